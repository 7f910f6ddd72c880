/// Stores chunks in the order of their numbers, whatever order they are done in: a file does not
/// show how many threads filled it.
///
/// A chunk whose turn has not come waits in memory. When many wait for one that nobody is working
/// on, further ones wait in a temporary file.
final class ChunkQueue: @unchecked Sendable {
  // Sound: what varies is touched only with the lock held.
  private let monitor = Monitor()
  private let store: Store
  private let path: String
  private let capacity: Int
  /// The first chunk that has not been stored and is not being.
  private(set) var next = 0
  private var isStoring = false
  private var failure: CheckpointError?
  private var inMemory: [Int: PackedChunk] = [:]
  private var inFile: [Int: (range: Range<Int>, skippedFilters: UInt32)] = [:]
  private var spill: Spill?
  private var idle: [PinnedBytes] = []

  /// What is done with a chunk when its turn has come, by one thread at a time.
  typealias Store = @Sendable (_ number: Int, PackedChunk) throws(CheckpointError) -> Void

  /// The temporary file and how much of it is used.
  private final class Spill {
    let file: File
    var end = 0

    init(beside path: String) throws(CheckpointError) { file = try File(temporaryBeside: path) }
  }

  /// - Parameters:
  ///   - path: the file that is written; the temporary file is made beside it.
  ///   - capacity: how many chunks may wait in memory.
  init(besides path: String, capacity: Int = 8, store: @escaping Store) {
    self.path = path
    self.capacity = capacity
    self.store = store
  }

  /// Memory for a chunk, used before if possible.
  func memory(_ byteCount: Int) -> PinnedBytes {
    monitor.lock()
    defer { monitor.unlock() }
    guard let last = idle.popLast(), last.bytes.count >= byteCount else {
      return PinnedBytes(count: byteCount)
    }
    return last
  }

  /// Takes memory back.
  func giveBack(_ memory: PinnedBytes) {
    monitor.lock()
    defer { monitor.unlock() }
    keep(memory)
  }

  /// Stores the chunk and those that waited for it, or lets it wait.
  /// - Throws: also what an earlier chunk could not be stored for.
  func put(_ number: Int, _ chunk: PackedChunk) throws(CheckpointError) {
    monitor.lock()
    defer { monitor.unlock() }
    // Whoever is storing makes room.
    while isStoring, inMemory.count >= capacity, failure == nil { monitor.wait() }
    if let failure { throw failure }
    guard number == next, !isStoring else {
      if inMemory.count < capacity { inMemory[number] = chunk } else { try spill(chunk, number) }
      return
    }
    isStoring = true
    defer {
      isStoring = false
      monitor.changed()
    }
    do throws(CheckpointError) {
      var chunk: PackedChunk? = chunk
      while let current = chunk {
        next += 1
        try unlocked { () throws(CheckpointError) in try store(next - 1, current) }
        keep(current.memory)
        chunk = try waiting(next)
        monitor.changed()
      }
    } catch {
      failure = error
      throw error
    }
  }

  private func unlocked(_ body: () throws(CheckpointError) -> Void) throws(CheckpointError) {
    monitor.unlock()
    defer { monitor.lock() }
    try body()
  }

  private func keep(_ memory: PinnedBytes) {
    if idle.count + inMemory.count < capacity { idle.append(memory) }
  }

  private func spill(_ chunk: PackedChunk, _ number: Int) throws(CheckpointError) {
    let spill = if let spill { spill } else { try Spill(beside: path) }
    self.spill = spill
    try spill.file.write(chunk.bytes, at: spill.end)
    inFile[number] = (spill.end..<spill.end + chunk.count, chunk.skippedFilters)
    spill.end += chunk.count
    keep(chunk.memory)
  }

  /// Takes out a chunk that waits.
  private func waiting(_ number: Int) throws(CheckpointError) -> PackedChunk? {
    if let chunk = inMemory.removeValue(forKey: number) { return chunk }
    guard let (range, skippedFilters) = inFile.removeValue(forKey: number) else { return nil }
    let memory = PinnedBytes(count: range.count)
    var span = MutableRawSpan(_unsafeBytes: memory.bytes)
    try spill!.file.read(at: range.lowerBound, into: &span)
    return PackedChunk(memory: memory, count: range.count, skippedFilters: skippedFilters)
  }
}

/// A chunk as it is to be stored: the first bytes of its memory, which it owns.
struct PackedChunk {
  let memory: PinnedBytes
  let count: Int
  /// Bit i says that filter i was left out.
  let skippedFilters: UInt32

  var bytes: UnsafeRawBufferPointer { memory.first(count) }
}
