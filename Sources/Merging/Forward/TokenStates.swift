import Checkpoints

/// Samples that go through a layer together, their tokens stacked in one matrix.
struct TokenBatch: Sendable {
  /// The samples' numbers in the inputs.
  let samples: Range<Int>
  /// Where each sample's tokens are.
  let rows: [Range<Int>]
  let states: Matrix<Float>

  /// The same tokens in another state.
  func with(_ states: Matrix<Float>) -> TokenBatch {
    TokenBatch(samples: samples, rows: rows, states: states)
  }
}

/// The states of samples between two layers of a model.
///
/// Batches are cut by the samples' lengths alone, so neither memory nor workers change a result.
struct TokenStates: Sendable {
  private(set) var batches: [TokenBatch]

  fileprivate init(batches: [TokenBatch]) { self.batches = batches }

  /// Rows of a matrix that make its product fast, and no more of them than are needed for that.
  static let rowsPerBatch = 256

  /// Embeds samples.
  init(
    embedding group: Range<Int>, of inputs: ModelInputs, for pass: ForwardPass, workers: Int
  ) throws {
    let batches = StepResults<TokenBatch>(count: group.count)
    try forEachStep(count: group.count, workers: workers) {
    } body: { step, _ in
      let states = try pass.embedding(group.lowerBound + step, of: inputs)
      let sample = group.lowerBound + step
      batches[step] = TokenBatch(
        samples: sample..<sample + 1, rows: [0..<states.rowCount], states: states)
    }
    self.batches = TokenStates.stack(batches.all)
  }

  private static func stack(_ single: [TokenBatch]) -> [TokenBatch] {
    var stacked: [TokenBatch] = []
    var waiting: [TokenBatch] = []
    func flush() {
      guard let first = waiting.first, let last = waiting.last else { return }
      var rows: [Range<Int>] = []
      var elements: [Float] = []
      for batch in waiting {
        let start = rows.last?.upperBound ?? 0
        rows.append(start..<start + batch.states.rowCount)
        elements += batch.states.elements
      }
      stacked.append(
        TokenBatch(
          samples: first.samples.lowerBound..<last.samples.upperBound, rows: rows,
          states: Matrix(
            rowCount: rows.last!.upperBound, columnCount: first.states.columnCount,
            elements: elements)))
      waiting = []
    }
    for batch in single {
      waiting.append(batch)
      if waiting.reduce(0, { $0 + $1.states.rowCount }) >= rowsPerBatch { flush() }
    }
    flush()
    return stacked
  }

  /// Goes through a layer up to its MLP.
  func mlpInputs(of layer: TransformerLayer, workers: Int) throws -> MLPInputs {
    let residuals = StepResults<TokenBatch>(count: batches.count)
    let inputs = StepResults<TokenBatch>(count: batches.count)
    try forEachStep(count: batches.count, workers: workers) {
    } body: { step, _ in
      let batch = batches[step]
      let (residual, input) = layer.beforeMLP(batch.states, samples: batch.rows)
      residuals[step] = batch.with(residual)
      inputs[step] = batch.with(input)
    }
    return MLPInputs(layer: layer, residuals: residuals.all, batches: inputs.all)
  }

  /// What the attention of a layer sees.
  func attentionInputs(of layer: TransformerLayer) -> [TokenBatch] {
    batches.map { $0.with(layer.attentionInput($0.states)) }
  }

  /// Goes through a layer, showing what its attention and its MLP see.
  mutating func advance(
    through layer: TransformerLayer, _ mlp: RoutedPart<FeedForward>, workers: Int,
    recording record:
      @Sendable (_ attentionInput: TokenBatch, _ mlpInput: TokenBatch) throws ->
      Void
  ) throws {
    let before = batches
    let after = StepResults<TokenBatch>(count: before.count)
    try forEachStep(count: before.count, workers: workers) {
    } body: { step, _ in
      let batch = before[step]
      let (residual, input) = layer.beforeMLP(batch.states, samples: batch.rows)
      try record(batch.with(layer.attentionInput(batch.states)), batch.with(input))
      let output = mlp(input, samples: batch.rows)
      after[step] = batch.with(layer.afterMLP(residual: residual, output: output))
    }
    batches = after.all
  }
}

