public import Checkpoints

/// A base model and the experts that were fine-tuned from it, checked against each other.
///
/// Every tensor of the base is in every expert with the same shape; element types may differ.
public struct ModelFamily: Sendable {
  public struct Expert: Sendable {
    public let name: String
    public let source: any TensorSource

    public init(name: String, source: any TensorSource) {
      self.name = name
      self.source = source
    }
  }

  public let base: any TensorSource
  public let experts: [Expert]
  /// Tensors that only experts have, which a merge leaves out.
  public let leftOut: [(expert: String, tensors: [String])]

  /// - Throws: `MergeError` for a bad list of experts, `CheckpointError` naming the file and the
  ///   tensor that does not fit the base.
  public init(base: any TensorSource, experts: [Expert]) throws {
    guard !experts.isEmpty else { throw MergeError("at least one expert is needed") }
    for (index, expert) in experts.enumerated() {
      guard !expert.name.isEmpty, !expert.name.contains("/") else {
        throw MergeError("the expert name \(quoted(expert.name)) is empty or contains a slash")
      }
      guard !experts[..<index].contains(where: { $0.name == expert.name }) else {
        throw MergeError("two experts are named \(quoted(expert.name))")
      }
    }
    for expert in experts {
      for tensor in base.manifest.tensors {
        try ModelFamily.check(expert.source, against: tensor, of: base)
      }
    }
    self.base = base
    self.experts = experts
    leftOut = experts.compactMap { expert in
      let extra = expert.source.manifest.tensors.filter { base.manifest[$0.name] == nil }
      return extra.isEmpty ? nil : (expert.name, extra.map { $0.name })
    }
  }

  private static func check(
    _ expert: any TensorSource, against tensor: TensorInfo, of base: any TensorSource
  ) throws {
    let own = try expert.tensor(tensor.name)
    guard own.shape == tensor.shape else {
      throw CheckpointError(
        file: expert.path, tensor: tensor.name,
        "has the shape \(own.shapeDescription) but \(tensor.shapeDescription) in \(base.path)",
        remedy: "an expert must be fine-tuned from the base it is merged with")
    }
    guard own.dtype.isArithmetic == tensor.dtype.isArithmetic else {
      throw CheckpointError(
        file: expert.path, tensor: tensor.name,
        "is \(own.dtype.rawValue) but \(tensor.dtype.rawValue) in \(base.path)")
    }
  }

  /// The base first, then the experts: the order of a tile's rows.
  var sources: [any TensorSource] { [base] + experts.map { $0.source } }

  /// The tensor of this name in the base and every expert.
  func places(of tensor: TensorInfo) -> [(file: Int, tensor: TensorInfo)] {
    sources.enumerated().map { (file: $0, tensor: $1.manifest[tensor.name]!) }
  }
}
