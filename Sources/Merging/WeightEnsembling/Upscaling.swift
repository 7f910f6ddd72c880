public import Checkpoints

/// Upscaling fine-tuned models into a weight-ensembling mixture of experts, as a plan: every
/// tensor that comes out and how, before any is read.
///
/// Tang et al., *Merging Multi-Task Models via Weight-Ensembling Mixture of Experts*,
/// arXiv 2402.00433; pruned task vectors and a shared gate are from Shen et al., *Efficient and
/// Effective Weight-Ensembling Mixture of Experts*, arXiv 2410.21804. The MLPs become modules of
/// a router, a base and a task vector an expert; everything else is merged by task arithmetic.
/// The state dict is the one FusionBench loads: `P.gate.…`, `P.base_model.S`,
/// `P.task_vectors.{j}.S` for the MLP at prefix `P`.
public struct Upscaling: Sendable {
  /// Whose gate a module has.
  public enum GateSharing: Sendable {
    case own
    /// All modules have one, stored once; the description's aliases tell whose.
    case shared
    /// The same, stored for each module.
    case duplicated
  }

  public struct Options: Sendable {
    /// λ of the static part, and of the untrained routers.
    public var scaling: Float = 0.3
    public var routerDepth = 2
    public var seed: UInt64 = 0
    /// Cleans the task vectors first; the mixture is then in the shared form.
    public var cleaning: Cleaning?
    /// Where the MLPs are.
    public var mlps = TransformerMLP.families
    /// The numbers of the layers to upscale; `nil` for all.
    public var layers: Set<Int>?
    /// ρ of magnitude pruning, tensor by tensor.
    public var pruning: Double?
    public var gates = GateSharing.own
    public var storage = TaskVectorStorage.dense
    /// What the MLPs compute between their maps; found from the model if not given.
    public var activation: Activation?
    /// Stores beside dense task vectors the weights that they do not give back exactly.
    public var keepsCorrections = true
    /// Keeps what only some experts have, as `experts.{name}.{tensor}`.
    public var keepsHeads = false

    public init() {}
  }

  public let family: ModelFamily
  public let options: Options
  /// The modules in the model's order.
  public let modules: [UpscaledModule]
  /// The mixture's tensors. Until `survey` has counted, the sizes of sparse task vectors are an
  /// estimate, and corrections are missing.
  public private(set) var manifest: Manifest
  /// The (cleaned) task vectors as a checkpoint of their own: `{expert}/{tensor}`, in Float.
  public let taskVectorManifest: Manifest
  /// What pruning keeps of each module tensor, by its name in the base.
  private(set) var pruned: [String: PrunedTensor] = [:]
  /// How many weights each expert's task vector does not give back, by the tensor's name in the
  /// base; empty before the survey.
  private(set) var corrections: [String: [Int]] = [:]
  /// The task vectors' Gram matrices, if the survey had to find them.
  var grams: TaskVectorGrams?
  private let members: [String: TransformerMLP.Member]
  /// What the MLPs compute: as asked, as the model's configuration says, or as the family does.
  private let activation: Activation?

  /// - Throws: `MergeError` if the model has no MLP that is known or an option is out of range;
  ///   `CheckpointError` if a tensor or the base's `config.json` cannot be used.
  public init(_ family: ModelFamily, _ options: Options) throws {
    self.family = family
    self.options = options
    try Upscaling.check(options)
    modules = UpscaledModule.modules(
      of: family.base.manifest, options.mlps, layers: options.layers)
    try Upscaling.check(modules, of: family, options)
    activation =
      try options.activation ?? ModelConfiguration(of: family.base.path)?.activation
      ?? modules.lazy.compactMap { $0.activation }.first
    let names = Set(modules.flatMap { $0.tensors })
    members = Dictionary(
      uniqueKeysWithValues: names.map {
        ($0, TransformerMLP.member($0, of: options.mlps)!)
      })
    manifest = Manifest([])
    taskVectorManifest = Manifest(
      try family.experts.flatMap { expert in
        try family.base.manifest.tensors.filter { $0.dtype.isArithmetic }.map {
          try Upscaling.taskVector(of: $0, expert.name, base: family.base.path)
        }
      },
      metadata: ["task_vectors": options.cleaning?.description ?? "as fine-tuned"])
    try checkNames()
    manifest = layOut()
  }

