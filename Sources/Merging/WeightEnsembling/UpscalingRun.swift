public import Checkpoints

extension Upscaling {
  /// What was found out on the way.
  public struct Report: Sendable {
    /// What the cleaning did.
    public fileprivate(set) var cleaning: DisentanglementSummary?
    /// ‖stored − τ‖/‖τ‖ of each expert, all its MLPs together: what pruning and storage cost.
    public fileprivate(set) var errors: [Double]?
  }

  /// Writes the mixture and, if asked, the task vectors.
  ///
  /// - Parameter memory: bytes that all workers' tiles take together.
  /// - Precondition: `survey` has run.
  @discardableResult
  public func run(
    into mixture: any TensorSink, taskVectors: (any TensorSink)? = nil, memory: Int, workers: Int
  ) throws -> Report {
    let coded = codedVectors
    let codingSink = TaskVectorSink(mixture, coded)
    let sink = CorrectionSink(codingSink, correctedVectors, from: family.sources)
    var cleanings: [String: TensorCleaning] = [:]
    func write(
      _ parts: [(tensor: TensorInfo, cleaning: TensorCleaning)], from inputs: Cleaning.Inputs
    ) throws -> [TensorFindings] {
      let pipeline = Pipeline(
        from: inputs.sources, into: [sink] + (taskVectors.map { [$0] } ?? []),
        memory: inputs.memory, workers: workers)
      for part in parts { cleanings[part.tensor.name] = part.cleaning }
      let steps = parts.map {
        self.steps(
          for: $0.tensor, $0.cleaning, into: sink.manifest, withTaskVectors: taskVectors != nil)
      }
      let findings = try pipeline.run(steps.flatMap { $0 })
      return fold(findings, steps.map { $0.count }) { $0 += $1 }
        .map { $0 ?? TensorFindings(experts: family.experts.count) }
    }
    var report = Report()
    if let cleaning = options.cleaning {
      report.cleaning = try cleaning.run(
        on: family, grams: grams, isKnownForSure: true, memory: memory, workers: workers,
        grain: largestGrain, write: write)
    } else {
      let tensors = family.base.manifest.tensors.filter { $0.dtype.isArithmetic }
      let files = Cleaning.Inputs(sources: family.sources, memory: memory)
      _ = try write(tensors.map { ($0, .none) }, from: files)
    }
    var distances = codingSink.errors
    try writeFactors(
      into: mixture, cleanings, memory: memory, workers: workers, &distances)
    try copyTheRest(into: mixture, workers: workers)
    try InitialRouters(gates: storedGates, seed: options.seed, mixture: options.scaling)
      .write(into: mixture, workers: workers)

    if !coded.isEmpty || options.pruning != nil { report.errors = errors(distances) }
    return report
  }

  /// Adds up what each expert's task vectors lost.
  private func errors(_ distances: [String: CodingDistance]) -> [Double] {
    family.experts.indices.map { expert in
      var sum = CodingDistance()
      for name in modules.flatMap({ $0.tensors }) {
        if let distance = distances[member(family.base.manifest[name]!)!.taskVectorName(expert)] {
          sum += distance
        } else if let pruned = pruned[name]?.experts[expert] {
          sum += CodingDistance(dropped: pruned.dropped, kept: pruned.total - pruned.dropped)
        }
      }
      return sum.relative
    }
  }

  /// The task vectors that are stored coded, as they would be stored dense.
  private var codedVectors: [(info: TensorInfo, coding: TaskVectorStorage.Coding, dropped: Double)]
  {
    family.base.manifest.tensors.flatMap {
      tensor -> [(TensorInfo, TaskVectorStorage.Coding, Double)] in
      let coding = coding(of: tensor)
      guard let member = member(tensor), coding != .dense else { return [] }
      return family.experts.indices.map {
        (
          tensor.renamed(member.taskVectorName($0)), coding,
          pruned[tensor.name]?.experts[$0].dropped ?? 0
        )
      }
    }
  }

