public import Checkpoints

/// A Transformer run one layer at a time from its checkpoint, so that one layer is in memory.
///
/// A model may be dense or a mixture made by upscaling: the MLPs' tensors tell.
public struct ForwardPass: Sendable {
  public let source: any TensorSource
  public let layerCount: Int
  /// Width of the states between the layers.
  public let width: Int
  let family: TransformerFamily
  let configuration: TransformerConfiguration
  let embedding: InputEmbedding
  private let stem: String
  private let headWidth: Int
  private let weights: TransformerWeights
  private let mixture: Mixture?

  /// - Parameters:
  ///   - inputs: What will be fed: of a model with two towers, it says which.
  ///   - configurationPath: The model's `config.json`, if there is one.
  ///   - flags: What the user says of the model; it counts for more than the file.
  /// - Throws: `CheckpointError` or `MergeError` if the model is of no known family or not whole.
  public init(
    of source: any TensorSource, for inputs: ModelInputs, configurationPath: String? = nil,
    flags: TransformerConfiguration = .init()
  ) throws {
    let tower: TransformerConfiguration.Tower = inputs.pixels == nil ? .text : .vision
    let found = TransformerFamily.table.filter { $0.tower == tower }.flatMap { family in
      family.stems(in: source.manifest).map { (family: family, stem: $0) }
    }
    guard let (family, stem) = found.first else {
      let kind = tower == .text ? "token ids" : "images"
      throw CheckpointError(
        file: source.path, "is no Transformer that Smelt can run on \(kind)",
        remedy: "record the activations with Scripts/capture-activations")
    }
    guard found.count == 1 else {
      throw CheckpointError(
        file: source.path,
        "holds several models for these inputs: \(found.map { quoted($0.stem) }.joined(separator: ", "))"
      )
    }
    var configuration = TransformerConfiguration()
    if let configurationPath {
      configuration = try TransformerConfiguration(contentsOf: configurationPath, tower: tower)
    }
    let isMixture = source.manifest.metadata[MixtureDescription.metadataKey] != nil
    let mixture = isMixture ? try Mixture(source) : nil
    configuration.override(with: flags)
    let weights = TransformerWeights(source: source)
    let embedding = try InputEmbedding(family, weights, stem: stem, configuration)
    let layers = "\(stem)\(family.layers)."
    if source.manifest["\(layers)0.pre_feedforward_layernorm.weight"] != nil {
      throw CheckpointError(
        file: source.path, "has layers with four norms (Gemma 2 or later), unknown to Smelt",
        remedy: "record the activations with Scripts/capture-activations")
    }
    var layerCount = 0
    while family.projection(family.query, of: "\(layers)\(layerCount)", in: source.manifest) != nil
    {
      layerCount += 1
    }
    guard let heads = configuration.heads else {
      throw MergeError(
        "the tensors of \(source.path) do not tell how many attention heads it has",
        remedy: "give --heads, or --config with its config.json")
    }
    let queries = family.projection(family.query, of: "\(layers)0", in: source.manifest)!
    guard heads > 0, queries.shape.count == 2, queries.shape[0] > 0, queries.shape[0] % heads == 0
    else {
      throw CheckpointError(
        file: source.path, tensor: queries.name,
        "has the shape \(queries.shapeDescription), which \(heads) attention heads cannot share")
    }
    self.source = source
    self.family = family
    self.stem = stem
    self.weights = weights
    self.mixture = mixture
    self.configuration = configuration
    self.embedding = embedding
    self.layerCount = layerCount
    width = embedding.width
    headWidth = queries.shape[0] / heads
    guard family.normKind == .layer || headWidth.isMultiple(of: 2) else {
      throw CheckpointError(
        file: source.path, tensor: queries.name, "makes heads of an odd width, \(headWidth)")
    }
  }

  private func layerName(_ index: Int) -> String { "\(stem)\(family.layers).\(index)" }

