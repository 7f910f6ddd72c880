public import Checkpoints
import Glibc

/// Llama-like experts as the sparse mixture of experts that transformers calls Mixtral: whole
/// MLPs side by side, of which a gate picks a few for every token.
///
/// `P.block_sparse_moe.experts.{e}.w1`, `w3` and `w2` are an expert's `gate_proj`, `up_proj` and
/// `down_proj`, `P.block_sparse_moe.gate` its gate; everything else is merged by task arithmetic.
/// The gates are fitted to recorded activations, token by token if they are recorded so: a
/// softmax over W h picks the experts.
public struct SparseMixture: Sendable {
  /// What one layer's gate does on samples that its fit has not seen.
  public struct LayerReport: Sendable {
    public let module: String
    /// The share of tokens (of samples, where only their means are recorded) with the largest weight
    /// on their own expert.
    public let routingAccuracy: Double
    /// What the linear fit is multiplied with before the softmax.
    public let sharpness: Double
  }

  public let family: ModelFamily
  public let manifest: Manifest
  /// The model's `config.json`, if the base has one.
  public let configuration: ModelConfiguration?
  private let scaling: Float
  private let modules: [UpscaledModule]
  private let activations: Activations
  private let tasks: [Int]

  private static let names = ["gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"]

  /// - Throws: `MergeError` if the model is not of a family that a Mixtral can hold.
  public init(
    _ family: ModelFamily, scaling: Float, activations: any TensorSource, expertsPerToken: Int = 2
  ) throws {
    let base = family.base
    let experts = family.experts.count
    guard (1...experts).contains(expertsPerToken) else {
      throw MergeError("a token can have 1 to \(experts) experts, not \(expertsPerToken)")
    }
    modules = UpscaledModule.modules(of: base.manifest, TransformerMLP.families, layers: nil)
    guard !modules.isEmpty, modules.allSatisfy({ $0.maps.sorted() == Self.names.keys.sorted() })
    else {
      throw MergeError(
        "\(base.path) is no model of gate_proj, up_proj and down_proj, which a Mixtral is made of")
    }
    let inner = base.manifest["\(modules[0].prefix).up_proj.weight"]!.shape[0]
    configuration = try ModelConfiguration(of: base.path).map {
      try $0.sparse(
        experts: experts, expertsPerToken: expertsPerToken, inner: inner, path: base.path)
    }
    for tensor in base.manifest.tensors where !Self.hasPlace(for: tensor.name) {
      throw CheckpointError(
        file: base.path, tensor: tensor.name, "has no place in a Mixtral",
        remedy: "leave out --format mixtral")
    }
    for (index, expert) in family.experts.enumerated() {
      for name in modules.flatMap({ $0.tensors })
      where family.counterpart(of: name, in: index) == nil {
        throw CheckpointError(file: expert.source.path, tensor: name, "is missing")
      }
    }
    self.family = family
    self.scaling = scaling
    self.activations = try Activations(
      activations,
      of: modules.map {
        .init(
          prefix: $0.prefix, original: $0.prefix, gate: "", width: $0.width, maps: $0.maps,
          transposed: false)
      })
    tasks = try self.activations.tasks(experts: experts)
    for module in modules
    where self.activations.sampleCount(of: module.prefix) != tasks.count {
      throw CheckpointError(
        file: activations.path, tensor: module.prefix,
        "has other samples than \"task\", which has \(tasks.count)")
    }
    manifest = Manifest(
      SparseMixture.layOut(base.manifest, modules, experts: experts),
      metadata: base.manifest.metadata)
  }

  /// Of a layer's tensors, whether a Mixtral's layer has it too.
  private static func hasPlace(for tensor: String) -> Bool {
    guard let layer = tensor.firstMatch(of: /(?:^|\.)layers\.\d+\.(.+)/) else { return true }
    return layer.1.wholeMatch(
      of:
        /self_attn\.[qkvo]_proj\.weight|mlp\..+_proj\.weight|(?:input|post_attention)_layernorm\.weight|self_attn\.rotary_emb\.inv_freq/
    ) != nil
  }