  /// The task vectors that have corrections, and how many.
  private var correctedVectors: [(info: TensorInfo, count: Int)] {
    family.base.manifest.tensors.flatMap { tensor -> [(TensorInfo, Int)] in
      guard let counts = corrections[tensor.name], let member = member(tensor) else { return [] }
      return counts.enumerated().filter { $0.element > 0 }.map {
        (tensor.renamed(member.taskVectorName($0.offset)), $0.element)
      }
    }
  }

  private func steps(
    for tensor: TensorInfo, _ cleaning: TensorCleaning, into mixture: Manifest,
    withTaskVectors: Bool
  ) -> [Step<UpscalingOperation>] {
    var operation = operation(for: tensor, cleaning)
    operation.writesTaskVectors = withTaskVectors
    var outputs: [(file: Int, tensor: TensorInfo)]
    if let member = member(tensor) {
      outputs = [(0, mixture[member.baseName]!)]
      outputs += family.experts.indices.map { (0, mixture[member.taskVectorName($0)]!) }
    } else {
      outputs = [(0, mixture[tensor.name]!)]
    }
    if withTaskVectors {
      outputs += family.experts.map { (1, taskVectorManifest["\($0.name)/\(tensor.name)"]!) }
    }
    operation.corrected = correctedExperts(of: tensor)
    outputs += operation.corrected.map { expert in
      let vector = tensor.renamed(member(tensor)!.taskVectorName(expert))
      return (0, mixture[Corrections.spread(over: vector).name]!)
    }
    return operation.steps(family.places(of: tensor), outputs: outputs)
  }

  /// The experts whose task vectors of this tensor have corrections.
  private func correctedExperts(of tensor: TensorInfo) -> [Int] {
    (corrections[tensor.name] ?? []).enumerated().filter { $0.element > 0 }.map { $0.offset }
  }

  /// How every tensor is cleaned. What shares a redundant vector wider than a row is read for
  /// it, once: the run will know the Gram matrices.
  mutating func findCleanings(memory: Int, workers: Int) throws -> [String: TensorCleaning] {
    guard let cleaning = options.cleaning else { return [:] }
    let experts = family.experts.count
    var cleanings: [String: TensorCleaning] = [:]
    let summary = try cleaning.run(on: family, grams: nil, memory: memory, workers: workers) {
      parts, _ in
      for part in parts { cleanings[part.tensor.name] = part.cleaning }
      return parts.map { _ in TensorFindings(experts: experts) }
    }
    if cleaning.method.scope != .row { grams = summary.grams }
    return cleanings
  }

  /// The elements that have to be in one tile of some tensor.
  var largestGrain: Int {
    family.base.manifest.tensors.filter { $0.dtype.isArithmetic }
      .map { operation(for: $0, .none).grain }.max() ?? 1
  }

  /// The arithmetic of one tensor.
  func operation(for tensor: TensorInfo, _ cleaning: TensorCleaning) -> UpscalingOperation {
    let isModule = member(tensor) != nil
    let coding = isModule ? coding(of: tensor) : .dense
    return UpscalingOperation(
      experts: family.experts.count, isModule: isModule,
      scaling: options.scaling, storedType: tensor.dtype,
      cleaning: cleaning, elementCount: tensor.elementCount,
      thresholds: isModule && options.pruning != nil
        ? pruned[tensor.name]?.experts.map { $0.threshold } : nil,
      codingGrain: min(coding.grain(of: tensor), max(1, tensor.elementCount)),
      isCoded: coding != .dense)
  }

  /// Integers and the like see no arithmetic: they are the base's, bit for bit. So are the heads
  /// that only some experts have.
  private func copyTheRest(into mixture: any TensorSink, workers: Int) throws {
    try family.base.copy(
      family.base.manifest.tensors.filter { !$0.dtype.isArithmetic }, into: mixture,
      workers: workers)
    for head in headTensors {
      try family.experts[head.expert].source.copy(head.own, into: mixture, as: head.stored)
    }
  }
}

