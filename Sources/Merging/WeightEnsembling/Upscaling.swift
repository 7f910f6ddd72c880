public import Checkpoints

/// Upscaling fine-tuned models into a weight-ensembling mixture of experts, as a plan: every
/// tensor that comes out and how, before any is read.
///
/// Tang et al., *Merging Multi-Task Models via Weight-Ensembling Mixture of Experts*,
/// arXiv 2402.00433. The MLPs become modules of a router, a base and a task vector an expert;
/// everything else is merged by task arithmetic. The state dict is the one FusionBench loads:
/// `P.gate.…`, `P.base_model.S`, `P.task_vectors.{j}.S` for the MLP at prefix `P`.
public struct Upscaling: Sendable {
  public struct Options: Sendable {
    /// λ of the static part, and of the untrained routers.
    public var scaling: Float = 0.3
    public var routerDepth = 2
    public var seed: UInt64 = 0
    /// Cleans the task vectors first; the mixture is then in the shared form.
    public var cleaning: Cleaning?

    public init() {}
  }

  public let family: ModelFamily
  public let options: Options
  /// The mixture's tensors.
  public let manifest: Manifest
  /// The (cleaned) task vectors as a checkpoint of their own: `{expert}/{tensor}`, in Float.
  public let taskVectorManifest: Manifest
  /// The prefixes of the modules, in the model's order, with the width of their input.
  public let modules: [(prefix: String, width: Int)]

  /// - Throws: `MergeError` if the model has no MLP that is known or the router no such depth.
  public init(_ family: ModelFamily, _ options: Options) throws {
    self.family = family
    self.options = options
    guard (0...2).contains(options.routerDepth) else {
      throw MergeError("a router's depth is 0, 1 or 2, not \(options.routerDepth)")
    }
    modules = Upscaling.modules(of: family.base.manifest)
    guard !modules.isEmpty else {
      let known = TransformerMLP.families.map { $0.family }.joined(separator: "; ")
      throw MergeError(
        "\(family.base.path) has no Transformer MLP that is known by its tensors' names",
        remedy: "known are \(known)")
    }
    let description = MixtureDescription(
      experts: family.experts.map { $0.name },
      form: options.cleaning == nil ? .pretrained : .shared,
      scaling: options.scaling, routerDepth: options.routerDepth, seed: options.seed,
      cleaning: options.cleaning?.description)
    manifest = Manifest(
      Upscaling.layOut(family, modules, options),
      metadata: family.base.manifest.metadata.merging(description.metadata) { $1 })
    taskVectorManifest = Manifest(
      family.experts.flatMap { expert in
        family.base.manifest.tensors.filter { $0.dtype.isArithmetic }.map {
          try! TensorInfo(name: "\(expert.name)/\($0.name)", dtype: .f32, shape: $0.shape)
        }
      },
      metadata: ["task_vectors": options.cleaning?.description ?? "as fine-tuned"])
  }

  private static func modules(of manifest: Manifest) -> [(prefix: String, width: Int)] {
    var found: [(prefix: String, width: Int)] = []
    for tensor in manifest.tensors {
      guard let member = TransformerMLP.member(tensor.name), let width = member.inputWidth(tensor),
        !found.contains(where: { $0.prefix == member.module })
      else { continue }
      found.append((member.module, width))
    }
    return found
  }

  /// The mixture's tensors in the base's order, a module where its first tensor was.
  private static func layOut(
    _ family: ModelFamily, _ modules: [(prefix: String, width: Int)], _ options: Options
  ) -> [TensorInfo] {
    var tensors: [TensorInfo] = []
    var begun = Set<String>()
    for tensor in family.base.manifest.tensors {
      guard let member = TransformerMLP.member(tensor.name), tensor.dtype.isArithmetic else {
        tensors.append(tensor)
        continue
      }
      if begun.insert(member.module).inserted,
        let module = modules.first(where: { $0.prefix == member.module })
      {
        tensors += Router.layout(
          depth: options.routerDepth, width: module.width, experts: family.experts.count,
          gate: "\(member.module).gate")
      }
      tensors.append(tensor.renamed(member.baseName))
      tensors += family.experts.indices.map { tensor.renamed(member.taskVectorName($0)) }
    }
    return tensors
  }
}

extension TransformerMLP.Member {
  var baseName: String { "\(module).base_model.\(key)" }
  func taskVectorName(_ expert: Int) -> String { "\(module).task_vectors.\(expert).\(key)" }
}

// MARK: - Running

