public import Checkpoints

/// Fitting every router of a mixture to recorded activations, one layer at a time.
///
/// The activations are those of `Activations`. A quarter of the samples is held out of a first
/// fit, to say what a router does that has not seen them; what is written is fitted to all.
public struct MixtureCalibration: Sendable {
  public enum Method: String, Sendable, CaseIterable {
    /// A linear gate to one-hot targets, in closed form.
    case ridge
    /// A linear gate to the experts' outputs, beginning at the ridge's.
    case output
  }

  public struct Options: Sendable {
    public var method = Method.output
    /// How many samples of each task are used, spread evenly over those there are.
    public var samplesPerTask = 256
    /// The fine-tuned models, in the order of the experts: what the outputs are compared with.
    /// Without them it is what the mixture makes of one expert alone, which is the same as long
    /// as its task vectors are neither pruned nor coded.
    public var experts: [any TensorSource]?
    /// What the MLPs compute between their maps, if the mixture does not say.
    public var activation: Activation?

    public init() {}
  }

  /// What one layer's router does on samples that its fit has not seen.
  public struct LayerReport: Sendable {
    public let module: String
    /// The strength of the ridge that was chosen.
    public let ridge: Double
    /// The share of samples with the largest weight on their own expert.
    public let routingAccuracy: (before: Double, after: Double)
    /// ‖output − expert's‖ over ‖base's − expert's‖; `nil` where the MLP is of a kind that
    /// cannot be computed.
    public let outputError: (before: Double, after: Double)?
    /// Whether the outputs were matched, and not only the tasks.
    public let isMatched: Bool
  }

  private let mixture: Mixture
  private let activations: Activations
  private let options: Options
  /// The samples that are used, and their tasks.
  private let samples: [Int]
  private let tasks: [Int]
  private let activation: Activation?
  /// The calibrated mixture: the same tensors; its description says that it is calibrated.
  public let manifest: Manifest

  /// - Throws: `CheckpointError` if the mixture is none, or the activations do not fit it.
  public init(
    of mixture: Mixture, with activations: any TensorSource, _ options: Options = Options()
  ) throws {
    var description = mixture.description
    guard description.routerDepth > 0 else {
      throw CheckpointError(
        file: mixture.source.path, "has routers of depth 0, which cannot see their input",
        remedy: "upscale again with --router-depth 1 or 2")
    }
    let inputs = try Activations(activations, of: description.modules)
    let tasks = try inputs.tasks(experts: description.experts.count)
    for module in description.modules
    where inputs.sampleCount(of: module.prefix) != tasks.count {
      throw CheckpointError(
        file: activations.path, tensor: module.prefix,
        "has \(inputs.sampleCount(of: module.prefix)) samples, but \"task\" has \(tasks.count)")
    }
    if let experts = options.experts { try MixtureCalibration.check(experts, against: mixture) }
    samples = MixtureCalibration.spread(tasks, perTask: options.samplesPerTask)
    self.tasks = samples.map { tasks[$0] }
    description.calibrated = true
    description.calibration = options.method.rawValue
    manifest = Manifest(
      mixture.source.manifest.tensors,
      metadata: mixture.source.manifest.metadata.merging(description.metadata) { $1 })
    self.mixture = mixture
    self.activations = inputs
    self.options = options
    activation =
      options.activation ?? description.activation.flatMap { Activation(rawValue: $0) }
  }

  private static func check(_ experts: [any TensorSource], against mixture: Mixture) throws {
    guard experts.count == mixture.description.experts.count else {
      throw MergeError(
        "\(experts.count) fine-tuned models are given, but \(mixture.source.path) has the experts \(mixture.description.experts.map(quoted).joined(separator: ", "))"
      )
    }
    for (module, keys) in mixture.modules {
      for key in keys {
        let base = try mixture.source.tensor("\(module.prefix).base_model.\(key)")
        for expert in experts {
          let own = try expert.tensor("\(module.original).\(key)")
          guard own.shape == base.shape, own.dtype.isArithmetic else {
            throw CheckpointError(
              file: expert.path, tensor: own.name,
              "is \(own.dtype.rawValue) \(own.shapeDescription), but the mixture's has the shape \(base.shapeDescription)"
            )
          }
        }
      }
    }
  }

