import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `The difference of two checkpoints` {
  private func floats(_ values: [Double], _ dtype: DType) -> [UInt8] {
    if dtype == .f64 { return values.withUnsafeBytes { Array($0) } }
    let floats = values.map { Float($0) }
    var bytes = [UInt8](repeating: 0, count: values.count * dtype.bitWidth / 8)
    var span = bytes.mutableSpan
    var raw = span.mutableBytes
    dtype.encode(floats.span, into: &raw)
    return bytes
  }

  /// The difference of two files that hold one tensor.
  private func difference(
    _ first: [Double], _ firstType: DType, _ second: [Double], _ secondType: DType
  ) throws -> TensorDifference {
    let folder = try TemporaryFolder()
    for (name, values, dtype) in [("1", first, firstType), ("2", second, secondType)] {
      try write(
        [TensorInfo(name: "t", dtype: dtype, shape: [values.count]): floats(values, dtype)],
        to: folder("\(name).safetensors"))
    }
    return try Checkpoint.difference(
      Checkpoint.open(folder("1.safetensors")), Checkpoint.open(folder("2.safetensors"))
    ).common[0]
  }

  @Test func `is nothing between equals`() throws {
    let difference = try difference(
      [1, -2, .nan, .infinity], .f32, [1, -2, .nan, .infinity], .f32)
    #expect(difference.isIdentical)
    #expect(difference.numbers == .init(maximum: 0, relativeNorm: 0, cosine: 1))
  }

  @Test func `is told in numbers`() throws {
    let numbers = try #require(try difference([3, 4], .f32, [3, 0], .f32).numbers)
    #expect(numbers.maximum == 4)
    #expect(numbers.relativeNorm == 0.8)
    #expect(abs(numbers.cosine - 0.6) < 1e-15)
  }

  @Test(arguments: [DType.f16, .bf16, .f64])
  func `is told across types`(dtype: DType) throws {
    let difference = try difference([1, 2], .f32, [1, 2], dtype)
    #expect(!difference.isIdentical)
    #expect(difference.numbers == .init(maximum: 0, relativeNorm: 0, cosine: 1))
  }

  /// The largest difference between two tensors of these bytes.
  private func maximum(_ dtype: DType, _ first: [UInt8], _ second: [UInt8]) throws -> Double? {
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(
      name: "t", dtype: dtype, shape: [8 * first.count / dtype.bitWidth])
    for (name, bytes) in [("1", first), ("2", second)] {
      try write([tensor: bytes], to: folder("\(name).safetensors"))
    }
    return try Checkpoint.difference(
      Checkpoint.open(folder("1.safetensors")), Checkpoint.open(folder("2.safetensors"))
    ).common[0].numbers?.maximum
  }

  @Test(
    arguments: [
      (DType.bool, [0], [1], 1), (.u8, [255], [0], 255), (.i8, [255], [1], 2),
      (.u16, [0, 1], [0, 0], 256), (.i16, [255, 255], [0, 0], 1),
      (.u32, [255, 255, 255, 255], [0, 0, 0, 0], 4_294_967_295),
      (.i32, [0, 0, 0, 128], [255, 255, 255, 127], 4_294_967_295),
      // 2⁶³ and 2⁶³ − 1, the same as Double.
      (.u64, [0, 0, 0, 0, 0, 0, 0, 128], [255, 255, 255, 255, 255, 255, 255, 127], 1),
      (.i64, [0, 0, 0, 0, 0, 0, 0, 128], [255, 255, 255, 255, 255, 255, 255, 127], 0x1p64),
      // 1 and 1.5, 2 and −2, 448 and −448, the smallest subnormal and zero.
      (.f8E4M3, [0x38], [0x3C], 0.5), (.f8E4M3, [0x40], [0xC0], 4), (.f8E4M3, [0x7E], [0xFE], 896),
      (.f8E4M3, [1], [0], 0x1p-9), (.f8E5M2, [0x3C], [0x3E], 0.5), (.f8E5M2, [1], [0], 0x1p-16),
      (.f8E5M2, [0x7C], [0x7B], .infinity), (.f8E8M0, [127], [128], 1), (.f8E8M0, [0], [0], 0),
      (.f8E4M3FNUZ, [0x40], [0x44], 0.5), (.f8E5M2FNUZ, [0x40], [0x42], 0.5),
      (.f8E4M3FNUZ, [0x7F], [0], 240), (.f8E5M2FNUZ, [0x7F], [0], 57344),
      // 3 + 4i and 0.
      (.c64, [0, 0, 64, 64, 0, 0, 128, 64], [0, 0, 0, 0, 0, 0, 0, 0], 5),
    ] as [(DType, [UInt8], [UInt8], Double)])
  func `is told of every type that fills bytes`(
    dtype: DType, first: [UInt8], second: [UInt8], expected: Double
  ) throws {
    #expect(try maximum(dtype, first, second) == expected)
  }

  @Test func `is not a number at the codes that are none`() throws {
    for (dtype, code) in [
      (DType.f8E4M3, 0x7F), (.f8E5M2, 0x7D), (.f8E8M0, 0xFF), (.f8E4M3FNUZ, 0x80),
      (.f8E5M2FNUZ, 0x80),
    ] as [(DType, UInt8)] {
      #expect(try #require(try maximum(dtype, [code], [1])).isNaN)
    }
    #expect(try maximum(.f4, [1], [2]) == nil)
  }

  @Test func `is told where Float could not hold it`() throws {
    let numbers = try #require(try difference([1], .f64, [1 + 0x1p-50], .f64).numbers)
    #expect(numbers.maximum == 0x1p-50)
  }

  @Test(arguments: [([Double.nan], [1.0]), ([1], [.nan]), ([.nan, 1, 5], [0, 2, 5])])
  func `is not a number where only one is`(first: [Double], second: [Double]) throws {
    #expect(try #require(try difference(first, .f32, second, .f32).numbers).maximum.isNaN)
  }

  @Test func `does not depend on the workers`() throws {
    var random = SplitMix(7)
    let (a, b) = ((0..<2_500_000), (0..<2_500_000))
    let first = a.map { _ in Double(Float.random(in: -1...1, using: &random)) }
    let second = b.map { _ in Double(Float.random(in: -1...1, using: &random)) }
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(name: "t", dtype: .f32, shape: [first.count])
    try write([tensor: floats(first, .f32)], to: folder("1.safetensors"))
    try write([tensor: floats(second, .f32)], to: folder("2.safetensors"))
    let (one, two) = (
      try Checkpoint.open(folder("1.safetensors")), try Checkpoint.open(folder("2.safetensors"))
    )
    let numbers = try [1, 2, 3].map {
      try Checkpoint.difference(one, two, workers: $0).common[0].numbers
    }
    #expect(numbers[0] == numbers[1] && numbers[0] == numbers[2])
    let expected = zip(first, second).reduce(0) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
    let norm = first.reduce(0) { $0 + $1 * $1 }
    #expect(abs(numbers[0]!.relativeNorm - (expected / norm).squareRoot()) < 1e-12)
  }

  @Test func `names what only one has and what cannot be compared`() throws {
    let folder = try TemporaryFolder()
    func tensor(_ name: String, _ dtype: DType, _ shape: [Int]) throws -> TensorInfo {
      try TensorInfo(name: name, dtype: dtype, shape: shape)
    }
    try write(
      [
        tensor("first", .u8, [1]): [1], tensor("shape", .u8, [2, 1]): [1, 2],
        tensor("type", .u8, [2]): [1, 2], tensor("bits", .f4, [4]): [1, 2],
        tensor("empty", .f32, [0]): [],
      ], to: folder("1.safetensors"))
    try write(
      [
        tensor("second", .u8, [1]): [1], tensor("shape", .u8, [1, 2]): [1, 2],
        tensor("type", .i8, [2]): [1, 2], tensor("bits", .f4, [4]): [1, 3],
        tensor("empty", .f32, [0]): [],
      ], to: folder("2.safetensors"))
    let difference = try Checkpoint.difference(
      Checkpoint.open(folder("1.safetensors")), Checkpoint.open(folder("2.safetensors")))
    #expect(!difference.isEmpty)
    #expect(difference.onlyInFirst.map { $0.name } == ["first"])
    #expect(difference.onlyInSecond.map { $0.name } == ["second"])
    let identical = difference.common.filter { $0.isIdentical }.map { $0.first.name }
    #expect(identical == ["empty"])
    let numbers = difference.common.filter { $0.numbers != nil }.map { $0.first.name }
    #expect(Set(numbers) == ["type", "empty"])
  }
}
