import Foundation
import TestSupport
import Testing

@testable import Checkpoints

/// The checksums in a safetensors file's metadata, and what a changed header makes of them.
@Suite struct `Checksums in a header` {
  private let folder: TemporaryFolder
  private let path: String

  init() throws {
    folder = try TemporaryFolder()
    path = folder("model.safetensors")
    try write(
      [
        TensorInfo(name: "b", dtype: .f16, shape: [2, 1]): [1, 2, 3, 4],
        TensorInfo(name: "é", dtype: .bf16, shape: [2, 1]): [5, 6, 7, 8],
        TensorInfo(name: "a", dtype: .i8, shape: [3]): [9, 10, 11],
      ], to: path)
  }

  /// The header's text, and the bytes behind it.
  private func parts() throws -> (header: String, body: [UInt8]) {
    let bytes = try Array(Data(contentsOf: URL(filePath: path)))
    let size = 8 + Int(bytes[0]) + Int(bytes[1]) << 8
    return (String(decoding: bytes[8..<size], as: UTF8.self), Array(bytes[size...]))
  }

  private func put(_ header: String, _ body: [UInt8]) throws {
    try Data(safetensors(Array(header.utf8), body: body)).write(to: URL(filePath: path))
  }

  private func verification() throws -> Verification {
    try #require(try Checkpoint.verify(path, data: true))
  }

