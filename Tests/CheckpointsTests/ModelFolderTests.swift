import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `Model folders` {
  private func tensor(_ name: String, _ count: Int) throws -> TensorInfo {
    try TensorInfo(name: name, dtype: .u8, shape: [count])
  }

  /// A model of two shards: `a` and `b` in the first, `c` in the second.
  private func makeModel(in folder: TemporaryFolder) throws {
    try write(
      [tensor("a", 2): [1, 2], tensor("b", 1): [3]], to: folder("model-00001-of-00002.safetensors"))
    try write([tensor("c", 3): [4, 5, 6]], to: folder("model-00002-of-00002.safetensors"))
    try writeIndex(
      #"{"metadata":{"total_size":6},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00001-of-00002.safetensors","c":"model-00002-of-00002.safetensors"}}"#,
      in: folder)
  }

  private func writeIndex(_ text: String, in folder: TemporaryFolder) throws {
    try Data(text.utf8).write(to: URL(filePath: folder("model.safetensors.index.json")))
  }

  // MARK: Reading

  @Test func `several files are read as one`() throws {
    let folder = try TemporaryFolder()
    try makeModel(in: folder)
    for path in [folder.path, folder("model.safetensors.index.json")] {
      let source = try Checkpoint.open(path)
      #expect(source.path == path)
      #expect(source.manifest.tensors.map { $0.name } == ["a", "b", "c"])
      #expect(try source.bytes(of: source.tensor("c")) == [4, 5, 6])
      #expect(source.manifest.metadata == ["format": "pt"])
      #expect(source.warnings == [])
      #expect(try source.verifyData(workers: 2).checkedCount == 3)
    }
  }

  @Test(arguments: ["model.safetensors", "adapter_model.safetensors"])
  func `a single file is found`(name: String) throws {
    let folder = try TemporaryFolder()
    try write([tensor("a", 2): [1, 2]], to: folder(name))
    try Data("{}".utf8).write(to: URL(filePath: folder("config.json")))
    #expect(try Checkpoint.open(folder.path).manifest.tensors.count == 1)
  }

  @Test func `a folder without a model is refused`() throws {
    let folder = try TemporaryFolder()
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(
      error.problem
        == "has no model in it: none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
    )
  }

  @Test func `two files that may be the model are refused`() throws {
    let folder = try TemporaryFolder()
    for name in ["one.safetensors", "two.safetensors"] {
      try write([tensor("a", 1): [1]], to: folder(name))
    }
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(
      error.problem == "has 2 files that may be the model: one.safetensors, two.safetensors")
    #expect(error.remedy == "name the one that is meant")
  }

  /// Indices and what is wrong with them; FOLDER stands for where they are.
  static let malformed: [(index: String, error: String)] = [
    ("", "the index ends where \"{\" was expected as the index"),
    ("[]", "the index has \"[\" at its byte 0 where \"{\" was expected as the index"),
    ("{}", "has no weight_map; it may not be an index of shards"),
    (
      #"{"weight_map":[]}"#,
      "the index has \"[\" at its byte 14 where \"{\" was expected as weight_map"
    ),
    (#"{"weight_map":{},"weight_map":{}}"#, #"the index has two fields "weight_map""#),
    (
      #"{"weight_map":{"a":"x.safetensors","\u0061":"x.safetensors"}}"#,
      #"tensor "a": the index names it twice"#
    ),
    (
      #"{"weight_map":{"a":1}}"#, #"tensor "a": has a file in the index that is not a string"#
    ),
    (
      #"{"weight_map":{"a":null}}"#, #"tensor "a": has a file in the index that is not a string"#
    ),
    (
      #"{"metadata":{"total_size":1,"total_size":2},"weight_map":{}}"#,
      #"the index has two metadata "total_size""#
    ),
    (
      #"{"weight_map":{}} x"#,
      "the index has \"x\" at its byte 18 where nothing was expected after the JSON"
    ),
  ]

  @Test(arguments: malformed)
  func `a malformed index is refused by name`(_ malformed: (index: String, error: String)) throws {
    let folder = try TemporaryFolder()
    try writeIndex(malformed.index, in: folder)
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(
      error.description
        == folder("model.safetensors.index.json") + ": " + malformed.error)
  }

  @Test(arguments: ["/etc/passwd", "../x.safetensors", "a/b.safetensors", "..", ".", "", "a\0b"])
  func `a file outside the folder is not looked at`(file: String) throws {
    let folder = try TemporaryFolder()
    try writeIndex("{\"weight_map\":{\"t\":\(jsonString(file))}}", in: folder)
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(error.tensor == "t")
    #expect(
      error.problem
        == "is said to be in \(quoted(file)), which is not the name of a file in the same folder")
  }

  @Test(arguments: ["model.safetensors.index.json", "other.index.json"])
  func `a shard that is an index is refused`(shard: String) throws {
    let folder = try TemporaryFolder()
    let text = "{\"weight_map\":{\"t\":\"\(shard)\"}}"
    try writeIndex(text, in: folder)
    try Data(text.utf8).write(to: URL(filePath: folder(shard)))
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(error.file == folder(shard))
    #expect(error.problem == "is not a file of tensors but an index of shards")
  }

  @Test func `a shard that is a folder is refused`() throws {
    let folder = try TemporaryFolder()
    try FileManager.default.createSymbolicLink(
      atPath: folder("x.safetensors"), withDestinationPath: ".")
    try writeIndex(#"{"weight_map":{"t":"x.safetensors"}}"#, in: folder)
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(error.file == folder("x.safetensors"))
    #expect(error.problem == "is not a file of tensors but a folder")
  }

  @Test func `a shard that is a loop of symbolic links is named`() throws {
    let folder = try TemporaryFolder()
    try makeModel(in: folder)
    let (one, other) = ("model-00002-of-00002.safetensors", "other")
    try FileManager.default.removeItem(atPath: folder(one))
    for (from, to) in [(one, other), (other, one)] {
      try FileManager.default.createSymbolicLink(atPath: folder(from), withDestinationPath: to)
    }
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(error.file == folder(one))
    #expect(
      error.problem
        == "is a loop of symbolic links, but \(folder("model.safetensors.index.json")) names it")
  }

  @Test func `a missing shard is named`() throws {
    let folder = try TemporaryFolder()
    try makeModel(in: folder)
    try FileManager.default.removeItem(atPath: folder("model-00002-of-00002.safetensors"))
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(error.file == folder("model-00002-of-00002.safetensors"))
    #expect(
      error.problem == "is missing, but \(folder("model.safetensors.index.json")) names it")
  }

  @Test func `a tensor that its shard lacks is named`() throws {
    let folder = try TemporaryFolder()
    try makeModel(in: folder)
    try write([tensor("d", 1): [4]], to: folder("model-00002-of-00002.safetensors"))
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(error.file == folder("model-00002-of-00002.safetensors"))
    #expect(error.tensor == "c")
    #expect(
      error.problem
        == "is missing, but \(folder("model.safetensors.index.json")) says that it is here")
  }

  @Test func `a tensor in two shards is refused`() throws {
    let folder = try TemporaryFolder()
    try makeModel(in: folder)
    try write(
      [tensor("a", 2): [1, 2], tensor("c", 3): [4, 5, 6]],
      to: folder("model-00002-of-00002.safetensors"))
    let error = try #require(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
    #expect(error.tensor == "a")
    #expect(error.problem == "is also in \(folder("model-00001-of-00002.safetensors"))")
  }

  @Test func `what is odd is said`() throws {
    let folder = try TemporaryFolder()
    let elsewhere = try TemporaryFolder()
    try makeModel(in: folder)
    let (first, second) = (
      folder("model-00001-of-00002.safetensors"), folder("model-00002-of-00002.safetensors")
    )
    try write([tensor("c", 3): [4, 5, 6], tensor("extra", 1): [0]], to: second)
    try FileManager.default.copyItem(
      atPath: first, toPath: folder("model-00003-of-00003.safetensors"))
    try FileManager.default.moveItem(atPath: first, toPath: elsewhere("blob"))
    try FileManager.default.createSymbolicLink(
      atPath: first, withDestinationPath: elsewhere("blob"))
    let index = folder("model.safetensors.index.json")
    let text = try String(contentsOfFile: index, encoding: .utf8)
    try writeIndex(text.replacing("\"total_size\":6", with: "\"total_size\":7.0"), in: folder)

    let source = try Checkpoint.open(folder.path)
    #expect(source.manifest.tensors.map { $0.name } == ["a", "b", "c"])
    #expect(
      source.warnings == [
        "\(second): tensor \"extra\" left out: not in \(index)",
        "\(index): says total_size 7, but its tensors have 6 bytes",
        "\(folder("model-00003-of-00003.safetensors")): left out: not in \(index)",
        "\(first): symbolic link to \(try #require(resolved(elsewhere.path)))",
      ])
  }

  @Test func `a loop of symbolic links is refused`() throws {
    let folder = try TemporaryFolder()
    try makeModel(in: folder)
    let first = folder("model-00001-of-00002.safetensors")
    try FileManager.default.removeItem(atPath: first)
    try FileManager.default.createSymbolicLink(atPath: first, withDestinationPath: first)
    #expect(throws: CheckpointError.self) { try Checkpoint.open(folder.path) }
  }

  // MARK: Writing

  /// Writes a folder of tensors of these sizes named "0", "1", …
  private func writeFolder(
    _ path: String, sizes: [Int], shardSize: Int, original: String? = nil,
    replacing isReplacing: Bool = false
  ) throws {
    let tensors = try sizes.enumerated().map { try tensor(String($0), $1) }
    let sink = try ModelFolder.create(
      path, Manifest(tensors), shardSize: shardSize, sideFilesOf: original, replacing: isReplacing)
    for (number, tensor) in tensors.enumerated().reversed() {
      let bytes = [UInt8](repeating: UInt8(number), count: tensor.byteCount)
      try sink.write(bytes.span.bytes, of: tensor, at: 0)
    }
    try sink.finish()
  }

  @Test(arguments: [
    ([3, 3, 3], 6, [["0", "1"], ["2"]]), ([9, 1, 1], 6, [["0"], ["1", "2"]]),
    ([1, 9, 1], 6, [["0"], ["1"], ["2"]]), ([6], 6, [["0"]]),
    ([0, 7, 0], 6, [["0", "1"], ["2"]]),
    ([], 6, [[]]), ([1, 1, 1], 1, [["0"], ["1"], ["2"]]),
  ])
  func `tensors fill the shards in order`(sizes: [Int], shardSize: Int, shards: [[String]]) throws {
    let folder = try TemporaryFolder()
    try writeFolder(folder("model"), sizes: sizes, shardSize: shardSize)
    let files =
      shards.count == 1
      ? ["model.safetensors"]
      : (1...shards.count).map { "model-0000\($0)-of-0000\(shards.count).safetensors" }
    for (file, names) in zip(files, shards) {
      let shard = try Safetensors.open(folder("model/\(file)"))
      #expect(shard.manifest.tensors.map { $0.name } == names)
    }
    #expect(
      try FileManager.default.contentsOfDirectory(atPath: folder("model")).sorted()
        == (files + (shards.count > 1 ? ["model.safetensors.index.json"] : [])).sorted())
    let source = try Checkpoint.open(folder("model"))
    #expect(source.warnings == [])
    for (number, size) in sizes.enumerated() {
      let bytes = try source.bytes(of: source.tensor(String(number)))
      #expect(bytes == [UInt8](repeating: UInt8(number), count: size))
    }
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path) == ["model"])
  }

  @Test func `the index says what Hugging Face's says`() throws {
    let folder = try TemporaryFolder()
    try writeFolder(folder("model"), sizes: [4, 4], shardSize: 4)
    let index = try Data(contentsOf: URL(filePath: folder("model/model.safetensors.index.json")))
    #expect(
      String(decoding: index, as: UTF8.self) == """
        {
          "metadata": {
            "total_size": 8
          },
          "weight_map": {
            "0": "model-00001-of-00002.safetensors",
            "1": "model-00002-of-00002.safetensors"
          }
        }

        """)
  }

  @Test func `side files come along, other weights do not`() throws {
    let folder = try TemporaryFolder()
    let files = FileManager.default
    try files.createDirectory(
      atPath: folder("original/1_Pooling"), withIntermediateDirectories: true)
    try files.createDirectory(atPath: folder("original/onnx"), withIntermediateDirectories: true)
    for name in [
      "config.json", "tokenizer.model", "1_Pooling/config.json", "pytorch_model.bin",
      "onnx/model.onnx", ".gitattributes", "model.safetensors.index.json", "vocab.txt",
    ] {
      try Data(name.utf8).write(to: URL(filePath: folder("original/\(name)")))
    }
    try writeFolder(
      folder("model"), sizes: [1], shardSize: 9, original: folder("original"))
    #expect(
      try files.subpathsOfDirectory(atPath: folder("model")).sorted() == [
        "1_Pooling", "1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.model",
        "vocab.txt",
      ])
    #expect(
      files.contentsEqual(
        atPath: folder("original/1_Pooling/config.json"),
        andPath: folder("model/1_Pooling/config.json")))
  }

  @Test func `weights that do not come along are named, the model's own are not`() throws {
    let folder = try TemporaryFolder()
    let files = FileManager.default
    try writeFolder(folder("original"), sizes: [1, 1], shardSize: 1)
    for name in ["2_Dense/model.safetensors", "onnx/a.onnx", "onnx/b.onnx", "tf_model.h5"] {
      let path = folder("original/\(name)")
      try files.createDirectory(
        atPath: String(path[..<path.lastIndex(of: "/")!]), withIntermediateDirectories: true)
      try Data().write(to: URL(filePath: path))
    }
    #expect(
      try ModelFolder.sideFileWarnings(of: folder("original"))
        == ["tf_model.h5", "2_Dense/model.safetensors", "onnx/a.onnx and 1 others"].map {
          "\(folder("original"))/\($0): not copied: weights beside the model's own"
        })
  }

  @Test func `beside a file only a model's usual files come along`() throws {
    let folder = try TemporaryFolder()
    let files = FileManager.default
    try files.createDirectory(
      atPath: folder("original/tokenizer"), withIntermediateDirectories: true)
    let usual = ["tokenizer.json", "tokenizer.model", "vocab.txt"]
    for name in usual + ["diary.txt", "README.md", "other.safetensors", "tokenizer/diary.txt"] {
      try Data(name.utf8).write(to: URL(filePath: folder("original/\(name)")))
    }
    let weights = folder("original/pytorch_model.bin")
    try writeFolder(folder("bare"), sizes: [1], shardSize: 9, original: weights)
    #expect(try files.contentsOfDirectory(atPath: folder("bare")) == ["model.safetensors"])

    try Data("{}".utf8).write(to: URL(filePath: folder("original/config.json")))
    try writeFolder(folder("model"), sizes: [1], shardSize: 9, original: weights)
    #expect(
      try files.contentsOfDirectory(atPath: folder("model")).sorted()
        == (usual + ["config.json", "model.safetensors"]).sorted())
  }

  @Test func `links to folders are not followed, links to files elsewhere are named`() throws {
    let folder = try TemporaryFolder()
    let files = FileManager.default
    for name in ["original/sub", "elsewhere"] {
      try files.createDirectory(atPath: folder(name), withIntermediateDirectories: true)
      try Data(name.utf8).write(to: URL(filePath: folder("\(name)/a.txt")))
    }
    for (link, target) in [
      ("loop", "."), ("away", "../elsewhere"), ("b.txt", "../elsewhere/a.txt"),
      ("c.txt", "sub/a.txt"),
    ] {
      try files.createSymbolicLink(
        atPath: folder("original/\(link)"), withDestinationPath: target)
    }
    try writeFolder(folder("model"), sizes: [1], shardSize: 9, original: folder("original"))
    #expect(
      try files.subpathsOfDirectory(atPath: folder("model")).sorted()
        == ["b.txt", "c.txt", "model.safetensors", "sub", "sub/a.txt"])
    #expect(
      try ModelFolder.sideFileWarnings(of: folder("original"))
        == ["\(folder("original"))/b.txt: symbolic link to \(resolved(folder("elsewhere"))!)"])
  }

  @Test func `folders without end are refused before anything is written`() throws {
    let folder = try TemporaryFolder()
    let deep = "original" + String(repeating: "/d", count: 10)
    try FileManager.default.createDirectory(
      atPath: folder(deep), withIntermediateDirectories: true)
    let error = try #require(throws: CheckpointError.self) {
      try writeFolder(folder("model"), sizes: [1], shardSize: 9, original: folder("original"))
    }
    #expect(error.file == folder("original"))
    #expect(error.problem == "has folders in folders more than 8 deep")
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path) == ["original"])
  }

  @Test func `a sink that is dropped leaves nothing`() throws {
    let folder = try TemporaryFolder()
    do {
      let sink = try ModelFolder.create(folder("model"), Manifest([tensor("a", 1)]))
      try sink.write([1 as UInt8].span.bytes, of: tensor("a", 1), at: 0)
    }
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path) == [])
  }

  @Test func `a folder with files in it is refused or wholly replaced`() throws {
    let folder = try TemporaryFolder()
    try writeFolder(folder("model"), sizes: [1, 1], shardSize: 1)
    let error = try #require(throws: CheckpointError.self) {
      try writeFolder(folder("model"), sizes: [5], shardSize: 9)
    }
    #expect(error.problem == "is a folder with files in it")
    try writeFolder(folder("model"), sizes: [5], shardSize: 9, replacing: true)
    #expect(
      try FileManager.default.contentsOfDirectory(atPath: folder("model")) == ["model.safetensors"])
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path) == ["model"])
  }

  @Test func `an empty folder is filled`() throws {
    let folder = try TemporaryFolder()
    try FileManager.default.createDirectory(
      atPath: folder("model"), withIntermediateDirectories: false)
    try writeFolder(folder("model/"), sizes: [1], shardSize: 9)
    #expect(try Checkpoint.open(folder("model")).manifest.tensors.count == 1)
  }

  @Test func `what a link leads to is not replaced`() throws {
    let folder = try TemporaryFolder()
    try writeFolder(folder("model"), sizes: [1], shardSize: 9)
    let files = FileManager.default
    try files.createSymbolicLink(atPath: folder("link"), withDestinationPath: "model")
    for path in ["link", "link/"] {
      let error = try #require(throws: CheckpointError.self) {
        try writeFolder(folder(path), sizes: [5], shardSize: 9, replacing: true)
      }
      #expect(
        error.description
          == "\(folder(path)): is a symbolic link; name the folder itself")
    }
    removeFolder(folder("link"))
    #expect(try files.contentsOfDirectory(atPath: folder("model")) == ["model.safetensors"])
    #expect(try files.contentsOfDirectory(atPath: folder.path).sorted() == ["link", "model"])
  }

  @Test func `a folder may have a name of 255 bytes`() throws {
    let folder = try TemporaryFolder()
    let name = String(repeating: "n", count: 255)
    try writeFolder(folder(name), sizes: [1], shardSize: 9)
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path) == [name])
  }
}