  private static func layOut(
    _ base: Manifest, _ modules: [UpscaledModule], experts: Int
  ) -> [TensorInfo] {
    let prefixes = Dictionary(
      uniqueKeysWithValues: modules.flatMap { module in module.tensors.map { ($0, module) } })
    var begun = Set<String>()
    return base.tensors.flatMap { tensor -> [TensorInfo] in
      guard let module = prefixes[tensor.name] else { return [tensor] }
      let own = (0..<experts).map { tensor.renamed(module.sparseName(of: tensor.name, expert: $0)) }
      guard begun.insert(module.prefix).inserted else { return own }
      let gate = try! TensorInfo(
        name: module.sparseGate, dtype: tensor.dtype, shape: [experts, module.width])
      return [gate] + own
    }
  }

  /// Writes the mixture.
  public func run(
    into sink: any TensorSink, memory: Int, workers: Int
  ) throws -> [LayerReport] {
    let ofModules = Set(modules.flatMap { $0.tensors })
    let pipeline = Pipeline(
      from: family.sources, into: [sink], memory: memory, workers: workers)
    try pipeline.run(
      family.base.manifest.tensors.filter {
        $0.dtype.isArithmetic && !ofModules.contains($0.name)
      }.flatMap { tensor in
        Step.covering(
          family.places(of: tensor), outputs: [(0, manifest[tensor.name]!)],
          with: UpscalingOperation(
            experts: family.experts.count, isModule: false, scaling: scaling,
            storedType: tensor.dtype, cleaning: .none, elementCount: tensor.elementCount,
            codingGrain: 1, isCoded: false))
      })
    try pipeline.run(
      modules.flatMap { module in
        module.tensors.flatMap { name in
          family.places(of: family.base.manifest[name]!).dropFirst().enumerated().flatMap {
            expert, place in
            Step.covering(
              [place],
              outputs: [(0, manifest[module.sparseName(of: name, expert: expert)]!)],
              with: Passage())
          }
        }
      })
    try family.base.copy(
      family.base.manifest.tensors.filter { !$0.dtype.isArithmetic }, into: sink,
      workers: workers)
    let reports = StepResults<LayerReport>(count: modules.count)
    try forEachStep(count: modules.count, workers: workers) {
    } body: { step, _ in
      reports[step] = try writeGate(of: modules[step], into: sink)
    }
    return reports.all
  }

  private func writeGate(of module: UpscaledModule, into sink: any TensorSink) throws
    -> LayerReport
  {
    // The gate will see tokens one by one; it is fitted to them where they are recorded.
    let tokens = try activations.tokens(
      of: module.prefix, spreadOver: Array(tasks.indices), about: Self.tokenRows)
    let perSample = tokens.rowCount / tasks.count
    let samples = try CalibrationSamples(
      features: tokens, tasks: tasks.flatMap { Array(repeating: $0, count: perSample) },
      taskCount: family.experts.count)
    guard let held = heldOut else {
      throw CheckpointError(
        file: activations.source.path, tensor: "task", "has fewer than 4 samples of some expert")
    }
    // A sample's tokens are alike: all of them are held out, or none.
    let isHeld = samples.tasks.indices.map { held.contains($0 / perSample) }
    let seen = samples.subset(isHeld.indices.filter { !isHeld[$0] })
    let unseen = isHeld.indices.filter { isHeld[$0] }
    let scores = RouterCalibration(seen).gate.withoutBias(seen.features)(samples.features)
    let sharpness = SparseMixture.sharpness(of: scores, unseen, samples.tasks)
    var gate = RouterCalibration(samples).gate.withoutBias(samples.features).weight
    for index in gate.elements.indices { gate.elements[index] *= Float(sharpness) }
    try sink.write(gate.elements, of: manifest[module.sparseGate]!, from: 0)
    return LayerReport(
      module: module.prefix,
      routingAccuracy: MatchedLayer.accuracy(of: scores, unseen, samples.tasks),
      sharpness: sharpness)
  }

  /// How many tokens a gate is fitted to, about.
  private static let tokenRows = 4096

  /// Every fourth sample of each task; `nil` if one has fewer than four.
  private var heldOut: Set<Int>? {
    var seen = Array(repeating: 0, count: family.experts.count)
    var held = Set<Int>()
    for (sample, task) in tasks.enumerated() {
      seen[task] += 1
      if seen[task].isMultiple(of: 4) { held.insert(sample) }
    }
    return seen.contains { $0 < 4 } ? nil : held
  }

