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

  @Test func `an output without a known ending is refused`() throws {
    try Checkpoint.write([SmallTensor("a", [1], [1])], to: folder("a.safetensors"))
    let result = try smelt("convert", folder("a.safetensors"), folder("a.xyz"))
    #expect(result.code == 1)
    #expect(result.errors.contains("has no ending that names a format; end it in one of"))
    #expect(try folder.names == ["a.safetensors"])
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
