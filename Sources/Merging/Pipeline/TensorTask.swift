public import Checkpoints

/// One output tensor and what it is made of.
public struct TensorTask: Sendable {
  /// A tensor of the source with this number.
  public typealias Place = (source: Int, tensor: TensorInfo)

  enum Work: Sendable {
    /// Its bytes are those of an input.
    case copy(Place)
    /// Arithmetic on tensors of the same shape. Row 0 is the base of `differences`.
    case merge(any TensorMerge, inputs: [Place], differences: Bool, rounding: DType?)
  }

  public let output: TensorInfo
  let work: Work

  var inputs: [Place] {
    switch work {
    case .copy(let place): [place]
    case .merge(_, let inputs, _, _): inputs
    }
  }

  /// How it is made, in a few words.
  public var explanation: String {
    switch work {
    case .copy: "copy"
    case .merge(_, let inputs, _, _):
      "\(inputs.count) inputs\(isCleaned ? ", cleaned" : ""), \(passes == 1 ? "1 pass" : "\(passes) passes")"
    }
  }

  /// Whether the method is shown cleaned task vectors.
  var isCleaned: Bool {
    if case .merge(let merge, _, _, _) = work { merge is any TaskVectorCleaning } else { false }
  }

  /// Whether its inner products are summed before the merge begins.
  var isReadForItsGroup: Bool {
    guard case .merge(let merge, _, _, _) = work else { return false }
    return (merge as? any TaskVectorCleaning)?.isWaitingForGroup ?? false
  }

  /// How often its inputs are looked at.
  var passes: Int {
    guard case .merge(let merge, _, _, _) = work else { return 1 }
    return 1 + (merge.isReady ? 0 : merge.observingPasses) + (isReadForItsGroup ? 1 : 0)
  }

  /// The same with other arithmetic.
  func mapMerge(_ change: (any TensorMerge) -> any TensorMerge) -> TensorTask {
    guard case .merge(let merge, let inputs, let differences, let rounding) = work else {
      return self
    }
    return TensorTask(
      output: output,
      work: .merge(
        change(merge), inputs: inputs, differences: differences, rounding: rounding))
  }
}

extension TensorTask {
  /// The grain of the arithmetic, 1 without.
  var grain: Int { if case .merge(let merge, _, _, _) = work { merge.grain } else { 1 } }

  /// Elements of each of its chunks but the last: a whole number of tiles.
  func chunkStride(_ size: Int = MergeRun.standardChunkSize) -> Int {
    let tile = Tile.width(grain: grain)
    return max(1, size / tile) * tile
  }

  var tileRows: (input: Int, output: Int) {
    guard case .merge(let merge, let inputs, _, _) = work else { return (0, 0) }
    return (inputs.count, 1 + merge.scratchRows)
  }

  var inputByteCount: Int { inputs.reduce(0) { $0 + $1.tensor.byteCount } }

  /// Bytes of the inputs that one of the task's chunks is made of.
  func inputByteCount(of chunk: Chunk) -> Int {
    inputBytes(of: chunk.elements.count)
  }

  /// Bytes of the inputs that so many of its elements are made of.
  func inputBytes(of elements: Int) -> Int {
    inputs.reduce(0) { $0 + elements * $1.tensor.dtype.bitWidth / 8 }
  }

  /// The least memory a worker needs for this task: its tiles and one tile of every input.
  var leastMemory: Int {
    guard case .merge(_, let inputs, _, _) = work else { return 0 }
    let rows = tileRows
    let columns = min(Tile.width(grain: grain), max(grain, output.elementCount))
    let stored = inputs.reduce(output.dtype.bitWidth / 8) { $0 + $1.tensor.dtype.bitWidth / 8 }
    return columns * (4 * (rows.input + rows.output) + stored)
  }
}
