public import Checkpoints

/// Fitting every router of a mixture to recorded activations, one layer at a time.
///
/// The activations checkpoint holds, for every module, a tensor named by its prefix —
/// `[samples, width]` averaged over tokens, or `[samples, tokens, width]` — and `task`,
/// `[samples]`, the number of each sample's expert.
public struct MixtureCalibration: Sendable {
  public struct LayerReport: Sendable {
    public let module: String
    /// The strength of the ridge that leave-one-out chose.
    public let ridge: Double
    /// How many samples a router that has not seen them would send to their own expert.
    public let routingAccuracy: Double
  }

  private let mixture: any TensorSource
  private let activations: any TensorSource
  private let description: MixtureDescription
  private let tasks: [Int]
  private let modules: [String]
  /// The calibrated mixture: the same tensors; its description says that it is calibrated.
  public let manifest: Manifest

  /// - Throws: `CheckpointError` if the mixture is none, or the activations do not fit it.
  public init(of mixture: any TensorSource, with activations: any TensorSource) throws {
    var description = try MixtureDescription(of: mixture)
    guard description.routerDepth > 0 else {
      throw CheckpointError(
        file: mixture.path, "has routers of depth 0, which cannot see their input",
        remedy: "upscale again with --router-depth 1 or 2")
    }
    let suffix = description.routerDepth == 1 ? ".gate.fc.weight" : ".gate.fc1.weight"
    modules = mixture.manifest.tensors.map { $0.name }.filter { $0.hasSuffix(suffix) }
      .map { String($0.dropLast(suffix.count)) }
    tasks = try MixtureCalibration.readTasks(activations, experts: description.experts.count)
    for module in modules {
      let width = try mixture.tensor(module + suffix).shape.last!
      try MixtureCalibration.check(
        activations, module: module, width: width, samples: tasks.count)
    }
    description.calibrated = true
    manifest = Manifest(
      mixture.manifest.tensors,
      metadata: mixture.manifest.metadata.merging(description.metadata) { $1 })
    self.mixture = mixture
    self.activations = activations
    self.description = description
  }

  private static func readTasks(_ activations: any TensorSource, experts: Int) throws -> [Int] {
    let tensor = try activations.tensor("task")
    let tasks = try activations.integers(of: tensor)
    guard tensor.shape.count == 1, !tasks.isEmpty else {
      throw CheckpointError(
        file: activations.path, tensor: "task",
        "has the shape \(tensor.shapeDescription) instead of [samples]")
    }
    for task in 0..<experts where !tasks.contains(task) {
      throw CheckpointError(
        file: activations.path, tensor: "task", "has no sample of expert \(task)",
        remedy: "record some for each of the \(experts) experts")
    }
    for task in tasks where !(0..<experts).contains(task) {
      throw CheckpointError(
        file: activations.path, tensor: "task",
        "names expert \(task), but the mixture has experts 0 to \(experts - 1)")
    }
    return tasks
  }

  private static func check(
    _ activations: any TensorSource, module: String, width: Int, samples: Int
  ) throws {
    let tensor = try activations.tensor(module)
    guard (2...3).contains(tensor.shape.count), tensor.shape[0] == samples,
      tensor.shape.last == width, !tensor.shape.contains(0)
    else {
      throw CheckpointError(
        file: activations.path, tensor: module,
        "has the shape \(tensor.shapeDescription) instead of [\(samples), \(width)] or [\(samples), tokens, \(width)]"
      )
    }
    guard tensor.dtype.isArithmetic else {
      throw CheckpointError(
        file: activations.path, tensor: module, "is \(tensor.dtype.rawValue), not floating-point")
    }
  }
}

// MARK: - Running

extension MixtureCalibration {
  /// Writes the mixture with fitted routers.
  public func run(into sink: any TensorSink, workers: Int) throws -> [LayerReport] {
    let rest = mixture.manifest.tensors.filter { tensor in
      !modules.contains { tensor.name.hasPrefix($0 + ".gate.") }
    }
    try mixture.copy(rest, into: sink, workers: workers)
    let reports = StepResults<LayerReport>(count: modules.count)
    try forEachStep(count: modules.count, workers: workers) {
    } body: { step, _ in
      reports[step] = try calibrate(modules[step], into: sink)
    }
    return reports.all
  }

  private func calibrate(_ module: String, into sink: any TensorSink) throws -> LayerReport {
    let tensor = try activations.tensor(module)
    var features = Matrix<Float>(
      rowCount: tasks.count, columnCount: tensor.rowLength, repeating: 0)
    var largest: Float = 0
    try forEachToken(of: tensor) { sample, tokens, values in
      for column in values.indices {
        features[sample, column] += values[column] / Float(tokens)
        largest = max(largest, abs(values[column]))
      }
    }
    let fit = try RouterCalibration(
      CalibrationSamples(features: features, tasks: tasks, taskCount: description.experts.count))
    try Router(embedding: fit.gate, depth: description.routerDepth, largestInput: largest)
      .write(into: sink, gate: "\(module).gate")
    return LayerReport(
      module: module, ridge: fit.ridge, routingAccuracy: fit.leaveOneOutAccuracy)
  }

  /// Reads one token at a time.
  private func forEachToken(
    of tensor: TensorInfo, _ body: (_ sample: Int, _ tokens: Int, Span<Float>) -> Void
  ) throws {
    let width = tensor.rowLength
    let tokens = tensor.shape.count == 3 ? tensor.shape[1] : 1
    let rowBytes = width * tensor.dtype.bitWidth / 8
    var bytes = Buffer(byteCount: rowBytes)
    var row = [Float](repeating: 0, count: width)
    for token in 0..<tensor.shape[0] * tokens {
      var raw = bytes.first(rowBytes)
      try activations.read(tensor, at: token * rowBytes, into: &raw)
      var values = row.mutableSpan
      tensor.dtype.decode(raw.bytes, into: &values)
      body(token / tokens, tokens, row.span)
    }
  }
}
