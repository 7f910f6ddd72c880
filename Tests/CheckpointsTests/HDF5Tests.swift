import Dispatch
import Foundation
import TestSupport
import Testing

@testable import Checkpoints

struct HDF5Tests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  static let ways: [WritingOptions] = [
    WritingOptions(), WritingOptions(layout: .tree), WritingOptions(compression: .zstd()),
    WritingOptions(compression: .zstd(level: 3)), WritingOptions(compression: .deflate()),
    WritingOptions(layout: .tree, compression: .deflate(level: 6)),
  ]

  /// Writes tensors with these bytes, whole, and opens the result.
  func written(
    _ manifest: Manifest, _ contents: [[UInt8]], _ options: WritingOptions = WritingOptions(),
    as name: String = "tensors.h5"
  ) throws -> any TensorSource {
    let sink = try HDF5.create(folder(name), manifest, options)
    for (tensor, bytes) in zip(manifest.tensors, contents) where !bytes.isEmpty {
      try sink.write(bytes.span.bytes, of: tensor, at: 0)
    }
    try sink.finish()
    return try HDF5.open(folder(name))
  }

  static func noise(_ count: Int, seed: UInt64) -> [UInt8] {
    var random = SeededGenerator(seed: seed)
    let words = (0..<(count + 7) / 8).map { _ in random.next() }
    return words.withUnsafeBytes { Array($0.prefix(count)) }
  }

  // MARK: - Types and shapes

  static let shapes: [[Int]] = [
    [], [0], [8], [3, 8], [2, 0, 4], [1, 3, 5, 16], [0, 3], [3, 5, 7], [66_000], [3, 12_001, 2],
    Array(repeating: 1, count: 32) + [8], Array(repeating: 2, count: 12),
  ]

  @Test(arguments: DType.allCases, ways.indices)
  func `every type in every shape comes back as it was`(dtype: DType, way: Int) throws {
    let tensors = Self.shapes.compactMap { shape in
      // Four- and six-bit elements must fill whole bytes.
      try? TensorInfo(name: "layers.\(shape.count).\(shape)", dtype: dtype, shape: shape)
    }
    let contents = tensors.map { Self.noise($0.byteCount, seed: UInt64($0.byteCount)) }
    let source = try written(Manifest(tensors), contents, Self.ways[way])
    let read = source.manifest
    #expect(Set(read.tensors) == Set(tensors))
    for (tensor, bytes) in zip(tensors, contents) {
      #expect(try source.bytes(of: tensor) == bytes, "\(tensor)")
    }
  }

  @Test(arguments: DType.allCases.filter { $0.bitWidth == 16 || $0.bitWidth == 8 }, ways.indices)
  func `every code of a type comes back, NaN payloads too`(dtype: DType, way: Int) throws {
    let codes = (UInt16.min...UInt16.max).flatMap { [UInt8($0 & 0xFF), UInt8($0 >> 8)] }
    let tensor = try TensorInfo(
      name: "codes", dtype: dtype, shape: [codes.count * 8 / dtype.bitWidth])
    let source = try written(Manifest([tensor]), [codes], Self.ways[way])
    #expect(try source.bytes(of: tensor) == codes)
  }

  @Test func `tensors keep the order they were given in`() throws {
    let tensors = try ["z", "a", "m/b", "m/a", "é"].map {
      try TensorInfo(name: $0, dtype: .u8, shape: [1])
    }
    let source = try written(Manifest(tensors), tensors.map { _ in [7] })
    #expect(source.manifest.tensors.map { $0.name } == ["z", "a", "m/b", "m/a", "é"])
  }

  // MARK: - Names

  static let names = [
    "", ".", "..", "/", "//", "a", "a/b", "a/b/c", "a/./b", "/x", "x/", "x//y", "x\0y", "x%00y",
    "x%2Fy", "x/y", "x.y", "x..y", ".x", "__metadata__/header", "é", "e\u{301}", "/\u{301}",
    "\u{301}/\u{301}", "../../etc/passwd", "line\nbreak", "🦙", "%", "%%", "a%2Fb",
    String(repeating: "long", count: 30_000), String(repeating: "deep/", count: 300) + "x",
  ]

  @Test(arguments: ways.indices)
  func `every name comes back, whatever HDF5 can hold`(way: Int) throws {
    let tensors = try Self.names.map { try TensorInfo(name: $0, dtype: .u8, shape: [1]) }
    let source = try written(
      Manifest(tensors), tensors.indices.map { [UInt8($0)] }, Self.ways[way])
    for (index, name) in Self.names.enumerated() {
      #expect(try source.bytes(of: source.tensor(name)) == [UInt8(index)], "\(name.prefix(50))")
    }
    #expect(source.manifest.tensors.count == Self.names.count)
  }

  @Test func `a name that needs no escape is the dataset's path`() {
    let names = ["a.b", "upright/vision_model.x", "%", "é"]
    #expect(HDF5.paths(for: names, layout: .flat) == names)
    #expect(
      HDF5.paths(for: names, layout: .tree) == ["a/b", "upright/vision_model/x", "%", "é"])
  }

  @Test func `names that clash are kept apart`() {
    #expect(HDF5.paths(for: ["a", "a/b", "a%2Fb"], layout: .flat) == ["a", "a%2Fb", "a%2Fb%"])
    #expect(
      HDF5.paths(for: ["__metadata__", "__metadata__/x"], layout: .flat)
        == ["__metadata__%", "__metadata__%2Fx"])
    #expect(HDF5.paths(for: ["a.b", "a/b", "a"], layout: .tree) == ["a%2Fb", "a%2Fb%", "a"])
  }

  // MARK: - Metadata

  @Test func `a megabyte of metadata and ten thousand keys come back`() throws {
    var metadata = ["big": String(repeating: "é", count: 500_000), "": "", "nul\0": "x\0y"]
    metadata[""] = nil
    metadata["nul\0"] = nil
    metadata["nul"] = "x\0y\0"
    metadata["empty"] = ""
    for i in 0..<10_000 { metadata["key \(i)"] = "\(i)" }
    let source = try written(Manifest([], metadata: metadata), [])
    #expect(source.manifest.metadata == metadata)
  }

  @Test(arguments: ["", "a\0b"])
  func `a key that HDF5 cannot hold is refused unless a header has it`(key: String) throws {
    let manifest = Manifest([], metadata: [key: "value"])
    let error = CheckpointError(
      file: folder("tensors.h5"), "cannot keep metadata under the key \(quoted(key)) in HDF5")
    #expect(throws: error) { _ = try HDF5.create(folder("tensors.h5"), manifest) }

    try Safetensors.create(folder("a.safetensors"), manifest).finish()
    let original = try Safetensors.open(folder("a.safetensors"))
    let kept = try written(original.manifest, [])
    #expect(kept.manifest.metadata == [key: "value", "format": "pt"])
  }

  // MARK: - Whole files

  /// A safetensors file of several types, sizes and difficult names.
  func sample() throws -> String {
    var contents: [TensorInfo: [UInt8]] = [:]
    for (index, dtype) in DType.allCases.enumerated() {
      for shape in [[], [0, 3], [5, 8], [3, 11_000]] {
        let name = "model.\(dtype.rawValue)/\(shape)"
        guard let tensor = try? TensorInfo(name: name, dtype: dtype, shape: shape) else { continue }
        contents[tensor] = Self.noise(tensor.byteCount, seed: UInt64(index))
      }
    }
    for name in Self.names where name != "__metadata__" {
      contents[try TensorInfo(name: name, dtype: .i8, shape: [2])] = [1, 2]
    }
    let path = folder("sample.safetensors")
    try write(contents, metadata: ["format": "pt", "": "x", "\0": "\0"], to: path)
    return path
  }

  @Test(arguments: ways.indices)
  func `safetensors to HDF5 and back is the identical file`(way: Int) throws {
    let original = try sample()
    try HDF5.write(Checkpoint.open(original), to: folder("a.h5"), Self.ways[way], workers: 3)
    try Checkpoint.write(Checkpoint.open(folder("a.h5")), to: folder("b.safetensors"))
    #expect(
      FileManager.default.contentsEqual(atPath: original, andPath: folder("b.safetensors")))
  }

  @Test(arguments: ways.indices)
  func `the same tensors give the same file for every number of workers`(way: Int) throws {
    let sizes = [3_000_001, 70_000, 6_000_000, 12, 5_242_880]
    let tensors = try sizes.map { try TensorInfo(name: "\($0)", dtype: .bf16, shape: [$0]) }
    let contents = tensors.map { tensor in
      (0..<tensor.byteCount).map { UInt8(truncatingIfNeeded: $0 &* $0 >> 7 & 31) }
    }
    let source = try written(Manifest(tensors), contents)
    for workers in [1, 2, 5] {
      try HDF5.write(source, to: folder("\(workers).h5"), Self.ways[way], workers: workers)
    }
    for name in ["2.h5", "5.h5"] {
      #expect(FileManager.default.contentsEqual(atPath: folder("1.h5"), andPath: folder(name)))
    }
    // Written from the last piece to the first, most chunks wait for their turn in a file.
    let sink = try HDF5.create(folder("back.h5"), Manifest(tensors), Self.ways[way])
    for (tensor, bytes) in zip(tensors, contents).reversed() {
      for begin in stride(from: 0, to: bytes.count, by: 700_000).reversed() {
        let piece = Array(bytes[begin..<min(begin + 700_000, bytes.count)])
        try sink.write(piece.span.bytes, of: tensor, at: begin)
      }
    }
    try sink.finish()
    #expect(FileManager.default.contentsEqual(atPath: folder("1.h5"), andPath: folder("back.h5")))
  }

  @Test(arguments: [1, 2] as [UInt64], ways.indices)
  func `pieces are written and read in any order and size`(seed: UInt64, way: Int) throws {
    var random = SeededGenerator(seed: seed)
    let tensors = try [[700_001], [77, 4_001], [3, 300_000]].map {
      try TensorInfo(name: "\($0)", dtype: .bf16, shape: $0)
    }
    let contents = tensors.map { Self.noise($0.byteCount, seed: seed) }
    let sink = try HDF5.create(folder("a.h5"), Manifest(tensors), Self.ways[way])
    var pieces: [(tensor: Int, range: Range<Int>)] = []
    for (index, tensor) in tensors.enumerated() {
      var start = 0
      while start < tensor.byteCount {
        let end = min(tensor.byteCount, start + Int.random(in: 1...1_000_000, using: &random))
        pieces.append((index, start..<end))
        start = end
      }
    }
    pieces.shuffle(using: &random)
    try forEachStep(count: pieces.count, workers: 3) {
    } body: { [pieces] step, _ in
      let (tensor, range) = pieces[step]
      let piece = Array(contents[tensor][range])
      try sink.write(piece.span.bytes, of: tensors[tensor], at: range.lowerBound)
    }
    try sink.finish()
    let source = try HDF5.open(folder("a.h5"))
    for (tensor, range) in pieces {
      var bytes = [UInt8](repeating: 0, count: range.count)
      var span = bytes.mutableSpan
      var raw = span.mutableBytes
      try source.read(tensors[tensor], at: range.lowerBound, into: &raw)
      #expect(bytes.elementsEqual(contents[tensor][range]), "\(range) of \(tensors[tensor])")
    }
  }

  @Test(arguments: ways.indices)
  func `an unfinished file leaves nothing`(way: Int) throws {
    let tensor = try TensorInfo(name: "a", dtype: .f32, shape: [500_000])
    do {
      let sink = try HDF5.create(folder("a.h5"), Manifest([tensor]), Self.ways[way])
      try sink.write(Self.noise(1_000_000, seed: 1).span.bytes, of: tensor, at: 4)
    }
    #expect(try folder.names == [])
  }

  @Test func `compressed weights are smaller and noise is not larger`() throws {
    let weights = try TensorInfo(name: "weights", dtype: .f32, shape: [1 << 18])
    var random = SeededGenerator(seed: 1)
    let values = (0..<1 << 18).map { _ in Float.random(in: -1...1, using: &random) }
    for way in Self.ways.indices where Self.ways[way].compression != nil {
      for (bytes, limit) in [
        (values.withUnsafeBytes { Array($0) }, 0.95), (Self.noise(1 << 20, seed: 2), 1.02),
      ] {
        _ = try written(Manifest([weights]), [bytes], Self.ways[way])
        let size = try File(reading: folder("tensors.h5")).size()
        #expect(Double(size) < limit * 0x1p20, "\(size) bytes")
      }
    }
  }

  @Test(arguments: [
    ("zstd", HDF5.Compression.zstd()), ("zstd:7", .zstd(level: 7)), ("deflate", .deflate()),
    ("deflate:9", .deflate(level: 9)), ("zstd:23", nil), ("zstd:", nil), ("deflate:0", nil),
    ("zstd:1:2", nil), ("lz4", nil), ("", nil), ("zstd:-1", nil),
  ])
  func `a compression is a method and perhaps a level`(text: String, meaning: HDF5.Compression?) {
    #expect(HDF5.Compression(text) == meaning)
  }

  @Test func `a file that is not HDF5 is refused in the library's words`() throws {
    let path = folder("a.h5")
    try Data([0x89, 0x48, 0x44, 0x46, 0x0D, 0x0A, 0x1A, 0x0A, 1, 2, 3]).write(
      to: URL(filePath: path))
    let error = #expect(throws: CheckpointError.self) { _ = try Checkpoint.open(path) }
    #expect(
      error?.description == "\(path): libhdf5: unable to open file (bad byte number in an address)")
  }
}
