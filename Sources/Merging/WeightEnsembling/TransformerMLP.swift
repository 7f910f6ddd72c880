import Checkpoints

/// Where the MLPs of Transformer layers are in a model, found from the tensors' names.
///
/// A family is a line of the table; `{i}` stands for the layer's number. The prefix in front
/// (`vision_model.` comes and goes between library versions) is taken from the names.
public struct TransformerMLP: Sendable, Hashable {
  public let family: String
  /// The dotted path of the layer or of the module that holds the MLP.
  let path: [String]
  /// What the WEMoE module is called below the path, where the model has no module of its own.
  let module: String?
  /// The linear maps below the path, in the order they are applied; all there are if empty.
  let parts: [String]
  /// What the MLP computes between its maps, where the model's configuration does not say.
  let activation: Activation?
  /// Whether weights are stored [in, out] and not [out, in].
  let isTransposed: Bool
  /// Whether these are the projections of an attention and no MLP.
  public let isAttention: Bool
  /// The pattern, if a user gave one: all that it names must be there.
  let pattern: String?

  private init(
    _ family: String, _ path: String, module: String? = nil, _ parts: [String],
    _ activation: Activation? = nil, isTransposed: Bool = false, isAttention: Bool = false,
    pattern: String? = nil
  ) {
    self.family = family
    self.path = path.split(separator: ".").map(String.init)
    self.module = module
    self.parts = parts
    self.activation = activation
    self.isTransposed = isTransposed
    self.isAttention = isAttention
    self.pattern = pattern
  }

  public static let families = [
    TransformerMLP("CLIP, SigLIP", "encoder.layers.{i}.mlp", ["fc1", "fc2"], .quickGELU),
    TransformerMLP(
      "BERT, RoBERTa, MiniLM, ViT", "encoder.layer.{i}", module: "mlp",
      ["intermediate.dense", "output.dense"], .gelu),
    TransformerMLP("DistilBERT", "transformer.layer.{i}.ffn", ["lin1", "lin2"], .gelu),
    TransformerMLP("timm", "blocks.{i}.mlp", ["fc1", "fc2"], .gelu),
    TransformerMLP("OpenCLIP", "resblocks.{i}.mlp", ["c_fc", "c_proj"], .gelu),
    TransformerMLP(
      "T5", "encoder.block.{i}.layer.1.DenseReluDense", ["wi", "wi_0", "wi_1", "wo"]),
    TransformerMLP(
      "T5", "decoder.block.{i}.layer.2.DenseReluDense", ["wi", "wi_0", "wi_1", "wo"]),
    TransformerMLP(
      "Llama, Mistral, Qwen, Gemma", "layers.{i}.mlp", ["gate_proj", "up_proj", "down_proj"],
      .silu),
    TransformerMLP("Phi-3", "layers.{i}.mlp", ["gate_up_proj", "down_proj"], .silu),
    TransformerMLP("Phi", "layers.{i}.mlp", ["fc1", "fc2"], .geluTanh),
    TransformerMLP(
      "GPT-NeoX", "layers.{i}.mlp", ["dense_h_to_4h", "dense_4h_to_h"], .gelu),
    TransformerMLP("GPT-2", "h.{i}.mlp", ["c_fc", "c_proj"], .geluTanh, isTransposed: true),
  ]

  /// The projections of the same families' attention, which can be experts as MLPs are.
  public static let attentions = [
    attention(
      "CLIP, SigLIP", "encoder.layers.{i}.self_attn", ["q_proj", "k_proj", "v_proj", "out_proj"]),
    attention(
      "BERT, RoBERTa, MiniLM, ViT", "encoder.layer.{i}.attention",
      [
        "self.query", "self.key", "self.value", "attention.query", "attention.key",
        "attention.value", "output.dense",
      ]),
    attention(
      "DistilBERT", "transformer.layer.{i}.attention", ["q_lin", "k_lin", "v_lin", "out_lin"]),
    attention("timm", "blocks.{i}.attn", ["qkv", "proj"]),
    attention("T5", "encoder.block.{i}.layer.0.SelfAttention", ["q", "k", "v", "o"]),
    attention("T5", "decoder.block.{i}.layer.0.SelfAttention", ["q", "k", "v", "o"]),
    attention(
      "Llama, Mistral, Qwen, Gemma, Phi", "layers.{i}.self_attn",
      ["q_proj", "qkv_proj", "k_proj", "v_proj", "o_proj", "dense"]),
    attention("GPT-NeoX", "layers.{i}.attention", ["query_key_value", "dense"]),
    attention("GPT-2", "h.{i}.attn", ["c_attn", "c_proj"], isTransposed: true),
  ]

