import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `HDF5 files` {
  let folder = try! TemporaryFolder()

  /// Bytes that are no pattern, from a seed.
  static func noise(_ count: Int, seed: UInt64) -> [UInt8] {
    var state = seed
    return (0..<count).map { _ in
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return UInt8(truncatingIfNeeded: state >> 33)
    }
  }

  /// Writes tensors with these bytes, and says how they are read back.
  func roundTrip(
    _ manifest: Manifest, _ contents: [[UInt8]], _ options: HDF5.Options = HDF5.Options()
  ) throws -> any TensorSource {
    let path = folder("tensors.h5")
    let sink = try HDF5.create(path, manifest, options)
    for (tensor, bytes) in zip(manifest.tensors, contents) where !bytes.isEmpty {
      try sink.write(bytes.span.bytes, of: tensor, at: 0)
    }
    try sink.finish()
    return try HDF5.open(path)
  }

  static let shapes: [[Int]] = [
    [], [0], [8], [3, 8], [2, 0, 4], [1, 3, 5, 16], [0, 3], [3, 5, 7],
  ]

  @Test(arguments: DType.allCases, shapes)
  func `every type in every shape comes back as it was`(dtype: DType, shape: [Int]) throws {
    // Four- and six-bit elements must fill whole bytes.
    guard let tensor = try? TensorInfo(name: "a.b/c", dtype: dtype, shape: shape) else { return }
    let bytes = Self.noise(tensor.byteCount, seed: 1)
    let source = try roundTrip(Manifest([tensor]), [bytes])
    #expect(source.manifest.tensors == [tensor])
    #expect(try source.bytes(of: tensor) == bytes)
  }
}
