import Checkpoints

/// Makes the tensors of a merge side by side, in bounded memory.
///
/// A tensor that needs no observing pass is cut into chunks, which the workers take in turn. One
/// that does and fits a worker's share of the memory is read once and kept, as it is stored, by
/// that worker. A larger one is worked on by all workers together and read once a pass.
struct MergeRun: Sendable {
  var sources: [any TensorSource]
  let sink: any TensorSink
  var tasks: [TensorTask]
  var memory: Int
  let workers: Int
  /// Chunks that need not be made again.
  var finished: Set<Chunk> = []
  /// Input tensors that are read for one output only, and may be forgotten then.
  var forgettable: Set<InputTensor> = []
  /// Called after some bytes of a tensor's inputs have been looked at, and will be read again.
  var didObserve: @Sendable (TensorInfo, _ bytes: Int) -> Void = { _, _ in }
  /// Called after a chunk has been written, from the worker's thread.
  var didFinish: @Sendable (FinishedChunk) throws -> Void = { _ in }

  /// Elements of a chunk, about. Sums are folded chunk by chunk, so it shows in the last bits.
  var chunkSize = MergeRun.standardChunkSize
  static let standardChunkSize = 4 << 20
  /// Elements of a tensor's row that are read and written at once, at most.
  static let windowSize = 512 << 10

  /// Makes the outputs of some tasks, by their numbers, or of all.
  func run(_ indices: [Int]? = nil) throws {
    let share = memory / max(1, workers)
    let sizes = MergeWorkspace.Sizes(of: tasks, share: share)
    var together: [Int] = []
    var alone: [Item] = []
    for index in indices ?? Array(tasks.indices) {
      switch tasks[index].work {
      case .copy: alone += chunks(of: index).map { .chunk($0) }
      case .merge(let merge, _, _, _):
        if merge.isReady {
          alone += chunks(of: index).map { .chunk($0) }
        } else if chunks(of: index).isEmpty {
          continue
        } else if sizes.holdsInputs(of: tasks[index]) {
          alone.append(.whole(index))
        } else {
          together.append(index)
        }
      }
    }
    for index in together { try runTogether(index) }
    let items = alone
    try forEachStep(count: items.count, workers: workers) {
      MergeWorkspace(for: tasks, share: share)
    } body: { step, workspace in
      switch items[step] {
      case .chunk(let chunk): try make(chunk, in: &workspace)
      case .whole(let index): try makeWhole(index, in: &workspace)
      }
    }
  }

  private enum Item: Sendable {
    case chunk(Chunk)
    case whole(Int)
  }

  /// The unfinished chunks of a task.
  private func chunks(of index: Int) -> [Chunk] {
    allChunks(of: index).filter { !finished.contains($0) }
  }

  /// Every chunk of a task, in order.
  func allChunks(of index: Int) -> [Chunk] {
    let stride = tasks[index].chunkStride(chunkSize)
    return Swift.stride(from: 0, to: tasks[index].output.elementCount, by: stride).map {
      Chunk(task: index, elements: $0..<min($0 + stride, tasks[index].output.elementCount))
    }
  }

  // MARK: Three ways to make a tensor

  private func make(_ chunk: Chunk, in workspace: inout MergeWorkspace) throws {
    switch tasks[chunk.task].work {
    case .copy(let place): try copy(chunk, from: place, in: &workspace)
    case .merge(let merge, _, _, _): try apply(merge, to: chunk, in: &workspace)
    }
  }

  private func makeWhole(_ index: Int, in workspace: inout MergeWorkspace) throws {
    guard case .merge(let merge, let inputs, _, _) = tasks[index].work else { return }
    try hold(inputs, in: &workspace)
    defer { workspace.isHolding = false }
    let ready = try learn(merge, index, in: &workspace)
    for chunk in chunks(of: index) { try apply(ready, to: chunk, in: &workspace) }
  }

  private func learn<Merge: TensorMerge>(
    _ merge: Merge, _ index: Int, in workspace: inout MergeWorkspace
  ) throws -> any TensorMerge {
    var merge = merge
    while !merge.isReady {
      var total = merge.makeObservation()
      for chunk in allChunks(of: index) {
        merge.combine(try observe(merge, chunk, in: &workspace), into: &total)
      }
      try conclude(&merge, total, tasks[index])
    }
    return merge
  }

  private func conclude<Merge: TensorMerge>(
    _ merge: inout Merge, _ total: Merge.Observation, _ task: TensorTask
  ) throws {
    do { try merge.learn(total) } catch {
      throw task.inputs.map { sources[$0.source] }.errorOfChange(of: task.output.name)
    }
  }

  private func runTogether(_ index: Int) throws {
    guard case .merge(let merge, _, _, _) = tasks[index].work else { return }
    let ready = try learnTogether(merge, index)
    let chunks = chunks(of: index)
    try forEachStep(count: chunks.count, workers: workers) {
      MergeWorkspace(for: [tasks[index]], share: memory / max(1, workers))
    } body: { step, workspace in
      try apply(ready, to: chunks[step], in: &workspace)
    }
  }

  private func learnTogether<Merge: TensorMerge>(_ merge: Merge, _ index: Int) throws
    -> any TensorMerge
  {
    let passes = merge.observingPasses
    var merge = merge
    let task = tasks[index]
    let chunks = allChunks(of: index)
    var pass = 0
    while !merge.isReady {
      let current = merge
      let total = OrderedTotal(merge.makeObservation())
      try forEachStep(count: chunks.count, workers: workers) {
        MergeWorkspace(for: [tasks[index]], share: memory / max(1, workers))
      } body: { step, workspace in
        let observation = try observe(current, chunks[step], in: &workspace)
        didObserve(task.output, task.inputByteCount(of: chunks[step]))
        total.add(observation, number: step) { current.combine($0, into: &$1) }
      }
      try conclude(&merge, total.value, task)
      pass += 1
    }
    // Passes that were planned for and not needed.
    didObserve(task.output, max(0, passes - pass) * task.inputByteCount)
    return merge
  }

  /// The Gram matrices of the task vectors that these tasks work on, in one pass over them.
  func taskVectorGrams(of indices: [Int]) throws -> [GramMatrix] {
    let chunks = indices.map { allChunks(of: $0) }
    let all = chunks.flatMap { $0 }
    let found = StepResults<GramMatrix>(count: all.count)
    // What is read again soon must stay in the page cache.
    var run = self
    run.forgettable = []
    let reading = run
    try forEachStep(count: all.count, workers: workers) {
      MergeWorkspace(for: tasks, share: memory / max(1, workers))
    } body: { step, workspace in
      let task = tasks[all[step].task]
      let gram = TaskVectorGram(experts: task.tileRows.input - 1, grain: task.grain)
      found[step] = try reading.observe(gram, all[step], in: &workspace)
      didObserve(task.output, task.inputByteCount(of: all[step]))
    }
    return zip(indices, fold(found.all, chunks.map { $0.count }) { $0 += $1 }).map {
      $1 ?? GramMatrix(order: tasks[$0].tileRows.input - 1)
    }
  }
}
