import Checkpoints

/// One worker's memory: stored bytes of the inputs, tiles, and encoded results.
struct MergeWorkspace: ~Copyable {
  var arena: Buffer
  var encoded: Buffer?
  var input: Tile
  var output: Tile
  /// Whether the arena holds whole tensors.
  var isHolding = false

  init(for tasks: [TensorTask], share: Int) {
    let sizes = Sizes(of: tasks, share: share)
    arena = Buffer(byteCount: sizes.arena)
    encoded = Buffer(byteCount: sizes.encoded)
    input = Tile(rows: sizes.inputRows, capacity: sizes.columns)
    output = Tile(rows: sizes.outputRows, capacity: sizes.columns)
  }

  /// What a worker needs for any of some tasks, within its share of the memory where it can be.
  struct Sizes {
    var columns = 1
    var (inputRows, outputRows) = (1, 1)
    var (arena, encoded) = (4 << 10, 8)
    /// What a worker sees of a chunk, and its sum over the chunks.
    var observations = 0
    /// What is left for inputs that are kept.
    private var room = 0

    init(of tasks: [TensorTask], share: Int) {
      for task in tasks {
        guard case .merge(let merge, let inputs, _, _) = task.work else { continue }
        if !merge.isReady { observations = max(observations, 2 * merge.observationBytes) }
        columns = max(columns, min(Tile.width(grain: task.grain), max(1, task.output.elementCount)))
        inputRows = max(inputRows, inputs.count)
        outputRows = max(outputRows, task.tileRows.output)
      }
      let left = max(0, share - observations - 4 * columns * (inputRows + outputRows))
      for task in tasks {
        guard case .merge(_, let inputs, _, _) = task.work else {
          arena = max(arena, min(4 << 20, left, task.output.byteCount))
          continue
        }
        let width = min(Tile.width(grain: task.grain), max(1, task.output.elementCount))
        let stored = inputs.reduce(0) { $0 + $1.tensor.dtype.bitWidth / 8 }
        let result = task.output.dtype.bitWidth / 8
        let window = min(left / (stored + result), MergeRun.windowSize, task.output.elementCount)
        encoded = max(encoded, max(window, width) * result)
        arena = max(arena, max(window, width) * stored)
      }
      room = left - encoded
      for task in tasks where holdsInputs(of: task) { arena = max(arena, task.inputByteCount) }
    }

    /// Whether a worker keeps all inputs of the task, because they are looked at more than once
    /// and fit.
    func holdsInputs(of task: TensorTask) -> Bool {
      guard case .merge(let merge, _, _, _) = task.work else { return false }
      return !merge.isReady && task.inputByteCount <= room
    }

    var byteCount: Int {
      arena + encoded + observations + 4 * columns * (inputRows + outputRows)
    }
  }
}
