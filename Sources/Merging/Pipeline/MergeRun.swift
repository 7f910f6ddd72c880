public import Checkpoints
import Synchronization

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

/// A part of an output tensor that is finished at once.
public struct Chunk: Sendable, Hashable {
  /// The number of the task.
  public let task: Int
  public let elements: Range<Int>
}

/// A tensor of the source with this number.
struct InputTensor: Hashable {
  let source: Int
  let name: String
}

/// What is known of a chunk when it has been written.
public struct FinishedChunk: Sendable {
  public let chunk: Chunk
  public let tensor: TensorInfo
  public let bytesRead: Int
  public let bytesWritten: Int
  /// Elements that are NaN or infinite.
  public let notFinite: Int
}

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

  // MARK: Chunks

  private func copy(
    _ chunk: Chunk, from place: TensorTask.Place, in workspace: inout MergeWorkspace
  ) throws {
    let tensor = tasks[chunk.task].output
    let bits = tensor.dtype.bitWidth
    // Sub-byte types: a chunk is a multiple of eight elements, so its ends are whole bytes.
    let bytes = chunk.elements.lowerBound * bits / 8..<(chunk.elements.upperBound * bits + 7) / 8
    var begin = bytes.lowerBound
    while begin < bytes.upperBound {
      let count = min(workspace.arena.byteCount, 4 << 20, bytes.upperBound - begin)
      var piece = workspace.arena.first(count)
      try sources[place.source].read(place.tensor, at: begin, into: &piece)
      forget(begin..<begin + count, of: place)
      try sink.write(piece.bytes, of: tensor, at: begin)
      begin += count
    }
    try didFinish(
      FinishedChunk(
        chunk: chunk, tensor: tensor, bytesRead: bytes.count, bytesWritten: bytes.count,
        notFinite: 0))
  }

  private func observe<Merge: TensorMerge>(
    _ merge: Merge, _ chunk: Chunk, in workspace: inout MergeWorkspace
  ) throws -> Merge.Observation {
    var observation = merge.makeObservation()
    try forEachTile(of: chunk, grain: merge.grain, isLast: false, in: &workspace) {
      position, input, output in
      merge.observe(&input, at: position, scratch: &output, into: &observation)
    }
    return observation
  }

  private func apply<Merge: TensorMerge>(
    _ merge: Merge, to chunk: Chunk, in workspace: inout MergeWorkspace
  ) throws {
    let task = tasks[chunk.task]
    guard case .merge(_, _, let differences, _) = task.work else { return }
    let width = task.output.dtype.bitWidth / 8
    var notFinite = 0
    var written = chunk.elements.lowerBound
    var encoded = workspace.encoded.take()!
    try forEachTile(of: chunk, grain: merge.grain, isLast: true, in: &workspace) {
      position, input, output in
      merge.merge(&input, at: position, into: &output)
      if differences { output.add(input, row: 0, to: 0) }
      notFinite += task.output.dtype.notFinite(output[0])
      let end = position + output.columns
      let room = encoded.byteCount / width
      // A window's worth of tiles is written at once.
      var bytes = encoded.first((end - written) * width)
      var place = bytes._mutatingExtracting(droppingFirst: (position - written) * width)
      task.output.dtype.encode(output[0], into: &place)
      if end == chunk.elements.upperBound || end - written + output.columns > room {
        let full = encoded.first((end - written) * width)
        try sink.write(full.bytes, of: task.output, at: written * width)
        written = end
      }
    }
    workspace.encoded = consume encoded
    try didFinish(
      FinishedChunk(
        chunk: chunk, tensor: task.output,
        bytesRead: task.inputByteCount(of: chunk),
        bytesWritten: chunk.elements.count * width, notFinite: notFinite))
  }

  /// Reads a chunk window by window and hands it on tile by tile, as differences if those are
  /// what the task works on.
  /// - Parameter isLast: whether it will not be read again.
  private func forEachTile(
    of chunk: Chunk, grain: Int, isLast: Bool, in workspace: inout MergeWorkspace,
    _ body: (_ position: Int, _ input: inout Tile, _ output: inout Tile) throws -> Void
  ) throws {
    guard case .merge(_, let inputs, let differences, let rounding) = tasks[chunk.task].work else {
      return
    }
    let tileWidth = Tile.width(grain: grain)
    let bytesPerColumn = inputs.reduce(0) { $0 + $1.tensor.dtype.bitWidth / 8 }
    let room = min(workspace.arena.byteCount / bytesPerColumn, MergeRun.windowSize)
    let windowWidth = max(tileWidth, room / tileWidth * tileWidth)
    var begin = chunk.elements.lowerBound
    while begin < chunk.elements.upperBound {
      let window = begin..<min(begin + windowWidth, chunk.elements.upperBound)
      if !workspace.isHolding { try read(inputs, window, isLast: isLast, into: &workspace) }
      for position in stride(from: window.lowerBound, to: window.upperBound, by: tileWidth) {
        let columns = position..<min(position + tileWidth, window.upperBound)
        workspace.input.resize(columns: columns.count)
        workspace.output.resize(columns: columns.count)
        var start = 0
        for (row, input) in inputs.enumerated() {
          let width = input.tensor.dtype.bitWidth / 8
          let offset = workspace.isHolding ? 0 : window.lowerBound
          decode(
            input.tensor.dtype, &workspace.arena,
            at: start + (columns.lowerBound - offset) * width, rounding: rounding,
            into: &workspace.input, row: row)
          if differences, row > 0 { workspace.input.subtract(row: 0, from: row) }
          start += workspace.isHolding ? input.tensor.byteCount : window.count * width
        }
        try body(columns.lowerBound, &workspace.input, &workspace.output)
      }
      begin = window.upperBound
    }
  }

  /// Fills the arena with the same window of every input, one after the other.
  private func read(
    _ inputs: [TensorTask.Place], _ window: Range<Int>, isLast: Bool,
    into workspace: inout MergeWorkspace
  ) throws {
    var start = 0
    for input in inputs {
      let width = input.tensor.dtype.bitWidth / 8
      let count = window.count * width
      var arena = workspace.arena.first(start + count)
      var bytes = arena._mutatingExtracting(droppingFirst: start)
      try sources[input.source].read(input.tensor, at: window.lowerBound * width, into: &bytes)
      if isLast { forget(window.lowerBound * width..<window.upperBound * width, of: input) }
      start += count
    }
  }

  /// Fills the arena with all inputs, one after the other.
  private func hold(_ inputs: [TensorTask.Place], in workspace: inout MergeWorkspace) throws {
    var start = 0
    for input in inputs {
      let count = input.tensor.byteCount
      for offset in stride(from: 0, to: count, by: 4 << 20) {
        let piece = min(4 << 20, count - offset)
        var arena = workspace.arena.first(start + offset + piece)
        var bytes = arena._mutatingExtracting(droppingFirst: start + offset)
        try sources[input.source].read(input.tensor, at: offset, into: &bytes)
        forget(offset..<offset + piece, of: input)
      }
      start += count
    }
    workspace.isHolding = true
  }

  private func forget(_ bytes: Range<Int>, of input: TensorTask.Place) {
    guard forgettable.contains(InputTensor(source: input.source, name: input.tensor.name)) else {
      return
    }
    sources[input.source].forget(bytes, of: input.tensor)
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
    inputs.reduce(0) { $0 + chunk.elements.count * $1.tensor.dtype.bitWidth / 8 }
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

/// Decodes what the arena holds from byte `start` on into a row of the tile.
private func decode(
  _ type: DType, _ arena: inout Buffer, at start: Int, rounding: DType?, into tile: inout Tile,
  row: Int
) {
  let held = arena.first(start + tile.columns * (type.bitWidth / 8))
  var values = tile.mutableRow(row)
  type.decode(held.bytes.extracting(droppingFirst: start), into: &values)
  if let rounding, type != rounding { rounding.round(&values) }
}

/// A total of parts that arrive in any order and are added in theirs.
private final class OrderedTotal<Part: Sendable>: Sendable {
  private struct State: Sendable {
    var total: Part
    var next = 0
    var waiting: [Int: Part] = [:]
  }
  private let state: Mutex<State>

  init(_ zero: Part) { state = Mutex(State(total: zero)) }

  var value: Part { state.withLock { $0.total } }

  func add(_ part: Part, number: Int, _ combine: (Part, inout Part) -> Void) {
    state.withLock { state in
      state.waiting[number] = part
      while let next = state.waiting.removeValue(forKey: state.next) {
        combine(next, &state.total)
        state.next += 1
      }
    }
  }
}

extension DType {
  /// How many values are NaN, infinite, or become infinite in this type.
  fileprivate func notFinite(_ values: Span<Float>) -> Int {
    // The largest magnitudes that do not round to infinity.
    let largest: UInt32 =
      switch self {
      case .f16: 0x477F_EFFF
      case .bf16: 0x7F7F_7FFF
      default: 0x7F7F_FFFF
      }
    var flags: UInt32 = 0
    for i in values.indices { flags |= largest &- values[i].magnitudeBits }
    guard flags >> 31 == 1 else { return 0 }
    var count = 0
    for i in values.indices where values[i].magnitudeBits > largest { count += 1 }
    return count
  }
}
