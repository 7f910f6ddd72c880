/// A tensor's bytes cut into chunks: boxes of one size, those at the far edges only partly used.
///
/// The last dimension counts bytes. Trailing dimensions that every chunk spans are joined to the
/// one before, so that what is contiguous in the tensor and in a chunk is one run.
struct ChunkGrid: Equatable, Sendable {
  private let dimensions: [Int]
  private let chunk: [Int]
  /// How many chunks there are along each dimension.
  private let counts: [Int]
  /// How many chunks there are.
  let count: Int
  /// What every chunk holds, those at the edges too.
  let chunkByteCount: Int

  /// Fails if a chunk has no elements, another rank than the tensor or more bytes than can be
  /// counted.
  /// - Precondition: the bytes of the tensor can be counted, and there are some.
  init?(dimensions: [Int], chunk: [Int], elementSize: Int) {
    guard dimensions.count == chunk.count, !chunk.isEmpty, chunk.allSatisfy({ $0 > 0 }) else {
      return nil
    }
    var byteCount = elementSize
    for length in chunk {
      let product = byteCount.multipliedReportingOverflow(by: length)
      guard !product.overflow else { return nil }
      byteCount = product.partialValue
    }
    var dimensions = dimensions
    var chunk = chunk
    dimensions[dimensions.count - 1] *= elementSize
    chunk[chunk.count - 1] *= elementSize
    while dimensions.count > 1, dimensions.last == chunk.last {
      let length = dimensions.removeLast()
      chunk.removeLast()
      dimensions[dimensions.count - 1] *= length
      chunk[chunk.count - 1] *= length
    }
    self.dimensions = dimensions
    self.chunk = chunk
    counts = zip(dimensions, chunk).map { 1 + ($0 - 1) / $1 }
    count = counts.reduce(1, *)
    chunkByteCount = byteCount
  }

  /// How many bytes of a chunk belong to the tensor.
  func usedByteCount(of number: Int) -> Int {
    var rest = number
    var used = 1
    for d in dimensions.indices.reversed() {
      used *= min(chunk[d], dimensions[d] - rest % counts[d] * chunk[d])
      rest /= counts[d]
    }
    return used
  }

  /// A stretch of bytes that lie together both in a chunk and in the tensor.
  struct Run: Equatable {
    let startInChunk: Int
    /// Counted from the beginning of the range that was asked for.
    let startInRange: Int
    let count: Int
  }

  /// Which chunks hold the bytes of a range of the tensor, each once, and where.
  func runs(in range: Range<Int>) -> [(chunk: Int, runs: [Run])] {
    var found: [Int: [Run]] = [:]
    for box in boxes(in: range) { addRuns(of: box, from: range.lowerBound, to: &found) }
    return found.sorted { $0.key < $1.key }.map { ($0.key, $0.value) }
  }

  /// A range of the row-major bytes as boxes: an incomplete first row, the whole rows, an
  /// incomplete last row, and so on within the incomplete ones.
  private func boxes(in range: Range<Int>) -> [[Range<Int>]] {
    var boxes: [[Range<Int>]] = []
    func split(_ range: Range<Int>, prefix: [Range<Int>]) {
      guard !range.isEmpty else { return }
      let rest = dimensions[(prefix.count + 1)...]
      let row = rest.reduce(1, *)
      let first = range.lowerBound / row
      let last = (range.upperBound - 1) / row
      let isWhole = range.lowerBound % row == 0 && range.upperBound % row == 0
      if isWhole {
        boxes.append(prefix + [first..<last + 1] + rest.map { 0..<$0 })
      } else if first == last {
        let start = first * row
        split(
          range.lowerBound - start..<range.upperBound - start, prefix: prefix + [first..<first + 1])
      } else {
        let wholeFirst = range.lowerBound % row == 0 ? first : first + 1
        let wholeLast = range.upperBound / row
        split(range.lowerBound..<wholeFirst * row, prefix: prefix)
        split(wholeFirst * row..<wholeLast * row, prefix: prefix)
        split(wholeLast * row..<range.upperBound, prefix: prefix)
      }
    }
    split(range, prefix: [])
    return boxes
  }

  private func addRuns(of box: [Range<Int>], from start: Int, to found: inout [Int: [Run]]) {
    let last = dimensions.count - 1
    let touched = zip(box, chunk).map { $0.lowerBound / $1..<($0.upperBound - 1) / $1 + 1 }
    forEachPoint(in: touched) { cell in
      var part = box
      for d in 0...last {
        part[d] = part[d].clamped(to: cell[d] * chunk[d]..<(cell[d] + 1) * chunk[d])
      }
      let number = zip(cell, counts).reduce(0) { $0 * $1.1 + $1.0 }
      let line = part[last]
      part[last] = line.lowerBound..<line.lowerBound + 1
      forEachPoint(in: part) { point in
        let inTensor = zip(point, dimensions).reduce(0) { $0 * $1.1 + $1.0 }
        let inChunk = zip(point, chunk).reduce(0) { $0 * $1.1 + $1.0 % $1.1 }
        found[number, default: []].append(
          Run(startInChunk: inChunk, startInRange: inTensor - start, count: line.count))
      }
    }
  }
}

/// Visits the points of a box, the last coordinate fastest.
private func forEachPoint(in box: [Range<Int>], _ body: ([Int]) -> Void) {
  var point = box.map { $0.lowerBound }
  while true {
    body(point)
    var d = box.count - 1
    while d >= 0, point[d] + 1 == box[d].upperBound {
      point[d] = box[d].lowerBound
      d -= 1
    }
    guard d >= 0 else { return }
    point[d] += 1
  }
}
