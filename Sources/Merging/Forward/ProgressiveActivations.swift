public import Checkpoints
import Synchronization

/// Activations that come into being while a mixture is calibrated: what each layer's MLP sees of
/// samples that went through the layers before it, whose routers are fitted already.
///
/// Recorded activations are another model's, and each layer adds to the difference. Here later
/// routers are fitted to what they will really see. Give this to a `MixtureCalibration` as its
/// activations, and its sink through `observing(_:)`; the modules must be fitted in their order: for
/// an earlier layer the samples begin anew.
public final class ProgressiveActivations: TensorSource {
  public let path: String
  public let manifest: Manifest
  private let mixture: MixtureInProgress
  private let pass: ForwardPass
  private let inputs: ModelInputs
  private let workers: Int
  /// Tokens of each sample that calibration sees.
  private let tokenCount: Int
  private let place: Mutex<Place?>

  /// Where the samples are: in front of a layer, or at its MLP.
  private enum Place {
    case states(layer: Int, TokenStates)
    case mlp(layer: Int, MLPInputs)

    var layer: Int {
      switch self {
      case .states(let layer, _), .mlp(let layer, _): layer
      }
    }
  }

  /// - Parameters:
  ///   - makePass: Makes the forward pass of the mixture that it is given.
  ///   - memory: Bytes that the samples' states may take; all of them are kept at once.
  /// - Throws: `MergeError` or `CheckpointError` if the mixture cannot be run over the samples.
  public init(
    of mixture: any TensorSource, over inputs: ModelInputs, memory: Int, workers: Int,
    pass makePass: (any TensorSource) throws -> ForwardPass
  ) throws {
    guard let tasks = inputs.tasks else {
      throw CheckpointError(
        file: inputs.source.path, tensor: "task", "is missing",
        remedy: "say with it which expert each sample is for")
    }
    let mixture = MixtureInProgress(mixture)
    let pass = try makePass(mixture)
    try StateMemory(of: pass, over: inputs, workers: workers).requireAll(memory: memory)
    let tokenCount = pass.embedding.longestSample(of: inputs)
    guard
      let recorded = try? TensorInfo(
        name: "", dtype: .f32, shape: [inputs.sampleCount, tokenCount, pass.width])
    else { throw MergeError("\(inputs.sampleCount) samples are too many to calibrate with") }
    manifest = Manifest(
      (0..<pass.layerCount).flatMap { layer in
        [pass.attentionModule(layer), pass.module(layer)].map { recorded.renamed($0) }
      }
        + [try! TensorInfo(name: "task", dtype: .i64, shape: [tasks.count])])
    path = inputs.source.path
    self.mixture = mixture
    self.pass = pass
    self.inputs = inputs
    self.workers = workers
    self.tokenCount = tokenCount
    place = Mutex(nil)
  }

  /// A sink whose routers are used for the samples' way on as soon as they are written.
  public func observing(_ sink: any TensorSink) -> any TensorSink {
    ObservedSink(sink, mixture: mixture)
  }