  /// What upscaling calls the MLP of a layer.
  public func module(_ layer: Int) -> String { "\(layerName(layer)).mlp" }

  /// What upscaling calls the attention of a layer.
  public func attentionModule(_ layer: Int) -> String { "\(layerName(layer)).\(family.attention)" }

  /// A layer without its MLP.
  func layer(_ index: Int) throws -> TransformerLayer {
    let name = layerName(index)
    return TransformerLayer(
      attention: try layerAttention(index),
      attentionNorm: try norm("\(name).\(family.attentionNorm)", count: width),
      mlpNorm: try norm("\(name).\(family.mlpNorm)", count: width),
      normsFirst: family.normsFirst)
  }

  /// A layer's attention, dense or a mixture.
  private func layerAttention(_ index: Int) throws -> RoutedPart<Attention> {
    let module = attentionModule(index)
    guard let mixture, let gate = mixture.description.modules.first(where: { $0.prefix == module })
    else {
      return .dense(try attention(index, "\(module).", in: weights))
    }
    let decoded = TransformerWeights(source: mixture.decoded)
    return .mixture(
      router: try mixture.router(gate.gate),
      base: try attention(index, "\(module).base_model.", in: weights),
      taskVectors: try mixture.description.experts.indices.map {
        try attention(index, "\(module).task_vectors.\($0).", in: decoded)
      })
  }

  /// - Parameter prefix: In front of the names of the projections.
  private func attention(
    _ index: Int, _ prefix: String, in weights: TransformerWeights
  ) throws -> Attention {
    let name = layerName(index)
    let inner = (configuration.heads ?? 1) * headWidth
    guard let key = family.projection(family.key, of: name, in: source.manifest) else {
      throw CheckpointError(
        file: source.path, tensor: "\(name).\(family.key).weight", "is missing")
    }
    let keyHeads = (key.shape.first ?? 0) / headWidth
    guard keyHeads > 0, key.shape[0] == keyHeads * headWidth,
      (configuration.heads ?? 1).isMultiple(of: keyHeads),
      configuration.keyValueHeads.map({ $0 == keyHeads }) ?? true
    else {
      throw CheckpointError(
        file: source.path, tensor: key.name,
        "has the shape \(key.shapeDescription), which does not make \(configuration.keyValueHeads.map { "\($0) key" } ?? "equal") heads of \(headWidth)"
      )
    }
    func dense(_ part: String, _ outputs: Int, _ inputs: Int) throws -> Dense {
      try weights.dense(
        prefix + family.below(family.attention, part), outputs: outputs, inputs: inputs)
    }
    let hasHeadNorms = source.manifest["\(name).self_attn.q_norm.weight"] != nil
    func headNorm(_ part: String) throws -> Norm? {
      hasHeadNorms ? try norm("\(name).self_attn.\(part)", count: headWidth) : nil
    }
    let slides =
      configuration.slidingLayers.map { $0.indices.contains(index) && $0[index] }
      ?? (index >= configuration.firstSlidingLayer)
    return Attention(
      query: try dense(family.query, inner, width),
      key: try dense(family.key, key.shape[0], width),
      value: try dense(family.value, key.shape[0], width),
      output: try dense(family.output, width, inner),
      headWidth: headWidth, queryNorm: try headNorm("q_norm"), keyNorm: try headNorm("k_norm"),
      rotary: family.normKind == .layer
        ? nil
        : RotaryEmbedding(
          headWidth: headWidth, theta: configuration.ropeTheta ?? 10000,
          scaling: configuration.ropeScaling),
      isCausal: family.isCausal,
      window: slides && family.isCausal ? configuration.slidingWindow : nil)
  }

