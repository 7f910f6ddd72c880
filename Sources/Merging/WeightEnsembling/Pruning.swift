import Checkpoints

/// What magnitude pruning does to a tensor of the MLPs (Shen et al., arXiv 2410.21804).
struct PrunedTensor: Sendable, Equatable {
  struct Expert: Sendable, Equatable {
    /// Kept is what has a greater magnitude.
    var threshold: Double
    var kept: Int
    /// Sums of squares: of what is set to zero, and of all.
    var dropped: Double
    var total: Double
  }

  var experts: [Expert]
}

extension Upscaling {
  /// How often a survey reads the tensors of the MLPs.
  var surveyPasses: Int {
    // Two passes find a quantile, a third counts and weighs what is beyond it.
    options.pruning != nil ? 3 : options.storage == .sparse || hasCorrections ? 1 : 0
  }

  /// Reads the MLPs to find out what pruning keeps and what needs correction, where the layout
  /// depends on it.
  ///
  /// Memory is the budget's; every worker keeps counters of a megabyte an expert beside it.
  public mutating func survey(memory: Int, workers: Int) throws {
    guard surveyPasses > 0 else { return }
    let tensors = modules.flatMap { $0.tensors }.map { family.base.manifest[$0]! }
    let cleanings = try findCleanings(memory: memory, workers: workers)
    if hasCorrections {
      let counts = try countCorrections(tensors, cleanings, memory: memory, workers: workers)
      return take(corrections: counts)
    }
    var found: [String: PrunedTensor] = [:]
    // As many tensors together as there are workers: their counters are what takes memory.
    for start in stride(from: 0, to: tensors.count, by: workers) {
      let batch = Array(tensors[start..<min(start + workers, tensors.count)])
      let pruned = try prune(batch, cleanings, memory: memory, workers: workers)
      for (tensor, pruned) in zip(batch, pruned) { found[tensor.name] = pruned }
    }
    take(pruned: found)
  }

  private func countCorrections(
    _ tensors: [TensorInfo], _ cleanings: [String: TensorCleaning], memory: Int, workers: Int
  ) throws -> [String: [Int]] {
    let steps = tensors.map { tensor in
      var operation = operation(for: tensor, cleanings[tensor.name] ?? .none)
      operation.corrected = Array(family.experts.indices)
      let survey = CorrectionSurvey(operation: operation)
      return Step.covering(
        family.places(of: tensor), outputs: [], scratchRows: survey.scratchRows, with: survey)
    }
    let counts = try Pipeline(
      from: family.sources, into: [], memory: memory, workers: workers
    ).run(steps.flatMap { $0 })
    let sums = fold(counts, steps.map { $0.count }) { sum, counts in
      for expert in counts.indices { sum[expert] += counts[expert] }
    }
    return Dictionary(
      uniqueKeysWithValues: zip(tensors, sums).compactMap { tensor, counts in
        counts.map { (tensor.name, $0) }
      })
  }

