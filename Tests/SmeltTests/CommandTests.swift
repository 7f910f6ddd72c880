import Checkpoints
import Foundation
import TestSupport
import Testing

/// The built command, run as a user runs it.
struct CommandTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  @Test func `help names every subcommand`() throws {
    let result = try smelt("--help")
    #expect(result.code == 0)
    for name in ["inspect", "convert", "upscale", "calibrate", "pack", "unpack"] {
      #expect(result.output.contains("  \(name) "), "\(name) is missing from the help")
    }
  }

  @Test func `wrong usage exits with 64 and names the way out`() throws {
    let result = try smelt("inspect")
    #expect(result.code == 64)
    #expect(result.errors.contains("Missing expected argument '<path>'"))
  }

  @Test func `a missing file is one sentence and exit code 1`() throws {
    let result = try smelt("inspect", folder("none.safetensors"))
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: \(folder("none.safetensors")): cannot be opened: No such file or directory\n")
  }

  @Test func `inspect shows tensors, metadata and totals`() throws {
    try Checkpoint.write(
      [SmallTensor("a.weight", [2, 3], dtype: .bf16, [1, 2, 3, 4, 5, 6])],
      to: folder("a.safetensors"), metadata: ["format": "pt"])
    let result = try smelt("inspect", folder("a.safetensors"))
    #expect(
      result.output == """
        type  shape   size  tensor
        BF16  [2, 3]  12 B  a.weight
        format = pt
        1 tensors, 6 elements, 12 B

        """)
  }

  @Test func `inspect prints JSON for programs`() throws {
    try Checkpoint.write(
      [SmallTensor("a", [2], [1, 2])], to: folder("a.safetensors"), metadata: ["k": "v"])
    let result = try smelt("inspect", "--json", folder("a.safetensors"))
    let json = try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any]
    #expect(json?["bytes"] as? Int == 8)
    #expect(json?["metadata"] as? [String: String] == ["format": "pt", "k": "v"])
    let tensor = (json?["tensors"] as? [[String: Any]])?.first
    #expect(tensor?["name"] as? String == "a")
    #expect(tensor?["shape"] as? [Int] == [2])
    #expect(tensor?["dtype"] as? String == "F32")
  }

  @Test func `inspect says how a bundle keeps each tensor and what that has lost`() throws {
    let values = (0..<64).map { Float($0 % 16) - 7.5 }
    try Checkpoint.write(
      [SmallTensor("a.weight", [4, 16], values), SmallTensor("a.bias", [2], [1, 2])],
      to: folder("a.safetensors"))
    _ = try smelt("pack", "--lossy", "int4", folder("a.safetensors"), folder("b.safetensors.zst"))
    // Half a step of scale 7.5/7 is the most that can be lost; the recipe has the mean square.
    let result = try smelt("inspect", folder("b.safetensors.zst"))
    let lines = result.output.split(separator: "\n").map { $0.split(separator: " ") }
    #expect(lines[0] == ["type", "shape", "size", "codec", "error", "tensor"])
    let weight = try #require(lines.first { $0.last == "a.weight" && $0.count == 8 })
    #expect(weight[5] == "int4")
    let error = try #require(Double(weight[6]))
    #expect(error > 0.01 && error < 0.1)
    #expect(lines.contains { $0.last == "a.bias" && $0.contains("raw") && $0.count == 6 })
    #expect(
      result.output.hasSuffix("largest error: \(weight[6]) of the tensor's norm, in a.weight\n"))

    let text = try smelt("inspect", "--json", folder("b.safetensors.zst")).output
    let json = try JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any]
    let tensors = try #require(json?["tensors"] as? [[String: Any]])
    let described = try #require(tensors.first { $0["name"] as? String == "a.weight" })
    #expect(described["codec"] as? String == "int4")
    #expect(abs(try #require(described["error"] as? Double) - error) < 1e-5)
    let exact = try #require(tensors.first { $0["name"] as? String == "a.bias" })
    #expect(exact["codec"] as? String == "raw" && exact["error"] == nil)
  }

  @Test func `inspect shows no errors of a bundle that has lost nothing`() throws {
    try Checkpoint.write([SmallTensor("a", [2], [1, 2])], to: folder("a.safetensors"))
    _ = try smelt("pack", folder("a.safetensors"), folder("b.safetensors.zst"))
    let result = try smelt("inspect", folder("b.safetensors.zst"))
    #expect(
      result.output.hasPrefix(
        """
        type  shape  size  codec  tensor
        F32   [2]     8 B  raw    a

        """))
    #expect(!result.output.contains("error"))
  }

  @Test func `an output without a known ending is refused`() throws {
    try Checkpoint.write([SmallTensor("a", [1], [1])], to: folder("a.safetensors"))
    let result = try smelt("convert", folder("a.safetensors"), folder("a.xyz"))
    #expect(result.code == 64)
    #expect(
      result.errors.hasPrefix(
        "Error: The output's ending names no format: '\(folder("a.xyz"))'. End it in one of .safetensors, "
      ))
    #expect(try folder.names == ["a.safetensors"])
    // Of these the ending is looked at before anything else, too.
    for command in [
      ["unpack", "x", "-o", "y.pt"], ["collapse", "x", "-o", "y", "--expert", "z"],
      ["calibrate", "x", "--activations", "z", "-o", "y.bin"],
      ["activations", "x", "z", "-o", "y"],
      ["upscale", "--base", "x", "--expert", "a=x", "-o", "y"],
      ["upscale", "--base", "x", "--expert", "a=x", "-o", "y.h5", "--task-vectors", "z"],
    ] {
      let result = try smelt(command)
      #expect(result.code == 64, "\(command)")
      #expect(result.errors.hasPrefix("Error: The output's ending names no format: '"))
    }
  }

  @Test(arguments: ["b.safetensors", "b.h5", "b.npz", "b.safetensors.zst", "b/"])
  func `an output that takes another's place keeps its permissions`(name: String) throws {
    try Checkpoint.write([SmallTensor("a", [1], [1])], to: folder("a.safetensors"))
    func mode() throws -> Int? {
      try FileManager.default.attributesOfItem(atPath: folder(name))[.posixPermissions] as? Int
    }
    let new = try smelt("convert", folder("a.safetensors"), folder(name))
    #expect(new.code == 0)
    #expect(try mode() == (name.hasSuffix("/") ? 0o755 : 0o644))
    for permissions in [0o700, 0o600 | (name.hasSuffix("/") ? 0o100 : 0o064)] {
      try FileManager.default.setAttributes(
        [.posixPermissions: permissions], ofItemAtPath: folder(name))
      let force = name.hasSuffix("/") ? ["--force"] : []
      #expect(try smelt(["convert", folder("a.safetensors"), folder(name)] + force).code == 0)
      #expect(try mode() == permissions)
    }
  }

  @Test func `an output that is an input is refused, also through a link`() throws {
    try Checkpoint.write([SmallTensor("a", [1], [1])], to: folder("a.safetensors"))
    try FileManager.default.createSymbolicLink(
      atPath: folder("b.safetensors"), withDestinationPath: "a.safetensors")
    let before = try Data(contentsOf: URL(filePath: folder("a.safetensors")))
    let result = try smelt("convert", folder("a.safetensors"), folder("b.safetensors"))
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: \(folder("b.safetensors")): is also an input; write to another name\n")
    #expect(try Data(contentsOf: URL(filePath: folder("a.safetensors"))) == before)
  }
}

