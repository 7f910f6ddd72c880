import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `numpy archives` {
  // MARK: Written by numpy

  static let files = ["plain.npz", "compressed.npz"]

  @Test(arguments: files)
  func `every array is read as numpy wrote it`(file: String) throws {
    let source = try Checkpoint.open(fixture("numpy/\(file)"))
    let dtypes: [String: DType] = [
      "float16": .f16, "float32": .f32, "float64": .f64, "int8": .i8, "int16": .i16, "int32": .i32,
      "int64": .i64, "uint8": .u8, "uint16": .u16, "uint32": .u32, "uint64": .u64, "bool": .bool,
      "complex64": .c64, "bfloat16": .bf16,
    ]
    for (name, dtype) in dtypes {
      let tensor = try source.tensor(name)
      #expect(tensor.dtype == dtype)
      #expect(tensor.shape == [2, 3])
      if dtype.isArithmetic {
        #expect(try source.floats(of: name) == [0, 1, 2, 3, 4, 5])
      } else if dtype != .bool, dtype != .c64 {
        #expect(try source.integers(of: tensor) == [0, 1, 2, 3, 4, 5])
      }
    }
    #expect(try source.bytes(of: source.tensor("bool")) == [0, 1, 1, 1, 1, 1])
    #expect(try source.tensor("scalar").shape == [])
    #expect(try source.floats(of: "scalar") == [7])
    #expect(try source.tensor("empty").shape == [0, 3])
    #expect(try source.tensor("vector").shape == [4])
    #expect(try source.tensor("layers.0.weight").shape == [1])
    #expect(source.manifest.tensors.count == dtypes.count + 6)
  }

  @Test(arguments: files)
  func `an array in Fortran's order is read in rows`(file: String) throws {
    let source = try Checkpoint.open(fixture("numpy/\(file)"))
    let tensor = try source.tensor("fortran")
    #expect(tensor.shape == [2, 3, 4])
    #expect(try source.integers(of: tensor) == Array(0..<24))
  }

  @Test(arguments: [
    ("big.npz", "big", #"has elements of numpy's type ">f4", which is not known"#),
    ("object.npz", "object", #"has elements of numpy's type "|O", which is not known"#),
    ("text.npz", "text", #"has elements of numpy's type "<U2", which is not known"#),
  ])
  func `types that are no tensors' are refused by name`(
    file: String, tensor: String, problem: String
  ) throws {
    let error = try #require(throws: CheckpointError.self) {
      try Checkpoint.open(fixture("numpy/\(file)"))
    }
    #expect(error.tensor == tensor)
    #expect(error.problem == problem)
  }

  // MARK: Written here

  @Test(arguments: [false, true])
  func `every type comes back from an archive`(isCompressed: Bool) throws {
    let folder = try TemporaryFolder()
    var contents: [TensorInfo: [UInt8]] = [:]
    for dtype in DType.allCases {
      for shape in [[0], [8], [3, 8], [2, 0, 3], [257, 4]] {
        let tensor = try TensorInfo(name: "\(dtype)/\(shape)", dtype: dtype, shape: shape)
        contents[tensor] = (0..<tensor.byteCount).map { UInt8(truncatingIfNeeded: $0 &* 167) }
      }
    }
    let large = try TensorInfo(name: "é 大", dtype: .f32, shape: [3 << 20])
    contents[large] = (0..<large.byteCount).map { UInt8(truncatingIfNeeded: $0 >> 7) }
    let tensors = contents.keys.sorted { $0.name < $1.name }
    let sink = try NumPy.create(folder("x.npz"), Manifest(tensors), isCompressed: isCompressed)
    for (tensor, bytes) in contents {
      // In two pieces, the second first.
      let half = tensor.byteCount / 16 * 8
      let span = bytes.span.bytes
      try sink.write(span.extracting(half..<bytes.count), of: tensor, at: half)
      if half > 0 { try sink.write(span.extracting(0..<half), of: tensor, at: 0) }
    }
    try sink.finish()
    let source = try Checkpoint.open(folder("x.npz"))
    #expect(source.manifest.tensors == tensors)
    #expect(source.warnings == [])
    for (tensor, bytes) in contents { #expect(try source.bytes(of: tensor) == bytes) }
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path) == ["x.npz"])
  }

  /// Writes tensors with metadata and an order of their own as safetensors.
  private func writeOriginal(_ folder: TemporaryFolder) throws -> [UInt8] {
    let header =
      #"{"z":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"__metadata__":{"by":"é\n","a":""},"#
      + #""m":{"shape":[4],"dtype":"F4","data_offsets":[4,6]},"a":{"dtype":"U8","shape":[0],"data_offsets":[6,6]}}"#
    let bytes = safetensors(Array(header.utf8), body: [1, 2, 3, 4, 5, 6])
    try Data(bytes).write(to: URL(filePath: folder("a.safetensors")))
    return bytes
  }

  @Test(arguments: [false, true])
  func `safetensors come back from an archive byte for byte`(isCompressed: Bool) throws {
    let folder = try TemporaryFolder()
    let original = try writeOriginal(folder)
    let source = try Checkpoint.open(folder("a.safetensors"))
    let sink = try NumPy.create(folder("x.npz"), source.manifest, isCompressed: isCompressed)
    try source.copy(into: sink)
    try sink.finish()
    let archive = try Checkpoint.open(folder("x.npz"))
    #expect(archive.warnings == [])
    #expect(archive.manifest.metadata == ["by": "é\n", "a": ""])
    #expect(archive.manifest.tensors.map { $0.name } == ["z", "m", "a"])
    try Checkpoint.write(archive, to: folder("b.safetensors"))
    #expect(
      try [UInt8](Data(contentsOf: URL(filePath: folder("b.safetensors")))) == original)
  }

  @Test(arguments: [false, true])
  func `an archive without arrays is one`(isCompressed: Bool) throws {
    let folder = try TemporaryFolder()
    try NumPy.create(folder("x.npz"), Manifest([]), isCompressed: isCompressed).finish()
    #expect(try Checkpoint.open(folder("x.npz")).manifest.tensors.isEmpty)
    // As numpy.savez("x.npz") writes it.
    let end: [UInt8] = [0x50, 0x4B, 5, 6] + [UInt8](repeating: 0, count: 18)
    try Data(end).write(to: URL(filePath: folder("y.npz")))
    #expect(try Checkpoint.open(folder("y.npz")).manifest.tensors.isEmpty)
  }

  @Test func `metadata without a header is kept too`() throws {
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(name: "t", dtype: .u8, shape: [1])
    try write([tensor: [7]], metadata: ["format": "pt"], to: folder("x.npz"))
    #expect(try Checkpoint.open(folder("x.npz")).manifest.metadata == ["format": "pt"])
  }

  @Test func `a kept header that no longer fits the arrays is passed over`() throws {
    let folder = try TemporaryFolder()
    _ = try writeOriginal(folder)
    try Checkpoint.write(Checkpoint.open(folder("a.safetensors")), to: folder("x.npz"))
    var file = try Data(contentsOf: URL(filePath: folder("x.npz")))
    // In the kept header alone: elsewhere the types have other names.
    let name = try #require(file.range(of: Data(#""BF16""#.utf8)))
    file.replaceSubrange(name, with: Data(#""BF61""#.utf8))
    try file.write(to: URL(filePath: folder("x.npz")))
    let archive = try Checkpoint.open(folder("x.npz"))
    #expect(archive.manifest.metadata == [:])
    #expect(try archive.bytes(of: archive.tensor("z")) == [1, 2, 3, 4])
  }

  @Test func `more entries than stay unpacked are read in any order`() throws {
    let folder = try TemporaryFolder()
    let tensors = try (0..<40).map { try TensorInfo(name: "\($0)", dtype: .u8, shape: [3]) }
    let sink = try NumPy.create(folder("x.npz"), Manifest(tensors), isCompressed: true)
    for (number, tensor) in tensors.enumerated() {
      try sink.write([UInt8](repeating: UInt8(number), count: 3).span.bytes, of: tensor, at: 0)
    }
    try sink.finish()
    let source = try Checkpoint.open(folder("x.npz"))
    for number in Array(0..<40) + [3, 39, 0, 20] {
      #expect(
        try source.bytes(of: tensors[number]) == [UInt8](repeating: UInt8(number), count: 3))
    }
  }

  // MARK: Malformed

  private static func array(_ header: String, body: Int = 0) -> [UInt8] {
    [0x93] + Array("NUMPY".utf8) + [1, 0, UInt8(header.utf8.count), 0] + Array(header.utf8)
      + [UInt8](repeating: 0, count: body)
  }

  static let malformed: [(bytes: [UInt8], problem: String)] = [
    ([], "is not a numpy array"),
    (Array("not a numpy array".utf8), "is not a numpy array"),
    (
      [0x93] + Array("NUMPY".utf8) + [4, 0, 0, 0, 0, 0, 0, 0],
      "is a numpy array of the unknown version 4"
    ),
    (
      [0x93] + Array("NUMPY".utf8) + [1, 0, 255, 255, 0, 0],
      "has a header of 65535 bytes, beyond its end or the limit"
    ),
    (array("{}"), "has a header that is not one of a simple numpy array"),
    (
      array("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (), }"),
      "has a header that is not one of a simple numpy array"
    ),
    (
      array("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
      "has a header that is not one of a simple numpy array"
    ),
    (
      array("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (), }", body: 4),
      "has a header that is not one of a simple numpy array"
    ),
    (
      array("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", body: 4),
      "has 4 bytes but its shape [3] of F32 needs 12"
    ),
    (
      array("{'descr': '<f4', 'fortran_order': True, 'shape': (4611686018427387904, 4), }"),
      "has a shape too large to count its bytes"
    ),
  ]

  @Test(arguments: malformed)
  func `a malformed array is refused by name`(_ malformed: (bytes: [UInt8], problem: String)) throws
  {
    let folder = try TemporaryFolder()
    try Data(zip([("a.npy", malformed.bytes)])).write(to: URL(filePath: folder("x.npz")))
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder("x.npz")) }
    #expect(error.tensor == "a")
    #expect(error.problem == malformed.problem)
  }

  @Test func `a forged type of elements below a byte is not believed`() throws {
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(name: "a", dtype: .f4, shape: [3, 4])
    try write([tensor: [1, 2, 3, 4, 5, 6]], to: folder("x.npz"))
    var file = try Data(contentsOf: URL(filePath: folder("x.npz")))
    // Of the same length, so that only what the array says of itself has changed.
    let (order, shape) = (
      try #require(file.range(of: Data("False, 'shape': (6,), }".utf8))),
      Data("True, 'shape': (2, 3)}  ".utf8)
    )
    file.replaceSubrange(order, with: shape.prefix(order.count))
    try file.write(to: URL(filePath: folder("x.npz")))
    let source = try Checkpoint.open(folder("x.npz"))
    #expect(source.manifest.tensors.map { $0.dtype } == [.u8])
    #expect(try source.bytes(of: source.tensor("a")) == [1, 3, 5, 2, 4, 6])
  }

  @Test func `a zip file of something else is refused`() throws {
    let folder = try TemporaryFolder()
    try Data(zip([("a.txt", [1])])).write(to: URL(filePath: folder("x.zip")))
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder("x.zip")) }
    #expect(error.problem == "is a zip archive, but neither PyTorch's nor numpy's")
  }

  @Test func `two entries of one name are refused`() throws {
    let folder = try TemporaryFolder()
    try Data(zip([("a.npy", []), ("a.npy", [])])).write(to: URL(filePath: folder("x.npz")))
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder("x.npz")) }
    #expect(error.problem == "has two zip entries \"a.npy\"")
  }

  @Test(arguments: ["a.npy", "a.nry"])
  func `a name that differs from the one at the data is refused`(_ name: String) throws {
    let folder = try TemporaryFolder()
    let tensors = try ["b", "c"].map { try TensorInfo(name: $0, dtype: .u8, shape: [1]) }
    try write([tensors[0]: [1], tensors[1]: [2]], to: folder("x.npz"))
    var file = try Data(contentsOf: URL(filePath: folder("x.npz")))
    let place = try #require(file.range(of: Data("b.npy".utf8), options: .backwards))
    file.replaceSubrange(place, with: Data(name.utf8))
    try file.write(to: URL(filePath: folder("x.npz")))
    let error = try #require(throws: CheckpointError.self) {
      let source = try Checkpoint.open(folder("x.npz"))
      _ = try source.verifyData(workers: 1)
    }
    #expect(
      error.problem == "its zip entry \"\(name)\" has another name where its data begins")
  }

  @Test(arguments: files)
  func `every truncation is refused`(file: String) throws {
    let folder = try TemporaryFolder()
    let whole = try Data(contentsOf: URL(filePath: fixture("numpy/\(file)")))
    for count in stride(from: 0, to: whole.count, by: 7) {
      try whole.prefix(count).write(to: URL(filePath: folder("x.npz")))
      #expect(throws: CheckpointError.self, "\(count)") { try Checkpoint.open(folder("x.npz")) }
    }
  }

  @Test func `damage to compressed data is found`() throws {
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(name: "a", dtype: .u8, shape: [100_000])
    let sink = try NumPy.create(folder("x.npz"), Manifest([tensor]), isCompressed: true)
    let bytes = (0..<100_000).map { UInt8(truncatingIfNeeded: $0 &* $0 >> 5) }
    try sink.write(bytes.span.bytes, of: tensor, at: 0)
    try sink.finish()
    var file = try Data(contentsOf: URL(filePath: folder("x.npz")))
    file[file.count / 2] ^= 0x10
    try file.write(to: URL(filePath: folder("x.npz")))
    #expect(throws: CheckpointError.self) {
      let source = try Checkpoint.open(folder("x.npz"))
      _ = try source.bytes(of: tensor)
    }
  }
}