  private func prune(
    _ tensors: [TensorInfo], _ cleanings: [String: TensorCleaning], memory: Int, workers: Int
  ) throws -> [PrunedTensor] {
    func pass(_ observe: (Int) -> VectorSurvey.Observation) throws -> [VectorSurvey.Observation] {
      let steps = tensors.enumerated().map { index, tensor in
        let survey = VectorSurvey(
          operation: operation(for: tensor, cleanings[tensor.name] ?? .none),
          observation: observe(index))
        return Step(
          whole: family.places(of: tensor), outputs: [],
          scratchRows: 1 + family.experts.count, with: survey)
      }
      return try Pipeline(
        from: family.sources, into: [], memory: memory, workers: workers
      ).run(steps)
    }

    var thresholds = tensors.map { _ in family.experts.map { _ in 0.0 } }
    if let ratio = options.pruning {
      var quantiles = tensors.map { tensor in
        family.experts.map { _ in MagnitudeQuantile(ratio, of: max(1, tensor.elementCount)) }
      }
      for _ in 0..<2 {
        let observed = try pass { .quantiles(quantiles[$0]) }
        for (index, observation) in observed.enumerated() {
          guard case .quantiles(var values) = observation, tensors[index].elementCount > 0 else {
            continue
          }
          for expert in values.indices {
            do { try values[expert].statistics.finishPass() } catch {
              throw family.sources.errorOfChange(of: tensors[index].name)
            }
          }
          quantiles[index] = values
        }
      }
      thresholds = zip(tensors, quantiles).map { tensor, quantiles in
        quantiles.map { tensor.elementCount > 0 ? $0.value : 0 }
      }
    }
    let none = PrunedTensor.Expert(threshold: 0, kept: 0, dropped: 0, total: 0)
    let weighed = try pass { index in
      .kept(
        thresholds[index].map { threshold in
          var expert = none
          expert.threshold = threshold
          return expert
        })
    }
    return try zip(tensors, weighed).map { tensor, observation in
      guard case .kept(let experts) = observation else {
        preconditionFailure("the passes differ")
      }
      if options.pruning != nil, let stray = experts.firstIndex(where: { !$0.total.isFinite }) {
        throw CheckpointError(
          file: family.experts[stray].source.path, tensor: tensor.name,
          "has differences to the base that are not finite, which have no magnitude to prune by",
          remedy: "leave out --prune: such a vector can only be stored dense or sparse")
      }
      return PrunedTensor(experts: experts)
    }
  }
}

/// Looks at the task vectors that an upscaling would write. A worker owns a whole tensor, so
/// sums of squares run from its first element to its last, whatever the tiles.
private struct VectorSurvey: TileOperation {
  enum Observation: Sendable {
    case quantiles([MagnitudeQuantile])
    case kept([PrunedTensor.Expert])
  }

  let operation: UpscalingOperation
  let observation: Observation

  var grain: Int { operation.grain }
  func makeSummary() -> Observation { observation }

  func apply(_ input: inout Tile, into output: inout Tile, summary: inout Observation) {
    var ignored = operation.makeSummary()
    operation.apply(&input, into: &output, summary: &ignored)
    switch summary {
    case .quantiles(var quantiles):
      // Emptied meanwhile, so that the counters are not copied.
      summary = .quantiles([])
      for expert in quantiles.indices where !quantiles[expert].statistics.isComplete {
        quantiles[expert].statistics.observe(output[expert + 1])
      }
      summary = .quantiles(quantiles)
    case .kept(var experts):
      for expert in experts.indices { experts[expert].add(output[expert + 1]) }
      summary = .kept(experts)
    }
  }
}

extension PrunedTensor.Expert {
  fileprivate mutating func add(_ values: Span<Float>) {
    for index in values.indices {
      let value = Double(values[index])
      total += value * value
      // A NaN is not zero.
      if value.magnitude <= threshold { dropped += value * value } else { kept += 1 }
    }
  }
}

/// Counts the corrections of every expert in what an upscaling would write.
private struct CorrectionSurvey: TileOperation {
  let operation: UpscalingOperation

  var grain: Int { operation.grain }
  func makeSummary() -> [Int] { operation.corrected.map { _ in 0 } }

  /// Only what is cleaned has to be worked out.
  var scratchRows: Int { operation.cleaning.isNone ? 0 : 1 + 2 * operation.experts }

  func apply(_ input: inout Tile, into output: inout Tile, summary: inout [Int]) {
    if operation.cleaning.isNone {
      for index in summary.indices {
        summary[index] += input.missedCount(index + 1, base: 0, operation.storedType)
      }
      return
    }
    var ignored = operation.makeSummary()
    operation.apply(&input, into: &output, summary: &ignored)
    for index in summary.indices {
      summary[index] += Corrections.count(output[1 + operation.experts + index])
    }
  }
}