/// `smelt verify` and `smelt diff`, with their exit codes.
struct IdentityCommandTests {
  let folder: TemporaryFolder

  init() throws {
    folder = try TemporaryFolder()
    try Checkpoint.write(
      [SmallTensor("a", [2], [3, 4]), SmallTensor("b", [1], [1])], to: folder("one.safetensors"))
  }

  @Test func `verify says what it checked and what it did not`() throws {
    let structure = try smelt("verify", folder("one.safetensors"))
    #expect(structure.code == 0)
    #expect(
      structure.output == """
        structure: valid, 2 tensors, 12 B
        not checked: the tensors' data (--data, --against)

        """)
    let data = try smelt("verify", folder("one.safetensors"), "--data")
    #expect(data.code == 0)
    #expect(
      data.output == """
        structure: valid, 2 tensors, 12 B
        data: 2 of 2 tensors have the checksum they were written with

        """)
  }

  @Test func `a flipped bit is found and the tensor is named`() throws {
    let path = folder("one.safetensors")
    var bytes = try Data(contentsOf: URL(filePath: path))
    bytes[bytes.count - 1] ^= 1
    try bytes.write(to: URL(filePath: path))
    let result = try smelt("verify", path, "--data")
    #expect(result.code == 1)
    #expect(
      result.output.contains(
        "data: tensor \"b\" is not what was written: its checksum differs\n"
          + "a file that was changed on purpose has to be saved without \"checksums\" in its metadata\n"
      ))
  }

  @Test func `a header of other tensors fails to verify, and is converted with a warning`() throws {
    let path = folder("one.safetensors")
    var bytes = try Data(contentsOf: URL(filePath: path))
    let name = try #require(bytes.firstRange(of: Data("\"b\"".utf8)))
    bytes[name.lowerBound + 1] = UInt8(ascii: "c")
    try bytes.write(to: URL(filePath: path))
    let result = try smelt("verify", path, "--data")
    #expect(result.code == 1)
    #expect(
      result.output.hasSuffix(
        """
        data: the names, types or shapes in \(path) are not those that its checksums were recorded for: its header is damaged, or another program saved it with other tensors and has to save it without "checksums" in its metadata
        data: 0 of 2 tensors have the checksum they were written with
        not checked: 2 tensors have no recorded checksum of their own; their data can be read

        """))
    let converted = try smelt("convert", path, folder("copy.h5"))
    #expect(converted.code == 0)
    #expect(
      converted.errors
        == "smelt: \(path): its recorded checksums are of tensors of other names, types or shapes and are not compared; 'smelt verify --data' says what to do\n"
    )
  }

  @Test func `a tensor that cannot be read is listed and the others are compared`() throws {
    let bundle = folder("two.safetensors.zst")
    #expect(try smelt("pack", folder("one.safetensors"), bundle).code == 0)
    var packed = try Data(contentsOf: URL(filePath: bundle))
    // The header's frame comes first, then the tensors'.
    let frames = packed.ranges(of: Data([0x28, 0xB5, 0x2F, 0xFD]))
    packed[frames[1].lowerBound + 6] ^= 1
    try packed.write(to: URL(filePath: bundle))
    let cause = "\(bundle): tensor \"a\": has a damaged frame; the bundle is damaged: get it again"
    let result = try smelt("verify", bundle, "--data", "--against", folder("one.safetensors"))
    #expect(result.code == 1)
    #expect(
      result.output.hasSuffix(
        """
        data: tensor "a" cannot be read: \(cause)
        data: 1 of 2 tensors have the checksum they were written with
        not compared with \(folder("one.safetensors")): \(cause)

        """))
    let difference = try smelt("diff", bundle, folder("one.safetensors"))
    #expect(difference.code == 1)
    #expect(
      difference.output
        == "not compared: \(cause)\n1 of 2 common tensors are the same, bit for bit\n")
  }

  @Test func `the same tensors in another format are the same`() throws {
    #expect(try smelt("convert", folder("one.safetensors"), folder("one.h5")).code == 0)
    #expect(
      try smelt("verify", folder("one.h5"), "--against", folder("one.safetensors")).code == 0)
    let result = try smelt("diff", folder("one.safetensors"), folder("one.h5"))
    #expect(result.code == 0)
    #expect(result.output == "2 of 2 common tensors are the same, bit for bit\n")
  }

  @Test func `a difference is measured and exits with 1`() throws {
    try Checkpoint.write(
      [SmallTensor("a", [2], [3, 4.5]), SmallTensor("c", [1], [1])], to: folder("two.safetensors"))
    let result = try smelt("diff", folder("one.safetensors"), folder("two.safetensors"))
    #expect(result.code == 1)
    #expect(
      result.output == """
        only in \(folder("one.safetensors")): "b"
        only in \(folder("two.safetensors")): "c"
        max |a−b|   relative      cosine  tensor
        5.000e-01  1.000e-01  0.99846035  "a"
        0 of 1 common tensors are the same, bit for bit

        """)
    let json = try smelt("diff", "--json", folder("one.safetensors"), folder("two.safetensors"))
    let report = try JSONSerialization.jsonObject(with: Data(json.output.utf8)) as? [String: Any]
    #expect(report?["onlyInSecond"] as? [String] == ["c"])
    #expect((report?["tensors"] as? [[String: Any]])?.first?["maximum"] as? Double == 0.5)
  }
}