extension TokenStates {
  /// What comes out of the model if these are the states behind its last layer: a matrix
  /// [tokens, width] for each sample.
  func outputs(_ norm: Norm?) -> [Matrix<Float>] {
    batches.flatMap { batch in
      let states = norm?(batch.states) ?? batch.states
      return batch.rows.map { states.block($0, columns: 0..<states.columnCount) }
    }
  }
}

extension ForwardPass {
  /// The last hidden states of some samples, each [tokens, width].
  func finalStates(
    of group: Range<Int>, _ inputs: ModelInputs, workers: Int
  ) throws -> [Matrix<Float>] {
    var states = try TokenStates(embedding: group, of: inputs, for: self, workers: workers)
    for index in 0..<layerCount {
      try states.advance(through: layer(index), mlp(index), workers: workers) { _, _ in }
    }
    return states.outputs(try finalNorm())
  }
}

/// Samples halfway through a layer: at its MLP.
struct MLPInputs: Sendable {
  fileprivate let layer: TransformerLayer
  fileprivate let residuals: [TokenBatch]
  let batches: [TokenBatch]

  /// Goes on through the MLP to the next layer.
  func advanced(through mlp: RoutedPart<FeedForward>, workers: Int) throws -> TokenStates {
    let after = StepResults<TokenBatch>(count: batches.count)
    try forEachStep(count: batches.count, workers: workers) {
    } body: { step, _ in
      let batch = batches[step]
      let output = mlp(batch.states, samples: batch.rows)
      let residual = residuals[step].states
      after[step] = batch.with(layer.afterMLP(residual: residual, output: output))
    }
    return TokenStates(batches: after.all)
  }
}

/// What a forward pass takes in memory, from the shapes alone.
struct StateMemory: Sendable {
  /// One layer with its MLP, all experts of a mixture, and the workers' batches on their way.
  private let layer: Double
  /// The states of one sample at rest.
  private let sample: Double
  private let sampleCount: Int

  // Doubles: a stranger's shapes may multiply to more than an Int holds.
  init(of pass: ForwardPass, over inputs: ModelInputs, workers: Int) {
    let float = Double(MemoryLayout<Float>.size)
    let (tokens, width) = (Double(pass.embedding.longestSample(of: inputs)), Double(pass.width))
    let sizes = (0..<pass.layerCount).map { pass.elementCount(ofLayer: $0) }
    func largest(_ size: KeyPath<ForwardPass.LayerSize, Int>) -> Double {
      Double(sizes.map { $0[keyPath: size] }.max() ?? 0)
    }
    let rows = Double(TokenStates.rowsPerBatch) + tokens
    let worker = rows * (8 * width + 2 * largest(\.inner)) + 2 * tokens * tokens + largest(\.mlp)
    layer = float * (largest(\.all) + Double(workers) * worker)
    // The old states stay until all the new ones are there.
    sample = 2 * float * max(1, tokens) * width
    sampleCount = inputs.sampleCount
  }

  /// The samples in groups that fit.
  /// - Throws: `MergeError` with both numbers if not even one does.
  func groups(memory: Int) throws -> [Range<Int>] {
    let fitting = (Double(memory) - layer) / sample
    guard fitting >= 1 else {
      throw MergeError(
        "one layer and one sample take \(Int(clamping: layer + sample)) bytes, but there are \(memory)",
        remedy: "give more with --memory, or less work at once with --jobs 1")
    }
    let count = Int(clamping: fitting)
    return stride(from: 0, to: sampleCount, by: count).map { $0..<min($0 + count, sampleCount) }
  }

  /// - Throws: `MergeError` with both numbers if the samples do not fit all at once.
  func requireAll(memory: Int) throws {
    let needed = layer + sample * Double(sampleCount)
    guard needed <= Double(memory) else {
      throw MergeError(
        "the states of \(sampleCount) samples and one layer take \(Int(clamping: needed)) bytes, but there are \(memory)",
        remedy: "give more with --memory, or fewer samples")
    }
  }
}

extension Int {
  /// The whole part, or the nearest number that there is.
  init(clamping value: Double) {
    self = value >= 0x1p62 ? .max : value <= -0x1p62 ? .min : Int(value)
  }
}