  /// A task vector's tensor, in Float whatever the model's type.
  private static func taskVector(of tensor: TensorInfo, _ expert: String, base: String)
    throws(CheckpointError) -> TensorInfo
  {
    do {
      return try TensorInfo(name: "\(expert)/\(tensor.name)", dtype: .f32, shape: tensor.shape)
    } catch {
      throw CheckpointError(file: base, tensor: tensor.name, "is too large to be widened to F32")
    }
  }

  /// A model may already have tensors under the names that a mixture gives its own.
  private func checkNames() throws(CheckpointError) {
    let taken = modules.flatMap {
      [$0.prefix + ".gate.", $0.prefix + ".base_model.", $0.prefix + ".task_vectors."]
    }
    for tensor in family.base.manifest.tensors
    where taken.contains(where: { tensor.name.hasPrefix($0) }) {
      throw CheckpointError(
        file: family.base.path, tensor: tensor.name,
        "has a name that the mixture needs for its own tensors",
        remedy: "is the base a mixture already?")
    }
  }

  private static func check(_ options: Options) throws(MergeError) {
    guard (0...2).contains(options.routerDepth) else {
      throw MergeError("a router's depth is 0, 1 or 2, not \(options.routerDepth)")
    }
    if let ratio = options.pruning, !(0...1).contains(ratio) {
      throw MergeError("a pruning ratio is from 0 to 1, not \(ratio)")
    }
    if case .lowRank(let rank) = options.storage, rank < 1 {
      throw MergeError("a rank is at least 1, not \(rank)")
    }
  }

  private static func check(
    _ modules: [UpscaledModule], of family: ModelFamily, _ options: Options
  ) throws {
    func isNowhere(_ pattern: String) -> MergeError {
      MergeError("\(family.base.path) has no tensors where --mlp \(quoted(pattern)) says")
    }
    guard let first = modules.first else {
      if options.layers == nil, let pattern = options.mlps.lazy.compactMap({ $0.pattern }).first {
        throw isNowhere(pattern)
      }
      let what = options.layers == nil ? "" : " in the layers asked for"
      throw MergeError(
        "\(family.base.path) has no Transformer MLP\(what) that is known by its tensors' names",
        remedy: "known are \(TransformerMLP.knownFamilies); tell where others are with --mlp")
    }
    if let asked = options.layers,
      let missing = asked.sorted().first(where: { layer in
        !modules.contains { $0.layer == layer }
      })
    {
      throw MergeError(
        "\(family.base.path) has no Transformer MLP in layer \(missing), which --layers asks for")
    }
    for mlp in options.mlps {
      guard let pattern = mlp.pattern else { continue }
      let own = modules.filter { $0.mlp == mlp }
      guard !own.isEmpty else { throw isNowhere(pattern) }
      for module in own {
        if let map = mlp.parts.first(where: { !module.maps.contains($0) }) {
          throw CheckpointError(
            file: family.base.path, tensor: "\(module.prefix).\(map).weight",
            "is missing, which --mlp \(quoted(pattern)) names")
        }
      }
    }
    if options.gates != .own, let other = modules.first(where: { $0.width != first.width }) {
      throw MergeError(
        "modules \(first.prefix) and \(other.prefix) cannot share a gate: their inputs have \(first.width) and \(other.width) elements"
      )
    }
    for (index, expert) in family.experts.enumerated() {
      for name in modules.flatMap({ $0.tensors })
      where family.counterpart(of: name, in: index) == nil {
        throw CheckpointError(file: expert.source.path, tensor: name, "is missing")
      }
    }
  }

  /// The tensor's place in a module, if it belongs to one.
  func member(_ tensor: TensorInfo) -> TransformerMLP.Member? { members[tensor.name] }

  func coding(of tensor: TensorInfo) -> TaskVectorStorage.Coding {
    options.storage.coding(of: tensor)
  }

  /// Whether there may be corrections: what is pruned or coded has lost more than a last digit.
  public var hasCorrections: Bool {
    options.keepsCorrections && options.storage == .dense && options.pruning == nil
  }