  @Test func `are those of the descriptions and of the tensors by their names`() throws {
    // By Python, with xxhash.xxh3_64, as `ChecksumText` has it.
    #expect(
      try parts().header.contains(
        "\"checksums\":\"xxh3-64/1MiB 2e75bc882572f68c 2287289456dbe8dd 8116c6dc870942b7 35a1603ca200a1ab\""
      ))
  }

  @Test func `every flipped bit is refused, or found, or of the metadata alone`() throws {
    let good = try Array(Data(contentsOf: URL(filePath: path)))
    let sound = try Checkpoint.open(path)
    let contents = try sound.manifest.tensors.map { try sound.bytes(of: $0) }
    let text = Data(good)
    // From the name `__metadata__` on to the end of its object.
    let first = try #require(text.firstRange(of: Data("__metadata__".utf8))).lowerBound
    let last = try #require(text.firstRange(of: Data("},".utf8))).lowerBound
    for bit in 0..<8 * good.count {
      var bad = good
      bad[bit / 8] ^= 1 << UInt8(bit % 8)
      try Data(bad).write(to: URL(filePath: path))
      guard let source = try? Checkpoint.open(path), try source.verifyData(workers: 1).isSound
      else { continue }
      #expect(source.manifest.tensors == sound.manifest.tensors, "bit \(bit)")
      #expect(try source.manifest.tensors.map { try source.bytes(of: $0) } == contents)
      #expect((first..<last).contains(bit / 8), "bit \(bit)")
    }
  }

  @Test func `damage where names were swapped`() throws {
    let (header, body) = try parts()
    try put(
      header.replacing("\"b\":", with: "\"?\":").replacing("\"é\":", with: "\"b\":")
        .replacing("\"?\":", with: "\"é\":")
        .replacing("\"BF16\"", with: "\"?\"").replacing("\"F16\"", with: "\"BF16\"")
        .replacing("\"?\"", with: "\"F16\""), body)
    let verification = try verification()
    #expect(verification.damaged.map { $0.name }.sorted() == ["b", "é"])
    #expect(verification.foreignChecksums.isEmpty && verification.checkedCount == 3)
  }

  @Test(arguments: [
    ("\"b\":", "\"c\":"), ("\"I8\"", "\"U8\""), ("[2,1]", "[1,2]"), ("\"F16\"", "\"BF16\""),
    ("xxh3-64/1MiB ", "xxh3-64/1MiB g"), ("xxh3-64/1MiB", "xxh3-64/1MiB 0123456789abcdef"),
  ])
  func `are not compared where a name, type or shape is another`(old: String, new: String) throws {
    let (header, body) = try parts()
    try put(header.replacing(old, with: new), body)
    let verification = try verification()
    #expect(!verification.isSound)
    #expect(verification.foreignChecksums == [path])
    #expect(verification.checkedCount == 0 && verification.unrecorded.count == 3)
    let source = try Checkpoint.open(path)
    let warning =
      "\(path): its recorded checksums are of tensors of other names, types or shapes and are not compared; 'smelt verify --data' says what to do"
    #expect(source.warnings == [warning])
    #expect(source.manifest.metadata == ["format": "pt"])
    // Nor do they come along.
    for output in ["copy.safetensors", "copy.h5", "copy.npz", "copy.safetensors.zst", "copy/"] {
      try Checkpoint.write(source, to: folder(output))
      let copy = try Checkpoint.open(folder(output))
      #expect(copy.warnings.isEmpty)
      #expect(copy.manifest.metadata == ["format": "pt"])
      let proven = try copy.verifyData(workers: 1)
      #expect(proven.isSound && proven.checkedCount == 3)
    }
  }

  @Test func `hold in a file that was saved in another order`() throws {
    let (header, body) = try parts()
    // "b" first, "é" next, "a" last, as our writer has it; now "a", "é" and "b".
    try put(
      header.replacing("[0,4]", with: "[7,11]").replacing("[4,8]", with: "[3,7]")
        .replacing("[8,11]", with: "[0,3]"),
      Array(body[8...] + body[4..<8] + body[..<4]))
    let verification = try verification()
    #expect(verification.isSound && verification.checkedCount == 3)
    #expect(try Checkpoint.open(path).manifest.tensors.map { $0.name } == ["a", "é", "b"])
    // And again when it is written with this header, which then holds them by name.
    try Checkpoint.write(Checkpoint.open(path), to: folder("again.safetensors"))
    #expect(
      try Data(contentsOf: URL(filePath: path))
        == Data(contentsOf: URL(filePath: folder("again.safetensors"))))
  }

  @Test func `of a shard that is of other tensors show in the whole model`() throws {
    let (header, body) = try parts()
    try put(header.replacing("\"b\":", with: "\"c\":"), body)
    let tensor = try TensorInfo(name: "x", dtype: .u8, shape: [1])
    try write([tensor: [1]], to: folder("other.safetensors"))
    try Data(
      #"{"weight_map":{"a":"model.safetensors","c":"model.safetensors","é":"model.safetensors","x":"other.safetensors"}}"#
        .utf8
    ).write(to: URL(filePath: folder("x.safetensors.index.json")))
    let index = folder("x.safetensors.index.json")
    let verification = try #require(try Checkpoint.verify(index, data: true))
    #expect(verification.foreignChecksums == [path])
    #expect(verification.checkedCount == 1)
  }
}

/// Verifying goes on behind what cannot be read.
@Suite struct `Verifying damaged data` {
  private let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  /// A file of six tensors of 80 KB, whose bytes compress.
  private func make(_ name: String, _ compression: HDF5.Compression? = nil) throws -> [UInt8] {
    let sink = try Checkpoint.create(
      folder(name),
      Manifest((0..<6).map { try! TensorInfo(name: "t\($0)", dtype: .u16, shape: [40_000]) }),
      WritingOptions(compression: compression))
    for (number, tensor) in sink.manifest.tensors.enumerated() {
      let bytes = (0..<80_000).map {
        UInt8(truncatingIfNeeded: $0 / 7 + (number + 1) * $0 * $0 / 31) & 15
      }
      try sink.write(bytes.span.bytes, of: tensor, at: 0)
    }
    try sink.finish()
    return try Array(Data(contentsOf: URL(filePath: folder(name))))
  }

