import Checkpoints
import Foundation
import TestSupport
import Testing

/// The commands disentangle and gram, on the digits experts.
struct DisentangleTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  private static let digits = URL(filePath: #filePath).deletingLastPathComponent()
    .appending(path: "../../Fixtures/digits").standardizedFileURL.path
  private static let experts = ["upright", "rotated", "inverted", "shuffled"]
  private static let family =
    ["--base", "\(digits)/base.safetensors"]
    + experts.flatMap { ["--expert", "\($0)=\(digits)/\($0).safetensors"] }

  private func json(_ text: String) throws -> [String: Any] {
    try #require(JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any])
  }

  @Test func `a folder gets a file an expert, the inner products and the page`() throws {
    let result = try smelt(
      ["disentangle"] + Self.family + ["-o", folder("out"), "--redundant", folder("d.safetensors")])
    #expect(result.code == 0, "\(result.errors)")
    #expect(result.output.contains("awd-row scope=row objective=abs optimizer=descent"))
    #expect(result.output.contains("vision_model.encoder.layers.3"))
    let names = try FileManager.default.contentsOfDirectory(atPath: folder("out")).sorted()
    #expect(
      names == [
        "gram.safetensors", "inverted.safetensors", "report.html", "rotated.safetensors",
        "shuffled.safetensors", "upright.safetensors",
      ])
    let name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    let base = try Checkpoint.open("\(Self.digits)/base.safetensors").floats(of: name)
    let redundant = try Checkpoint.open(folder("d.safetensors")).floats(of: name)
    #expect(redundant.contains { $0 != 0 })
    for expert in Self.experts {
      let cleaned = try Checkpoint.open(folder("out/\(expert).safetensors"))
      #expect(cleaned.manifest.metadata["task_vector"] == expert)
      #expect(cleaned.manifest.metadata["cleaning"]!.hasPrefix("awd-row scope=row"))
      let own = try Checkpoint.open("\(Self.digits)/\(expert).safetensors").floats(of: name)
      let values = try cleaned.floats(of: name)
      for index in values.indices {
        #expect(values[index] == (own[index] - base[index]) - redundant[index])
      }
    }
  }

  @Test func `one HDF5 file gets a group an expert`() throws {
    let result = try smelt(
      ["disentangle"] + Self.family + ["-o", folder("all.h5"), "--clean", "awd-model", "--json"])
    #expect(result.code == 0, "\(result.errors)")
    #expect(try folder.names == ["all.gram.safetensors", "all.h5", "all.report.html"])
    let all = try Checkpoint.open(folder("all.h5"))
    for expert in Self.experts {
      #expect(all.manifest["\(expert)/vision_model.post_layernorm.weight"] != nil)
    }
    let report = try json(result.output)
    let whole = try #require(report["whole"] as? [String: Any])
    #expect((whole["retainedNorms"] as? [String: Double])?.count == 4)
    #expect((whole["cosinesBefore"] as? [[Double]])?[2][2] == 1)
    #expect((report["groups"] as? [[String: Any]])?.count == 1)
    #expect((report["layers"] as? [[String: Any]])?.count == 4)
  }

  @Test func `given Gram matrices the result is the same`() throws {
    let measured = try smelt(["gram"] + Self.family + ["-o", folder("g.safetensors")])
    #expect(measured.code == 0, "\(measured.errors)")
    #expect(measured.output.hasPrefix("whole model\n"))
    #expect(measured.output.contains("\nvision_model.encoder.layers.0\n"))
    let clean = ["--clean", "awd-model,scope=block,penalty=0.01", "--exclude", "*.bias"]
    let plain = try smelt(["disentangle"] + Self.family + ["-o", folder("a.h5")] + clean)
    let reused = try smelt(
      ["disentangle"] + Self.family + ["-o", folder("b.h5"), "--gram", folder("g.safetensors")]
        + clean)
    #expect(plain.code == 0 && reused.code == 0, "\(plain.errors) \(reused.errors)")
    let (one, other) = (try Checkpoint.open(folder("a.h5")), try Checkpoint.open(folder("b.h5")))
    for tensor in one.manifest.tensors {
      #expect(try one.bytes(of: tensor) == other.bytes(of: tensor), "\(tensor.name)")
    }
  }

  @Test func `the page is one file that asks for nothing else`() throws {
    _ = try smelt(["disentangle"] + Self.family + ["-o", folder("out")])
    let page = try String(contentsOfFile: folder("out/report.html"), encoding: .utf8)
    #expect(page.hasPrefix("<!DOCTYPE html>"))
    #expect(page.components(separatedBy: "<svg").count == 5)
    for word in ["http", "<script", "@import", "url("] { #expect(!page.contains(word)) }
    #expect(page.contains("prefers-color-scheme: dark"))
  }

  @Test func `a name from a stranger's file is text on the page`() throws {
    let name = "layers.0.<script>alert(1)</script>"
    for (file, value) in [("base", Float(0)), ("a", 1), ("b", 2)] {
      try Checkpoint.write(
        [SmallTensor(name, [2, 2], [value, 1, 1, value * value])],
        to: folder("\(file).safetensors"))
    }
    let result = try smelt(
      "disentangle", "--base", folder("base.safetensors"), "--expert",
      "<b>=\(folder("a.safetensors"))", "--expert", "c=\(folder("b.safetensors"))", "-o",
      folder("out.h5"), "--clean", "awd-model")
    #expect(result.code == 0, "\(result.errors)")
    let page = try String(contentsOfFile: folder("out.report.html"), encoding: .utf8)
    #expect(page.contains("&lt;b&gt;") && !page.contains("<b>=") && !page.contains("<script>"))
  }

  @Test func `one expert alone is one sentence and leaves nothing`() throws {
    let result = try smelt(["disentangle"] + Self.family.prefix(4) + ["-o", folder("x.h5")])
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: one expert alone has nothing redundant; cleaning takes at least two experts\n")
    #expect(try folder.names == [])
  }

  @Test func `what fails leaves no folder, and what was there stays`() throws {
    let failing = ["disentangle"] + Self.family.prefix(6) + ["--clean", "awd-model", "--gram"]
    _ = try smelt(["gram"] + Self.family + ["-o", folder("g.safetensors")])
    for _ in 0..<2 {
      let result = try smelt(failing + [folder("g.safetensors"), "-o", folder("out")])
      #expect(
        result.errors
          == "Error: the Gram matrices are of the experts upright, rotated, inverted, shuffled, not upright, rotated; give the same experts in the same order\n"
      )
      #expect(result.code == 1)
    }
    #expect(try folder.names == ["g.safetensors"])
  }

  @Test func `a plan says what is read twice and why, and writes nothing`() throws {
    let plan = ["disentangle"] + Self.family + ["-o", folder("out"), "--dry-run", "--clean"]
    let once = try smelt(plan + ["awd-model,scope=block"])
    #expect(once.code == 0, "\(once.errors)")
    #expect(once.output.contains(", each byte once, writes 3."))
    let twice = try smelt(plan + ["awd-model", "--memory", "1MiB"])
    #expect(
      twice.output.contains(
        "the group that is cleaned does not fit the memory beside the tiles, and is read twice ("))
    #expect(try folder.names == [])
  }

  @Test func `Gram matrices are not needed for rows, which is said`() throws {
    _ = try smelt(["gram"] + Self.family + ["-o", folder("g.safetensors")])
    let result = try smelt(
      ["disentangle"] + Self.family + ["-o", folder("x.h5"), "--gram", folder("g.safetensors")])
    #expect(result.code == 0)
    #expect(
      result.errors.contains(
        "smelt: --gram is not needed: rows are solved on the way, in one reading\n"))
  }

  @Test func `no input is written over, the Gram matrices neither`() throws {
    _ = try smelt(["gram"] + Self.family + ["-o", folder("g.safetensors")])
    let before = try Checkpoint.open(folder("g.safetensors")).manifest.tensors
    let clean = ["--clean", "awd-model", "--gram", folder("g.safetensors")]
    for output in [
      ["-o", folder("g.safetensors")],
      ["-o", folder("x.h5"), "--redundant", folder("g.safetensors")],
    ] {
      let result = try smelt(["disentangle"] + Self.family + clean + output)
      #expect(result.code == 1)
      #expect(
        result.errors
          == "Error: \(folder("g.safetensors")): is also an input; write to another name\n")
    }
    // The Gram matrices that are written beside the output go to the file that was read.
    try FileManager.default.createDirectory(
      atPath: folder("out"), withIntermediateDirectories: true)
    try FileManager.default.moveItem(
      atPath: folder("g.safetensors"), toPath: folder("out/gram.safetensors"))
    let result = try smelt(
      ["disentangle"] + Self.family
        + ["--clean", "awd-model", "--gram", folder("out/gram.safetensors"), "-o", folder("out")])
    #expect(
      result.errors
        == "Error: \(folder("out/gram.safetensors")): is also an input; write to another name\n")
    #expect(try folder.names == ["out"])
    #expect(try Checkpoint.open(folder("out/gram.safetensors")).manifest.tensors == before)
  }

  @Test func `what is not understood in --clean is wrong usage`() throws {
    let result = try smelt(
      ["disentangle"] + Self.family + ["-o", folder("x.h5"), "--clean", "awd-row,scope=all"])
    #expect(result.code == 64)
    #expect(result.errors.contains("scope is one of row, tensor, block, model, not \"all\""))
  }

  @Test func `a penalty that cleans nothing is said`() throws {
    let result = try smelt(
      ["disentangle"] + Self.family + ["-o", folder("x.h5"), "--clean", "awd-model,penalty=9"])
    #expect(result.code == 0)
    #expect(result.errors.contains("smelt: there is nothing to gain: the penalty 9 is at or above"))
  }

  @Test func `a descent that overshoots is said`() throws {
    let result = try smelt(
      ["disentangle"] + Self.family
        + ["-o", folder("x.h5"), "--clean", "awd-model,scope=tensor,penalty=none,rate=50"])
    #expect(result.code == 0)
    #expect(result.errors.contains("smelt: the descent overshot: the mean |cos| rose from 0."))
    #expect(result.errors.contains("; lower the rate, or use optimizer=converged\n"))
  }

  @Test(arguments: ["awd-model", "awd-model,scope=block", "awd-row,optimizer=converged"])
  func `upscale cleans in every scope and says so in the mixture`(clean: String) throws {
    let result = try smelt(
      ["upscale"] + Self.family + ["-o", folder("moe.h5"), "--clean", clean])
    #expect(result.code == 0, "\(result.errors)")
    #expect(result.output.contains("before cleaning"))
    let metadata = try Checkpoint.open(folder("moe.h5")).manifest.metadata["wemoe"]!
    let cleaning = try #require(try json(metadata)["cleaning"] as? String)
    #expect(cleaning.hasPrefix(clean.prefix { $0 != "," } + " scope="))
  }
}