  /// At most so many samples of every task, evenly spread, in their order.
  private static func spread(_ tasks: [Int], perTask: Int) -> [Int] {
    var chosen: [Int] = []
    for task in Set(tasks) {
      let own = tasks.indices.filter { tasks[$0] == task }
      let count = min(perTask, own.count)
      chosen += (0..<count).map { own[$0 * own.count / count] }
    }
    return chosen.sorted()
  }

  /// What a person should know before the run.
  public var remarks: [String] {
    var remarks: [String] = []
    if options.method == .output, mixture.gates.count < mixture.modules.count {
      remarks.append("a shared router is fitted to the tasks by ridge, not to the outputs")
    } else if options.method == .output, activation == nil {
      remarks.append(
        "the MLPs' activation is not known, so the routers are fitted to the tasks by ridge; tell it with --activation"
      )
    }
    let isExact = mixture.description.pruning == nil && mixture.description.storage == nil
    if !isExact, options.experts == nil, options.method == .output {
      remarks.append(
        "the task vectors are pruned or coded: give the fine-tuned models with --expert to match their outputs"
      )
    }
    return remarks
  }
}

// MARK: - Running

extension MixtureCalibration {
  /// Writes the mixture with fitted routers.
  ///
  /// - Parameter memory: as many layers are worked on together as have room in it.
  public func run(into sink: any TensorSink, memory: Int, workers: Int) throws -> [LayerReport] {
    // What the routers are made of, and nothing else that may stand under a gate's name.
    let fitted = Set(
      try mixture.gates.flatMap { $0.copies }.flatMap { gate in
        try mixture.router(gate).tensors.map { "\(gate).\($0.name)" }
      })
    let rest = mixture.source.manifest.tensors.filter { !fitted.contains($0.name) }
    try mixture.source.copy(rest, into: sink, workers: workers)
    return try fit(into: sink, memory: memory, workers: workers)
  }

  /// Fits the routers, and writes nothing else.
  func fit(into sink: any TensorSink, memory: Int, workers: Int) throws -> [LayerReport] {
    let gates = mixture.gates
    let largest = mixture.modules.indices.map(need).max() ?? 0
    guard largest <= memory else {
      throw MergeError(
        "a layer with its experts and samples takes \(largest) bytes; the budget is \(memory)",
        remedy: "give it more with --memory, or use fewer --samples")
    }
    if gates.count < mixture.modules.count { return try calibrateShared(into: sink) }
    let reports = StepResults<LayerReport>(count: mixture.modules.count)
    try forEachStep(
      count: mixture.modules.count, workers: min(workers, memory / max(1, largest))
    ) {
    } body: { step, _ in
      reports[step] = try calibrate(step, into: sink)
    }
    return reports.all
  }

  /// Bytes of a layer's weights, features and what is computed from them.
  private func need(_ index: Int) -> Int {
    let (module, keys) = mixture.modules[index]
    func elementCount(_ key: String) -> Int {
      mixture.source.manifest["\(module.prefix).base_model.\(key)"]!.elementCount
    }
    let parameters = keys.reduce(0) { $0 + elementCount($1) }
    let experts = mixture.description.experts.count
    let weights = parameters * (2 + experts * (options.experts == nil ? 1 : 2))
    let features = samples.count * module.width * (2 + 3 * 2) + 3 * module.width * module.width * 2
    guard options.method == .output, !module.isAttention else { return 4 * (weights + features) }
    // What the first maps say to the tokens that are held out and to a batch of others, and what
    // is computed from a batch.
    let firstMaps = module.maps.dropLast().map { "\($0).weight" }.filter { keys.contains($0) }
    let hidden = firstMaps.reduce(0) { $0 + elementCount($1) } / max(1, module.width)
    let tokens = max(
      samples.count, min(Self.tokenRows, activations.tokenCount(of: module.prefix) * samples.count))
    let sums = (experts + 1) * (tokens / 4 + MatchedLayer.batch) + 6 * MatchedLayer.batch
    return 4 * (weights + features + hidden * sums)
  }

  private func features(of module: String) throws -> (samples: CalibrationSamples, largest: Float) {
    let (features, largest) = try activations.means(of: module, samples)
    do {
      return (
        try CalibrationSamples(
          features: features, tasks: tasks, taskCount: mixture.description.experts.count), largest
      )
    } catch {
      throw CheckpointError(
        file: activations.source.path, tensor: module, error.description)
    }
  }

