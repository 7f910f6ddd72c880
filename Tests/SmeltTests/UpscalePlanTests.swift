import Foundation
import TestSupport
import Testing

/// What `smelt upscale` says before it writes anything.
struct UpscalePlanTests {
  let folder: TemporaryFolder
  let digits = fixtures("digits")

  init() throws { folder = try TemporaryFolder() }

  @Test func `an expert without one of the MLPs' tensors is refused in one sentence`() throws {
    let name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    let expert = folder("expert.safetensors")
    let made = try smelt("convert", "\(digits)/upright.safetensors", expert, "--exclude", name)
    #expect(made.code == 0, "\(made.errors)")
    let result = try smelt(
      "upscale", "--base", "\(digits)/base.safetensors", "--expert", "a=\(expert)", "-o",
      folder("moe.h5"))
    #expect(result.code == 1)
    #expect(result.errors == "Error: \(expert): tensor \"\(name)\": is missing\n")
  }

  @Test func `a dry run tells what coded task vectors will take`() throws {
    let models = ["upright", "rotated"].flatMap {
      ["--expert", "\($0)=\(digits)/\($0).safetensors"]
    }
    let result = try smelt(
      ["upscale", "--base", "\(digits)/base.safetensors"] + models
        + ["--store", "lowrank", "--rank", "8", "-o", folder("moe.h5"), "--dry-run"])
    #expect(result.code == 0, "\(result.errors)")
    // Of four layers and two experts: 8 (256 + 64) numbers for each of two matrices, biases.
    let stored = 4 * 2 * (2 * 8 * (256 + 64) + 256 + 64)
    #expect(stored * 4 == 174_080)
    let lines = result.output.split(separator: "\n").map { line in
      line.split(separator: " ").joined(separator: " ")
    }
    #expect(lines.contains("as stored 0.26 M"), "\(lines)")
    #expect(lines.contains("task vectors 174.1 KB instead of 1.06 MB"), "\(lines)")
  }
}
