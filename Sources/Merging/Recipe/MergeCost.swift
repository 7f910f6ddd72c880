import Checkpoints

extension MergePlan {
  /// What a plan will need of the machine.
  public struct Cost: Sendable {
    /// Bytes of the inputs, as often as they are read.
    public var bytesRead = 0
    /// Bytes of the inputs, once for each tensor that they are used in.
    public var bytesMerged = 0
    public var bytesWritten = 0
    /// How often the data of the most demanding tensor is looked at, the result's pass included.
    public var passes = 1
    /// Tensors that are read again in every pass, because they do not fit a worker's memory.
    public var tensorsReadAgain = 0
    /// Bytes that the workers take together.
    public var memory = 0
  }

  /// - Parameter finished: chunks that an earlier run has made.
  public func cost(memory: Int, workers: Int, finished: Set<Chunk> = []) -> Cost {
    var cost = Cost()
    let share = memory / max(1, workers)
    let sizes = MergeWorkspace.Sizes(of: tasks, share: share)
    let made = Dictionary(grouping: finished) { $0.task }.mapValues { chunks in
      chunks.reduce(0) { $0 + $1.elements.count }
    }
    for (index, task) in tasks.enumerated() {
      let bytes = task.inputByteCount
      let made = made[index] ?? 0
      let (isMade, read) = (made > 0 && made == task.output.elementCount, task.inputBytes(of: made))
      cost.bytesWritten += task.output.byteCount - task.output.dtype.bitWidth * made / 8
      cost.bytesMerged += bytes - read
      cost.bytesRead -= read
      switch task.work {
      case .copy: cost.bytesRead += bytes
      case .merge(let merge, _, _, _):
        let isReadAgain = !isMade && !merge.isReady && !sizes.holdsInputs(of: task)
        cost.passes = max(cost.passes, task.passes)
        cost.tensorsReadAgain += isReadAgain || task.isReadForItsGroup ? 1 : 0
        cost.bytesRead += bytes * (isReadAgain ? 1 + merge.observingPasses : 1)
        cost.bytesRead += task.isReadForItsGroup ? bytes : 0
      }
    }
    cost.memory = workers * sizes.byteCount
    return cost
  }

  /// - Throws: `MergeError` with both numbers if a tensor's rows do not fit the memory.
  public func check(memory: Int, workers: Int) throws {
    for task in tasks where task.grain > 1 {
      let needed = task.leastMemory * workers
      // What fits the constant part of the memory beside the budget always fits.
      guard needed > max(memory, 16 << 20) else { continue }
      throw MergeError(
        "\(recipe.method.name) needs whole rows, and tensor \(quoted(task.output.name)) needs \(needed) bytes for \(workers) of them at once; the budget is \(memory)",
        remedy: "give it more with --memory or use fewer --jobs")
    }
  }
}
