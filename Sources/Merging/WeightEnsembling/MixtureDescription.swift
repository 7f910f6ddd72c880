public import Checkpoints
import FoundationEssentials

/// What a mixture of experts says of itself, kept as JSON under `wemoe` in its metadata.
public struct MixtureDescription: Codable, Sendable, Equatable {
  /// How the MLPs' shared knowledge is kept; see `spec` names in AWD and WEMoE's papers.
  public enum Form: String, Codable, Sendable {
    /// `base_model` is the pre-trained MLP.
    case pretrained
    /// `base_model` is the pre-trained MLP plus the redundant vector that cleaning took out of
    /// the task vectors, so that one-hot routing gives every expert's MLP back.
    case shared
  }

  public var experts: [String]
  public var form: Form
  /// λ of the static part.
  public var scaling: Float
  public var routerDepth: Int
  public var seed: UInt64
  /// The preset that cleaned the task vectors and its parameters.
  public var cleaning: String?
  /// Whether the routers have been fitted. Until then the mixture equals task arithmetic.
  public var calibrated: Bool

  static let metadataKey = "wemoe"

  /// - Throws: `CheckpointError` if the checkpoint does not say that it is a mixture.
  public init(of source: any TensorSource) throws {
    guard let text = source.manifest.metadata[Self.metadataKey] else {
      throw CheckpointError(
        file: source.path, "is not a mixture of experts: its metadata has no \"wemoe\"",
        remedy: "make one with 'smelt upscale'")
    }
    do {
      self = try JSONDecoder().decode(Self.self, from: Data(text.utf8))
    } catch {
      throw CheckpointError(
        file: source.path, "has \"wemoe\" metadata that this version cannot read")
    }
  }

  init(
    experts: [String], form: Form, scaling: Float, routerDepth: Int, seed: UInt64,
    cleaning: String?
  ) {
    self.experts = experts
    self.form = form
    self.scaling = scaling
    self.routerDepth = routerDepth
    self.seed = seed
    self.cleaning = cleaning
    calibrated = false
  }

  /// The description as metadata; the same description gives the same text.
  var metadata: [String: String] {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    return [Self.metadataKey: String(decoding: try! encoder.encode(self), as: UTF8.self)]
  }
}