  private func norm(_ name: String, count: Int) throws -> Norm {
    let epsilon = configuration.normEpsilon ?? family.normEpsilon
    let weight = try weights.vector("\(name).weight", count: count)
    switch family.normKind {
    case .layer:
      let bias = try weights.vector("\(name).bias", count: count)
      return .layer(weight: weight, bias: bias, epsilon: epsilon)
    case .rootMeanSquare:
      return .rootMeanSquare(
        weight: configuration.isGemma ? weight.map { 1 + $0 } : weight, epsilon: epsilon)
    }
  }

  /// The norm behind the last layer, where the model's last hidden states have one.
  func finalNorm() throws -> Norm? {
    try family.finalNorm.map { try norm("\(stem)\($0)", count: width) }
  }

  /// A layer's MLP, dense or a mixture.
  func mlp(_ layer: Int) throws -> RoutedPart<FeedForward> {
    let module = module(layer)
    guard let mixture, let gate = mixture.description.modules.first(where: { $0.prefix == module })
    else {
      return .dense(try feedForward("\(layerName(layer)).\(family.mlp)", in: weights))
    }
    // However the task vectors are stored, here they are read dense.
    let decoded = TransformerWeights(source: mixture.decoded)
    return .mixture(
      router: try mixture.router(gate.gate),
      base: try feedForward("\(module).base_model.", in: weights),
      taskVectors: try mixture.description.experts.indices.map {
        try feedForward("\(module).task_vectors.\($0).", in: decoded)
      })
  }

  /// How many elements a layer's tensors have.
  struct LayerSize {
    let all: Int
    /// Its MLP alone; one expert of it in a mixture.
    let mlp: Int
    /// Between the MLP's linear maps.
    let inner: Int
  }

  func elementCount(ofLayer index: Int) -> LayerSize {
    let layer = "\(layerName(index))."
    let tensors = source.manifest.tensors.filter { $0.name.hasPrefix(layer) }
    let prefixes = ["\(module(index)).base_model.", layer + family.mlp]
    let up = prefixes.lazy.compactMap { source.manifest["\($0)\(family.up).weight"] }.first
    return LayerSize(
      all: tensors.reduce(0) { $0 + $1.elementCount },
      mlp: (up?.elementCount ?? 0) * (family.gate == nil ? 2 : 3), inner: up?.shape.first ?? 0)
  }

  private func feedForward(
    _ prefix: String, in weights: TransformerWeights
  ) throws -> FeedForward {
    let up = try weights.dense(prefix + family.up, inputs: width)
    let inner = up.bias.count
    return FeedForward(
      gate: try family.gate.map { try weights.dense(prefix + $0, outputs: inner, inputs: width) },
      up: up, down: try weights.dense(prefix + family.down, outputs: width, inputs: inner),
      activation: configuration.activation
        ?? mixture?.description.activation.flatMap { Activation(rawValue: $0) }
        ?? family.activation)
  }
}

/// A Transformer layer up to and behind its MLP.
struct TransformerLayer: Sendable {
  let attention: RoutedPart<Attention>
  let attentionNorm: Norm
  let mlpNorm: Norm
  /// Whether norms come before attention and MLP, or after they were added to what went in.
  let normsFirst: Bool

  /// What the attention sees.
  func attentionInput(_ states: Matrix<Float>) -> Matrix<Float> {
    normsFirst ? attentionNorm(states) : states
  }

  /// What the MLP sees, and what its output will be added to.
  func beforeMLP(
    _ states: Matrix<Float>, samples: [Range<Int>]
  ) -> (residual: Matrix<Float>, input: Matrix<Float>) {
    var residual = attention(attentionInput(states), samples: samples)
    residual.add(states)
    guard !normsFirst else { return (residual, mlpNorm(residual)) }
    residual = attentionNorm(residual)
    return (residual, residual)
  }

  /// The states for the next layer.
  func afterMLP(residual: Matrix<Float>, output: Matrix<Float>) -> Matrix<Float> {
    var states = output
    states.add(residual)
    return normsFirst ? states : mlpNorm(states)
  }
}