extension TensorSource {
  /// Writes a tensor under another name, byte for byte, in pieces of 4 MiB.
  func copy(_ tensor: TensorInfo, into sink: any TensorSink, as other: TensorInfo) throws {
    var buffer = Buffer(byteCount: min(4 << 20, tensor.byteCount))
    for begin in stride(from: 0, to: tensor.byteCount, by: 4 << 20) {
      var piece = buffer.first(min(4 << 20, tensor.byteCount - begin))
      try read(tensor, at: begin, into: &piece)
      try sink.write(piece.bytes, of: other, at: begin)
    }
  }
}

/// The arithmetic of one tensor: rows are the base and the experts.
///
/// Out come the merged tensor, or for an MLP the module's base and task vectors; behind them,
/// if they are asked for, the task vectors as such, and behind those the corrections, spread.
struct UpscalingOperation: TileOperation {
  let experts: Int
  let isModule: Bool
  var writesTaskVectors = false
  let scaling: Float
  let storedType: DType
  let cleaning: TensorCleaning
  let elementCount: Int
  /// What a magnitude must exceed to be kept, for every expert.
  var thresholds: [Double]?
  /// Elements that are coded together.
  let codingGrain: Int
  let isCoded: Bool
  /// The experts whose corrections come out.
  var corrected: [Int] = []

  var grain: Int {
    let length = cleaning.grain
    if codingGrain.isMultiple(of: length) { return codingGrain }
    return length.isMultiple(of: codingGrain) ? length : min(length * codingGrain, elementCount)
  }

  /// Where the corrections come out.
  private var firstCorrection: Int { 1 + experts * (writesTaskVectors ? 2 : 1) }

  /// Coded vectors and corrections are written in order, by one worker: the whole tensor is a step.
  func steps(
    _ inputs: [Step<Self>.Place], outputs: [Step<Self>.Place]
  ) -> [Step<Self>] {
    guard isCoded || !corrected.isEmpty else {
      return Step.covering(inputs, outputs: outputs, with: self)
    }
    return [Step(whole: inputs, outputs: outputs, with: self)]
  }

  func makeSummary() -> TensorFindings { TensorFindings(experts: experts) }

  func apply(_ input: inout Tile, into output: inout Tile, summary: inout TensorFindings) {
    if isModule {
      for row in 1...experts { output.copyRow(row, from: input, row) }
    }
    // Row 0 of the output holds the redundant vector until the result takes its place.
    output.clear(row: 0)
    if !isModule || writesTaskVectors || !cleaning.isNone {
      for row in 1...experts { input.subtract(row: 0, from: row) }
      let vectors = cleaning.redundantVectors(
        in: input, from: 1, experts: experts, findings: &summary)
      input.takeOut(vectors, from: 1, keeping: &output, row: 0)
    }
    if writesTaskVectors {
      let first = isModule ? experts + 1 : 1
      for expert in 0..<experts { output.copyRow(first + expert, from: input, expert + 1) }
    }
    var result = output.mutableRow(0)
    if isModule {
      add(input[0], times: 1, into: &result)
      storedType.round(&result)
      splitWeights(&output)
    } else {
      // The reference's order: the sum of the task vectors, times λ, plus the base.
      copy(input[1], into: &result)
      for row in 1..<experts { add(input[row + 1], times: 1, into: &result) }
      scale(&result, by: scaling, onto: input[0])
    }
  }

  /// Turns the experts' weights into differences to the base as it is stored: its rounding is
  /// theirs to make good.
  private func splitWeights(_ output: inout Tile) {
    for expert in 0..<experts {
      if let index = corrected.firstIndex(of: expert) {
        output.split(expert + 1, base: 0, missed: firstCorrection + index, storedType)
      } else {
        output.subtract(row: 0, from: expert + 1)
      }
      guard let threshold = thresholds?[expert] else { continue }
      var vector = output.mutableRow(expert + 1)
      prune(&vector, above: threshold)
    }
  }
}