  private static func attention(
    _ family: String, _ path: String, _ parts: [String], isTransposed: Bool = false
  ) -> TransformerMLP {
    TransformerMLP(family, path, parts, isTransposed: isTransposed, isAttention: true)
  }

  /// The families' names in a sentence.
  public static var knownFamilies: String {
    var names: [String] = []
    for mlp in families where !names.contains(mlp.family) { names.append(mlp.family) }
    return names.joined(separator: "; ")
  }

  /// The MLPs at a path that a user gives: `blocks.{i}.ffn`, or with its linear maps in the order
  /// they are applied, `blocks.{i}.ffn:lin1,lin2`.
  public init(pattern: String) throws(MergeError) {
    let halves = pattern.split(separator: ":", omittingEmptySubsequences: false)
    let words = halves[0].split(separator: ".", omittingEmptySubsequences: false)
    let parts = halves.dropFirst().flatMap {
      $0.split(separator: ",", omittingEmptySubsequences: false)
    }
    guard halves.count <= 2, words.filter({ $0 == "{i}" }).count == 1,
      !(words + parts).contains("")
    else {
      throw MergeError(
        "\(quoted(pattern)) is not the path of an MLP",
        remedy: "write it like blocks.{i}.ffn or blocks.{i}.ffn:lin1,lin2")
    }
    self.init(pattern, String(halves[0]), parts.map(String.init), pattern: pattern)
  }
}

// MARK: - Names

extension TransformerMLP {
  /// One tensor's place in an MLP.
  public struct Member: Sendable, Hashable {
    /// The WEMoE module's prefix: `vision_model.encoder.layers.3.mlp`.
    public let module: String
    /// The tensor's key below it: `fc1.weight`.
    public let key: String
    public let layer: Int
    public let mlp: TransformerMLP

    var baseName: String { "\(module).base_model.\(key)" }
    func taskVectorName(_ expert: Int) -> String { "\(module).task_vectors.\(expert).\(key)" }

    /// Where the tensor's linear map stands in the order they are applied.
    fileprivate var rank: Int {
      mlp.parts.firstIndex { key.hasPrefix("\($0).") } ?? mlp.parts.count
    }
  }

  /// The MLP that a tensor belongs to, or `nil` if it belongs to none.
  public static func member(_ name: String, of mlps: [TransformerMLP] = families) -> Member? {
    mlps.lazy.compactMap { $0.member(name) }.first
  }

  fileprivate func member(_ name: String) -> Member? {
    let words = name.split(separator: ".", omittingEmptySubsequences: false).map(String.init)
    guard words.count > path.count else { return nil }
    for start in 0..<(words.count - path.count) {
      guard let layer = layer(of: words[start...]) else { continue }
      let key = words[(start + path.count)...].joined(separator: ".")
      let isPart =
        parts.isEmpty || parts.contains { key == "\($0).weight" || key == "\($0).bias" }
      guard isPart else { continue }
      let prefix = words[..<(start + path.count)] + (module.map { [$0] } ?? [])
      return Member(module: prefix.joined(separator: "."), key: key, layer: layer, mlp: self)
    }
    return nil
  }

  /// The layer's number if the words begin with the path.
  private func layer(of words: ArraySlice<String>) -> Int? {
    var layer: Int?
    for (word, pattern) in zip(words, path) {
      if pattern == "{i}" {
        guard word.utf8.allSatisfy({ (0x30...0x39).contains($0) }), let number = Int(word) else {
          return nil
        }
        layer = number
      } else if word != pattern {
        return nil
      }
    }
    return layer
  }
}

// MARK: - Modules

/// An MLP of a model that becomes a module of experts.
public struct UpscaledModule: Sendable {
  /// `vision_model.encoder.layers.3.mlp`.
  public let prefix: String
  public let layer: Int
  public let mlp: TransformerMLP
  /// The width of its input.
  public let width: Int
  /// Its tensors' names in the original model.
  public let tensors: [String]
  /// Its linear maps in the order they are applied.
  let maps: [String]
  /// Whether their weights are stored [in, out] and not [out, in].
  let isTransposed: Bool

