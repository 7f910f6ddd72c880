public import Checkpoints

/// Turning a mixture back into a plain model: in every module θ = base + Σ wⱼτⱼ with weights that
/// no longer depend on the input; everything else stays as it is.
///
/// With weight 1 for one expert and 0 for the others the MLPs are that expert's bit for bit, if the
/// mixture has dense task vectors and its corrections (see `Corrections`); without those up to the
/// rounding of the stored task vector, and of F64 to Float.
public struct Collapse: Sendable {
  /// Where the weights come from.
  public enum Weights: Sendable {
    /// One expert's, by its name; what is kept of its head comes back too.
    case expert(String)
    case given([Float])
    /// What the routers say on average to recorded inputs.
    case activations(any TensorSource)
  }

  private let mixture: Mixture
  private let weights: Weights
  /// The expert whose head is taken, if there is one.
  private let headPrefix: String?
  private let activations: Activations?
  /// The plain model.
  public let manifest: Manifest

  public init(_ mixture: Mixture, _ weights: Weights) throws {
    let experts = mixture.description.experts
    var headPrefix: String?
    var activations: Activations?
    switch weights {
    case .expert(let name):
      guard experts.contains(name) else {
        throw MergeError(
          "\(mixture.source.path) has no expert \(quoted(name))",
          remedy: "it has \(experts.map(quoted).joined(separator: ", "))")
      }
      headPrefix = "experts.\(name)."
    case .given(let values):
      guard values.count == experts.count else {
        throw MergeError(
          "\(values.count) weights are given for the \(experts.count) experts \(experts.map(quoted).joined(separator: ", "))"
        )
      }
    case .activations(let source):
      activations = try Activations(source, of: mixture.description.modules)
    }
    self.mixture = mixture
    self.weights = weights
    self.headPrefix = headPrefix
    self.activations = activations
    manifest = try Collapse.layOut(mixture, headPrefix: headPrefix)
  }

  /// The tensors in the mixture's order, under the names of the original model.
  private static func layOut(_ mixture: Mixture, headPrefix: String?) throws -> Manifest {
    let tensors = mixture.source.manifest.tensors
    let heads = tensors.filter { headPrefix != nil && $0.name.hasPrefix(headPrefix!) }
      .map { $0.renamed(String($0.name.dropFirst(headPrefix!.count))) }
    let replaced = Set(heads.map { $0.name })
    let allHeads = mixture.description.experts.map { "experts.\($0)." }
    var plain: [TensorInfo] = []
    for tensor in tensors {
      if let original = mixture.originalName(of: tensor.name) {
        plain.append(tensor.renamed(original))
      } else if !mixture.isOfModule(tensor.name), !replaced.contains(tensor.name),
        !allHeads.contains(where: { tensor.name.hasPrefix($0) })
      {
        plain.append(tensor)
      }
    }
    var metadata = mixture.source.manifest.metadata
    metadata[MixtureDescription.metadataKey] = nil
    var names = Set<String>()
    for tensor in plain + heads where !names.insert(tensor.name).inserted {
      throw CheckpointError(
        file: mixture.source.path, tensor: tensor.name, "is there beside a module that replaces it")
    }
    return Manifest(plain + heads, metadata: metadata)
  }

  /// The weights of every module, in their order.
  public func moduleWeights() throws -> [(module: String, weights: [Float])] {
    try mixture.description.modules.map { module in
      switch weights {
      case .expert(let name):
        (module.prefix, mixture.description.experts.map { $0 == name ? 1 : 0 })
      case .given(let values): (module.prefix, values)
      case .activations: (module.prefix, try averageMixture(in: module))
      }
    }
  }

  private func averageMixture(in module: MixtureDescription.Module) throws -> [Float] {
    let router = try mixture.router(module.gate)
    let activations = activations!
    var sums = [Double](repeating: 0, count: router.expertCount)
    let samples = activations.sampleCount(of: module.prefix)
    for sample in 0..<samples {
      let mixture = router.mixture(try activations.tokens(of: module.prefix, sample: sample))
      for (expert, weight) in mixture.enumerated() { sums[expert] += Double(weight) }
    }
    return sums.map { Float($0 / Double(samples)) }
  }

  /// Writes the plain model.
  public func run(into sink: any TensorSink, memory: Int, workers: Int) throws {
    let weights = try moduleWeights()
    let pipeline = Pipeline(
      from: [mixture.decoded, mixture.corrections], into: [sink], memory: memory, workers: workers)
    let steps = zip(mixture.modules, weights).flatMap { entry, weights in
      entry.keys.flatMap { key in
        step(entry.module, key, weights.weights)
      }
    }
    try pipeline.run(steps)
    let copied = manifest.tensors.filter {
      mixture.source.manifest[$0.name] != nil && !isHead($0.name)
    }
    try mixture.source.copy(copied, into: sink, workers: workers)
    for tensor in manifest.tensors where isHead(tensor.name) {
      try mixture.source.copy(
        mixture.source.manifest[headPrefix! + tensor.name]!, into: sink, as: tensor)
    }
  }

  private func isHead(_ name: String) -> Bool {
    headPrefix.map { mixture.source.manifest[$0 + name] != nil } ?? false
  }

  private func step(
    _ module: MixtureDescription.Module, _ key: String, _ weights: [Float]
  ) -> [Step<WeightedSum>] {
    let used = weights.indices.filter { weights[$0] != 0 }
    let vectors = used.map {
      mixture.decoded.manifest["\(module.prefix).task_vectors.\($0).\(key)"]!
    }
    let base = mixture.decoded.manifest["\(module.prefix).base_model.\(key)"]!
    var inputs: [(file: Int, tensor: TensorInfo)] = ([base] + vectors).map { (0, $0) }
    var sum = WeightedSum(weights: used.map { weights[$0] })
    if sum.weights == [1],
      let corrections = mixture.corrections.manifest[Corrections.spread(over: vectors[0]).name]
    {
      inputs.append((1, corrections))
      sum.isCorrected = true
    }
    return Step.covering(
      inputs, outputs: [(0, manifest["\(module.original).\(key)"]!)], with: sum)
  }
}

extension Mixture {
  /// The name that a tensor of a module's base had in the original model.
  fileprivate func originalName(of name: String) -> String? {
    for module in description.modules {
      let prefix = "\(module.prefix).base_model."
      if name.hasPrefix(prefix) { return "\(module.original).\(name.dropFirst(prefix.count))" }
    }
    return nil
  }
}

/// The first row plus the others, weighted; where a row of corrections behind them has a weight,
/// that weight.
private struct WeightedSum: TileOperation {
  let weights: [Float]
  var isCorrected = false

  var grain: Int { 1 }
  func makeSummary() {}

  func apply(_ input: inout Tile, into output: inout Tile, summary: inout Void) {
    var result = output.mutableRow(0)
    copy(input[0], into: &result)
    for (index, weight) in weights.enumerated() {
      add(input[index + 1], times: weight, into: &result)
    }
    guard isCorrected else { return }
    let corrections = input[weights.count + 1]
    for i in corrections.indices
    where corrections[i].bitPattern != Corrections.none.bitPattern {
      result[i] = corrections[i]
    }
  }
}
