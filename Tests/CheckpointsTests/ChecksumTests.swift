import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct Checksums {
  /// Bytes that a line of Python makes too: `bytes((i * 7 + i // 251) % 256 for i in range(n))`.
  private static func pattern(_ count: Int) -> [UInt8] {
    (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 / 251) }
  }

  /// From Python's hashlib and xxhash:
  /// `H(b"".join(H(b[i:i + 2**20]).digest() for i in range(0, len(b), 2**20))).hexdigest()`.
  static let known: [(count: Int, xxh3: String, sha256: String)] = [
    (
      0, "2d06800538d394c2",
      "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    ),
    (
      1, "00817c81126c8fc1",
      "1406e05881e299367766d313e26c05564ec91bf721d31726bd6e46e60689539a"
    ),
    (
      1000, "7db49e8cfb036e3d",
      "4ef4e5593284115a3b40f804e6eefbfd03edc1f99b1bfc0d9406395f4ad9dc73"
    ),
    (
      1048576, "772956fcc15bce76",
      "87c51d8df8c08ae3aef390ad634b258177ec139262c7c9bd23f6ee553a4bc10c"
    ),
    (
      1048577, "d364807f7c2c984a",
      "99541925ae307285cfcff8411df09bff987636d574e5e76fe6fd78ca5eea0300"
    ),
    (
      3145723, "b853bca78577d27c",
      "d33990f819e874e449553517cf53b055abf236933259b0f233b83f284abd0aff"
    ),
  ]

  @Test(arguments: known)
  func `are what other people's libraries compute`(
    _ known: (count: Int, xxh3: String, sha256: String)
  ) throws {
    let tensor = try TensorInfo(name: "a", dtype: .u8, shape: [known.count])
    let bytes = Self.pattern(known.count)
    for (algorithm, expected) in [
      (TensorChecksum.Algorithm.xxh3, known.xxh3), (.sha256, known.sha256),
    ] {
      let recorder = ChecksumRecorder([tensor], algorithm)
      recorder.add(bytes.span.bytes, ofTensorAt: 0, from: 0)
      #expect(recorder.finishUnread()[0].description == expected)
    }
  }

  @Test(arguments: [1, 2, 3, 4])
  func `do not depend on the order or size of the pieces`(seed: UInt64) throws {
    var random = SplitMix(seed)
    let bytes = Self.pattern(5_000_001)
    let tensors = try [
      TensorInfo(name: "a", dtype: .u8, shape: [0]),
      TensorInfo(name: "b", dtype: .u8, shape: [bytes.count]),
    ]
    let whole = ChecksumRecorder(tensors, .xxh3)
    whole.add(bytes.span.bytes, ofTensorAt: 1, from: 0)

    let cuts =
      ([0, bytes.count] + (0..<9).map { _ in Int.random(in: 0..<bytes.count, using: &random) })
      .sorted()
    let recorder = ChecksumRecorder(tensors, .xxh3)
    for (begin, end) in zip(cuts, cuts.dropFirst()).shuffled(using: &random) {
      recorder.add(bytes.span.bytes.extracting(begin..<end), ofTensorAt: 1, from: begin)
    }
    let checksums = try recorder.finish { (tensor, offset, buffer) throws(CheckpointError) in
      #expect(tensor == tensors[1])
      for i in 0..<buffer.byteCount {
        buffer.storeBytes(of: bytes[offset + i], toByteOffset: i, as: UInt8.self)
      }
    }
    #expect(checksums == whole.finishUnread(), "seed \(seed)")
  }

  // MARK: In safetensors files

  private func tensors() throws -> [TensorInfo: [UInt8]] {
    try [
      TensorInfo(name: "small", dtype: .u8, shape: [3]): [1, 2, 3],
      TensorInfo(name: "empty", dtype: .f32, shape: [0, 5]): [],
      TensorInfo(name: "large", dtype: .bf16, shape: [700_000]): Self.pattern(1_400_000),
    ]
  }

  @Test(arguments: [TensorChecksum.Algorithm.xxh3, .sha256])
  func `are recorded on writing and hold`(algorithm: TensorChecksum.Algorithm) throws {
    let folder = try TemporaryFolder()
    let file = folder("model.safetensors")
    let contents = try tensors()
    let sink = try Safetensors.create(
      file, Manifest(contents.keys.sorted { $0.name < $1.name }), checksums: algorithm)
    for (tensor, bytes) in contents { try sink.write(bytes.span.bytes, of: tensor, at: 0) }
    try sink.finish()
    let source = try Safetensors.open(file)
    #expect(source.manifest.metadata == ["format": "pt"])
    for tensor in contents.keys {
      #expect(source.recordedChecksum(of: tensor)?.algorithm == algorithm)
    }
    let verification = try source.verifyData(workers: 2)
    #expect(
      verification.isSound && verification.checkedCount == 3 && verification.unrecorded.isEmpty)
  }

  @Test func `every flipped bit of the data names its tensor`() throws {
    let folder = try TemporaryFolder()
    let file = folder("model.safetensors")
    try write(
      [
        TensorInfo(name: "a", dtype: .u8, shape: [3]): [1, 2, 3],
        TensorInfo(name: "b", dtype: .f16, shape: [2]): [4, 5, 6, 7],
      ], to: file)
    let good = try Data(contentsOf: URL(filePath: file))
    let start = good.count - 7
    for bit in 0..<7 * 8 {
      var bad = good
      bad[start + bit / 8] ^= 1 << (bit % 8)
      try bad.write(to: URL(filePath: file))
      // The wider type comes first.
      let verification = try #require(try Checkpoint.verify(file, data: true))
      #expect(verification.damaged.map { $0.name } == [bit / 8 < 4 ? "b" : "a"])
    }
  }

  @Test(
    arguments: ["copy.safetensors", "copy.h5", "copy.npz", "copy/", "copy.safetensors.zst"],
    [false, true])
  func `damage is refused when it would be copied`(output: String, isCast: Bool) throws {
    // A bundle is made of the numbers that were cast, which nobody has recorded.
    if isCast, output.hasSuffix(".zst") { return }
    let folder = try TemporaryFolder()
    let file = folder("model.safetensors")
    try write(
      [
        TensorInfo(name: "a", dtype: .u8, shape: [3]): [1, 2, 3],
        TensorInfo(name: "b", dtype: .f16, shape: [2]): [4, 5, 6, 7],
      ], to: file)
    var bytes = try Data(contentsOf: URL(filePath: file))
    // "b" comes first: its type is wider.
    bytes[bytes.count - (isCast ? 4 : 1)] ^= 1
    try bytes.write(to: URL(filePath: file))
    let error = try #require(throws: CheckpointError.self) {
      let source = try Checkpoint.open(file)
      try Checkpoint.write(isCast ? source.casting(to: .f32) : source, to: folder(output))
    }
    #expect(
      error.description
        == "\(file): tensor \"\(isCast ? "b" : "a")\": is not what was written: its checksum differs; "
        + "get it again ('smelt verify --data' lists what is damaged), or if it was changed on purpose, save it without \"checksums\" in its metadata"
    )
    #expect(try folder.names == ["model.safetensors"])
  }

  @Test(arguments: [nil, Bundle.Lossy.int8])
  func `damage is refused when it would be packed`(lossy: Bundle.Lossy?) throws {
    let folder = try TemporaryFolder()
    let file = folder("model.safetensors")
    let values = (0..<64).map { Float($0) }
    try Checkpoint.write([SmallTensor("w", [4, 16], values)], to: file)
    var bytes = try Data(contentsOf: URL(filePath: file))
    bytes[bytes.count - 2] ^= 1
    try bytes.write(to: URL(filePath: file))
    let error = try #require(throws: CheckpointError.self) {
      try Bundle.pack(Checkpoint.open(file), to: folder("packed.safetensors.zst"), lossy: lossy)
    }
    #expect(
      error.description
        == "\(file): tensor \"w\": is not what was written: its checksum differs; "
        + "get it again ('smelt verify --data' lists what is damaged), or if it was changed on purpose, save it without \"checksums\" in its metadata"
    )
    #expect(try folder.names == ["model.safetensors"])
  }

  @Test(arguments: ["model.safetensors", "model.h5", "model.npz", "model.safetensors.zst"])
  func `a file that is written to while it is copied is refused`(name: String) throws {
    let folder = try TemporaryFolder()
    let contents = try tensors()
    let sink = try Checkpoint.create(
      folder(name), Manifest(contents.keys.sorted { $0.name < $1.name }))
    for (tensor, bytes) in contents { try sink.write(bytes.span.bytes, of: tensor, at: 0) }
    try sink.finish()
    let source = try Checkpoint.open(folder(name))
    try source.checkUnchanged()
    // The same bytes again, but later: what was read in between is anyone's guess.
    try FileManager.default.setAttributes(
      [.modificationDate: Date(timeIntervalSince1970: 1e9)], ofItemAtPath: folder(name))
    let error = try #require(throws: CheckpointError.self) {
      try Checkpoint.write(source, to: folder("copy.h5"))
    }
    let sentence =
      "\(folder(name)): was changed while it was being read; try again when nothing writes to it"
    #expect(error.description == sentence)
    #expect(try folder.names == [name])
    let verifying = try #require(throws: CheckpointError.self) { try source.verifyData(workers: 1) }
    #expect(verifying.description == sentence)
    for (one, other) in try [
      (source, Checkpoint.open(folder(name))), (Checkpoint.open(folder(name)), source),
    ] {
      let comparing = try #require(throws: CheckpointError.self) {
        try Checkpoint.difference(one, other)
      }
      #expect(comparing.description == sentence)
    }
  }

  @Test(arguments: ["copy.safetensors", "copy.h5", "copy/"])
  func `sha256 is recorded where it is asked for, whatever the header`(output: String) throws {
    let folder = try TemporaryFolder()
    let file = folder("model.safetensors")
    let tensor = try TensorInfo(name: "a", dtype: .u8, shape: [3])
    try write([tensor: [1, 2, 3]], to: file)
    #expect(try Safetensors.open(file).recordedChecksum(of: tensor)?.algorithm == .xxh3)
    var options = WritingOptions()
    options.checksums = .sha256
    try Checkpoint.write(Checkpoint.open(file), to: folder(output), options)
    let copy = try Checkpoint.open(folder(output))
    #expect(copy.recordedChecksum(of: tensor)?.algorithm == .sha256)
    #expect(try copy.verifyData(workers: 2).isSound)
    // Not asked for: the header stays, so that the same tensors give the same file.
    try Checkpoint.write(Checkpoint.open(file), to: folder("again.safetensors"))
    let files = try [file, folder("again.safetensors")].map {
      try Data(contentsOf: URL(filePath: $0))
    }
    #expect(files[0] == files[1])
  }

  @Test(arguments: [("copy.npz", "CRC-32"), ("copy.safetensors.zst", "XXH3")])
  func `sha256 is refused where it cannot be recorded`(output: String, checksum: String) throws {
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(name: "a", dtype: .u8, shape: [3])
    try write([tensor: [1, 2, 3]], to: folder("model.safetensors"))
    var options = WritingOptions()
    options.checksums = .sha256
    let error = try #require(throws: CheckpointError.self) {
      try Checkpoint.write(
        Checkpoint.open(folder("model.safetensors")), to: folder(output), options)
    }
    #expect(
      error.problem == "records \(checksum) of its own; --sha256 is for safetensors and HDF5")
    #expect(try folder.names == ["model.safetensors"])
  }

  @Test func `a flipped byte of an npz array names it`() throws {
    let folder = try TemporaryFolder()
    let file = folder("model.npz")
    let contents = try tensors()
    let sink = try NumPy.create(file, Manifest(contents.keys.sorted { $0.name < $1.name }))
    for (tensor, bytes) in contents { try sink.write(bytes.span.bytes, of: tensor, at: 0) }
    try sink.finish()
    let good = try Data(contentsOf: URL(filePath: file))
    let sound = try #require(try Checkpoint.verify(file, data: true))
    #expect(sound.isSound && sound.checkedCount == 3)
    var bad = good
    // In the midst of the large one, which fills the file.
    bad[good.count / 2] ^= 0x10
    try bad.write(to: URL(filePath: file))
    let verification = try #require(try Checkpoint.verify(file, data: true))
    #expect(verification.damaged.map { $0.name } == ["large"])
    for output in ["copy.safetensors", "copy.h5", "copy.safetensors.zst", "copy/"] {
      let error = try #require(throws: CheckpointError.self) {
        try Checkpoint.write(Checkpoint.open(file), to: folder(output))
      }
      #expect(error.tensor == "large")
      #expect(error.problem == "is not what was written: its checksum differs")
    }
    let cast = try Checkpoint.open(file).casting(to: .f64)
    #expect(throws: CheckpointError.self) {
      try Checkpoint.write(cast, to: folder("copy.safetensors"))
    }
    // The others can still be saved.
    let others = try Checkpoint.open(file).selecting { $0.name != "large" }
    try Checkpoint.write(others, to: folder("others.safetensors"))
    #expect(try folder.names == ["model.npz", "others.safetensors"])
  }

  @Test func `every flipped byte of a PyTorch file's elements and pickle shows`() throws {
    let folder = try TemporaryFolder()
    let file = folder("model.bin")
    let good = try Data(contentsOf: URL(filePath: fixture("pytorch/pytorch_model.bin")))
    try good.write(to: URL(filePath: file))
    let sound = try #require(try Checkpoint.verify(file, data: true))
    #expect(sound.isSound && sound.checkedCount == 2)
    let archive = try ZipArchive(file)
    for entry in archive.entries where entry.name.contains("/data") {
      let start = try archive.offset(of: entry)
      for offset in start..<start + entry.size {
        var bad = good
        bad[offset] ^= 0x10
        try bad.write(to: URL(filePath: folder("bad.bin")))
        // What no longer opens shows too.
        let verification = try? Checkpoint.verify(folder("bad.bin"), data: true)
        #expect(verification?.isSound != true, "\(entry.name) at byte \(offset)")
        if entry.name.contains("/data/") { #expect(verification?.damaged.count == 1) }
        #expect(throws: CheckpointError.self) {
          try Checkpoint.write(
            Checkpoint.open(folder("bad.bin")), to: folder("copy.safetensors"))
        }
      }
    }
    #expect(try folder.names == ["bad.bin", "model.bin"])
  }

  @Test(arguments: ["model.safetensors", "model.h5", "model.npz"])
  func `an output that does not read back is not put in place`(name: String) throws {
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(name: "a", dtype: .u8, shape: [3])
    let sink = try Checkpoint.create(folder(name), Manifest([tensor]))
    try sink.write([1, 2, 3 as UInt8].span.bytes, of: tensor, at: 0)
    // The disk loses the beginning; an archive's comes last, and a byte too many hides its end.
    let partial = try #require(try folder.names.first)
    let file = try File(updating: folder(partial))
    if name.hasSuffix("npz") {
      try file.write([UInt8](repeating: 0, count: 70_000).span.bytes, at: 1000)
    } else {
      try file.write([UInt8](repeating: 0, count: 16).span.bytes, at: 0)
    }
    let error = try #require(throws: CheckpointError.self) { try sink.finish() }
    #expect(error.file == folder(name))
    #expect(error.problem.hasPrefix("does not read back as it was written: "))
  }

  @Test func `a carried header's checksums become those of the new data`() throws {
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(name: "a", dtype: .u8, shape: [3])
    try write([tensor: [1, 2, 3]], to: folder("one.safetensors"))
    let one = try Safetensors.open(folder("one.safetensors"))
    let sink = try Safetensors.create(folder("two.safetensors"), one.manifest)
    try sink.write([9, 9, 9 as UInt8].span.bytes, of: tensor, at: 0)
    try sink.finish()
    let two = try Safetensors.open(folder("two.safetensors"))
    #expect(try two.verifyData(workers: 2).isSound)
    #expect(one.recordedChecksum(of: tensor) != two.recordedChecksum(of: tensor))
  }

  @Test(arguments: [
    "none", "xxh3-64/1MiB", "xxh3-64/1MiB,00", "sha256 0123456789abcdef",
    "md5 0123456789abcdef", "",
  ])
  func `other people's metadata of that name stays theirs`(text: String) throws {
    let header =
      #"{"__metadata__":{"checksums":"\#(text)"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#
    let folder = try TemporaryFolder()
    try Data(safetensors(Array(header.utf8), body: [1])).write(to: URL(filePath: folder("x")))
    let source = try Safetensors.open(folder("x"))
    #expect(source.manifest.metadata == ["checksums": text])
    #expect(source.recordedChecksum(of: source.manifest.tensors[0]) == nil)
    #expect(try source.verifyData(workers: 2).unrecorded.count == 1)
  }
}