  private func calibrate(_ index: Int, into sink: any TensorSink) throws -> LayerReport {
    let module = mixture.modules[index].module
    let (samples, largest) = try features(of: module.prefix)
    let layer = try layer(index, samples)
    let fit: (gate: Dense, report: LayerReport)
    if options.method == .output, let layer, samples.canBeSplit {
      let matching = try OutputMatching(
        samples, tokens: layer.tokens, module: layer.module, experts: layer.experts,
        present: try presentMixtures(module, samples))
      fit = (
        matching.gate,
        LayerReport(
          module: module.prefix, ridge: matching.ridge ?? 0,
          before: matching.present!, after: matching.after, isMatched: matching.ridge != nil)
      )
    } else {
      let ridge = RouterCalibration(samples)
      fit = (ridge.gate, try report(module, layer, samples, ridge))
    }
    try Router(
      embedding: fit.gate, depth: mixture.description.routerDepth, largestInput: largest
    ).write(into: sink, gate: module.gate)
    return fit.report
  }

  /// One gate for all modules, fitted to the inputs of all.
  private func calibrateShared(into sink: any TensorSink) throws -> [LayerReport] {
    var reports: [LayerReport] = []
    for (copies, modules) in mixture.gates {
      var fit = try fitShared(modules)
      if let progress = activations.source as? ProgressiveActivations {
        // What the layers see depends on the gate: it is fitted again to what they see with it.
        let observed = progress.observing(RouterSink(manifest: manifest))
        for gate in copies { try fit.router.write(into: observed, gate: gate) }
        fit = try fitShared(modules)
      }
      let split = fit.samples[0].canBeSplit ? try fit.samples[0].split() : nil
      let trial = try split.map { split in
        RouterCalibration(
          try CalibrationSamples(layers: fit.samples.map { $0.subset(split.fitted) })
        ).gate
      }
      for (module, samples) in zip(modules, fit.samples) {
        let index = mixture.modules.firstIndex { $0.module == module }!
        let layer = try layer(index, samples)
        reports.append(try report(module, layer, samples, fit.ridge, trial: trial))
      }
      for gate in copies { try fit.router.write(into: sink, gate: gate) }
    }
    return reports
  }

  /// Fits a gate to what all its modules see at present.
  private func fitShared(
    _ modules: [MixtureDescription.Module]
  ) throws -> (samples: [CalibrationSamples], ridge: RouterCalibration, router: Router) {
    let inputs = try modules.map { try features(of: $0.prefix) }
    let samples = inputs.map { $0.samples }
    let ridge = RouterCalibration(try CalibrationSamples(layers: samples))
    let router = Router(
      embedding: ridge.gate, depth: mixture.description.routerDepth,
      largestInput: inputs.map { $0.largest }.max()!)
    return (samples, ridge, router)
  }

  // MARK: What came of it

  private func report(
    _ module: MixtureDescription.Module, _ layer: MatchedLayer?, _ samples: CalibrationSamples,
    _ ridge: RouterCalibration, trial: Dense? = nil
  ) throws -> LayerReport {
    guard samples.canBeSplit else {
      return LayerReport(
        module: module.prefix, ridge: ridge.ridge,
        routingAccuracy: (.nan, ridge.leaveOneOutAccuracy), outputError: nil, isMatched: false)
    }
    let split = try samples.split()
    let gate = trial ?? RouterCalibration(samples.subset(split.fitted)).gate
    let mixtures = [try presentMixtures(module, samples), gate(samples.features)]
    let qualities =
      layer.map { $0.qualities(ofMixtures: mixtures, $0.batches(of: split.held)) }
      ?? mixtures.map {
        OutputMatching.Quality(
          outputError: .nan,
          routingAccuracy: MatchedLayer.accuracy(of: $0, split.held, samples.tasks))
      }
    return LayerReport(
      module: module.prefix, ridge: ridge.ridge, before: qualities[0], after: qualities[1],
      isMatched: false)
  }

  /// What the router that is there gives to the held-out samples; zeros for the others.
  private func presentMixtures(
    _ module: MixtureDescription.Module, _ samples: CalibrationSamples
  ) throws -> Matrix<Float> {
    let held = try samples.split().held
    let answers = try mixture.router(module.gate).answers(samples.features.rows(held))
    var mixtures = Matrix<Float>(
      rowCount: samples.tasks.count, columnCount: samples.taskCount, repeating: 0)
    for (index, row) in held.enumerated() {
      for expert in 0..<samples.taskCount { mixtures[row, expert] = answers[index, expert] }
    }
    return mixtures
  }
}

