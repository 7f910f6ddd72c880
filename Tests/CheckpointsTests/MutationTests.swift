import Foundation
import TestSupport
import Testing

@testable import Checkpoints

/// Damaged files are read or refused, but never trap: a trap ends the whole test run.
@Suite struct `Mutated files` {
  static let files = [
    "pytorch/types.pt", "pytorch/views.pt", "pytorch/nested.ckpt", "pytorch/pytorch_model.bin",
    "pytorch/old.pt", "numpy/plain.npz", "numpy/compressed.npz",
  ]

  @Test(arguments: files, [1, 2, 3] as [UInt64])
  func `of other people's are read or refused`(file: String, seed: UInt64) throws {
    let original = [UInt8](try Data(contentsOf: URL(filePath: fixture(file))))
    try mutate(original, seed: seed, rounds: 60)
  }

  @Test(arguments: 1...6 as ClosedRange<UInt64>)
  func `of safetensors are read or refused`(seed: UInt64) throws {
    let folder = try TemporaryFolder()
    var contents: [TensorInfo: [UInt8]] = [:]
    for (number, dtype) in DType.allCases.enumerated() {
      let tensor = try TensorInfo(name: "t\(number)", dtype: dtype, shape: [2, 4])
      contents[tensor] = [UInt8](repeating: UInt8(number), count: tensor.byteCount)
    }
    try write(contents, metadata: ["note": "é\n"], to: folder("x.safetensors"))
    try mutate(
      [UInt8](Data(contentsOf: URL(filePath: folder("x.safetensors")))), seed: seed, rounds: 150)
  }

  @Test(arguments: [1, 2, 3] as [UInt64])
  func `of shard indices are read or refused`(seed: UInt64) throws {
    let index = ShardIndex.describe([
      ("a.safetensors", [try TensorInfo(name: "t", dtype: .u8, shape: [2])])
    ])
    let folder = try TemporaryFolder()
    var random = SplitMix(seed)
    for _ in 0..<300 {
      let path = folder("x.index.json")
      try Data(damaged(index, &random)).write(to: URL(filePath: path))
      do { _ = try ShardIndex(reading: path) } catch { #expect(error.file == path) }
    }
  }

  /// Opens damaged copies and reads all that they hold.
  private func mutate(_ original: [UInt8], seed: UInt64, rounds: Int) throws {
    let folder = try TemporaryFolder()
    let path = folder("x")
    var random = SplitMix(seed)
    for round in 0..<rounds {
      try Data(damaged(original, &random)).write(to: URL(filePath: path))
      do {
        let source = try Checkpoint.open(path)
        for tensor in source.manifest.tensors where tensor.byteCount < 1 << 20 {
          let bytes = try source.bytes(of: tensor)
          #expect(bytes.count == tensor.byteCount)
        }
      } catch let error as CheckpointError {
        #expect(error.file == path && !error.problem.isEmpty, "seed \(seed), round \(round)")
      }
    }
  }

  /// Some bytes changed, removed, doubled or cut off, as files are damaged or forged.
  private func damaged(_ original: [UInt8], _ random: inout SplitMix) -> [UInt8] {
    var bytes = original
    for _ in 0..<Int.random(in: 1...4, using: &random) where !bytes.isEmpty {
      let at = Int.random(in: 0..<bytes.count, using: &random)
      let end = min(bytes.count, at + Int.random(in: 1...16, using: &random))
      switch Int.random(in: 0..<7, using: &random) {
      case 0: bytes[at] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      case 1: bytes[at] = UInt8.random(in: 0...255, using: &random)
      case 2: bytes[at] = [0, 1, 0x7F, 0x80, 0xFF].randomElement(using: &random)!
      case 3: bytes.removeSubrange(at..<end)
      case 4: bytes.insert(contentsOf: Array(bytes[at..<end]), at: at)
      case 5: for i in at..<end { bytes[i] = 0xFF }
      default:
        // A byte from elsewhere: digits for digits, opcodes for opcodes.
        bytes[at] = bytes.randomElement(using: &random)!
      }
    }
    if Int.random(in: 0..<20, using: &random) == 0 {
      bytes.removeLast(Int.random(in: 0...bytes.count, using: &random))
    }
    return bytes
  }
}