  /// The factor under which a softmax of the scores says the tasks of unseen samples best.
  private static func sharpness(
    of scores: Matrix<Float>, _ rows: [Int], _ tasks: [Int]
  ) -> Double {
    func surprise(_ factor: Double) -> Double {
      rows.reduce(0) { sum, row in
        let logits = scores[row: row].map { factor * Double($0) }
        let largest = logits.max()!
        let total = logits.reduce(0) { $0 + exp($1 - largest) }
        return sum + largest + log(total) - logits[tasks[row]]
      }
    }
    return (0...7).map { exp2(Double($0)) }.min { surprise($0) < surprise($1) }!
  }
}

extension UpscaledModule {
  fileprivate var sparsePrefix: String {
    "\(prefix.split(separator: ".").dropLast().joined(separator: ".")).block_sparse_moe"
  }

  fileprivate var sparseGate: String { "\(sparsePrefix).gate.weight" }

  fileprivate func sparseName(of tensor: String, expert: Int) -> String {
    let map = tensor.split(separator: ".").dropLast().last!
    let name = ["gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"][map]!
    return "\(sparsePrefix).experts.\(expert).\(name).weight"
  }
}

extension Dense {
  /// A layer without bias whose answers to these inputs are as near as a linear map's can be: the
  /// bias becomes a multiple of the linear form that varies least while its mean is 1.
  fileprivate func withoutBias(_ features: Matrix<Float>) -> Dense {
    let principal = PrincipalFeatures(features)
    let mean = principal.mean
    let ridge = 1e-3 * max(principal.values.last ?? 0, 1e-12)
    // (Σ + ridge)⁻¹ mean, by the principal directions and what is orthogonal to all of them.
    var form = mean.map { $0 / ridge }
    for (row, value) in principal.values.enumerated() {
      let direction = principal.directions[row: row]
      let along = zip(direction, mean).reduce(0) { $0 + $1.0 * $1.1 }
      let change = along * (1 / (value + ridge) - 1 / ridge)
      for (column, element) in direction.enumerated() { form[column] += change * element }
    }
    let scale = zip(form, mean).reduce(0) { $0 + $1.0 * $1.1 }
    guard scale > 0 else { return self }
    var result = self
    for row in bias.indices {
      for column in form.indices {
        result.weight[row, column] += Float(Double(bias[row]) * form[column] / scale)
      }
      result.bias[row] = 0
    }
    return result
  }
}

extension ModelConfiguration {
  /// A Llama's or Mistral's configuration as that of a Mixtral, its classes' own defaults said.
  fileprivate func sparse(
    experts: Int, expertsPerToken: Int, inner: Int, path: String
  ) throws -> ModelConfiguration {
    guard let type = modelType, ["llama", "mistral"].contains(type) else {
      throw MergeError(
        "\(path) is a model of type \(quoted(modelType ?? "unknown")); only llama and mistral become a Mixtral"
      )
    }
    var sparse = self
    // Not every model has a head for its language: MistralModel, LlamaForSequenceClassification.
    var architecture = "MixtralForCausalLM"
    if case .array(let known) = self["architectures"], let own = known.first?.string,
      let part = own.firstMatch(of: /^(?:Llama|Mistral)(.+)/)?.1
    {
      architecture = "Mixtral\(part)"
    }
    sparse["architectures"] = .array([.string(architecture)])
    sparse["model_type"] = .string("mixtral")
    sparse["num_local_experts"] = .integer(experts)
    sparse["num_experts_per_tok"] = .integer(expertsPerToken)
    sparse["output_router_logits"] = .bool(false)
    // Where the classes' defaults differ, what the original's meant.
    let defaults: [(String, JSONValue)] = [
      ("rope_theta", self["rope_parameters"]?["rope_theta"] ?? .number(10000)),
      ("rms_norm_eps", .number(1e-6)), ("intermediate_size", .integer(inner)),
      ("max_position_embeddings", .integer(type == "llama" ? 2048 : 131_072)),
      ("sliding_window", type == "llama" ? .null : .integer(4096)),
    ]
    for (key, value) in defaults where sparse[key] == nil { sparse[key] = value }
    if sparse["num_key_value_heads"] == nil {
      sparse["num_key_value_heads"] =
        type == "llama" ? sparse["num_attention_heads"] : .integer(8)
    }
    return sparse
  }
}

/// A tensor as it is, in another type perhaps.
private struct Passage: TileOperation {
  var grain: Int { 1 }
  func makeSummary() {}
  func apply(_ input: inout Tile, into output: inout Tile, summary: inout Void) {
    output.copyRow(0, from: input, 0)
  }
}
