import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `Safetensors files` {
  /// Opens a file of this header and body.
  private func open(_ header: String, body: [UInt8] = [], in folder: TemporaryFolder) throws
    -> any TensorSource
  {
    let path = folder("model.safetensors")
    try Data(safetensors(Array(header.utf8), body: body)).write(to: URL(filePath: path))
    return try Safetensors.open(path)
  }

  // MARK: What is data, however odd

  @Test(arguments: [
    "{}", "{}   ", "{ }\n\t\r ", " \n{}", #"{"__metadata__":{}}"#, #"{"__metadata__":null}"#,
  ])
  func `a header without tensors is a checkpoint without tensors`(header: String) throws {
    let source = try open(header, in: TemporaryFolder())
    #expect(source.manifest.tensors.isEmpty)
  }

  @Test func `unknown fields of an entry are passed over`() throws {
    let header = #"""
      {"a":{"note":{"deep":[1,-2.5e+3,true,null,"\u00e9\\"]},"dtype":"U8","shape":[2],
      "data_offsets":[0,2],"":[]}}
      """#
    let source = try open(header, body: [4, 5], in: TemporaryFolder())
    #expect(try source.bytes(of: source.tensor("a")) == [4, 5])
  }

  @Test(arguments: [
    "../../etc/passwd", "/etc/passwd", "..", ".", "", "a\u{0}b", "a\nb", "a\u{7F}\u{1B}[31m", "%2e",
    "\u{10FFFF}", "__metadata", "\u{2028}", #""\"#, "C:\\x", " ",
  ])
  func `a dangerous name is only a name`(name: String) throws {
    let folder = try TemporaryFolder()
    let tensor = try TensorInfo(name: name, dtype: .u8, shape: [3])
    let path = folder("model.safetensors")
    try write([tensor: [1, 2, 3]], to: path)
    let source = try Safetensors.open(path)
    #expect(source.manifest.tensors.map { Array($0.name.utf8) } == [Array(name.utf8)])
    #expect(try source.bytes(of: tensor) == [1, 2, 3])
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path).count == 1)
  }

  @Test func `escapes name the tensor that they spell`() throws {
    let header =
      #"{"\u0061\"\\\/\b\f\n\r\t\u00E9\ud83d\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#
    let source = try open(header, body: [9], in: TemporaryFolder())
    #expect(
      source.manifest.tensors.map { $0.name } == ["a\"\\/\u{8}\u{C}\n\r\t\u{E9}\u{1F600}"])
  }

  @Test func `names that look the same are different names`() throws {
    let folder = try TemporaryFolder()
    let path = folder("model.safetensors")
    let composed = try TensorInfo(name: "\u{E9}", dtype: .u8, shape: [1])
    let decomposed = try TensorInfo(name: "e\u{301}", dtype: .u8, shape: [2])
    let sink = try Safetensors.create(path, Manifest([composed, decomposed]))
    try sink.write([1 as UInt8].span.bytes, of: composed, at: 0)
    try sink.write([2, 3 as UInt8].span.bytes, of: decomposed, at: 0)
    try sink.finish()
    let source = try Safetensors.open(path)
    #expect(try source.bytes(of: source.tensor("\u{E9}")) == [1])
    #expect(try source.bytes(of: source.tensor("e\u{301}")) == [2, 3])
  }

  @Test func `a tensor may have a thousand dimensions`() throws {
    let shape = Array(repeating: "1", count: 999).joined(separator: ",") + ",3"
    let source = try open(
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[\(shape)],\"data_offsets\":[0,3]}}", body: [1, 2, 3],
      in: TemporaryFolder())
    #expect(source.manifest.tensors[0].shape.count == 1000)
    #expect(try source.bytes(of: source.manifest.tensors[0]) == [1, 2, 3])
  }

  @Test func `misaligned data is read as it is`() throws {
    let header = #"""
      {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
      "b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}
      """#
    let body: [UInt8] = [7, 0, 0, 128, 63, 0, 0, 0, 192]
    let source = try open(header, body: body, in: TemporaryFolder())
    #expect(try source.floats(of: "b") == [1, -2])
  }

  @Test func `empty tensors lie anywhere between others`() throws {
    let header = #"""
      {"z":{"dtype":"F32","shape":[0,9223372036854775],"data_offsets":[2,2]},
      "b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},
      "a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
      "e":{"dtype":"F4","shape":[0,3],"data_offsets":[0,0]},
      "x":{"dtype":"F64","shape":[0],"data_offsets":[3,3]}}
      """#
    let source = try open(header, body: [1, 2, 3], in: TemporaryFolder())
    #expect(source.manifest.tensors.map { $0.name } == ["e", "a", "z", "b", "x"])
    #expect(try source.bytes(of: source.tensor("z")) == [])
    #expect(try source.bytes(of: source.tensor("b")) == [3])
  }

  // MARK: Every type

  /// Shapes from nothing to odd; those of types below a byte fill whole bytes.
  static let shapes: [[Int]] = [[0], [], [8], [3, 8], [2, 0, 3], [1, 1, 24], [257, 4]]

  @Test(arguments: DType.allCases)
  func `every type keeps every bit in every shape`(dtype: DType) throws {
    let folder = try TemporaryFolder()
    var contents: [TensorInfo: [UInt8]] = [:]
    for (number, shape) in Self.shapes.enumerated() where !(dtype.bitWidth < 8 && shape == []) {
      let tensor = try TensorInfo(name: "t\(number)", dtype: dtype, shape: shape)
      contents[tensor] = (0..<tensor.byteCount).map { UInt8(truncatingIfNeeded: $0 &* 167 &+ 13) }
    }
    // Every code that the type has, the bits of NaNs among them, as far as 16 bits go.
    let every = try TensorInfo(
      name: "every code", dtype: dtype, shape: [65_536 * 16 / max(dtype.bitWidth, 16), 3])
    contents[every] = (0..<every.byteCount).map {
      UInt8(truncatingIfNeeded: ($0 / 2) >> ($0 % 2 * 8))
    }

    let path = folder("model.safetensors")
    try write(contents, to: path)
    let source = try Safetensors.open(path)
    #expect(Set(source.manifest.tensors) == Set(contents.keys))
    let copy = folder("copy.safetensors")
    let sink = try Safetensors.create(copy, source.manifest)
    try source.copy(into: sink)
    try sink.finish()
    #expect(FileManager.default.contentsEqual(atPath: path, andPath: copy))
    let reopened = try Safetensors.open(copy)
    for (tensor, bytes) in contents { #expect(try reopened.bytes(of: tensor) == bytes) }
  }

  @Test func `a scalar below a byte cannot be`() {
    #expect(throws: TensorSizeError.partialByte) {
      try TensorInfo(name: "a", dtype: .f4, shape: [])
    }
  }

  // MARK: Writing

  @Test func `the same input gives the same bytes`() throws {
    let folder = try TemporaryFolder()
    let metadata = Dictionary(uniqueKeysWithValues: (0..<50).map { ("key\($0)", "\u{1}\"\\\($0)") })
    let tensors = try (0..<50).map {
      try TensorInfo(name: "t\($0)", dtype: DType.allCases[$0 % 22], shape: [8])
    }
    var files: Set<Data> = []
    for round in 0..<5 {
      let path = folder("\(round).safetensors")
      // The pairs in another order of insertion, which a dictionary shows when it is walked.
      let shuffled = Dictionary(uniqueKeysWithValues: metadata.shuffled())
      let sink = try Safetensors.create(path, Manifest(tensors, metadata: shuffled))
      for tensor in tensors.shuffled() {
        try sink.write(
          [UInt8](repeating: 5, count: tensor.byteCount).span.bytes, of: tensor, at: 0)
      }
      try sink.finish()
      files.insert(try Data(contentsOf: URL(filePath: path)))
      let expected = metadata.merging(["format": "pt"]) { $1 }
      #expect(try Safetensors.open(path).manifest.metadata == expected)
    }
    #expect(files.count == 1)
  }

  @Test func `every tensor that is written is aligned`() throws {
    let folder = try TemporaryFolder()
    let tensors = try DType.allCases.reversed().map {
      try TensorInfo(name: $0.rawValue, dtype: $0, shape: [8])
    }
    let layout = try Safetensors.Layout(writing: Manifest(tensors), path: folder("x"))
    for (tensor, offset) in zip(layout.manifest.tensors, layout.offsets) {
      #expect(offset.isMultiple(of: max(1, tensor.dtype.bitWidth / 8)), "\(tensor.name)")
    }
  }

  @Test func `a tensor cannot be called __metadata__`() throws {
    let path = try TemporaryFolder()("model.safetensors")
    let tensor = try TensorInfo(name: "__metadata__", dtype: .u8, shape: [1])
    let error = try #require(throws: CheckpointError.self) {
      try Safetensors.create(path, Manifest([tensor]))
    }
    #expect(error.problem == "has a name that safetensors keeps for itself")
  }

  @Test func `a header that would be too long is refused`() throws {
    let path = try TemporaryFolder()("model.safetensors")
    let long = String(repeating: "x", count: 1_000_000)
    let tensors = try (0..<100).map {
      try TensorInfo(name: long + String($0), dtype: .u8, shape: [1])
    }
    let error = try #require(throws: CheckpointError.self) {
      try Safetensors.create(path, Manifest(tensors))
    }
    #expect(error.problem.hasSuffix("bytes; the format's limit is 100000000"))
  }

  // MARK: Size

  /// `SMELT_LARGE_TESTS=1` takes the largest header there can be.
  @Test func `a huge header opens in bounded time`() throws {
    let isLarge = ProcessInfo.processInfo.environment["SMELT_LARGE_TESTS"] != nil
    let count = isLarge ? 1_200_000 : 50_000
    var header = "{"
    for number in 0..<count {
      header += "\(number == 0 ? "" : ",")\"layers.\(number)\":"
      header += "{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[\(number),\(number + 1)]}"
    }
    header += "}"
    let body = (0..<count).map { UInt8(truncatingIfNeeded: $0) }
    let clock = ContinuousClock()
    let folder = try TemporaryFolder()
    var source: (any TensorSource)?
    let time = try clock.measure { source = try open(header, body: body, in: folder) }
    #expect(source?.manifest.tensors.count == count)
    #expect(try source?.bytes(of: source!.tensor("layers.49999")) == [UInt8(49_999 & 0xFF)])
    // Debug builds, busy machines: the bound is against quadratic time, not slow time.
    #expect(time < .seconds(count / 4_000), "\(count) tensors took \(time)")
  }
}
