import Checkpoints
import FoundationEssentials

/// What a Transformer's tensors do not tell of how it computes; from `config.json` or from flags.
///
/// What is `nil` is the family's default, as the classes of transformers have it.
public struct TransformerConfiguration: Sendable, Equatable {
  /// Attention heads; there is no default.
  public var heads: Int?
  /// Heads of keys and values, where several query heads share one.
  public var keyValueHeads: Int?
  public var activation: Activation?
  public var normEpsilon: Float?
  public var ropeTheta: Double?
  var ropeScaling: RotaryEmbedding.Scaling = .none
  /// How many tokens back a layer sees; `nil` for all.
  var slidingWindow: Int?
  /// For each layer whether its attention is a sliding window; `nil` if all layers are alike.
  var slidingLayers: [Bool]?
  /// Where those are not named: the first layer whose attention is a sliding window.
  var firstSlidingLayer = 0
  /// Gemma adds one to the weights of its norms, multiplies its embeddings by the root of the width.
  var isGemma = false
  /// Which of the padding's and the first position's numbers RoBERTa's positions begin behind.
  var paddingPosition: Int?

  public init() {}

  /// Which part of a model of two towers is meant.
  enum Tower { case text, vision }

  /// Reads what a `config.json` says.
  init(contentsOf path: String, tower: Tower) throws {
    let text = try configurationText(path)
    let file: ConfigurationFile
    do {
      let whole = try JSONDecoder().decode(ConfigurationFile.self, from: Data(text))
      file = (tower == .text ? whole.textConfig : whole.visionConfig)?.value ?? whole
    } catch {
      throw CheckpointError(
        file: path, "is not a Transformer's configuration: \(reason(of: error))")
    }
    try self.init(file, path: path)
  }

  private init(_ file: ConfigurationFile, path: String) throws {
    heads = file.heads
    keyValueHeads = file.keyValueHeads
    normEpsilon = (file.layerNormEpsilon ?? file.rmsNormEpsilon).map { Float($0) }
    isGemma = file.modelType == "gemma"
    if ["roberta", "xlm-roberta", "camembert"].contains(file.modelType) {
      paddingPosition = file.paddingToken ?? 1
    }
    if let name = file.activation ?? file.hiddenActivation {
      guard let activation = Activation(configurationName: name) else {
        throw CheckpointError(
          file: path, "names an activation that Smelt does not know: \(quoted(name))")
      }
      // Gemma's first configurations say "gelu" and have always meant its approximation.
      self.activation = isGemma && activation == .gelu ? .geluTanh : activation
    }
    if file.partialRotaryFactor ?? 1 != 1 {
      throw CheckpointError(file: path, "asks for partial rotary embeddings, unknown to Smelt")
    }
    let rope = file.ropeParameters ?? file.ropeScaling
    ropeTheta = rope?.theta ?? file.ropeTheta
    ropeScaling = try rope?.scaling(path) ?? .none
    // Qwen's windows are off unless switched on, and begin behind its first layers.
    let isQwen = ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"].contains(file.modelType)
    if file.usesSlidingWindow ?? !isQwen {
      slidingWindow = file.slidingWindow ?? (isQwen ? 4096 : nil)
    }
    if isQwen { firstSlidingLayer = file.fullWindowLayers ?? 28 }
    slidingLayers = file.layerTypes?.map { $0 == "sliding_attention" }
    if let window = slidingWindow, window < 1 {
      throw CheckpointError(file: path, "has a sliding window of \(window) tokens")
    }
  }

  /// Takes over what `other` says; where it says nothing this stays.
  public mutating func override(with other: TransformerConfiguration) {
    heads = other.heads ?? heads
    keyValueHeads = other.keyValueHeads ?? keyValueHeads
    activation = other.activation ?? activation
    normEpsilon = other.normEpsilon ?? normEpsilon
    ropeTheta = other.ropeTheta ?? ropeTheta
  }
}

/// The fields of a `config.json` that matter here, under the names that transformers gives them.
private struct ConfigurationFile: Decodable {
  let modelType: String?
  let heads: Int?
  let keyValueHeads: Int?
  let activation: String?
  let hiddenActivation: String?
  let layerNormEpsilon: Double?
  let rmsNormEpsilon: Double?
  let ropeTheta: Double?
  let ropeParameters: Rope?
  let ropeScaling: Rope?
  let partialRotaryFactor: Double?
  let slidingWindow: Int?
  let usesSlidingWindow: Bool?
  let layerTypes: [String]?
  let fullWindowLayers: Int?
  let paddingToken: Int?
  let textConfig: Nested?
  let visionConfig: Nested?

  enum CodingKeys: String, CodingKey {
    case modelType = "model_type"
    case heads = "num_attention_heads"
    case keyValueHeads = "num_key_value_heads"
    case activation = "hidden_act"
    case hiddenActivation = "hidden_activation"
    case layerNormEpsilon = "layer_norm_eps"
    case rmsNormEpsilon = "rms_norm_eps"
    case ropeTheta = "rope_theta"
    case ropeParameters = "rope_parameters"
    case ropeScaling = "rope_scaling"
    case partialRotaryFactor = "partial_rotary_factor"
    case slidingWindow = "sliding_window"
    case usesSlidingWindow = "use_sliding_window"
    case layerTypes = "layer_types"
    case fullWindowLayers = "max_window_layers"
    case paddingToken = "pad_token_id"
    case textConfig = "text_config"
    case visionConfig = "vision_config"
  }

  /// A configuration within one: a class, since a value cannot contain its own kind.
  final class Nested: Decodable {
    let value: ConfigurationFile
    init(from decoder: any Decoder) throws { value = try ConfigurationFile(from: decoder) }
  }

  struct Rope: Decodable {
    let theta: Double?
    let type: String?
    let oldType: String?
    let factor: Double?
    let lowFrequencyFactor: Double?
    let highFrequencyFactor: Double?
    let originalLength: Double?

    enum CodingKeys: String, CodingKey {
      case theta = "rope_theta"
      case type = "rope_type"
      case oldType = "type"
      case factor
      case lowFrequencyFactor = "low_freq_factor"
      case highFrequencyFactor = "high_freq_factor"
      case originalLength = "original_max_position_embeddings"
    }

    func scaling(_ path: String) throws -> RotaryEmbedding.Scaling {
      switch type ?? oldType ?? "default" {
      case "default": return .none
      case "linear": return .linear(factor: factor ?? 1)
      case "llama3":
        return .llama3(
          factor: factor ?? 8, low: lowFrequencyFactor ?? 1, high: highFrequencyFactor ?? 4,
          originalLength: originalLength ?? 8192)
      case let other:
        throw CheckpointError(
          file: path,
          "asks for rotary embeddings of a type that Smelt does not know: \(quoted(other))")
      }
    }
  }
}

extension Activation {
  /// The activation that a model's configuration calls by this name.
  public init?(configurationName name: String) {
    switch name {
    case "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate": self = .geluTanh
    case "gelu_python": self = .gelu
    case "swish": self = .silu
    default: self.init(rawValue: name)
    }
  }
}

private func reason(of error: any Error) -> String {
  switch error as? DecodingError {
  case .typeMismatch(_, let context), .valueNotFound(_, let context), .keyNotFound(_, let context):
    let place = context.codingPath.map { $0.stringValue }.joined(separator: ".")
    return "\(quoted(place)) is of another type than expected"
  default: return "it is not valid JSON"
  }
}
