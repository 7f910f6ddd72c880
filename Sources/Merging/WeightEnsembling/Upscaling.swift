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
    public var cleaning: AdaptiveWeightDisentanglement?

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
  /// What was found out on the way.
  public struct Report: Sendable {
    /// Inner products of the task vectors, all cleaned tensors together, before cleaning.
    public fileprivate(set) var before: GramMatrix
    /// The same after cleaning.
    public fileprivate(set) var after: GramMatrix
  }

  /// Writes the mixture and, if asked, the task vectors.
  ///
  /// - Parameter memory: bytes that all workers' tiles take together.
  /// - Returns: the report of the cleaning, or `nil` without cleaning.
  @discardableResult
  public func run(
    into mixture: any TensorSink, taskVectors: (any TensorSink)? = nil, memory: Int, workers: Int
  ) throws -> Report? {
    let pipeline = Pipeline(
      from: family.sources, into: [mixture] + (taskVectors.map { [$0] } ?? []), memory: memory,
      workers: workers)
    let steps = family.base.manifest.tensors.filter { $0.dtype.isArithmetic }.flatMap {
      self.steps(for: $0, withTaskVectors: taskVectors != nil)
    }
    let summaries = try pipeline.run(steps)
    try copyTheRest(into: mixture)
    try writeRouters(into: mixture)
    guard options.cleaning != nil else { return nil }
    let none = GramMatrix(order: family.experts.count)
    return summaries.reduce(into: Report(before: none, after: none)) { report, summary in
      report.before += summary.before
      report.after += summary.after
    }
  }

  private func steps(for tensor: TensorInfo, withTaskVectors: Bool) -> [Step<UpscalingOperation>] {
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
    let isCleaned = options.cleaning != nil && AdaptiveWeightDisentanglement.cleansRows(of: tensor)
    let operation = UpscalingOperation(
      experts: experts.count, isModule: member != nil, writesTaskVectors: withTaskVectors,
      scaling: options.scaling, storedType: tensor.dtype,
      cleaning: isCleaned ? options.cleaning : nil, rowLength: tensor.rowLength,
      rowCount: tensor.rowLength == 0 ? 0 : tensor.elementCount / tensor.rowLength)
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
  struct Summary: Sendable {
    var before: GramMatrix
    var after: GramMatrix
  }

  let experts: Int
  let isModule: Bool
  let writesTaskVectors: Bool
  let scaling: Float
  let storedType: DType
  let cleaning: AdaptiveWeightDisentanglement?
  let rowLength: Int
  let rowCount: Int

  var grain: Int { cleaning == nil ? 1 : rowLength }

  func makeSummary() -> Summary {
    Summary(before: GramMatrix(order: experts), after: GramMatrix(order: experts))
  }

  func apply(_ input: inout Tile, into output: inout Tile, summary: inout Summary) {
    if isModule {
      for row in 1...experts { output.copyRow(row, from: input, row) }
    }
    for row in 1...experts { input.subtract(row: 0, from: row) }
    // Row 0 of the output holds the redundant vector until the result takes its place.
    output.clear(row: 0)
    if let cleaning {
      for begin in stride(from: 0, to: input.columns, by: rowLength) {
        clean(begin..<begin + rowLength, of: &input, output: &output, by: cleaning, &summary)
      }
    }
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

  /// Takes the redundant vector of one row out of the task vectors.
  private func clean(
    _ row: Range<Int>, of input: inout Tile, output: inout Tile,
    by cleaning: AdaptiveWeightDisentanglement, _ summary: inout Summary
  ) {
    var gram = GramMatrix(order: experts)
    gram.add(
      input.rows(from: 1).extracting(droppingFirst: row.lowerBound), stride: input.capacity,
      columns: row.count)
    let solution = cleaning.solve(gram, rowCount: rowCount)
    for expert in 0..<experts {
      output.add(
        input, row: expert + 1, times: Float(solution.coefficients[expert]), columns: row)
    }
    for expert in 0..<experts { input.subtract(output, row: 0, from: expert + 1, columns: row) }
    summary.before += gram
    summary.after += CleanedProducts(gram, solution.coefficients).products
  }
}

extension AdaptiveWeightDisentanglement {
  /// Whether the row scope cleans this tensor: weight matrices, but not embeddings and heads;
  /// biases and norms are left as they are.
  static func cleansRows(of tensor: TensorInfo) -> Bool {
    let name = tensor.name.lowercased()
    let excluded = ["embed", "wte", "wpe", "head", "classifier"]
    return tensor.shape.count == 2 && !excluded.contains { name.contains($0) }
  }
}
