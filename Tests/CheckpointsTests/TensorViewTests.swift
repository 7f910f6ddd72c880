import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `Views of a checkpoint` {
  private func bytes<Element>(_ values: [Element]) -> [UInt8] {
    values.withUnsafeBytes { Array($0) }
  }

  /// A checkpoint of one tensor "t".
  private func source(_ dtype: DType, _ bytes: [UInt8], in folder: TemporaryFolder) throws
    -> any TensorSource
  {
    let count = bytes.count * 8 / dtype.bitWidth
    try write(
      [TensorInfo(name: "t", dtype: dtype, shape: [count]): bytes], to: folder("t.safetensors"))
    return try Checkpoint.open(folder("t.safetensors"))
  }

  private func doubles() -> [Double] {
    var random = SplitMix(3)
    // Beside each F16 and BF16 number and each half between two, what lies closest to it.
    let codes = (0..<UInt16.max).map { $0 }
    let halves = codes.map { Double(Float16(bitPattern: $0)) }
    let between = zip(halves, halves.dropFirst()).map { ($0 + $1) / 2 }
    let brains = stride(from: 0, to: UInt32.max - 0x10000, by: 0x8000).map {
      Double(Float(bitPattern: $0))
    }
    let near = (halves + between + brains).flatMap { [$0, $0.nextUp, $0.nextDown] }
    let others = (0..<10_000).map { _ in Double(bitPattern: random.next()) }
    return (near + others).filter { $0.isFinite }
  }

  @Test func `F64 becomes F16 as Float16 rounds it`() throws {
    let folder = try TemporaryFolder()
    let values = doubles().filter { Float16($0).isFinite }
    let cast = try source(.f64, bytes(values), in: folder).casting(to: .f16)
    let result = try cast.bytes(of: cast.tensor("t"))
    #expect(result == bytes(values.map { Float16($0).bitPattern }))
  }

  @Test func `F64 becomes BF16 without rounding twice`() throws {
    let folder = try TemporaryFolder()
    let values = doubles().filter { abs($0) < 0x1.FEp127 }
    let cast = try source(.f64, bytes(values), in: folder).casting(to: .bf16)
    let result = try cast.bytes(of: cast.tensor("t"))
    var wrong = 0
    for (index, value) in values.enumerated() {
      let code = UInt16(result[2 * index]) | UInt16(result[2 * index + 1]) << 8
      func number(_ code: UInt16) -> Double { Double(Float(bitPattern: UInt32(code) << 16)) }
      let distance = abs(number(code) - value)
      for neighbour in [code &- 1, code &+ 1] where number(neighbour).isFinite {
        let other = abs(number(neighbour) - value)
        let isNearer = other < distance || (other == distance && code & 1 == 1)
        wrong += isNearer && (number(neighbour) < 0) == (number(code) < 0) ? 1 : 0
      }
    }
    #expect(wrong == 0)
  }

  @Test(arguments: [DType.f16, .bf16, .f32, .f64])
  func `what fits goes there and back`(dtype: DType) throws {
    let folder = try TemporaryFolder()
    let values = (0..<200_000).map { Float($0 % 256) - 128 }
    let one = try source(.f32, bytes(values), in: folder)
    let there = try one.casting(to: dtype)
    #expect(try there.tensor("t").dtype == dtype)
    let back = try there.casting(to: .f32)
    #expect(try back.bytes(of: back.tensor("t")) == bytes(values))
    // In pieces, as a copy reads it.
    try Checkpoint.write(there, to: folder("2.safetensors"))
    #expect(try Checkpoint.open(folder("2.safetensors")).floats(of: "t") == values)
  }

  @Test(arguments: [
    (DType.f64, 1e300, DType.f16), (.f64, 1e300, .f32), (.f64, 1e39, .bf16), (.f64, 65520, .f16),
  ])
  func `a number too large is refused by name unless infinity will do`(
    from: DType, value: Double, to: DType
  ) throws {
    let folder = try TemporaryFolder()
    let one = try source(from, bytes([1, value, .infinity]), in: folder)
    let cast = try one.casting(to: to)
    let error = try #require(throws: CheckpointError.self) {
      try cast.bytes(of: cast.tensor("t"))
    }
    #expect(error.tensor == "t")
    #expect(
      error.problem
        == "has the value \(value) at its element 1, too large for \(to.rawValue)")
    let allowed = try one.casting(to: to, allowsOverflow: true)
    #expect(try allowed.floats(of: "t") == [1, .infinity, .infinity])
  }

  @Test(arguments: DType.allCases.filter { !$0.isArithmetic })
  func `only floating-point numbers are cast`(dtype: DType) throws {
    let folder = try TemporaryFolder()
    let content = (0..<24).map { UInt8($0) }
    let cast = try source(dtype, content, in: folder).casting(to: .f16)
    #expect(try cast.tensor("t").dtype == dtype)
    #expect(try cast.bytes(of: cast.tensor("t")) == content)
  }

  private func letters(in folder: TemporaryFolder) throws -> any TensorSource {
    try write(
      Dictionary(
        uniqueKeysWithValues: ["a.0", "a.1", "b.0"].enumerated().map {
          (try TensorInfo(name: $1, dtype: .u8, shape: [1]), [UInt8($0)])
        }), to: folder("x.safetensors"))
    return try Checkpoint.open(folder("x.safetensors"))
  }

  @Test func `some tensors are selected`() throws {
    let folder = try TemporaryFolder()
    let pattern = NamePattern("a.*")
    let some = try letters(in: folder).selecting { pattern.matches($0.name) }
    #expect(some.manifest.tensors.map { $0.name } == ["a.0", "a.1"])
    try Checkpoint.write(some, to: folder("y.safetensors"))
    let written = try Checkpoint.open(folder("y.safetensors"))
    #expect(written.manifest.tensors.count == 2)
    #expect(try written.verifyData(workers: 2).isSound)
  }

  @Test func `tensors are renamed`() throws {
    let folder = try TemporaryFolder()
    let renaming = try Renaming(#"^a\.(\d)$"#, to: "layer$1.$0$$")
    let renamed = try letters(in: folder).renaming { renaming($0) }
    #expect(renamed.manifest.tensors.map { $0.name } == ["layer0.a.0$", "layer1.a.1$", "b.0"])
    #expect(try renamed.bytes(of: renamed.tensor("layer1.a.1$")) == [1])
    let error = try #require(throws: CheckpointError.self) {
      try letters(in: folder).renaming { _ in "same" }
    }
    #expect(error.problem == "would be the name of two tensors")
  }

  @Test(arguments: [
    ("*", "", true), ("*", "abc", true), ("a*c", "abc", true), ("a*c", "abcd", false),
    ("a?c", "abc", true), ("a?c", "ac", false), ("*.weight", "a.b.weight", true),
    ("model.*.q.*", "model.1.q.w", true), ("model.*.q.*", "model.1.k.w", false), ("", "", true),
    ("", "a", false), ("*a*b*", "xxaxxbxx", true), ("*aab", "aaaab", true), ("[a]", "a", false),
    ("é*", "e\u{301}x", false),
  ])
  func `patterns match names`(pattern: String, name: String, isMatch: Bool) {
    #expect(NamePattern(pattern).matches(name) == isMatch)
  }
}
