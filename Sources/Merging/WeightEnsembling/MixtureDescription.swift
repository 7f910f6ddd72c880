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

  /// What E-WEMoE's magnitude pruning took away.
  public struct Pruning: Codable, Sendable, Equatable {
    /// ρ, the share of every tensor that was set to zero.
    public var ratio: Double
    /// ‖pruned − τ‖/‖τ‖ of each expert, all its MLPs together.
    public var errors: [Double]
  }

  /// A WEMoE module.
  public struct Module: Codable, Sendable, Equatable {
    /// Where its tensors are: `encoder.layer.3.mlp`.
    public var prefix: String
    /// Where the MLP's tensors were in the original model: `encoder.layer.3`.
    public var original: String
    /// Where its router is stored: `{prefix}.gate`, or that of a module it shares one with.
    public var gate: String
    public var width: Int
    /// Its linear maps in the order they are applied; with three, the first gates the second.
    public var maps: [String]
    /// Whether their weights are stored [in, out] and not [out, in].
    public var transposed: Bool
    /// Whether these are the projections of an attention; absent from MLPs.
    public var attention: Bool?

    var isAttention: Bool { attention ?? false }
  }

  public var experts: [String]
  public var form: Form
  /// λ of the static part.
  public var scaling: Float
  public var routerDepth: Int
  public var seed: UInt64
  /// The preset that cleaned the task vectors and its parameters.
  public var cleaning: String?
  public var pruning: Pruning?
  public var storage: TaskVectorStorage?
  /// What the MLPs compute between their maps, as configurations name it.
  public var activation: String?
  public var modules: [Module]
  /// Gates that are not stored, and the stored gate that each is: a shared gate is kept once.
  public var aliases: [String: String]?
  /// Whether one gate for all modules is stored with each; absent from others.
  public var hasGateCopies: Bool?
  /// Whether the routers have been fitted. Until then the mixture equals task arithmetic.
  public var calibrated: Bool
  /// How the routers were fitted.
  public var calibration: String?

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
    guard !experts.isEmpty, (0...2).contains(routerDepth),
      modules.allSatisfy({ (1...1 << 24).contains($0.width) })
    else {
      throw CheckpointError(
        file: source.path, "has \"wemoe\" metadata that describes no mixture")
    }
  }

  init(
    experts: [String], form: Form, scaling: Float, routerDepth: Int, seed: UInt64,
    cleaning: String?, modules: [Module]
  ) {
    self.experts = experts
    self.form = form
    self.scaling = scaling
    self.routerDepth = routerDepth
    self.seed = seed
    self.cleaning = cleaning
    self.modules = modules
    calibrated = false
  }

  /// The description as metadata; the same description gives the same text.
  var metadata: [String: String] {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    return [Self.metadataKey: String(decoding: try! encoder.encode(self), as: UTF8.self)]
  }

  /// What a person must know who looks at a checkpoint; `nil` if it is no mixture.
  public static func warning(of source: any TensorSource) -> String? {
    // Whoever only looks need not hear that a description is of another version.
    (try? MixtureDescription(of: source))?.warning
  }

  /// What a person must know who is about to use the mixture.
  public var warning: String? {
    guard !calibrated else { return nil }
    // In the shared form the redundant vector is added once more than λ·k times: see AWD.
    let equal = form == .shared ? "is about as good as" : "equals"
    return
      "the routers are not calibrated yet: until 'smelt calibrate' this mixture \(equal) task arithmetic"
  }
}
