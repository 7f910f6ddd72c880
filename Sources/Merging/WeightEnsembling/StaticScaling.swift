public import Checkpoints

/// A mixture whose static part is merged with another λ: θ₀ + λ′·Σ(θᵢ − θ₀) from θ₀ and what is
/// there, θ₀ + λ·Σ(θᵢ − θ₀). The modules are as they were.
public final class RescaledMixture: TensorSource {
  public let path: String
  public let manifest: Manifest
  private let source: any TensorSource
  private let base: any TensorSource
  private let factor: Float
  /// The base's tensor for each that is rescaled.
  private let originals: [String: TensorInfo]

  /// - Throws: `MergeError` if the mixture's own λ is 0; `CheckpointError` if the base is another
  ///   model's.
  public init(_ source: any TensorSource, base: any TensorSource, scaling: Float) throws {
    let mixture = try Mixture(source)
    var description = mixture.description
    guard description.scaling != 0 else {
      throw MergeError(
        "\(source.path) was merged with λ = 0, which no other λ can be made from",
        remedy: "upscale again with --lambda")
    }
    factor = scaling / description.scaling
    description.scaling = scaling
    manifest = Manifest(
      source.manifest.tensors,
      metadata: source.manifest.metadata.merging(description.metadata) { $1 })
    let heads = description.experts.map { "experts.\($0)." }
    var originals: [String: TensorInfo] = [:]
    for tensor in source.manifest.tensors
    where tensor.dtype.isArithmetic && !mixture.isOfModule(tensor.name)
      && !heads.contains(where: { tensor.name.hasPrefix($0) })
    {
      let original = try base.tensor(tensor.name)
      guard original.shape == tensor.shape, original.dtype.isArithmetic else {
        throw CheckpointError(
          file: base.path, tensor: original.name,
          "is \(original.dtype.rawValue) \(original.shapeDescription), but the mixture's has the shape \(tensor.shapeDescription)",
          remedy: "give the model that the mixture was made from")
      }
      originals[tensor.name] = original
    }
    self.originals = originals
    self.source = source
    self.base = base
    path = source.path
  }

  public func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    guard let original = originals[tensor.name], factor != 1 else {
      return try source.read(tensor, at: offset, into: &buffer)
    }
    let width = tensor.dtype.bitWidth / 8
    precondition(offset.isMultiple(of: width) && buffer.byteCount.isMultiple(of: width))
    let range = offset / width..<(offset + buffer.byteCount) / width
    guard !range.isEmpty else { return }
    var values = try source.floats(of: tensor, range)
    let start = try base.floats(of: original, range)
    for index in values.indices {
      values[index] = start[index] + factor * (values[index] - start[index])
    }
    tensor.dtype.encode(values.span, into: &buffer)
  }
}

/// The choice of the static part's λ by what comes out of the whole model: for every candidate
/// the routers are fitted progressively, and the last hidden states are compared with each
/// sample's own expert's.
public struct ScalingChoice: Sendable {
  public struct Trial: Sendable, Equatable {
    public let scaling: Float
    /// ‖mixture's − expert's‖ over ‖base's − expert's‖, all tokens of all samples.
    public let outputError: Double
  }

  /// Those that were tried, in ascending order; none after the error has begun to rise.
  public let trials: [Trial]
  public var best: Trial { trials.min { $0.outputError < $1.outputError }! }

  public static let candidates: [Float] = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]

  /// - Parameters:
  ///   - options: Of the calibrations; its experts are the teachers and must be there.
  ///   - memory: Bytes that the samples' states may take, the teachers' included.
  ///   - makePass: Makes the forward pass of the model that it is given.
  public init(
    of mixture: any TensorSource, base: any TensorSource, over inputs: ModelInputs,
    _ options: MixtureCalibration.Options, candidates: [Float] = Self.candidates, memory: Int,
    workers: Int, pass makePass: (any TensorSource) throws -> ForwardPass
  ) throws {
    guard let experts = options.experts else {
      throw MergeError(
        "a choice of λ needs the experts' own outputs", remedy: "give every model with --expert")
    }
    guard let tasks = inputs.tasks else {
      throw CheckpointError(
        file: inputs.source.path, tensor: "task", "is missing",
        remedy: "say with it which expert each sample is for")
    }
    if let stray = tasks.first(where: { !experts.indices.contains($0) }) {
      throw CheckpointError(
        file: inputs.source.path, tensor: "task",
        "names expert \(stray), but the mixture has experts 0 to \(experts.count - 1)")
    }
    let basePass = try makePass(base)
    try StateMemory(of: basePass, over: inputs, workers: workers).requireAll(memory: memory / 2)
    let passes = try experts.map { try makePass($0) }
    var wanted: [Matrix<Float>] = []
    var distance = 0.0
    for group in ScalingChoice.runs(tasks) {
      let own = try passes[tasks[group.lowerBound]].finalStates(
        of: group, inputs, workers: workers)
      let start = try basePass.finalStates(of: group, inputs, workers: workers)
      distance += squaredDistance(start, own)
      wanted += own
    }
    guard distance > 0 else {
      throw MergeError("the experts give the same outputs as the base: any λ is as good")
    }
    var trials: [Trial] = []
    for scaling in candidates.sorted() {
      let rescaled = try RescaledMixture(mixture, base: base, scaling: scaling)
      let progress = try ProgressiveActivations(
        of: rescaled, over: inputs, memory: memory, workers: workers, pass: makePass)
      let calibration = try MixtureCalibration(of: Mixture(rescaled), with: progress, options)
      _ = try calibration.fit(
        into: progress.observing(RouterSink(manifest: calibration.manifest)), memory: memory,
        workers: 1)
      let states = try progress.finalStates()
      trials.append(
        Trial(
          scaling: scaling,
          outputError: (squaredDistance(states, wanted) / distance).squareRoot()))
      if let before = trials.dropLast().last, trials.last!.outputError > before.outputError {
        break
      }
    }
    self.trials = trials
  }

  /// Neighbours of the same task.
  private static func runs(_ tasks: [Int]) -> [Range<Int>] {
    var runs: [Range<Int>] = []
    for (sample, task) in tasks.enumerated() {
      if let last = runs.last, tasks[last.lowerBound] == task {
        runs[runs.count - 1] = last.lowerBound..<sample + 1
      } else {
        runs.append(sample..<sample + 1)
      }
    }
    return runs
  }
}

private func squaredDistance(_ left: [Matrix<Float>], _ right: [Matrix<Float>]) -> Double {
  zip(left, right).reduce(0) { sum, pair in
    var difference = pair.0
    difference.subtract(pair.1)
    return sum + dotProduct(difference.elements.span, difference.elements.span)
  }
}

/// Takes routers and keeps nothing.
struct RouterSink: TensorSink {
  let manifest: Manifest
  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) {}
  func complete() {}
  func finish() {}
}