  /// Takes in what a survey found; the layout then fits it.
  mutating func take(
    pruned: [String: PrunedTensor] = [:], corrections: [String: [Int]] = [:]
  ) {
    self.pruned = pruned
    self.corrections = corrections
    manifest = layOut()
  }
}

// MARK: - Layout

extension Upscaling {
  /// Where a module's gate is stored.
  func gate(of module: UpscaledModule) -> String {
    "\(options.gates == .shared ? modules[0].prefix : module.prefix).gate"
  }

  /// The gates that are stored.
  var storedGates: [InitialRouters.Gate] {
    let owners = options.gates == .shared ? Array(modules.prefix(1)) : modules
    return owners.map { module in
      InitialRouters.Gate(
        prefix: gate(of: module),
        origin: "\(options.gates == .own ? module.prefix : modules[0].prefix).gate",
        tensors: Router.layout(
          depth: options.routerDepth, width: module.width, experts: family.experts.count,
          gate: gate(of: module)))
    }
  }

  /// The mixture's tensors in the base's order, a module where its first tensor was.
  private func layOut() -> Manifest {
    var tensors: [TensorInfo] = []
    let gates = Dictionary(uniqueKeysWithValues: storedGates.map { ($0.prefix, $0.tensors) })
    var begun = Set<String>()
    for tensor in family.base.manifest.tensors {
      guard let member = members[tensor.name] else {
        tensors.append(tensor)
        continue
      }
      if begun.insert(member.module).inserted {
        tensors += gates["\(member.module).gate"] ?? []
      }
      tensors.append(tensor.renamed(member.baseName))
      for expert in family.experts.indices {
        let vector = tensor.renamed(member.taskVectorName(expert))
        tensors += coding(of: tensor).layout(
          of: vector, kept: pruned[tensor.name]?.experts[expert].kept ?? estimatedKept(tensor))
        tensors += Corrections.layout(of: vector, count: corrections[tensor.name]?[expert] ?? 0)
      }
    }
    return Manifest(
      tensors + headTensors.map { $0.stored },
      metadata: family.base.manifest.metadata.merging(description.metadata) { $1 })
  }

  /// How many elements pruning keeps if no two have the same magnitude.
  private func estimatedKept(_ tensor: TensorInfo) -> Int {
    guard let ratio = options.pruning, tensor.elementCount > 0 else { return tensor.elementCount }
    return tensor.elementCount - 1 - Int(ratio * Double(tensor.elementCount - 1))
  }

  /// What only some experts have, where it is kept.
  var headTensors: [(expert: Int, own: TensorInfo, stored: TensorInfo)] {
    guard options.keepsHeads else { return [] }
    return family.experts.enumerated().flatMap { index, expert in
      let names = family.remarks.filter {
        $0.expert == expert.name && ($0.rule == .leftOut || $0.rule == .otherHead)
      }.flatMap { $0.tensors }
      return names.compactMap { expert.source.manifest[$0] }.map {
        (index, $0, $0.renamed("experts.\(expert.name).\($0.name)"))
      }
    }
  }

  /// What a person must know who is about to use the mixture.
  public var warning: String { description.warning! }

  var description: MixtureDescription {
    var description = MixtureDescription(
      experts: family.experts.map { $0.name },
      form: options.cleaning == nil ? .pretrained : .shared,
      scaling: options.scaling, routerDepth: options.routerDepth, seed: options.seed,
      cleaning: options.cleaning?.description,
      modules: modules.map {
        .init(
          prefix: $0.prefix, original: $0.originalPrefix, gate: gate(of: $0), width: $0.width,
          maps: $0.maps, transposed: $0.isTransposed,
          attention: $0.mlp.isAttention ? true : nil)
      })
    if options.gates == .shared {
      description.aliases = Dictionary(
        uniqueKeysWithValues: modules.dropFirst().map { ("\($0.prefix).gate", gate(of: $0)) })
    }
    if options.gates == .duplicated { description.hasGateCopies = true }
    if let ratio = options.pruning {
      description.pruning = .init(ratio: ratio, errors: pruningErrors)
    }
    if options.storage != .dense { description.storage = options.storage }
    description.activation = activation?.rawValue
    return description
  }

