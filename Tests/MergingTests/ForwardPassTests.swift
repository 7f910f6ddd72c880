import Checkpoints
import Foundation
import Merging
import TestSupport
import Testing

/// The forward pass against what transformers computed, stored in Fixtures/forward.
struct ForwardPassTests {
  static let families = [
    "clip", "clip-text", "vit", "bert", "roberta", "llama", "mistral", "qwen2", "qwen3", "gemma",
  ]

  /// The files of a family; CLIP's text tower shares a folder with its vision tower.
  private struct Fixture {
    let model: any TensorSource
    let configuration: String
    let inputs: ModelInputs
    let expected: any TensorSource

    init(_ family: String) throws {
      let words = family.split(separator: "-")
      let folder = fixtures("forward/\(words[0])")
      let suffix = words.count > 1 ? "-\(words[1])" : ""
      model = try Checkpoint.open("\(folder)/model.safetensors")
      configuration = "\(folder)/config.json"
      inputs = try ModelInputs(Checkpoint.open("\(folder)/inputs\(suffix).safetensors"))
      expected = try Checkpoint.open("\(folder)/expected\(suffix).safetensors")
    }

    func pass() throws -> ForwardPass {
      try ForwardPass(of: model, for: inputs, configurationPath: configuration)
    }
  }

  private func record(
    _ pass: ForwardPass, _ inputs: ModelInputs, everyToken: Bool = true, memory: Int = 1 << 28,
    workers: Int = 2
  ) throws -> any TensorSource {
    let folder = try TemporaryFolder()
    var options = ActivationRecording.Options()
    options.everyToken = everyToken
    options.finalStates = true
    let recording = try ActivationRecording(of: pass, over: inputs, options)
    let sink = try Checkpoint.create(folder("a.safetensors"), recording.manifest)
    try recording.run(into: sink, memory: memory, workers: workers)
    try sink.finish()
    return try Checkpoint.open(folder("a.safetensors"))
  }

  @Test(arguments: families)
  func `every token of every layer agrees with transformers`(family: String) throws {
    let fixture = try Fixture(family)
    let actual = try record(fixture.pass(), fixture.inputs)
    let names = fixture.expected.manifest.tensors.filter { $0.dtype == .f32 }.map { $0.name }
    #expect(names.count == 3)
    for name in names {
      #expect(try actual.tensor(name).shape == fixture.expected.tensor(name).shape)
      let (got, wanted) = (try actual.floats(of: name), try fixture.expected.floats(of: name))
      let largest = wanted.map { abs($0) }.max()!
      let difference = zip(got, wanted).map { abs($0 - $1) }.max()!
      #expect(difference <= 1e-5 * largest, "\(name): \(difference / largest)")
    }
  }

  @Test(arguments: ["clip", "bert"])
  func `means are those of the tokens that are not masked`(family: String) throws {
    let fixture = try Fixture(family)
    let all = try record(fixture.pass(), fixture.inputs)
    let means = try record(fixture.pass(), fixture.inputs, everyToken: false)
    let mask = try all.manifest["attention_mask"].map { try all.integers(of: $0) }
    for tensor in means.manifest.tensors where tensor.dtype == .f32 {
      let (rows, width) = (try all.tensor(tensor.name).shape[1], tensor.rowLength)
      let (values, mean) = (try all.floats(of: tensor.name), try means.floats(of: tensor.name))
      for sample in 0..<tensor.shape[0] {
        let seen = (0..<rows).filter { mask?[sample * rows + $0] ?? 1 == 1 }
        for column in 0..<width {
          let sum = seen.reduce(Float(0)) { $0 + values[(sample * rows + $1) * width + column] }
          #expect(abs(sum / Float(seen.count) - mean[sample * width + column]) < 1e-5)
        }
      }
    }
  }

  @Test(arguments: [1, 2], [400_000, 1 << 28])
  func `workers and memory change no bit`(workers: Int, memory: Int) throws {
    let fixture = try Fixture("clip")
    let one = try record(fixture.pass(), fixture.inputs)
    let other = try record(fixture.pass(), fixture.inputs, memory: memory, workers: workers)
    for tensor in one.manifest.tensors {
      #expect(try one.bytes(of: tensor) == other.bytes(of: tensor))
    }
  }

