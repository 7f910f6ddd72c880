import Foundation
import TestSupport
import Testing

@testable import Checkpoints

struct HDF5IsolationTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  /// An executable that does this instead of reading HDF5.
  func executable(_ script: String) throws -> String {
    let path = folder("child")
    // Written by a child: a file that this process has open for writing may be inherited by what
    // another test starts meanwhile, and is then too busy to be run.
    let writer = Process()
    writer.executableURL = URL(filePath: "/bin/sh")
    writer.arguments = [
      "-c", #"printf '#!/bin/sh\n%s\n' "$1" > "$2" && chmod 755 "$2""#, "sh", script, path,
    ]
    try writer.run()
    writer.waitUntilExit()
    return path
  }

  static let endings: [(script: String, message: String)] = [
    ("kill -SEGV $$", "a.h5: crashes libhdf5 (signal 11); it is damaged: get it again"),
    (
      "exit 0",
      "a.h5: could not be read: the process that reads HDF5 gave no answer; it may be damaged"
    ),
    (
      "echo nonsense",
      "a.h5: could not be read: the process that reads HDF5 gave no answer; it may be damaged"
    ),
    (
      "exec sleep 100",
      "a.h5: keeps libhdf5 busy for more than 1 seconds; it is damaged, or of a huge number of chunks"
    ),
    (
      "exec cat /dev/zero",
      "a.h5: keeps libhdf5 busy for more than 1 seconds; it is damaged, or of a huge number of chunks"
    ),
  ]

  @Test(arguments: endings)
  func `whatever becomes of the child is an error`(script: String, message: String) throws {
    let child = try executable(script)
    let patience = message.contains("busy") ? 1 : 60
    let error = #expect(throws: CheckpointError.self) {
      _ = try HDF5.inventory("a.h5", from: child, patience: patience)
    }
    #expect(error?.description == message)
  }

  static let inventory: HDF5.Inventory = {
    var inventory = HDF5.Inventory()
    inventory.datasets = [
      .init(
        path: "a/é", storedType: .bf16, dimensions: [2, 3], name: nil, dtype: "BF16", shape: nil,
        storage: .contiguous(at: 4096)),
      .init(
        path: "b", storedType: .u8, dimensions: [], name: "x\0", dtype: "F8_E4M3", shape: [1, -1],
        storage: .inline([1, 2, 3])),
      .init(
        path: "", storedType: .c64, dimensions: [0], name: "", dtype: nil, shape: [],
        storage: .nothing, fill: [0, 1]),
      .init(
        path: "c", storedType: .f64, dimensions: [.max], name: nil, dtype: nil, shape: nil,
        storage: .chunked(
          dimensions: [7],
          filters: [.shuffle(width: 8), .deflate, .lzf, .fletcher32, .zstd],
          chunks: [.init(number: 3, offset: -1, byteCount: 9, skippedFilters: .max)])),
    ]
    inventory.metadata = ["k": "v", "": ""]
    inventory.header = 5..<9
    inventory.leftOut = [.init(path: "vocabulary", content: "strings")]
    return inventory
  }()

  @Test func `what the child says arrives as it was`() throws {
    let answer = HDF5Message.encode(.success(Self.inventory))
    #expect(try HDF5Message.decode(answer, file: "f")?.get() == Self.inventory)
    let error = CheckpointError(file: "f", tensor: "t", "p", remedy: "r")
    let failure = HDF5Message.decode(HDF5Message.encode(.failure(error)), file: "f")
    #expect(throws: error) { try failure?.get() }
  }

  @Test func `a part of an answer is no answer`() {
    let answer = HDF5Message.encode(.success(Self.inventory))
    for count in 0..<answer.count {
      #expect(HDF5Message.decode(Array(answer[..<count]), file: "f") == nil)
    }
  }

  @Test func `a damaged answer is decoded without a trap`() {
    var random = SeededGenerator(seed: 1)
    let answer = HDF5Message.encode(.success(Self.inventory))
    for _ in 0..<20_000 {
      var damaged = answer
      for _ in 0..<Int.random(in: 1...4, using: &random) {
        damaged[damaged.indices.randomElement(using: &random)!] = .random(
          in: 0...255, using: &random)
      }
      _ = HDF5Message.decode(damaged, file: "f")
    }
  }

  // MARK: - Damaged files, read by the built command's child

  /// A small file with a bit of everything.
  func sample() throws -> (path: String, bytes: [UInt8]) {
    let path = folder("sample.h5")
    let tensors = try [
      TensorInfo(name: "model.a", dtype: .f32, shape: [3, 4]),
      TensorInfo(name: "group/b", dtype: .bf16, shape: [5]),
      TensorInfo(name: "packed", dtype: .f4, shape: [2, 4]),
      TensorInfo(name: "large", dtype: .u16, shape: [300, 120]),
    ]
    let manifest = Manifest(tensors, metadata: ["format": "pt"])
    let sink = try HDF5.create(path, manifest, WritingOptions(compression: .deflate()))
    for tensor in tensors {
      let bytes = (0..<tensor.byteCount).map { UInt8($0 % 7) }
      try sink.write(bytes.span.bytes, of: tensor, at: 0)
    }
    try sink.finish()
    return (path, Array(try Data(contentsOf: URL(filePath: path))))
  }

  /// Opens these bytes as a file and reads all its tensors.
  func read(_ bytes: [UInt8]) throws {
    let path = folder("damaged.h5")
    try Data(bytes).write(to: URL(filePath: path))
    let inventory = try HDF5.inventory(path, from: builtCommand.path, patience: 20)
    let source = try HDF5.source(inventory, path)
    for tensor in source.manifest.tensors where tensor.byteCount < 1 << 24 {
      _ = try source.bytes(of: tensor)
    }
  }

  @Test func `the undamaged file is read by the child`() throws {
    try read(sample().bytes)
  }

  @Test(arguments: 1...8 as ClosedRange<UInt64>)
  func `random damage is an error or harmless`(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    let (_, bytes) = try sample()
    for _ in 0..<12 {
      var damaged = bytes
      for _ in 0..<Int.random(in: 1...4, using: &random) {
        damaged[damaged.indices.randomElement(using: &random)!] = .random(
          in: 0...255, using: &random)
      }
      do { try read(damaged) } catch is CheckpointError {}
    }
  }

  @Test func `a truncated file is an error`() throws {
    let (_, bytes) = try sample()
    for count in stride(from: 12, to: bytes.count, by: bytes.count / 40) {
      #expect(throws: CheckpointError.self) { try read(Array(bytes[..<count])) }
    }
  }
}