extension Upscaling {
  /// Writes the mixture and, if asked, the task vectors.
  ///
  /// - Parameter memory: bytes that all workers' tiles take together.
  /// - Returns: what the cleaning did, or `nil` without cleaning.
  @discardableResult
  public func run(
    into mixture: any TensorSink, taskVectors: (any TensorSink)? = nil, memory: Int, workers: Int
  ) throws -> DisentanglementSummary? {
    let pipeline = Pipeline(
      from: family.sources, into: [mixture] + (taskVectors.map { [$0] } ?? []), memory: memory,
      workers: workers)
    func write(_ parts: [(tensor: TensorInfo, cleaning: TensorCleaning)]) throws
      -> [TensorFindings]
    {
      let steps = parts.map { self.steps(for: $0.tensor, $0.cleaning, taskVectors != nil) }
      let findings = try pipeline.run(steps.flatMap { $0 })
      return fold(findings, steps.map { $0.count }) { $0 += $1 }
        .map { $0 ?? TensorFindings(experts: family.experts.count) }
    }
    let summary: DisentanglementSummary?
    if let cleaning = options.cleaning {
      summary = try cleaning.run(
        on: family, grams: nil, memory: memory, workers: workers, write: write)
    } else {
      let tensors = family.base.manifest.tensors.filter { $0.dtype.isArithmetic }
      _ = try write(tensors.map { ($0, .none) })
      summary = nil
    }
    try copyTheRest(into: mixture)
    try writeRouters(into: mixture)
    return summary
  }

  private func steps(
    for tensor: TensorInfo, _ cleaning: TensorCleaning, _ withTaskVectors: Bool
  ) -> [Step<UpscalingOperation>] {
    let experts = family.experts
    let member = TransformerMLP.member(tensor.name)
    var outputs: [(file: Int, tensor: TensorInfo)]
    if let member {
      outputs = [(0, manifest[member.baseName]!)]
      outputs += experts.indices.map { (0, manifest[member.taskVectorName($0)]!) }
    } else {
      outputs = [(0, manifest[tensor.name]!)]
    }
    if withTaskVectors {
      outputs += experts.map { (1, taskVectorManifest["\($0.name)/\(tensor.name)"]!) }
    }
    let operation = UpscalingOperation(
      experts: experts.count, isModule: member != nil, writesTaskVectors: withTaskVectors,
      scaling: options.scaling, storedType: tensor.dtype, cleaning: cleaning)
    return Step.covering(family.places(of: tensor), outputs: outputs, with: operation)
  }

  /// Integers and the like see no arithmetic: they are the base's, bit for bit.
  private func copyTheRest(into mixture: any TensorSink) throws {
    try family.base.copy(
      family.base.manifest.tensors.filter { !$0.dtype.isArithmetic }, into: mixture)
  }

  private func writeRouters(into mixture: any TensorSink) throws {
    for module in modules {
      let gate = "\(module.prefix).gate"
      let router = Router.initial(
        depth: options.routerDepth, width: module.width, experts: family.experts.count,
        name: gate, seed: options.seed, mixture: options.scaling)
      try router.write(into: mixture, gate: gate)
    }
  }
}

/// The arithmetic of one tensor: rows are the base and the experts.
///
/// Out come the merged tensor, or for an MLP the module's base and task vectors; behind them,
/// if they are asked for, the task vectors as such.
private struct UpscalingOperation: TileOperation {
  let experts: Int
  let isModule: Bool
  let writesTaskVectors: Bool
  let scaling: Float
  let storedType: DType
  let cleaning: TensorCleaning

  var grain: Int { cleaning.grain }

  func makeSummary() -> TensorFindings { TensorFindings(experts: experts) }

  func apply(_ input: inout Tile, into output: inout Tile, summary: inout TensorFindings) {
    if isModule {
      for row in 1...experts { output.copyRow(row, from: input, row) }
    }
    for row in 1...experts { input.subtract(row: 0, from: row) }
    // Row 0 of the output holds the redundant vector until the result takes its place.
    let vectors = cleaning.redundantVectors(
      in: input, from: 1, experts: experts, findings: &summary)
    input.takeOut(vectors, from: 1, keeping: &output, row: 0)
    if writesTaskVectors {
      let first = isModule ? experts + 1 : 1
      for expert in 0..<experts { output.copyRow(first + expert, from: input, expert + 1) }
    }
    var result = output.mutableRow(0)
    if isModule {
      add(input[0], times: 1, into: &result)
      storedType.round(&result)
      // Differences to the base as it is stored: its rounding is theirs to make good.
      for row in 1...experts { output.subtract(row: 0, from: row) }
    } else {
      // The reference's order: the sum of the task vectors, times λ, plus the base.
      copy(input[1], into: &result)
      for row in 1..<experts { add(input[row + 1], times: 1, into: &result) }
      scale(&result, by: scaling, onto: input[0])
    }
  }
}