  public func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    precondition(offset.isMultiple(of: 4) && buffer.byteCount.isMultiple(of: 4))
    if tensor.name == "task" {
      let tasks = inputs.tasks!.map { Int64($0).littleEndian }
      fill(&buffer, from: offset, of: tasks.span.bytes)
      return
    }
    let position = manifest.position(of: tensor.name)!
    let values = try values(
      atMLP: !position.isMultiple(of: 2), of: position / 2,
      offset / 4..<(offset + buffer.byteCount) / 4)
    tensor.dtype.encode(values.span, into: &buffer)
  }

  private func values(
    atMLP isMLP: Bool, of layer: Int, _ range: Range<Int>
  ) throws(CheckpointError) -> [Float] {
    do {
      let batches = try place.withLock { place in
        if isMLP {
          return try mlpInputs(&place, of: layer).batches
        }
        return try states(&place, before: layer).attentionInputs(of: pass.layer(layer))
      }
      return values(of: batches, range)
    } catch let error as CheckpointError {
      throw error
    } catch {
      throw CheckpointError(file: path, "\(error)")
    }
  }

  /// Takes the samples to the front of a layer.
  private func states(_ place: inout Place?, before layer: Int) throws -> TokenStates {
    while true {
      switch place {
      case .states(layer, let states):
        return states
      case .states(let here, _) where here > layer, .mlp(let here, _) where here >= layer:
        place = nil
      case .states(let here, _):
        _ = try mlpInputs(&place, of: here)
      case .mlp(let here, let inputs):
        place = .states(
          layer: here + 1, try inputs.advanced(through: pass.mlp(here), workers: workers))
      case nil:
        place = .states(
          layer: 0,
          try TokenStates(
            embedding: 0..<self.inputs.sampleCount, of: self.inputs, for: pass, workers: workers))
      }
    }
  }

  /// Takes the samples to the MLP of a layer.
  private func mlpInputs(_ place: inout Place?, of layer: Int) throws -> MLPInputs {
    if case .mlp(layer, let inputs) = place { return inputs }
    let inputs = try states(&place, before: layer).mlpInputs(
      of: pass.layer(layer), workers: workers)
    place = .mlp(layer: layer, inputs)
    return inputs
  }

  /// The last hidden states of all samples, each [tokens, width]. No layer can be read after.
  func finalStates() throws -> [Matrix<Float>] {
    try place.withLock { place in
      try states(&place, before: pass.layerCount).outputs(try pass.finalNorm())
    }
  }

  /// Elements of `[samples, tokens, width]`. Shorter samples fill their places with tokens
  /// repeated as evenly as can be.
  private func values(of batches: [TokenBatch], _ range: Range<Int>) -> [Float] {
    var values: [Float] = []
    values.reserveCapacity(range.count)
    let (width, sampleLength) = (pass.width, tokenCount * pass.width)
    var batch = 0
    var element = range.lowerBound
    while element < range.upperBound {
      let (sample, token) = (element / sampleLength, element % sampleLength / width)
      while !batches[batch].samples.contains(sample) { batch += 1 }
      let here = batches[batch]
      let rows = here.rows[sample - here.samples.lowerBound]
      let row = here.states[row: rows.lowerBound + token * rows.count / tokenCount]
      let column = element % width
      let count = min(width - column, range.upperBound - element)
      values += row[row.startIndex + column..<row.startIndex + column + count]
      element += count
    }
    return values
  }
}

/// A mixture whose routers are being fitted: what has been written of it counts, the rest is as
/// it was.
private final class MixtureInProgress: TensorSource {
  private let source: any TensorSource
  private let written = Mutex<[String: [UInt8]]>([:])

  init(_ source: any TensorSource) { self.source = source }

  var path: String { source.path }
  var manifest: Manifest { source.manifest }

  func replace(_ tensor: TensorInfo, at offset: Int, with bytes: RawSpan) {
    written.withLock { written in
      var whole = written[tensor.name] ?? Array(repeating: 0, count: tensor.byteCount)
      for index in 0..<bytes.byteCount {
        whole[offset + index] = bytes.unsafeLoad(fromByteOffset: index, as: UInt8.self)
      }
      written[tensor.name] = whole
    }
  }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    guard let bytes = written.withLock({ $0[tensor.name] }) else {
      return try source.read(tensor, at: offset, into: &buffer)
    }
    fill(&buffer, from: offset, of: bytes.span.bytes)
  }
}

/// A sink that shows a mixture in progress the routers that pass through it.
private final class ObservedSink: TensorSink {
  private let sink: any TensorSink
  private let mixture: MixtureInProgress

  init(_ sink: any TensorSink, mixture: MixtureInProgress) {
    self.sink = sink
    self.mixture = mixture
  }

  var manifest: Manifest { sink.manifest }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    if tensor.name.contains(".gate.") { mixture.replace(tensor, at: offset, with: bytes) }
    try sink.write(bytes, of: tensor, at: offset)
  }

  func complete() throws(CheckpointError) { try sink.complete() }
  func finish() throws(CheckpointError) { try sink.finish() }
}

private func fill(_ buffer: inout MutableRawSpan, from offset: Int, of bytes: RawSpan) {
  let count = buffer.byteCount
  precondition(offset + count <= bytes.byteCount)
  // Sound: both ranges were checked, and a span that is written is nobody else's.
  buffer.withUnsafeMutableBytes { target in
    bytes.withUnsafeBytes { source in
      target.copyMemory(from: UnsafeRawBufferPointer(rebasing: source[offset..<offset + count]))
    }
  }
}