/// `smelt upscale` on models that do not fit each other.
struct UpscaleCommandTests {
  @Test func `an expert of another shape is refused and nothing is left behind`() throws {
    let folder = try TemporaryFolder()
    let name = "encoder.layers.0.mlp.fc1.weight"
    try Checkpoint.write(
      [SmallTensor(name, [2, 3], .init(repeating: 1, count: 6))], to: folder("b.safetensors"))
    try Checkpoint.write(
      [SmallTensor(name, [3, 2], .init(repeating: 1, count: 6))], to: folder("e.safetensors"))
    let result = try smelt(
      "upscale", "--base", folder("b.safetensors"), "--expert", "e=\(folder("e.safetensors"))",
      "-o", folder("moe.h5"), "--task-vectors", folder("tv.safetensors"))
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: \(folder("e.safetensors")): tensor \"\(name)\": has the shape [3, 2] but [2, 3] in \(folder("b.safetensors")); an expert must be fine-tuned from the base it is merged with\n"
    )
    #expect(try folder.names == ["b.safetensors", "e.safetensors"])
  }
}

extension UpscaleCommandTests {
  @Test func `two outputs of one name are refused and what is there stays`() throws {
    let folder = try TemporaryFolder()
    let name = "encoder.layers.0.mlp.fc1.weight"
    try Checkpoint.write(
      [SmallTensor(name, [2, 3], [1, 2, 3, 4, 5, 6])], to: folder("b.safetensors"))
    try Data("precious".utf8).write(to: URL(filePath: folder("moe.h5")))
    let result = try smelt(
      "upscale", "--base", folder("b.safetensors"), "--expert", "e=\(folder("b.safetensors"))",
      "-o", folder("moe.h5"), "--task-vectors", "\(folder.path)/./moe.h5")
    #expect(result.code == 1)
    #expect(result.errors.contains("is being written already; give each output its own name"))
    #expect(try String(contentsOfFile: folder("moe.h5"), encoding: .utf8) == "precious")
    #expect(try folder.names == ["b.safetensors", "moe.h5"])
  }
}
