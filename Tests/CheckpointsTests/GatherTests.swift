import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `Strided reading` {
  /// A file of elements that are all different, as far as their width allows.
  private func file(_ count: Int, width: Int, in folder: TemporaryFolder) throws -> MappedFile {
    var random = SplitMix(7)
    let bytes = (0..<count * width).map { _ in UInt8.random(in: 0...255, using: &random) }
    try Data([9, 9, 9] + bytes).write(to: URL(filePath: folder("x")))
    return try MappedFile(folder("x"))
  }

  /// What the part must be: each element's place by its indices.
  private func expected(
    _ bytes: [UInt8], _ shape: [Int], _ strides: [Int], _ width: Int, _ part: Range<Int>
  ) -> [UInt8] {
    part.flatMap { number -> [UInt8] in
      var rest = number
      var place = 0
      for axis in shape.indices.reversed() {
        place += rest % shape[axis] * strides[axis]
        rest /= shape[axis]
      }
      return Array(bytes[3 + place * width..<3 + (place + 1) * width])
    }
  }

  @Test(arguments: [1, 2, 4, 8], 1...2 as ClosedRange<UInt64>)
  func `any part of any view is what its indices say`(width: Int, seed: UInt64) throws {
    let folder = try TemporaryFolder()
    var random = SplitMix(seed)
    let whole = try file(200_000, width: width, in: folder)
    let bytes = try whole.bytes(at: 0, count: whole.size)
    for round in 0..<40 {
      let rank = Int.random(in: 0...4, using: &random)
      let shape = (0..<rank).map { _ in Int.random(in: 1...9, using: &random) }
      // Small steps, and some wider than what is read with the elements between.
      let strides = shape.map { _ in
        Int.random(in: 0...(Bool.random(using: &random) ? 12 : 5000), using: &random)
      }
      let count = shape.reduce(1, *)
      let lower = Int.random(in: 0..<count, using: &random)
      let part = lower..<Int.random(in: lower...count, using: &random)
      var buffer = Buffer(byteCount: part.count * width)
      var span = buffer.first(part.count * width)
      try whole.gather(
        from: 3, shape: shape, strides: strides, width: width, at: lower * width, into: &span)
      let got = span.withUnsafeBytes { Array($0) }
      #expect(
        got == expected(bytes, shape, strides, width, part),
        "round \(round): \(shape) by \(strides), \(part)")
    }
  }

  @Test func `a matrix larger than a stretch is turned`() throws {
    let folder = try TemporaryFolder()
    let (rows, columns) = (701, 503)
    let whole = try file(rows * columns, width: 4, in: folder)
    let bytes = try whole.bytes(at: 0, count: whole.size)
    let part = 5 * columns + 17..<rows * columns - 1234
    var buffer = Buffer(byteCount: part.count * 4)
    var span = buffer.first(part.count * 4)
    try whole.gather(
      from: 3, shape: [rows, columns], strides: [1, rows], width: 4, at: part.lowerBound * 4,
      into: &span)
    let got = span.withUnsafeBytes { Array($0) }
    #expect(got == expected(bytes, [rows, columns], [1, rows], 4, part))
  }

  @Test(arguments: [0..<24, 1..<24, 5..<19, 7..<8, 4..<20])
  func `a range is cut into boxes that hold each of its elements once`(range: Range<Int>) {
    var seen: [Int: Int] = [:]
    let boxes = StridedBox.boxes(range, shape: [2, 3, 4], strides: [12, 4, 1])
    #expect(boxes.count <= 6)
    func visit(_ axes: ArraySlice<StridedBox.Axis>, _ source: Int, _ target: Int) {
      guard let axis = axes.first else {
        #expect(seen.updateValue(source, forKey: target) == nil)
        return
      }
      for step in 0..<axis.count {
        visit(axes.dropFirst(), source + step * axis.source, target + step * axis.target)
      }
    }
    for box in boxes { visit(box.axes[...], box.source, box.target) }
    #expect(seen == Dictionary(uniqueKeysWithValues: range.enumerated().map { ($0, $1) }))
  }
}
