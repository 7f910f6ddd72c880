import Checkpoints
import Foundation
import TestSupport
import Testing

/// `smelt activations` and `smelt calibrate --progressive`, on the digits' models.
struct ActivationsTests {
  static let experts = ["upright", "rotated", "inverted", "shuffled"]
  let folder: TemporaryFolder
  let base = fixtures("digits/base.safetensors")
  /// The command's options for all experts.
  let models = Self.experts.flatMap {
    ["--expert", "\($0)=\(fixtures("digits/\($0).safetensors"))"]
  }

  init() throws { folder = try TemporaryFolder() }

  /// Eight images for each expert: noise, brighter from expert to expert.
  private func writeInputs(_ name: String = "inputs.safetensors") throws -> String {
    var generator = SeededGenerator(seed: 5)
    let pixels = (0..<32 * 64).map {
      Float.random(in: 0...1, using: &generator) * Float($0 / 64 % 4 + 1) / 4
    }
    let images = try TensorInfo(name: "pixel_values", dtype: .f32, shape: [32, 1, 8, 8])
    let task = try TensorInfo(name: "task", dtype: .i64, shape: [32])
    let sink = try Checkpoint.create(folder(name), Manifest([images, task]))
    try sink.write(pixels.span.bytes, of: images, at: 0)
    let tasks = (0..<32).map { Int64($0 % 4) }
    try sink.write(tasks.span.bytes, of: task, at: 0)
    try sink.finish()
    return folder(name)
  }

  private func succeed(_ arguments: String...) throws {
    let result = try smelt(arguments)
    #expect(result.code == 0, "\(arguments.joined(separator: " ")): \(result.errors)")
  }

  /// Calibrates a mixture on what it makes of the inputs itself; writes `fitted.safetensors`.
  private func fit(_ mixture: String, to inputs: String) throws {
    try succeed(
      "calibrate", folder(mixture), "--progressive", inputs, "--heads", "4", "-o",
      folder("fitted.safetensors"))
  }

  @Test(arguments: [[], ["--attention"]])
  func `what routers were fitted to is what their mixture sees`(attention: [String]) throws {
    let inputs = try writeInputs()
    let upscaled = try smelt(
      ["upscale", "--base", base] + models + attention + ["-o", folder("moe.h5")])
    #expect(upscaled.code == 0)
    try fit("moe.h5", to: inputs)
    // Recorded from the result, the activations must lead to the same routers again.
    let recorded = try smelt(
      ["activations", folder("fitted.safetensors"), inputs, "--heads", "4", "--tokens", "-o"]
        + [folder("seen.safetensors")] + attention)
    #expect(recorded.code == 0)
    try succeed(
      "calibrate", folder("moe.h5"), "--activations", folder("seen.safetensors"), "-o",
      folder("again.safetensors"))
    let (one, other) = (
      try Checkpoint.open(folder("fitted.safetensors")),
      try Checkpoint.open(folder("again.safetensors"))
    )
    for tensor in one.manifest.tensors {
      #expect(try one.bytes(of: tensor) == other.bytes(of: tensor), "\(tensor.name)")
    }
  }

  @Test func `one gate for all layers is one, stored once or with each`() throws {
    let inputs = try writeInputs()
    var gates: [[[Float]]] = []
    for options in [["--shared-gate"], ["--shared-gate", "--duplicate-gate"]] {
      let made = try smelt(
        ["upscale", "--base", base] + models + options + ["-o", folder("moe.safetensors")])
      #expect(made.code == 0)
      try fit("moe.safetensors", to: inputs)
      let fitted = try Checkpoint.open(folder("fitted.safetensors"))
      let names = fitted.manifest.tensors.map { $0.name }.filter { $0.hasSuffix("gate.fc2.weight") }
      gates.append(try names.map { try fitted.floats(of: $0) })
    }
    #expect(gates.map { $0.count } == [1, 4])
    #expect(gates[1].allSatisfy { $0 == gates[0][0] })
    #expect(gates[0][0].contains { abs($0) > 0.1 }, "it is still the one that it was made with")
  }

