public import Checkpoints

/// A mixture of experts in a checkpoint, opened to be calibrated or collapsed: its description has
/// been proven to fit its tensors.
public struct Mixture: Sendable {
  public let description: MixtureDescription
  public let source: any TensorSource
  /// The same with every task vector dense and in Float, however it is stored.
  let decoded: any TensorSource
  /// What task vectors do not give back exactly.
  let corrections: CorrectionSource
  /// The modules in their order, with the keys of their tensors.
  let modules: [(module: MixtureDescription.Module, keys: [String])]

  /// - Throws: `CheckpointError` if the checkpoint is no mixture or lacks tensors of one.
  public init(_ source: any TensorSource) throws {
    description = try MixtureDescription(of: source)
    self.source = source
    let decoded = try TaskVectorSource(source, description)
    self.decoded = decoded
    corrections = try CorrectionSource(of: source, description)
    let experts = description.experts.count
    for gate in Set(description.modules.map { $0.gate }) {
      let width = description.modules.first { $0.gate == gate }!.width
      for expected in Router.layout(
        depth: description.routerDepth, width: width, experts: experts, gate: gate)
      {
        let own = try source.tensor(expected.name)
        guard own.shape == expected.shape, own.dtype.isArithmetic else {
          throw CheckpointError(
            file: source.path, tensor: own.name,
            "is \(own.dtype.rawValue) \(own.shapeDescription); a router of depth \(description.routerDepth) for \(experts) experts has \(expected.shapeDescription)"
          )
        }
      }
    }
    modules = try description.modules.map { module in
      let prefix = "\(module.prefix).base_model."
      let keys = source.manifest.tensors.map { $0.name }.filter { $0.hasPrefix(prefix) }
        .map { String($0.dropFirst(prefix.count)) }
      guard !keys.isEmpty else {
        throw CheckpointError(
          file: source.path, "has no base of the module \(quoted(module.prefix))")
      }
      return (module, keys)
    }
  }

  /// The gates, each with the names that it is stored under and the modules that it routes.
  var gates: [(copies: [String], modules: [MixtureDescription.Module])] {
    if description.hasGateCopies ?? false {
      return [(description.modules.map { $0.gate }, description.modules)]
    }
    var order: [String] = []
    var routed: [String: [MixtureDescription.Module]] = [:]
    for module in description.modules {
      if routed[module.gate] == nil { order.append(module.gate) }
      routed[module.gate, default: []].append(module)
    }
    return order.map { ([$0], routed[$0]!) }
  }

  func router(_ gate: String) throws -> Router {
    try Router(of: source, gate: gate, depth: description.routerDepth)
  }

  /// Whether a tensor belongs to one of the modules.
  func isOfModule(_ name: String) -> Bool {
    description.modules.contains { module in
      ["gate.", "base_model.", "task_vectors."].contains {
        name.hasPrefix("\(module.prefix).\($0)")
      }
    }
  }
}