  /// Bytes to damage. Of HDF5 only those of chunks: others can crash libhdf5, which tests have
  /// in their own process.
  private func places(in name: String, of size: Int) throws -> [Int] {
    guard name.hasSuffix(".h5") else { return Array(stride(from: 0, to: size, by: size / 25)) }
    return try HDF5.Inventory(reading: folder(name)).datasets.flatMap { dataset -> [Int] in
      guard case .chunked(_, _, let chunks) = dataset.storage else { return [] }
      return chunks.flatMap { [$0.offset + 2, $0.offset + $0.byteCount / 2] }
    }
  }

  @Test(arguments: [
    ("a.h5", HDF5.Compression.zstd(level: nil)), ("a.h5", .deflate(level: nil)),
    ("a.npz", .deflate(level: nil)), ("a.safetensors.zst", nil), ("a.npz", nil),
    ("a.safetensors", nil),
  ])
  func `lists each tensor that cannot be read and compares the others`(
    name: String, compression: HDF5.Compression?
  ) throws {
    let good = try make(name, compression)
    try Data(good).write(to: URL(filePath: folder("good-\(name)")))
    var kinds = Set<String>()
    for byte in try places(in: name, of: good.count) {
      var bad = good
      bad[byte] ^= 0x55
      try Data(bad).write(to: URL(filePath: folder(name)))
      guard let source = try? Checkpoint.open(folder(name)), source.manifest.tensors.count == 6,
        let verification = try? source.verifyData(workers: 2), !verification.isSound
      else { continue }
      let (damaged, unreadable) = (verification.damaged, verification.unreadable)
      #expect(damaged.count + unreadable.count == 1)
      #expect(verification.unrecorded.isEmpty && verification.foreignChecksums.isEmpty)
      #expect(verification.checkedCount - damaged.count == 5)
      kinds.insert(unreadable.isEmpty ? "damaged" : "unreadable")
      for failure in unreadable { #expect(failure.cause.file == folder(name)) }
      let difference = try Checkpoint.difference(source, Checkpoint.open(folder("good-\(name)")))
      let different = difference.common.filter { !$0.isIdentical }
      if let failure = unreadable.first {
        #expect(different.map { $0.first.name } == [failure.tensor.name])
      }
      // Where it is the recorded checksum that is damaged, the data is the same.
      #expect(different.count <= 1)
      #expect(different.allSatisfy { $0.failure == nil || $0.failure?.tensor == $0.first.name })
    }
    // What is deflated as a stream mostly unpacks to the end, to something else.
    let isCoded = name.hasSuffix(".h5") || name.hasSuffix(".zst")
    #expect(kinds.contains(isCoded ? "unreadable" : "damaged"))
  }

  @Test func `of a family says of what a tensor is a difference`() throws {
    for (name, step) in [("base", 0), ("one", 1), ("two", 2)] {
      try Checkpoint.write(
        [
          SmallTensor("v", [64], (0..<64).map { Float($0 + step) }),
          SmallTensor("w", [64, 64], (0..<4096).map { sin(Float($0)) + 0.001 * Float(step) }),
        ], to: folder("\(name).safetensors"))
    }
    let path = folder("family.safetensors.zst")
    try Bundle.pack(
      models: ["base", "one", "two"].map {
        ($0, try Checkpoint.open(folder("\($0).safetensors")))
      }, to: path)
    let good = try Array(Data(contentsOf: URL(filePath: path)))
    let all = try Checkpoint.open(path).manifest.tensors.map { $0.name }
    var most = 0
    for byte in stride(from: 100, to: good.count - 100, by: (good.count - 200) / 40) {
      var bad = good
      bad[byte] ^= 1
      try Data(bad).write(to: URL(filePath: path))
      guard let source = try? Checkpoint.open(path) else { continue }
      let verification = try source.verifyData(workers: 2)
      #expect(!verification.unreadable.isEmpty)
      #expect(verification.checkedCount + verification.unreadable.count == all.count)
      // The cause is in one tensor, of the base perhaps, whichever cannot be read for it.
      #expect(Set(verification.unreadable.map { $0.cause.tensor }).count == 1)
      most = max(most, verification.unreadable.count)
    }
    #expect(most == 3, "the base's matrix and both differences from it")
  }
}