  /// ‖pruned − τ‖/‖τ‖ of each expert; empty before the survey.
  var pruningErrors: [Double] {
    guard !pruned.isEmpty else { return [] }
    // In the model's order: a sum over a dictionary would round differently every time.
    let tensors = modules.flatMap { $0.tensors }.compactMap { pruned[$0] }
    return family.experts.indices.map { expert in
      let dropped = tensors.reduce(0) { $0 + $1.experts[expert].dropped }
      let total = tensors.reduce(0) { $0 + $1.experts[expert].total }
      return total > 0 ? (dropped / total).squareRoot() : 0
    }
  }
}

// MARK: - Cost

extension Upscaling {
  /// What a run takes and gives.
  public struct Cost: Sendable, Equatable {
    /// Numbers in the mixture, as if its task vectors were dense.
    public var parameters: Int
    /// Those of them that pruning leaves other than zero.
    public var remaining: Int
    /// Numbers as they are stored: a low-rank vector's factors, the scales of a quantised one,
    /// what a sparse one keeps.
    public var stored: Int
    /// Bytes of the task vectors as they are stored.
    public var taskVectorBytes: Int
    /// The same if they were dense.
    public var denseVectorBytes: Int
    public var bytesRead: Int
    public var bytesWritten: Int
    /// How often the MLPs' tensors are read.
    public var passes: Int
    /// How often groups wider than a row are read by the cleaning.
    public var reads = CleaningReads()
    public var peakMemory: Int
  }

  /// What the program takes beside its tiles: its code, libraries, headers.
  public static let memoryBesideTiles = 48 << 20

  /// - Parameter memory: the budget of a run.
  public func cost(memory: Int, workers: Int, withTaskVectors: Bool) -> Cost {
    let gates = storedGates.flatMap { $0.tensors }.reduce(0) { $0 + $1.elementCount }
    var cost = Cost(
      parameters: gates, remaining: gates, stored: gates, taskVectorBytes: 0, denseVectorBytes: 0,
      bytesRead: 0,
      bytesWritten: manifest.byteCount + (withTaskVectors ? taskVectorManifest.byteCount : 0),
      passes: 1 + surveyPasses, peakMemory: memory + Upscaling.memoryBesideTiles)
    for tensor in family.base.manifest.tensors {
      let isModule = members[tensor.name] != nil
      cost.parameters += tensor.elementCount
      cost.remaining += tensor.elementCount
      cost.stored += tensor.elementCount
      if isModule { for expert in family.experts.indices { add(tensor, expert, to: &cost) } }
      let bytes =
        tensor.dtype.isArithmetic
        ? family.places(of: tensor).reduce(0) { $0 + $1.tensor.byteCount } : tensor.byteCount
      cost.bytesRead += bytes * (isModule ? cost.passes : 1)
    }
    if let cleaning = options.cleaning {
      // A survey needs to know before what else is held in memory while it is written.
      let isSurveyed = surveyPasses > 0
      let reads = cleaning.reads(
        of: family, memory: isSurveyed ? 0 : memory, workers: workers, grain: largestGrain)
      cost.bytesRead += reads.bytesReadAgain
      cost.passes += reads.groupsReadTwice > 0 ? 1 : 0
      if !isSurveyed { cost.reads = reads }
    }
    let heads = headTensors.reduce(0) { $0 + $1.own.elementCount }
    cost.parameters += heads
    cost.remaining += heads
    cost.stored += heads
    cost.bytesRead += headTensors.reduce(0) { $0 + $1.own.byteCount }
    return cost
  }

  /// Adds an expert's task vector of a module's tensor.
  private func add(_ tensor: TensorInfo, _ expert: Int, to cost: inout Cost) {
    let coding = coding(of: tensor)
    let kept = pruned[tensor.name]?.experts[expert].kept ?? estimatedKept(tensor)
    cost.parameters += tensor.elementCount
    cost.remaining += kept
    cost.stored += coding.numberCount(of: tensor, kept: kept)
    cost.denseVectorBytes += tensor.byteCount
    cost.taskVectorBytes += coding.layout(of: tensor, kept: kept)
      .reduce(0) { $0 + $1.byteCount }
  }
}
