import Checkpoints
import Foundation
import TestSupport
import Testing

/// `smelt upscale --format mixtral`, of the small Llamas in Fixtures/forward.
struct SparseMixtureTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  /// A fixture as a model's folder, its tensors multiplied, its configuration changed.
  private func write(
    _ fixture: String, as name: String, times scale: Float = 1,
    _ change: (inout [String: Any]) -> Void = { _ in }
  ) throws -> String {
    let original = fixtures("forward/\(fixture)")
    let source = try Checkpoint.open("\(original)/model.safetensors")
    let tensors = try source.manifest.tensors.map {
      try SmallTensor(
        $0.name, $0.shape, dtype: $0.dtype, source.floats(of: $0.name).map { $0 * scale })
    }
    try FileManager.default.createDirectory(
      atPath: folder(name), withIntermediateDirectories: true)
    try Checkpoint.write(tensors, to: folder("\(name)/model.safetensors"))
    var values = try configuration("\(original)/config.json")
    change(&values)
    try JSONSerialization.data(withJSONObject: values).write(
      to: URL(filePath: folder("\(name)/config.json")))
    return folder(name)
  }

  private func configuration(_ path: String) throws -> [String: Any] {
    let data = try Data(contentsOf: URL(filePath: path))
    return try #require(try JSONSerialization.jsonObject(with: data) as? [String: Any])
  }

  /// Recorded activations: eight texts, in turn for the first expert and for the second.
  private func activations(of base: String) throws -> String {
    let ids = try TensorInfo(name: "input_ids", dtype: .i64, shape: [8, 6])
    let task = try TensorInfo(name: "task", dtype: .i64, shape: [8])
    let sink = try Checkpoint.create(folder("inputs.safetensors"), Manifest([ids, task]))
    let (tokens, tasks) = ((0..<48).map { Int64($0 * 7 % 40) }, (0..<8).map { Int64($0 % 2) })
    try sink.write(tokens.span.bytes, of: ids, at: 0)
    try sink.write(tasks.span.bytes, of: task, at: 0)
    try sink.finish()
    let result = try smelt(
      "activations", base, folder("inputs.safetensors"), "--tokens", "-o",
      folder("seen.safetensors"))
    #expect(result.code == 0, "\(result.errors)")
    return folder("seen.safetensors")
  }

  private func upscale(
    _ base: String, _ experts: [String], _ activations: String, to output: String,
    _ options: String...
  ) throws -> CommandResult {
    let experts = experts.enumerated().flatMap { ["--expert", "e\($0.offset)=\($0.element)"] }
    return try smelt(
      ["upscale", "--base", base] + experts
        + ["--format", "mixtral", "--activations", activations, "-o", folder(output)] + options)
  }

  @Test(arguments: ["llama", "mistral"])
  func `experts stand side by side under Mixtral's names`(fixture: String) throws {
    let base = try write(fixture, as: "base")
    let experts = [
      try write(fixture, as: "one", times: 1.25), try write(fixture, as: "two", times: 0.5),
    ]
    let result = try upscale(base, experts, activations(of: base), to: "mixtral")
    #expect(result.code == 0, "\(result.errors)")
    #expect(result.output.contains("\(folder("mixtral")): a Mixtral, "))

    let mixtral = try Checkpoint.open(folder("mixtral"))
    let dense = try Checkpoint.open(base)
    let sources = try experts.map { try Checkpoint.open($0) }
    var expected = Set<String>()
    for tensor in dense.manifest.tensors {
      guard let match = tensor.name.wholeMatch(of: /(.*)\.mlp\.(gate|up|down)_proj\.weight/) else {
        expected.insert(tensor.name)
        let values = try dense.floats(of: tensor.name)
        let merged = try mixtral.floats(of: tensor.name)
        // 0.3 · ((1.25 − 1) + (0.5 − 1)) = −0.075
        for index in values.indices {
          #expect(abs(merged[index] - 0.925 * values[index]) <= 1e-6 * abs(values[index]))
        }
        continue
      }
      let map = ["gate": "w1", "up": "w3", "down": "w2"][String(match.2)]!
      for (index, source) in sources.enumerated() {
        let name = "\(match.1).block_sparse_moe.experts.\(index).\(map).weight"
        expected.insert(name)
        #expect(try mixtral.bytes(of: mixtral.tensor(name)) == source.bytes(of: tensor))
      }
      let gate = "\(match.1).block_sparse_moe.gate.weight"
      expected.insert(gate)
      #expect(try mixtral.tensor(gate).shape == [2, 16])
    }
    #expect(Set(mixtral.manifest.tensors.map { $0.name }) == expected)
  }

  @Test func `a Llama's configuration becomes a Mixtral's that means the same`() throws {
    let base = try write("llama", as: "base")
    let result = try upscale(base, [base, base], activations(of: base), to: "mixtral")
    #expect(result.code == 0, "\(result.errors)")
    let old = try configuration("\(base)/config.json")
    let new = try configuration(folder("mixtral/config.json"))
    #expect(new["model_type"] as? String == "mixtral")
    #expect(new["architectures"] as? [String] == ["MixtralForCausalLM"])
    #expect(new["num_local_experts"] as? Int == 2)
    #expect(new["num_experts_per_tok"] as? Int == 2)
    #expect(new["sliding_window"] is NSNull)
    #expect(new["rope_theta"] as? Double == 500)
    let changed: Set = [
      "model_type", "architectures", "num_local_experts", "num_experts_per_tok", "sliding_window",
      "output_router_logits", "rope_theta",
    ]
    for key in Set(old.keys).union(new.keys).subtracting(changed) {
      #expect(old[key] as? NSObject == new[key] as? NSObject, "\(key)")
    }
  }

  @Test func `what an old configuration leaves to its class is said`() throws {
    let base = try write("mistral", as: "base") { configuration in
      for key in [
        "rope_parameters", "rms_norm_eps", "sliding_window", "max_position_embeddings",
        "intermediate_size",
      ] { configuration[key] = nil }
    }
    let result = try upscale(base, [base, base], activations(of: base), to: "mixtral")
    #expect(result.code == 0, "\(result.errors)")
    let new = try configuration(folder("mixtral/config.json"))
    #expect(new["architectures"] as? [String] == ["MixtralModel"])
    #expect(new["rope_theta"] as? Double == 10000)
    #expect(new["rms_norm_eps"] as? Double == 1e-6)
    #expect(new["sliding_window"] as? Int == 4096)
    #expect(new["max_position_embeddings"] as? Int == 131_072)
    #expect(new["intermediate_size"] as? Int == 24)
  }

  @Test func `a dry run counts and writes nothing`() throws {
    let base = try write("llama", as: "base")
    let activations = try activations(of: base)
    let before = try folder.names
    let result = try upscale(base, [base, base], activations, to: "mixtral", "--dry-run")
    #expect(result.code == 0)
    #expect(result.output.contains("2, 2 a token"))
    #expect(result.output.contains("written"))
    #expect(try folder.names == before)
  }

  @Test func `a file alone says that the configuration is missing`() throws {
    let base = try write("llama", as: "base")
    let result = try upscale(
      base, [base, base], activations(of: base), to: "mixtral.safetensors")
    #expect(result.code == 0)
    #expect(
      result.errors.contains(
        "transformers needs config.json too, which is written into a folder: -o NAME/"))
    #expect(try !folder.names.contains("config.json"))
  }

  @Test(arguments: ["qwen2", "qwen3", "gemma"])
  func `other types of models are refused by name`(type: String) throws {
    let base = try write(type, as: "base")
    let result = try upscale(base, [base, base], activations(of: base), to: "mixtral")
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: \(base)/model.safetensors is a model of type \"\(type)\"; only llama and mistral become a Mixtral\n"
    )
  }

  @Test(arguments: [
    ("qwen2", "layers.0.self_attn.k_proj.bias"), ("qwen3", "layers.0.self_attn.k_norm.weight"),
  ])
  func `tensors that a Mixtral lacks are refused by name`(fixture: String, tensor: String) throws {
    let base = try write(fixture, as: "base") { $0["model_type"] = "llama" }
    let result = try upscale(base, [base, base], activations(of: base), to: "mixtral")
    #expect(result.code == 1)
    #expect(
      result.errors.hasSuffix(
        "tensor \"\(tensor)\": has no place in a Mixtral; leave out --format mixtral\n"))
  }
}