  /// The modules of a model, in its order.
  static func modules(
    of manifest: Manifest, _ mlps: [TransformerMLP], layers: Set<Int>?
  ) -> [UpscaledModule] {
    var order: [String] = []
    var members: [String: [(member: TransformerMLP.Member, tensor: TensorInfo)]] = [:]
    for tensor in manifest.tensors where tensor.dtype.isArithmetic {
      guard let member = TransformerMLP.member(tensor.name, of: mlps),
        layers?.contains(member.layer) ?? true
      else { continue }
      if members[member.module] == nil { order.append(member.module) }
      members[member.module, default: []].append((member, tensor))
    }
    return inOrderOfExecution(
      order.compactMap { prefix in
        let own = ofOneFamily(members[prefix]!, mlps)
        guard let (width, isTransposed) = width(of: own) else { return nil }
        let mlp = own[0].member.mlp
        let keys = own.map { $0.member.key }
        return UpscaledModule(
          prefix: prefix, layer: own[0].member.layer, mlp: mlp, width: width,
          tensors: own.map { $0.tensor.name },
          maps: mlp.parts.filter { keys.contains("\($0).weight") }, isTransposed: isTransposed)
      })
  }

  /// Families share some of their maps' names: the one that has them all is meant.
  private static func ofOneFamily(
    _ found: [(member: TransformerMLP.Member, tensor: TensorInfo)], _ mlps: [TransformerMLP]
  ) -> [(member: TransformerMLP.Member, tensor: TensorInfo)] {
    for mlp in mlps {
      let own = found.compactMap { member, tensor in
        mlp.member(tensor.name).flatMap { $0.module == member.module ? ($0, tensor) : nil }
      }
      if own.count == found.count { return own }
    }
    return found
  }

  /// Files may have layer 10 before layer 2, and a layer's MLP before its attention.
  private static func inOrderOfExecution(_ modules: [UpscaledModule]) -> [UpscaledModule] {
    var stacks: [String] = []
    for module in modules where !stacks.contains(module.stack) { stacks.append(module.stack) }
    return stacks.flatMap { stack in
      modules.filter { $0.stack == stack }.enumerated().sorted { one, other in
        let (left, right) = (one.element, other.element)
        return (left.layer, left.mlp.isAttention ? 0 : 1, one.offset)
          < (right.layer, right.mlp.isAttention ? 0 : 1, other.offset)
      }.map(\.element)
    }
  }

  /// What stands in front of the layer's number.
  private var stack: String {
    let words = prefix.split(separator: ".")
    let behind = mlp.path.count - mlp.path.firstIndex(of: "{i}")! + (mlp.module == nil ? 0 : 1)
    return words.dropLast(behind).joined(separator: ".")
  }

  /// How wide the input is, as the first weight's shape tells, and whether that is a weight's
  /// first dimension; `nil` if there is no weight.
  private static func width(
    of members: [(member: TransformerMLP.Member, tensor: TensorInfo)]
  ) -> (Int, isTransposed: Bool)? {
    let weights = members.filter { $0.tensor.shape.count >= 2 && !$0.tensor.shape.contains(0) }
    guard let (member, weight) = weights.min(by: { $0.member.rank < $1.member.rank }) else {
      return nil
    }
    let (rows, columns) = (weight.shape[weight.shape.count - 2], weight.rowLength)
    // Without an order of the maps: an MLP is wider inside than outside.
    if member.mlp.parts.isEmpty { return (min(rows, columns), false) }
    if member.mlp.isTransposed { return (rows, true) }
    // A bias is as long as the output, which tells how a pattern's weights are stored.
    let bias = members.first { $0.member.rank == member.rank && $0.tensor.shape.count == 1 }
    if let outputs = bias?.tensor.elementCount, outputs != rows, outputs == columns {
      return (rows, true)
    }
    return (columns, false)
  }

  /// What the family computes between the maps; T5's gated MLPs differ from its plain ones.
  var activation: Activation? {
    if mlp.family == "T5" { return maps.count == 3 ? .geluTanh : .relu }
    return mlp.activation
  }
}

extension UpscaledModule {
  /// Where the MLP's tensors were in the original model.
  var originalPrefix: String {
    guard let inserted = mlp.module else { return prefix }
    return String(prefix.dropLast(inserted.count + 1))
  }
}