  @Test func `too little memory is refused with both numbers`() throws {
    let fixture = try Fixture("clip")
    let error = #expect(throws: MergeError.self) {
      _ = try record(fixture.pass(), fixture.inputs, memory: 50_000)
    }
    #expect(
      error?.problem.contains(/one layer and one sample take \d+ bytes, but there are 50000/)
        == true)
  }

  @Test func `heads must be given where no configuration is`() throws {
    let fixture = try Fixture("bert")
    let error = #expect(throws: MergeError.self) {
      _ = try ForwardPass(of: fixture.model, for: fixture.inputs)
    }
    #expect(error?.remedy == "give --heads, or --config with its config.json")
    var flags = TransformerConfiguration()
    flags.heads = 5
    let refusal = #expect(throws: CheckpointError.self) {
      _ = try ForwardPass(of: fixture.model, for: fixture.inputs, flags: flags)
    }
    #expect(refusal?.problem == "has the shape [16, 16], which 5 attention heads cannot share")
  }

  @Test func `texts are not fed to a model of images`() throws {
    let vision = try Fixture("vit")
    let text = try Fixture("bert")
    let error = #expect(throws: CheckpointError.self) {
      _ = try ForwardPass(of: vision.model, for: text.inputs)
    }
    #expect(error?.problem == "is no Transformer that Smelt can run on token ids")
  }

  @Test func `a token beyond the vocabulary is refused`() throws {
    let fixture = try Fixture("llama")
    let folder = try TemporaryFolder()
    let ids = try TensorInfo(name: "input_ids", dtype: .i64, shape: [1, 2])
    let sink = try Checkpoint.create(folder("in.safetensors"), Manifest([ids]))
    let values: [Int64] = [3, 40]
    try sink.write(values.span.bytes, of: ids, at: 0)
    try sink.finish()
    let inputs = try ModelInputs(Checkpoint.open(folder("in.safetensors")))
    let error = #expect(throws: CheckpointError.self) { _ = try record(fixture.pass(), inputs) }
    #expect(error?.problem.contains("has the token 40, but") == true)
  }

  @Test(arguments: [
    (#"{"num_attention_heads": "4"}"#, "\"num_attention_heads\" is of another type than expected"),
    (#"{"#, "it is not valid JSON"),
    (#"[4]"#, "\"\" is of another type than expected"),
  ])
  func `a bad configuration is refused by name`(text: String, reason: String) throws {
    let fixture = try Fixture("bert")
    let folder = try TemporaryFolder()
    try Data(text.utf8).write(to: URL(filePath: folder("config.json")))
    let error = #expect(throws: CheckpointError.self) {
      _ = try ForwardPass(
        of: fixture.model, for: fixture.inputs, configurationPath: folder("config.json"))
    }
    #expect(error?.problem == "is not a Transformer's configuration: \(reason)")
  }

  /// Qwen2's windows are off unless switched on, and begin behind its first layers.
  @Test(arguments: [
    (#""use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1"#, [1]),
    (#""use_sliding_window": true, "sliding_window": 3, "max_window_layers": 0"#, [0, 1]),
    (#""use_sliding_window": true, "sliding_window": 3"#, []),
    (#""sliding_window": 3, "max_window_layers": 0"#, []),
  ])
  func `without layer types, Qwen's sliding windows are those that its configuration means`(
    fields: String, sliding: [Int]
  ) throws {
    let fixture = try Fixture("qwen2")
    let folder = try TemporaryFolder()
    func run(_ fields: String) throws -> [[Float]] {
      let text =
        #"{"model_type": "qwen2", "hidden_act": "silu", "num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, \#(fields)}"#
      try Data(text.utf8).write(to: URL(filePath: folder("config.json")))
      let pass = try ForwardPass(
        of: fixture.model, for: fixture.inputs, configurationPath: folder("config.json"))
      let recorded = try record(pass, fixture.inputs)
      return try ["layers.1.mlp", "last_hidden_state"].map { try recorded.floats(of: $0) }
    }
    let types = (0..<2).map { #""\#(sliding.contains($0) ? "sliding" : "full")_attention""# }
    let named = try run(
      #""use_sliding_window": true, "sliding_window": 3, "layer_types": [\#(types[0]), \#(types[1])]"#
    )
    #expect(try run(fields) == named)
    if !sliding.isEmpty {
      let full = try run(#""use_sliding_window": false"#)
      #expect(full != named)
    }
  }

  @Test func `an unknown rotary embedding is refused`() throws {
    let fixture = try Fixture("llama")
    let folder = try TemporaryFolder()
    let text = #"{"num_attention_heads": 4, "rope_scaling": {"type": "yarn", "factor": 2}}"#
    try Data(text.utf8).write(to: URL(filePath: folder("config.json")))
    let error = #expect(throws: CheckpointError.self) {
      _ = try ForwardPass(
        of: fixture.model, for: fixture.inputs, configurationPath: folder("config.json"))
    }
    #expect(
      error?.problem
        == "asks for rotary embeddings of a type that Smelt does not know: \"yarn\"")
  }
}