  @Test func `one gate for all layers is fitted to what they see with its first fit`() throws {
    let inputs = try writeInputs()
    let made = try smelt(
      ["upscale", "--base", base] + models + ["--shared-gate", "-o", folder("moe.safetensors")])
    #expect(made.code == 0)
    try fit("moe.safetensors", to: inputs)
    // The same by hand: a fit to what is recorded from the mixture, and one to what it makes.
    for (mixture, result) in [("moe", "first"), ("first", "second")] {
      try succeed(
        "activations", folder("\(mixture).safetensors"), inputs, "--heads", "4", "--tokens", "-o",
        folder("seen.safetensors"))
      try succeed(
        "calibrate", folder("moe.safetensors"), "--activations", folder("seen.safetensors"), "-o",
        folder("\(result).safetensors"))
    }
    func gate(_ name: String) throws -> [Float] {
      let fitted = try Checkpoint.open(folder("\(name).safetensors"))
      return try fitted.floats(of: "vision_model.encoder.layers.0.mlp.gate.fc2.weight")
    }
    #expect(try gate("fitted") == gate("second"))
    #expect(try gate("fitted") != gate("first"))
  }

  @Test func `the static part's λ is chosen by the model's outputs`() throws {
    let inputs = try writeInputs()
    for (name, scaling) in [("third", "0.3"), ("chosen", "0.6")] {
      let made = try smelt(
        ["upscale", "--base", base] + models + ["--lambda", scaling, "-o", folder("\(name).h5")])
      #expect(made.code == 0)
    }
    let result = try smelt(
      ["calibrate", folder("third.h5"), "--progressive", inputs, "--heads", "4", "--choose-lambda"]
        + ["--base", base] + models + ["--report", folder("report.svg")]
        + ["-o", folder("fitted.safetensors")])
    #expect(result.code == 0, "\(result.errors)")
    // λ, error, and an arrow at the one that was taken.
    let lines = result.output.split(separator: "\n").map { $0.split(separator: " ") }
    let trials = lines.compactMap { words in
      words.count >= 2 ? Float(words[0]).map { ($0, Double(words[1])!, words.count == 3) } : nil
    }
    #expect(
      trials.map { $0.0 }
        == Array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1].prefix(trials.count)))
    let chosen = try #require(trials.first { $0.2 })
    #expect(trials.allSatisfy { chosen.1 <= $0.1 })
    #expect(try text(of: folder("report.svg")).contains("λ 0.2"))

    // What is written is what upscaling with that λ writes, and what the arrow says.
    let fitted = try Checkpoint.open(folder("fitted.safetensors"))
    let name = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    let (start, third, own) = (
      try Checkpoint.open(base).floats(of: name),
      try Checkpoint.open(folder("third.h5")).floats(of: name), try fitted.floats(of: name)
    )
    for index in own.indices {
      let wanted = start[index] + chosen.0 / 0.3 * (third[index] - start[index])
      #expect(abs(own[index] - wanted) < 1e-6)
    }
    let description = try #require(fitted.manifest.metadata["wemoe"])
    #expect(description.contains("\"scaling\":\(chosen.0)"))
  }

  private func text(of path: String) throws -> String {
    try String(contentsOfFile: path, encoding: .utf8)
  }

  @Test func `a choice of λ says what it needs`() throws {
    let lonely = try smelt(
      "calibrate", "m.h5", "--progressive", "i.npz", "--choose-lambda", "-o", "o.h5")
    #expect(lonely.code == 64)
    #expect(lonely.errors.contains("--choose-lambda and --base go together."))
    let recorded = try smelt(
      "calibrate", "m.h5", "--activations", "a.npz", "--choose-lambda", "--base", "b.h5", "-o",
      "o.h5")
    #expect(recorded.code == 64)
    #expect(recorded.errors.contains("--choose-lambda needs --progressive and every --expert."))
  }

  @Test func `a model without a configuration needs its heads`() throws {
    let result = try smelt("activations", base, try writeInputs(), "-o", folder("a.safetensors"))
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: the tensors of \(base) do not tell how many attention heads it has; give --heads, or --config with its config.json\n"
    )
    #expect(try folder.names == ["inputs.safetensors"])
  }

  @Test func `a configuration beside the model is found`() throws {
    let model = fixtures("forward/bert")
    let result = try smelt(
      "activations", "\(model)/model.safetensors", "\(model)/inputs.safetensors", "-o",
      folder("a.h5"))
    #expect(result.code == 0)
    #expect(result.output.hasPrefix("\(folder("a.h5")): 3 samples through 2 layers, 3 tensors"))
  }

  @Test func `images of another size are refused with what to do`() throws {
    try Checkpoint.write(
      [SmallTensor("pixel_values", [1, 1, 6, 8], Array(repeating: 0, count: 48))],
      to: folder("small.safetensors"))
    let result = try smelt(
      "activations", base, folder("small.safetensors"), "--heads", "4", "-o", folder("a.h5"))
    #expect(result.code == 1)
    #expect(
      result.errors.hasSuffix(
        "tensor \"pixel_values\": has images of [1, 6, 8], which do not make 16 patches of [1, 2, 2]; resize them to what the model was trained with\n"
      ))
  }

  @Test func `padding of recorded texts counts for nothing`() throws {
    _ = try smelt(["upscale", "--base", base] + models + ["-o", folder("moe.h5")])
    try succeed(
      "activations", base, try writeInputs(), "--heads", "4", "--tokens", "-o",
      folder("bare.safetensors"))
    // The same tokens, and three more of each sample that the mask takes out.
    let bare = try Checkpoint.open(folder("bare.safetensors"))
    let mask = try TensorInfo(name: "attention_mask", dtype: .i64, shape: [32, 20])
    let tensors = try bare.manifest.tensors.map {
      $0.name == "task"
        ? $0 : try TensorInfo(name: $0.name, dtype: .f32, shape: [32, 20, $0.shape[2]])
    }
    let sink = try Checkpoint.create(folder("padded.safetensors"), Manifest(tensors + [mask]))
    for tensor in tensors where tensor.name != "task" {
      let values = try bare.floats(of: tensor.name)
      let own = values.count / 32
      let padding = Array(repeating: Float(9), count: tensor.elementCount / 32 - own)
      let padded = (0..<32).flatMap { values[$0 * own..<($0 + 1) * own] + padding }
      try sink.write(padded.span.bytes, of: tensor, at: 0)
    }
    let tasks = try bare.integers(of: bare.manifest["task"]!).map(Int64.init)
    try sink.write(tasks.span.bytes, of: bare.manifest["task"]!, at: 0)
    let isToken = (0..<32 * 20).map { Int64($0 % 20 < 17 ? 1 : 0) }
    try sink.write(isToken.span.bytes, of: mask, at: 0)
    try sink.finish()

    for name in ["bare", "padded"] {
      try succeed(
        "calibrate", folder("moe.h5"), "--activations", folder("\(name).safetensors"),
        "--method", "ridge", "-o", folder("\(name).h5"))
    }
    let (one, other) = (
      try Checkpoint.open(folder("bare.h5")), try Checkpoint.open(folder("padded.h5"))
    )
    for tensor in one.manifest.tensors {
      #expect(try one.bytes(of: tensor) == other.bytes(of: tensor), "\(tensor.name)")
    }
  }

  @Test func `attention becomes modules that one expert's weights give back`() throws {
    let upscaled = try smelt(
      ["upscale", "--base", base, "--attention"] + models + ["-o", folder("moe.h5")])
    #expect(upscaled.output.contains("4 experts in 8 MLP and attention modules"))
    try succeed("collapse", folder("moe.h5"), "--expert", "rotated", "-o", folder("one.h5"))
    let one = try Checkpoint.open(folder("one.h5"))
    let expert = try Checkpoint.open(fixtures("digits/rotated.safetensors"))
    for tensor in expert.manifest.tensors
    where tensor.name.contains(".self_attn.") || tensor.name.contains(".mlp.") {
      #expect(
        try one.bytes(of: one.tensor(tensor.name)) == expert.bytes(of: tensor), "\(tensor.name)")
    }

    try succeed(
      "activations", base, try writeInputs(), "--heads", "4", "-o", folder("mlps.npz"))
    let incomplete = try smelt(
      "calibrate", folder("moe.h5"), "--activations", folder("mlps.npz"), "-o", folder("c.h5"))
    #expect(
      incomplete.errors.hasSuffix(
        "mlps.npz: tensor \"vision_model.encoder.layers.0.self_attn\": is missing; record the inputs of attention too, with 'smelt activations --attention'\n"
      ))
  }

  @Test func `FusionBench's format has FusionBench's tensors and no others`() throws {
    func upscale(_ options: [String], _ output: String) throws -> CommandResult {
      try smelt(["upscale", "--base", base] + models + options + ["-o", folder(output)])
    }
    #expect(try upscale([], "own.safetensors").code == 0)
    #expect(try upscale(["--format", "fusionbench"], "other.safetensors").code == 0)
    let own = try Checkpoint.open(folder("own.safetensors"))
    let other = try Checkpoint.open(folder("other.safetensors"))
    let added = own.manifest.tensors.filter { other.manifest[$0.name] == nil }
    #expect(!added.isEmpty && added.allSatisfy { $0.name.contains("#") })
    for tensor in other.manifest.tensors {
      #expect(try own.bytes(of: own.tensor(tensor.name)) == other.bytes(of: tensor))
    }
    for options in [["--store", "int8"], ["--attention"], ["--keep-heads"]] {
      let refused = try upscale(["--format", "fusionbench"] + options, "no.safetensors")
      #expect(refused.code == 64)
    }
    let plan = try upscale(["--dry-run"], "plan.safetensors")
    #expect(plan.output.contains("MB, and corrections"))
    #expect(!FileManager.default.fileExists(atPath: folder("plan.safetensors")))
  }

  @Test func `activations and progressive exclude each other`() throws {
    let result = try smelt("calibrate", "moe.h5", "-o", "out.h5")
    #expect(result.code == 64)
    #expect(result.errors.contains("Give either --activations or --progressive."))
  }

  @Test func `of CLIP's two towers the one that is run can be upscaled alone`() throws {
    let clip = fixtures("forward/clip")
    func calibrate(_ options: String...) throws -> CommandResult {
      let experts = (0..<3).flatMap { ["--expert", "e\($0)=\(clip)/model.safetensors"] }
      let made = try smelt(
        ["upscale", "--base", "\(clip)/model.safetensors"] + experts + options
          + ["-o", folder("moe.h5")])
      #expect(made.code == 0, "\(made.errors)")
      return try smelt(
        "calibrate", folder("moe.h5"), "--progressive", "\(clip)/inputs.safetensors", "--config",
        "\(clip)/config.json", "-o", folder("fitted.h5"))
    }
    let both = try calibrate()
    #expect(both.code == 1)
    #expect(
      both.errors
        == "Error: \(clip)/inputs.safetensors: tensor \"text_model.encoder.layers.0.mlp\": is missing; of a model with two towers upscale the one that you run: --mlp 'vision_model.encoder.layers.{i}.mlp:fc1,fc2'\n"
    )
    let one = try calibrate("--mlp", "vision_model.encoder.layers.{i}.mlp:fc1,fc2")
    #expect(one.code == 0, "\(one.errors)")
  }
}
