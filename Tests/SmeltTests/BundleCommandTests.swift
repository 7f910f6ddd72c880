import Checkpoints
import Foundation
import TestSupport
import Testing

/// Commands on bundles, as a user runs them.
struct BundleCommandTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  private func run(_ arguments: String...) throws -> String {
    let result = try smelt(arguments)
    #expect(result.code == 0, "\(arguments): \(result.errors)")
    return result.output
  }

  private func digits(_ name: String) -> String { fixtures("digits/\(name).safetensors") }

  @Test func `what reads a checkpoint reads a bundle and one model of a family`() throws {
    let (family, model) = (folder("family.safetensors.zst"), folder("family.safetensors.zst/one"))
    _ = try run(
      "pack", "--base", digits("base"), "one=\(digits("upright"))", "two=\(digits("rotated"))",
      family)
    #expect(try run("verify", "--data", family).contains("213 of 213 tensors"))
    _ = try run("verify", model, "--against", digits("upright"))
    #expect(try run("inspect", model).contains("71 tensors"))

    _ = try run("convert", model, folder("one.h5"))
    _ = try run("diff", folder("one.h5"), digits("upright"))

    func recipe(_ base: String, _ one: String, _ two: String) -> String {
      """
      base_model: \(base)
      models: [{model: \(one), parameters: {weight: 0.5}}, {model: \(two), parameters: {weight: 0.5}}]
      merge_method: task_arithmetic
      dtype: float32
      """
    }
    for (name, text) in [
      ("bundled", recipe("\(family)/base", model, "\(family)/two")),
      ("plain", recipe(digits("base"), digits("upright"), digits("rotated"))),
    ] {
      try Data(text.utf8).write(to: URL(filePath: folder("\(name).yml")))
      _ = try run("merge", folder("\(name).yml"), folder("\(name).safetensors"))
    }
    _ = try run("diff", folder("bundled.safetensors"), folder("plain.safetensors"))

    _ = try run(
      "upscale", "--base", "\(family)/base", "--expert", "one=\(model)", "--expert",
      "two=\(family)/two", "-o", folder("mixture.safetensors.zst"))
    _ = try run(
      "collapse", folder("mixture.safetensors.zst"), "--expert", "one", "-o",
      folder("collapsed.safetensors"))
    #expect(try run("inspect", folder("collapsed.safetensors")).contains("71 tensors"))
  }

  @Test func `a path names a model of a family and the base outside`() throws {
    let (family, outside) = (folder("family.safetensors.zst"), folder("outside.safetensors.zst"))
    _ = try run("pack", "--base", digits("upright"), "two=\(digits("rotated"))", family)
    _ = try run("pack", family, outside, "--against", digits("base"))
    // The base may be such a path in its turn.
    let itself = folder("base.safetensors.zst")
    _ = try run("pack", digits("base"), itself, "--against", digits("base"))
    for path in [
      "\(family)/two", "\(outside)/two@\(digits("base"))",
      "\(outside)/two@\(itself)@\(digits("base"))",
    ] {
      _ = try run("unpack", path, "-o", folder("two.safetensors"))
      _ = try run("diff", folder("two.safetensors"), digits("rotated"))
      _ = try run("verify", "--data", path, "--against", digits("rotated"))
    }
    _ = try run("unpack", "\(outside)@\(digits("base"))", "-o", folder("all.safetensors"))
    _ = try run("verify", "--data", folder("all.safetensors"), "--against", family)
  }

  @Test func `what is inexact is said`() throws {
    let (lossy, again) = (folder("lossy.safetensors.zst"), folder("again.safetensors.zst"))
    let summary = try run("pack", "--lossy", "int8", digits("upright"), lossy)
    #expect(
      summary.contains(/\d+ of 71 tensors are inexact, by at most 0\.0\d+ of their norm/),
      "\(summary)")
    for result in [
      try smelt("pack", lossy, again), try smelt("convert", lossy, folder("again.h5")),
    ] {
      #expect(result.errors.contains("tensors that were packed inexactly"), "\(result.errors)")
    }
    let exact = try smelt("pack", "--lossy", "lowrank:1024", digits("upright"), again)
    #expect(exact.code == 0 && exact.errors.contains("no tensor could be stored so"))
  }

  @Test func `a family that becomes one checkpoint is said to`() throws {
    let (family, other) = (folder("family.safetensors.zst"), folder("other.safetensors.zst"))
    _ = try run("pack", "--base", digits("base"), "one=\(digits("upright"))", family)
    let kept = try smelt("convert", family, other)
    #expect(kept.code == 0 && kept.errors.isEmpty, "\(kept.errors)")
    _ = try run("verify", "\(other)/one", "--against", digits("upright"))
    let flat = try smelt("convert", family, other, "--include", "*")
    #expect(flat.errors.contains("the 2 models of \(family) become one checkpoint"))
  }

  @Test func `an expert is kept as its difference from the nearest one before it`() throws {
    // Two kinds of models: each is near to the one before it, and the third not to the first.
    var generator = SeededGenerator(seed: 7)
    func noise() -> [Float] {
      (0..<20_000).map { _ in Float.random(in: -1...1, using: &generator) }
    }
    let (first, third) = (noise(), noise())
    let models = [first, first.map { $0 * 1.001 }, third, third.map { $0 * 1.001 }]
    for (index, values) in models.enumerated() {
      try Checkpoint.write(
        [SmallTensor("w", [100, 200], values)], to: folder("\(index).safetensors"))
    }
    _ = try run(
      "pack", "--base", folder("0.safetensors"), "b=\(folder("1.safetensors"))",
      "c=\(folder("2.safetensors"))", "d=\(folder("3.safetensors"))",
      folder("f.safetensors.zst"))
    let table = try run("inspect", folder("f.safetensors.zst"))
    var codecs: [Substring] = []
    for line in table.split(separator: "\n") where line.hasPrefix("F32") {
      codecs.append(line.split(separator: " ")[5])
    }
    #expect(codecs == ["planes", "ulp", "planes", "ulp"])
  }
}
