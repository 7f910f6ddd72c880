public import Checkpoints

/// Running a model over samples and recording what its MLPs see: the checkpoint of activations
/// that calibration reads.
///
/// For every module a tensor of its name, `[samples, width]`, averaged over the tokens, or
/// `[samples, tokens, width]` with `attention_mask` where texts are padded; and `task`.
public struct ActivationRecording: Sendable {
  public struct Options: Sendable {
    /// Whether every token is recorded and not their mean alone.
    public var everyToken = false
    /// Whether what attention sees is recorded too, under the attention's name.
    public var attention = false
    /// Whether the last hidden states are recorded too, as `last_hidden_state`.
    public var finalStates = false

    public init() {}
  }

  private let pass: ForwardPass
  private let inputs: ModelInputs
  private let options: Options
  public let manifest: Manifest

  /// - Throws: `MergeError` if the recording would be larger than any file.
  public init(
    of pass: ForwardPass, over inputs: ModelInputs, _ options: Options = .init()
  ) throws {
    self.pass = pass
    self.inputs = inputs
    self.options = options
    let samples = inputs.sampleCount
    // A text keeps the places that it has in its file.
    let places =
      inputs.pixels == nil ? inputs.paddedLength : pass.embedding.longestSample(of: inputs)
    let shape = options.everyToken ? [samples, places, pass.width] : [samples, pass.width]
    var names = (0..<pass.layerCount).map { pass.module($0) }
    if options.attention { names += (0..<pass.layerCount).map { pass.attentionModule($0) } }
    if options.finalStates { names.append(Self.finalName) }
    guard let one = try? TensorInfo(name: "", dtype: .f32, shape: shape) else {
      throw MergeError("\(samples) samples of \(places) tokens are too many to record")
    }
    var tensors = names.map { one.renamed($0) }
    if inputs.tasks != nil {
      tensors.append(try! TensorInfo(name: "task", dtype: .i64, shape: [samples]))
    }
    if options.everyToken && inputs.pixels == nil {
      tensors.append(
        try! TensorInfo(name: "attention_mask", dtype: .i64, shape: [samples, places]))
    }
    manifest = Manifest(tensors)
  }

  private static let finalName = "last_hidden_state"

  /// - Parameter memory: bytes that the states of the samples and one layer take together. Samples
  ///   that do not fit at once go through the model group after group.
  public func run(into sink: any TensorSink, memory: Int, workers: Int) throws {
    let groups = try StateMemory(of: pass, over: inputs, workers: workers).groups(memory: memory)
    for group in groups {
      var states = try TokenStates(embedding: group, of: inputs, for: pass, workers: workers)
      for index in 0..<pass.layerCount {
        let tensor = sink.manifest[pass.module(index)]!
        let attention = sink.manifest[pass.attentionModule(index)]
        try states.advance(through: pass.layer(index), pass.mlp(index), workers: workers) {
          if let attention { try record($0, in: attention, of: sink) }
          try record($1, in: tensor, of: sink)
        }
      }
      if options.finalStates {
        let norm = try pass.finalNorm()
        let tensor = sink.manifest[Self.finalName]!
        for batch in states.batches {
          try record(batch.with(norm?(batch.states) ?? batch.states), in: tensor, of: sink)
        }
      }
    }
    try writeIntegers(into: sink)
  }

  private func record(_ batch: TokenBatch, in tensor: TensorInfo, of sink: any TensorSink) throws {
    let sampleBytes = tensor.byteCount / inputs.sampleCount
    for (index, sample) in batch.samples.enumerated() {
      let rows = batch.rows[index]
      var values: [Float]
      if options.everyToken {
        values = Array(repeating: 0, count: sampleBytes / MemoryLayout<Float>.size)
        let places = inputs.pixels == nil ? inputs.texts[sample].places : Array(0..<rows.count)
        for (row, place) in zip(rows, places) {
          let start = place * pass.width
          values.replaceSubrange(start..<start + pass.width, with: batch.states[row: row])
        }
      } else {
        values = batch.states.mean(of: rows)
      }
      var buffer = Buffer(byteCount: sampleBytes)
      var bytes = buffer.first(sampleBytes)
      tensor.dtype.encode(values.span, into: &bytes)
      try sink.write(bytes.bytes, of: tensor, at: sample * sampleBytes)
    }
  }

  private func writeIntegers(into sink: any TensorSink) throws {
    func write(_ values: [Int], as name: String) throws {
      guard let tensor = sink.manifest[name] else { return }
      let values = values.map { Int64($0).littleEndian }
      try sink.write(values.span.bytes, of: tensor, at: 0)
    }
    try write(inputs.tasks ?? [], as: "task")
    var mask = Array(repeating: 0, count: inputs.sampleCount * inputs.paddedLength)
    for (sample, text) in inputs.texts.enumerated() {
      for place in text.places { mask[sample * inputs.paddedLength + place] = 1 }
    }
    try write(mask, as: "attention_mask")
  }
}

extension Matrix where Scalar == Float {
  /// The mean of some rows.
  func mean(of rows: Range<Int>) -> [Float] {
    var sum = Array(repeating: 0.0, count: columnCount)
    for row in rows {
      for (column, value) in self[row: row].enumerated() { sum[column] += Double(value) }
    }
    return sum.map { Float($0 / Double(max(1, rows.count))) }
  }
}
