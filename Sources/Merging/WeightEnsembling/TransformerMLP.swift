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
  let module: [String]
  /// The linear maps below the path, in the order they are applied.
  let parts: [String]

  let isTransposed: Bool

  private init(
    _ family: String, _ path: String, module: String? = nil, _ parts: [String],
    isTransposed: Bool = false
  ) {
    self.family = family
    self.path = path.split(separator: ".").map(String.init)
    self.module = module.map { [$0] } ?? []
    self.parts = parts
    self.isTransposed = isTransposed
  }

  public static let families = [
    TransformerMLP("CLIP, ViT", "encoder.layers.{i}.mlp", ["fc1", "fc2"]),
    TransformerMLP(
      "BERT, RoBERTa, ViT", "encoder.layer.{i}", module: "mlp",
      ["intermediate.dense", "output.dense"]),
    TransformerMLP(
      "T5", "encoder.block.{i}.layer.1.DenseReluDense", ["wi", "wi_0", "wi_1", "wo"]),
    TransformerMLP(
      "T5", "decoder.block.{i}.layer.2.DenseReluDense", ["wi", "wi_0", "wi_1", "wo"]),
    TransformerMLP(
      "Llama, Mistral, Qwen, Gemma", "layers.{i}.mlp", ["gate_proj", "up_proj", "down_proj"]),
    TransformerMLP("GPT-2", "h.{i}.mlp", ["c_fc", "c_proj"], isTransposed: true),
  ]

  /// One tensor's place in an MLP.
  public struct Member: Sendable, Hashable {
    /// The WEMoE module's prefix: `vision_model.encoder.layers.3.mlp`.
    public let module: String
    /// The tensor's key below it: `fc1.weight`.
    public let key: String
    /// Whether the tensor is the weight of the first linear map.
    let isFirstWeight: Bool
    /// Whether weights are stored [in, out] and not [out, in].
    let isTransposed: Bool

    /// How wide the MLP's input is, as its first weight's shape tells.
    func inputWidth(_ tensor: TensorInfo) -> Int? {
      guard isFirstWeight, tensor.shape.count == 2 else { return nil }
      return tensor.shape[isTransposed ? 0 : 1]
    }
  }

  /// The MLP that a tensor belongs to, or `nil` if it belongs to none.
  public static func member(_ name: String) -> Member? {
    families.lazy.compactMap { $0.member(name) }.first
  }

  private func member(_ name: String) -> Member? {
    let words = name.split(separator: ".", omittingEmptySubsequences: false).map(String.init)
    guard words.count > path.count else { return nil }
    for start in 0..<(words.count - path.count) where matches(words, at: start) {
      let key = words[(start + path.count)...].joined(separator: ".")
      let isPart = parts.contains { key == "\($0).weight" || key == "\($0).bias" }
      guard isPart else { continue }
      let module = (words[..<(start + path.count)] + self.module).joined(separator: ".")
      let isFirst =
        parts.prefix(2).contains { key == "\($0).weight" } && key != "\(parts.last!).weight"
      return Member(
        module: module, key: key, isFirstWeight: isFirst, isTransposed: isTransposed)
    }
    return nil
  }

  private func matches(_ words: [String], at start: Int) -> Bool {
    zip(words[start...], path).allSatisfy { word, pattern in
      pattern == "{i}"
        ? !word.isEmpty && word.utf8.allSatisfy { (0x30...0x39).contains($0) }
        : word == pattern
    }
  }
}
