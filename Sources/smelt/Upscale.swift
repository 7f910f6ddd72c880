import ArgumentParser
import Checkpoints
import Foundation
import Merging

struct Upscale: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Upscale fine-tuned models into a weight-ensembling mixture of experts.",
    discussion: """
      Every Transformer MLP becomes a module of a router, the pre-trained MLP and a task vector \
      for each expert (WEMoE, arXiv 2402.00433); everything else is merged by task arithmetic, \
      base + λ·Σ(expert − base). Until its routers are calibrated the mixture equals task \
      arithmetic: see 'smelt calibrate'.

      The MLPs are found by the tensors' names (\(TransformerMLP.knownFamilies)); --mlp tells \
      where others are. --prune 0.9 --shared-gate make the efficient form (E-WEMoE, \
      arXiv 2410.21804).
      """)

  @OptionGroup var family: FamilyArguments

  @Option(
    name: .shortAndLong, help: "The mixture to write; its ending names the format: \(Endings.all).")
  var output: String

  @OptionGroup var cleaning: CleaningArguments

  @Option(help: "Also write the task vectors, cleaned if so asked: NAME/tensor for each expert.")
  var taskVectors: String?

  @Option(name: .customLong("lambda"), help: "λ of the static part and of the untrained routers.")
  var scaling: Float = 0.3

  @Option(help: "Depth of the routers: 0 (a constant), 1 (linear) or 2 (one hidden layer).")
  var routerDepth = 2

  @Option(help: "Seed of the routers' random initialisation.")
  var seed: UInt64 = 0

  @Option(
    help: ArgumentHelp(
      "Where the MLPs are, {i} being the layer's number: blocks.{i}.ffn, or with its linear maps in order, blocks.{i}.ffn:lin1,lin2.",
      valueName: "pattern"))
  var mlp: [String] = []

  @Flag(
    help: ArgumentHelp(
      "Make modules of the attention's projections too, each with a router of its own.",
      discussion:
        "What attention learned is then kept as well, for about half as much more. FusionBench does not load such mixtures."
    ))
  var attention = false

  @Option(help: "The layers to upscale, such as 0-5,11; the others are merged.")
  var layers: LayerRange?

  @Option(
    help: ArgumentHelp(
      "Set this share of every task vector's tensors to zero, the smallest first.",
      valueName: "ratio"))
  var prune: Double?

  @Flag(help: "One router for all layers, stored once: metadata tells which gates it stands for.")
  var sharedGate = false

  @Flag(help: "With --shared-gate: store its copy in every layer.")
  var duplicateGate = false

  @Option(help: "How task vectors are stored: dense, sparse, int8, int4 or lowrank.")
  var store = Storage.dense

  @Option(help: "The rank of --store lowrank.")
  var rank: Int?

  @Option(
    help: ArgumentHelp(
      "The MLPs' nonlinearity, where the model does not tell: \(ActivationName.all).",
      valueName: "name"))
  var activation: ActivationName?

  @Flag(help: "Keep the heads that only some experts have, as experts.NAME.TENSOR.")
  var keepHeads = false

  @Option(
    help: ArgumentHelp(
      "wemoe, fusionbench or mixtral: Llama-like experts as whole MLPs side by side, which transformers loads.",
      discussion:
        "FusionBench loads its own tensors and no others: without what makes a collapse to one expert exact. A Mixtral's gates are fitted to --activations, best recorded with --tokens. An output without a file's ending is a folder with config.json and the base's tokenizer."
    ))
  var format = Format.wemoe

  @Option(help: "Recorded activations, for --format mixtral.", completion: .file())
  var activations: String?

  @Option(help: "How many experts a token has, for --format mixtral.")
  var expertsPerToken = 2

  @Flag(help: "Say what would be written and what it would take, and write nothing.")
  var dryRun = false

  @OptionGroup var resources: Resources

  enum Storage: String, ExpressibleByArgument, CaseIterable {
    case dense, sparse, int8, int4, lowrank
  }

  enum Format: String, ExpressibleByArgument, CaseIterable {
    case wemoe, fusionbench, mixtral
  }

  func validate() throws {
    for output in (format == .mixtral ? [] : [output]) + (taskVectors.map { [$0] } ?? []) {
      try refuseUnknownEnding(of: output)
    }
    guard (format == .mixtral) == (activations != nil) else {
      throw ValidationError("--format mixtral and --activations go together.")
    }
    guard !attention || format == .wemoe else {
      throw ValidationError("--format \(format.rawValue) cannot have --attention.")
    }
    guard format != .fusionbench || store == .dense && !keepHeads else {
      throw ValidationError(
        "--format fusionbench is dense and cannot have --store or --keep-heads.")
    }
    guard (0...2).contains(routerDepth) else {
      throw ValidationError("--router-depth is 0, 1 or 2.")
    }
    guard scaling.isFinite else { throw ValidationError("--lambda must be a finite number.") }
    guard sharedGate || !duplicateGate else {
      throw ValidationError("--duplicate-gate needs --shared-gate.")
    }
    guard (store == .lowrank) == (rank != nil) else {
      throw ValidationError("--store lowrank and --rank go together.")
    }
    if let prune, !(0...1).contains(prune) {
      throw ValidationError("--prune is from 0 to 1.")
    }
    if let rank, rank < 1 { throw ValidationError("--rank must be at least 1.") }
  }

  func run() throws {
    if format == .mixtral { return try writeSparse() }
    var upscaling = try family.open { try Upscaling($0, options()) }
    for output in [output] + (taskVectors.map { [$0] } ?? []) {
      try refuse(writing: output, overInputs: family.paths)
    }
    if dryRun { return sayPlan(of: upscaling) }
    try upscaling.survey(memory: resources.memory.bytes, workers: resources.jobs)
    let mixture = try Checkpoint.create(output, upscaling.manifest, resources.options)
    let vectors = try taskVectors.map {
      try Checkpoint.create($0, upscaling.taskVectorManifest, resources.options)
    }
    let report = try upscaling.run(
      into: mixture, taskVectors: vectors, memory: resources.memory.bytes, workers: resources.jobs)
    try upscaling.family.checkUnchanged()
    try Checkpoint.finish([mixture] + (vectors.map { [$0] } ?? []))
    say(upscaling, report)
  }

  private func writeSparse() throws {
    let sparse = try family.open {
      try SparseMixture(
        $0, scaling: scaling, activations: Checkpoint.open(activations!),
        expertsPerToken: min(expertsPerToken, family.experts.count))
    }
    try refuse(writing: output, overInputs: family.paths + [activations!])
    if dryRun { return sayPlan(of: sparse) }
    var options = resources.options
    if writesFolder {
      options.sideFilesOf = family.base
      options.files = sparse.configuration.map { ["config.json": Array($0.text.utf8)] } ?? [:]
    }
    let path = writesFolder && !output.hasSuffix("/") ? output + "/" : output
    let sink = try Checkpoint.create(path, sparse.manifest, options)
    let reports = try sparse.run(
      into: sink, memory: resources.memory.bytes, workers: resources.jobs)
    try sparse.family.checkUnchanged()
    try sink.finish()
    let rows = reports.map {
      [$0.module, "\(decimal(100 * $0.routingAccuracy, 1)) %", decimal($0.sharpness, 0)]
    }
    print(
      Table(
        columns: ["module", "held-out routing", "sharpness"], rows: rows, rightAligned: [1, 2]))
    print("\(output): a Mixtral, \(summary(of: sparse.manifest))")
    if sparse.configuration == nil {
      note("the base has no config.json to make one from")
    } else if !writesFolder {
      note("transformers needs config.json too, which is written into a folder: -o NAME/")
    }
  }

  /// Whether the output is a model's folder: its name ends in no format's ending.
  private var writesFolder: Bool {
    output.hasSuffix("/")
      || !Checkpoint.formats.contains { format in
        format.fileExtensions.contains { output.lowercased().hasSuffix("." + $0) }
      }
  }

  private func options() throws -> Upscaling.Options {
    var options = Upscaling.Options()
    options.scaling = scaling
    options.routerDepth = routerDepth
    options.seed = seed
    options.cleaning = try cleaning.cleaning(or: nil)
    if !mlp.isEmpty { options.mlps = try mlp.map { try TransformerMLP(pattern: $0) } }
    if attention { options.mlps += TransformerMLP.attentions }
    options.layers = layers?.numbers
    options.pruning = prune
    let isDuplicated = duplicateGate || format == .fusionbench
    options.gates = !sharedGate ? .own : isDuplicated ? .duplicated : .shared
    options.keepsCorrections = format == .wemoe
    options.activation = activation?.activation
    options.keepsHeads = keepHeads
    switch store {
    case .dense: options.storage = .dense
    case .sparse: options.storage = .sparse
    case .int8: options.storage = .int8
    case .int4: options.storage = .int4
    case .lowrank: options.storage = .lowRank(rank!)
    }
    return options
  }

  private func kinds(of upscaling: Upscaling) -> String {
    upscaling.modules.contains { $0.mlp.isAttention } ? "MLP and attention" : "MLP"
  }

  private func sayPlan(of upscaling: Upscaling) {
    let cost = upscaling.cost(
      memory: resources.memory.bytes, workers: resources.jobs,
      withTaskVectors: taskVectors != nil)
    let isCoded = store != .dense
    let rows = [
      ["experts", "\(upscaling.family.experts.count)"],
      ["\(kinds(of: upscaling)) modules", "\(upscaling.modules.count)"],
      ["parameters", "\(millions(cost.parameters)) M"],
      ["  other than zero", "\(millions(cost.remaining)) M"],
      isCoded ? ["  as stored", "\(millions(cost.stored)) M"] : [],
      isCoded
        ? [
          "task vectors",
          "\(ByteSize(bytes: cost.taskVectorBytes)) instead of \(ByteSize(bytes: cost.denseVectorBytes))",
        ] : [],
      ["read", "\(ByteSize(bytes: cost.bytesRead)) (the MLPs \(cost.passes) ×)"],
      [
        "written",
        "\(ByteSize(bytes: cost.bytesWritten))\(upscaling.hasCorrections ? ", and corrections" : "")",
      ],
      ["peak memory", "\(ByteSize(bytes: cost.peakMemory)) at most"],
    ]
    print(Table(columns: [output, ""], rows: rows.filter { !$0.isEmpty }))
    if upscaling.hasCorrections {
      print(
        "corrections: the weights that base + task vector misses by a last digit, counted when it is written"
      )
    }
    if let sentence = cost.reads.sentence { print(sentence) }
  }

  private func sayPlan(of sparse: SparseMixture) {
    let tensors = sparse.manifest.tensors
    let sources = [sparse.family.base] + sparse.family.experts.map { $0.source }
    let perToken = min(expertsPerToken, sources.count - 1)
    let rows = [
      ["experts", "\(sources.count - 1), \(perToken) a token"],
      ["parameters", "\(millions(tensors.reduce(0) { $0 + $1.elementCount })) M"],
      ["read", "\(ByteSize(bytes: sources.reduce(0) { $0 + $1.manifest.byteCount }))"],
      ["written", "\(ByteSize(bytes: sparse.manifest.byteCount))"],
    ]
    print(Table(columns: [output, ""], rows: rows))
  }

  private func millions(_ count: Int) -> String { decimal(Double(count) / 1e6, 2) }

  private func say(_ upscaling: Upscaling, _ report: Upscaling.Report) {
    print(
      "\(output): \(upscaling.family.experts.count) experts in \(upscaling.modules.count) \(kinds(of: upscaling)) modules, \(summary(of: upscaling.manifest))"
    )
    if let taskVectors { print("\(taskVectors): \(summary(of: upscaling.taskVectorManifest))") }
    if let cleaning = report.cleaning {
      let whole = cleaning.whole
      print(
        "mean |cos| of the task vectors: \(decimal(whole.before.meanAbsoluteCosine)) before cleaning, \(decimal(whole.after.meanAbsoluteCosine)) after"
      )
      for warning in cleaning.warnings { note(warning) }
    }
    if let errors = report.errors {
      let names = upscaling.family.experts.map { $0.name }
      print("relative error of the stored task vectors:")
      for (name, error) in zip(names, errors) { print("  \(name)  \(decimal(error, 6))") }
    }
    note(upscaling.warning)
  }
}

/// Numbers of layers as people write them: `0-5,11`.
struct LayerRange: ExpressibleByArgument {
  let numbers: Set<Int>

  init?(argument: String) {
    var numbers = Set<Int>()
    for part in argument.split(separator: ",", omittingEmptySubsequences: false) {
      let ends = part.split(separator: "-", omittingEmptySubsequences: false).map { Int($0) }
      guard (1...2).contains(ends.count), let first = ends[0], let last = ends[ends.count - 1],
        0 <= first, first <= last, last < 100_000
      else { return nil }
      numbers.formUnion(first...last)
    }
    self.numbers = numbers
  }
}

/// An activation by the names that model configurations use.
struct ActivationName: ExpressibleByArgument {
  let activation: Activation

  init?(argument: String) {
    guard let activation = Activation(configurationName: argument) else { return nil }
    self.activation = activation
  }

  static var all: String { Activation.allCases.map { $0.rawValue }.joined(separator: ", ") }
}