extension MixtureCalibration.LayerReport {
  fileprivate init(
    module: String, ridge: Double, before: OutputMatching.Quality,
    after: OutputMatching.Quality, isMatched: Bool
  ) {
    self.init(
      module: module, ridge: ridge,
      routingAccuracy: (before.routingAccuracy, after.routingAccuracy),
      outputError: after.outputError.isNaN ? nil : (before.outputError, after.outputError),
      isMatched: isMatched)
  }
}

// MARK: - A layer in memory

extension MixtureCalibration {
  /// How many rows of tokens are pushed through a layer's experts.
  private static let tokenRows = 4096

  /// The layer with its experts; `nil` if its MLP is of a kind that cannot be computed.
  private func layer(_ index: Int, _ samples: CalibrationSamples) throws -> MatchedLayer? {
    let (module, _) = mixture.modules[index]
    guard let activation, !module.isAttention, module.maps.count == 2 || module.maps.count == 3
    else { return nil }
    func weights(_ source: any TensorSource, _ prefix: String) throws -> MLPWeights? {
      try MLPWeights(of: source, prefix: prefix, maps: module.maps, isTransposed: module.transposed)
    }
    let prefix = module.prefix
    guard let base = try weights(mixture.source, "\(prefix).base_model") else { return nil }
    let vectors = try mixture.description.experts.indices.compactMap {
      try weights(mixture.decoded, "\(prefix).task_vectors.\($0)")
    }
    let experts = try options.experts.map {
      try $0.compactMap { try weights($0, module.original) }
    }
    let count = mixture.description.experts.count
    return MatchedLayer(
      samples: samples,
      tokens: try activations.tokens(of: prefix, spreadOver: self.samples, about: Self.tokenRows),
      module: WeightEnsemblingMLP(
        router: .constant(Array(repeating: 0, count: count)), base: base, taskVectors: vectors,
        activation: activation),
      experts: experts)
  }
}

extension MLPWeights {
  /// The linear maps below a prefix, in the order they are applied: two, or three of which the
  /// first is a gate; where gate and first map are stored as one (Phi-3), the gate is the upper half
  /// of its rows. `nil` where their shapes make no such MLP.
  init?(
    of source: any TensorSource, prefix: String, maps: [String], isTransposed: Bool
  ) throws {
    func dense(_ map: String) throws -> Dense? {
      let tensor = try source.tensor("\(prefix).\(map).weight")
      guard tensor.shape.count == 2 else { return nil }
      var weight = Matrix(
        rowCount: tensor.shape[0], columnCount: tensor.shape[1],
        elements: try source.floats(of: tensor.name))
      if isTransposed { weight = weight.transposed }
      let hasBias = source.manifest["\(prefix).\(map).bias"] != nil
      let bias =
        hasBias
        ? try source.floats(of: "\(prefix).\(map).bias")
        : Array(repeating: 0, count: weight.rowCount)
      return bias.count == weight.rowCount ? Dense(weight: weight, bias: bias) : nil
    }
    var layers = try maps.compactMap { try dense($0) }
    if layers.count == 2, maps.count == 2,
      layers[0].bias.count == 2 * layers[1].weight.columnCount
    {
      let middle = layers[1].weight.columnCount
      layers.replaceSubrange(
        0..<1, with: [layers[0].rows(0..<middle), layers[0].rows(middle..<2 * middle)])
    }
    guard layers.count >= maps.count, let first = layers.first, let last = layers.last,
      layers.dropLast().allSatisfy({ $0.weight.columnCount == first.weight.columnCount }),
      layers.dropLast().allSatisfy({ $0.bias.count == last.weight.columnCount })
    else { return nil }
    self.init(fc1: layers[layers.count - 2], fc2: last)
    if layers.count == 3 { gate = first }
  }
}

extension Dense {
  /// The layer that makes some of the outputs.
  fileprivate func rows(_ rows: Range<Int>) -> Dense {
    Dense(weight: weight.rows(rows), bias: Array(bias[rows]))
  }
}

extension Matrix {
  fileprivate var transposed: Matrix {
    var elements: [Scalar] = []
    elements.reserveCapacity(self.elements.count)
    for column in 0..<columnCount {
      for row in 0..<rowCount { elements.append(self[row, column]) }
    }
    return Matrix(rowCount: columnCount, columnCount: rowCount, elements: elements)
  }
}
