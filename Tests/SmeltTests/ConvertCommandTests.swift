import Checkpoints
import Foundation
import TestSupport
import Testing

/// The options of `smelt convert`.
struct ConvertCommandTests {
  let folder: TemporaryFolder

  init() throws {
    folder = try TemporaryFolder()
    try Checkpoint.write(
      [
        SmallTensor("model.a.weight", [2, 2], [1, 1.0039, 70000, -2]),
        SmallTensor("model.b.weight", [4], [1, 2, 3, 4]),
        SmallTensor("head.bias", [2], [5, 6]),
      ], to: folder("in.safetensors"))
  }

  @Test func `types are rounded to nearest even`() throws {
    let result = try smelt(
      "convert", folder("in.safetensors"), folder("out.safetensors"), "--dtype", "bf16")
    #expect(result.code == 0, "\(result.errors)")
    let output = try Checkpoint.open(folder("out.safetensors"))
    #expect(try output.tensor("model.a.weight").dtype == .bf16)
    // 1.0039 lies just below the middle of 1 and the next BF16, 1.0078125.
    #expect(try output.floats(of: "model.a.weight") == [1, 1, 70144, -2])
  }

  @Test func `a number too large for the type is refused, or becomes infinite if allowed`() throws {
    let arguments = ["convert", folder("in.safetensors"), folder("out.h5"), "--dtype", "F16"]
    let refused = try smelt(arguments)
    #expect(refused.code == 1)
    #expect(
      refused.errors
        == "Error: \(folder("in.safetensors")): tensor \"model.a.weight\": has the value 70000.0 at its element 2, too large for F16; choose a type of more exponent bits, or allow infinities (--allow-overflow)\n"
    )
    #expect(try folder.names == ["in.safetensors"])
    #expect(try smelt(arguments + ["--allow-overflow"]).code == 0)
    let output = try Checkpoint.open(folder("out.h5"))
    #expect(try output.floats(of: "model.a.weight")[2] == .infinity)
  }

  @Test(arguments: ["out.npz", "out.safetensors.zst"])
  func `sha256 is refused where a format has checksums of its own`(_ name: String) throws {
    let result = try smelt("convert", folder("in.safetensors"), folder(name), "--sha256")
    #expect(result.code == 64)
    #expect(result.errors.hasPrefix("Error: --sha256 is for safetensors and HDF5"))
  }

  @Test func `what a killed run has left is named and not used`() throws {
    // No process has the highest number there is.
    let leftover = folder(".out.h5.2147483647.partial")
    try Data([1, 2, 3]).write(to: URL(filePath: leftover))
    // Of another output, and of a process that is there.
    for name in [".other.h5.2147483647.partial", ".out.h5.1.partial"] {
      try Data().write(to: URL(filePath: folder(name)))
    }
    let result = try smelt("convert", folder("in.safetensors"), folder("out.h5"))
    #expect(result.code == 0)
    #expect(
      result.errors
        == "smelt: an earlier run that wrote \(folder("out.h5")) was killed; its unfinished files are still there and can be removed: \(leftover)\n"
    )
    #expect(try Data(contentsOf: URL(filePath: leftover)) == Data([1, 2, 3]))
  }

  @Test func `tensors are chosen and renamed by pattern`() throws {
    let result = try smelt(
      "convert", folder("in.safetensors"), folder("out.npz"), "--include", "model.*",
      "--exclude", "*.b.*", "--rename", #"^model\.(.*)=encoder.$1"#)
    #expect(result.code == 0, "\(result.errors)")
    let output = try Checkpoint.open(folder("out.npz"))
    #expect(output.manifest.tensors.map { $0.name } == ["encoder.a.weight"])
  }

  @Test func `a pattern that leaves nothing is refused`() throws {
    let result = try smelt(
      "convert", folder("in.safetensors"), folder("out.h5"), "--include", "nothing*")
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: \(folder("in.safetensors")): has no tensor that --include and --exclude leave; list its names with 'smelt inspect'\n"
    )
  }

  @Test func `a model's folder is cut into shards and gets the side files`() throws {
    try FileManager.default.createDirectory(
      atPath: folder("model"), withIntermediateDirectories: false)
    try Data("{}".utf8).write(to: URL(filePath: folder("model/config.json")))
    #expect(
      try smelt("convert", folder("in.safetensors"), folder("model/model.safetensors")).code == 0)
    let result = try smelt("convert", folder("model"), folder("out"), "--max-shard-size", "20B")
    #expect(result.code == 0, "\(result.errors)")
    #expect(
      try FileManager.default.contentsOfDirectory(atPath: folder("out")).sorted() == [
        "config.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors", "model.safetensors.index.json",
      ])
    #expect(try smelt("diff", folder("out"), folder("in.safetensors")).code == 0)
    let again = try smelt("convert", folder("in.safetensors"), folder("out/"))
    #expect(again.code == 1)
    #expect(again.errors.contains("is a folder with files in it"))
    #expect(try smelt("convert", folder("in.safetensors"), folder("out/"), "--force").code == 0)
    #expect(try smelt("diff", folder("out"), folder("in.safetensors")).code == 0)
  }

  @Test func `a folder that holds the input is not replaced`() throws {
    let result = try smelt(
      "convert", folder("in.safetensors"), folder.path + "/", "--force")
    #expect(result.code == 1)
    #expect(result.errors.contains("holds the input"))
    #expect(try folder.names == ["in.safetensors"])
  }

  @Test(arguments: [
    (["--layout", "tree"], "--layout is for HDF5 outputs"),
    (["--compress", "zstd"], "--compress is for HDF5 outputs"),
    (["--max-shard-size", "1GB"], "--max-shard-size writes a model's folder"),
    (["--rename", "abc"], "is not of the form FROM=TO"),
    (["--rename", "(=x"], "is not a regular expression"),
    (["--allow-overflow"], "--allow-overflow goes with --dtype"),
    (["--dtype", "I8"], "'I8' is invalid"),
  ])
  func `options that do not suit are wrong usage`(options: [String], message: String) throws {
    let result = try smelt(
      ["convert", folder("in.safetensors"), folder("out.safetensors")] + options)
    #expect(result.code == 64)
    #expect(result.errors.contains(message), "\(result.errors)")
  }

  @Test(arguments: ["model", "model/", "model/model.safetensors"])
  func `the configuration says the new type`(input: String) throws {
    #expect(try smelt("convert", folder("in.safetensors"), folder("model/")).code == 0)
    let text = #"{"torch_dtype": "float32", "dtype":"float32", "hidden_size": 4}"#
    try Data(text.utf8).write(to: URL(filePath: folder("model/config.json")))
    for (options, expected) in [([], "float32"), (["--dtype", "BF16"], "bfloat16")] {
      let result = try smelt(["convert", folder(input), folder("out/"), "--force"] + options)
      #expect(result.code == 0, "\(result.errors)")
      #expect(
        try String(contentsOfFile: folder("out/config.json"), encoding: .utf8)
          == text.replacing("float32", with: expected))
    }
  }

  @Test func `inspect says what is odd`() throws {
    try makeShards("sh")
    try Data().write(to: URL(filePath: folder("sh/model-00009-of-00009.safetensors")))
    let result = try smelt("inspect", folder("sh"))
    #expect(result.code == 0)
    #expect(
      result.errors
        == "smelt: \(folder("sh/model-00009-of-00009.safetensors")): left out: not in \(folder("sh/model.safetensors.index.json"))\n"
    )
  }

  // MARK: Outputs that are inputs

  /// A folder of two shards.
  private func makeShards(_ name: String) throws {
    let result = try smelt(
      "convert", folder("in.safetensors"), folder(name), "--max-shard-size", "16")
    #expect(result.code == 0, "\(result.errors)")
  }

  @Test(arguments: [
    ("sh", "sh/model-00001-of-00003.safetensors"),
    ("sh/model.safetensors.index.json", "sh/model-00003-of-00003.safetensors"),
    ("single", "single/model.safetensors"), ("single", "link.safetensors"),
  ])
  func `a file that is read is not written`(input: String, output: String) throws {
    try makeShards("sh")
    #expect(try smelt("convert", folder("in.safetensors"), folder("single/")).code == 0)
    try FileManager.default.createSymbolicLink(
      atPath: folder("link.safetensors"), withDestinationPath: folder("single/model.safetensors"))
    let before = try Data(contentsOf: URL(filePath: folder(output)))
    for options in [[], ["--dtype", "BF16"]] {
      let result = try smelt(["convert", folder(input), folder(output)] + options)
      #expect(result.code == 1)
      #expect(
        result.errors.hasSuffix(
          "Error: \(folder(output)): is also an input; write to another name\n"),
        "\(result.errors)")
    }
    #expect(try Data(contentsOf: URL(filePath: folder(output))) == before)
  }

  @Test func `a folder that links lead into is not replaced`() throws {
    try makeShards("blobs")
    let files = FileManager.default
    try files.createDirectory(atPath: folder("snap"), withIntermediateDirectories: false)
    let names = try files.contentsOfDirectory(atPath: folder("blobs")).sorted()
    for name in names {
      try files.createSymbolicLink(
        atPath: folder("snap/\(name)"), withDestinationPath: "../blobs/\(name)")
    }
    let result = try smelt("convert", folder("snap"), folder("blobs/"), "--force")
    #expect(result.code == 1)
    #expect(
      result.errors.contains("Error: \(folder("blobs/")): holds the input \(folder("snap/"))"))
    #expect(try files.contentsOfDirectory(atPath: folder("blobs")).sorted() == names)
  }
}
