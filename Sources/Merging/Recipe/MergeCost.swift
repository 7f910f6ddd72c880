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
    /// How often groups wider than a row are read by the cleaning.
    public var cleaning = CleaningReads()
    /// Bytes that the workers take together.
    public var memory = 0
  }

  /// - Parameter finished: chunks that an earlier run has made.
  public func cost(memory: Int, workers: Int, finished: Set<Chunk> = []) -> Cost {
    var cost = Cost()
    cost.cleaning = cleaning?.reads(of: tasks, memory: memory, workers: workers) ?? CleaningReads()
    cost.bytesRead = cost.cleaning.bytesReadAgain
    let sizes = MergeWorkspace.Sizes(of: tasks, share: memory / max(1, workers))
    // The workers' share while groups are held, which are read once however often they are seen.
    let besideHeld = MergeWorkspace.Sizes(
      of: tasks, share: (memory - cost.cleaning.held) / max(1, workers))
    let held = cleaning?.heldTasks(tasks, memory: memory, workers: workers) ?? []
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
        let sizes = task.isReadForItsGroup ? besideHeld : sizes
        let isReadAgain =
          !isMade && !held.contains(index) && !merge.isReady && !sizes.holdsInputs(of: task)
        cost.passes = max(cost.passes, task.passes)
        cost.tensorsReadAgain += isReadAgain ? 1 : 0
        cost.bytesRead += bytes * (isReadAgain ? 1 + merge.observingPasses : 1)
      }
    }
    cost.memory = max(
      workers * sizes.byteCount, cost.cleaning.held + workers * besideHeld.byteCount)
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
