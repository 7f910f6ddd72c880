/// Decoded chunks of which a neighbouring range of the tensor will want the rest, until it has
/// been read once.
///
/// Those that memory has no room for go to a temporary file: where chunks are narrow and tall,
/// every range of rows needs a part of each of them.
struct DecodedChunks: ~Copyable {
  struct Key: Hashable {
    let tensor: Int
    let chunk: Int
  }

  /// How many bytes are kept in memory.
  private let capacity: Int
  /// The checkpoint that they are of.
  private let path: String
  private var kept: [Key: Kept] = [:]
  /// Those in memory, oldest first, and some that were.
  private var order: [Key] = []
  private var byteCount = 0
  private var overflow: Overflow?
  private var overflowTensor: Int?
  private var overflowEnd = 0

  private struct Kept {
    /// Nil if they are in the file.
    var content: [UInt8]?
    /// Where in the file.
    var start = 0
    /// How many bytes have not been asked for.
    var missing: Int
  }

  /// The temporary file.
  private final class Overflow: Sendable {
    let file: File
    init() throws(CheckpointError) { file = try File(temporaryBeside: temporaryFolder + "/smelt") }
  }

  init(of path: String, capacity: Int = 16 << 20) {
    self.path = path
    self.capacity = capacity
  }

  /// Copies parts of a chunk into their places in a range.
  /// - Returns: false if the chunk is not kept.
  mutating func copy(
    _ runs: [ChunkGrid.Run], of key: Key, into buffer: inout MutableRawSpan
  ) throws(CheckpointError) -> Bool {
    guard var chunk = kept[key], let first = runs.first else { return false }
    if let content = chunk.content {
      content.withUnsafeBytes { runs.copy(from: $0, into: &buffer) }
    } else {
      // What lies between the first and the last run is read too: rows of a chunk are short.
      let begin = runs.reduce(first.startInChunk) { min($0, $1.startInChunk) }
      let end = runs.reduce(0) { max($0, $1.startInChunk + $1.count) }
      let bytes = try overflow!.file.bytes(at: chunk.start + begin, count: end - begin)
      bytes.withUnsafeBytes { runs.copy(from: $0, startingAt: begin, into: &buffer) }
    }
    chunk.missing -= runs.reduce(0) { $0 + $1.count }
    if chunk.missing > 0 { kept[key] = chunk } else { drop(key) }
    return true
  }

  /// Keeps a chunk of which so many bytes have not been asked for yet.
  mutating func keep(_ content: UnsafeRawBufferPointer, as key: Key, missing: Int)
    throws(CheckpointError)
  {
    guard kept[key] == nil else { return }
    guard content.count <= capacity else {
      let start = try write(RawSpan(_unsafeBytes: content), key)
      kept[key] = Kept(content: nil, start: start, missing: missing)
      return
    }
    while byteCount + content.count > capacity, !order.isEmpty { try moveOut(order.removeFirst()) }
    kept[key] = Kept(content: Array(content), missing: missing)
    order.append(key)
    byteCount += content.count
  }

  private mutating func moveOut(_ key: Key) throws(CheckpointError) {
    guard let content = kept[key]?.content else { return }  // It has been read meanwhile.
    byteCount -= content.count
    let start = try write(content.span.bytes, key)
    kept[key]!.content = nil
    kept[key]!.start = start
  }

  /// Writes a chunk to the temporary file.
  /// - Returns: where it begins there.
  private mutating func write(_ content: RawSpan, _ key: Key) throws(CheckpointError) -> Int {
    // One tensor's at a time: those of others have been read, or are decoded again.
    if overflowTensor != key.tensor {
      kept = kept.filter { $0.value.content != nil }
      overflowTensor = key.tensor
      overflowEnd = 0
    }
    let overflow = if let overflow { overflow } else { try Overflow() }
    self.overflow = overflow
    try overflow.file.write(content, at: overflowEnd)
    defer { overflowEnd += content.byteCount }
    return overflowEnd
  }

  private mutating func drop(_ key: Key) {
    guard let content = kept.removeValue(forKey: key)?.content else { return }
    byteCount -= content.count
  }
}

extension [ChunkGrid.Run] {
  /// Copies runs of a chunk, whose bytes are given from byte `begin` on, into a range.
  func copy(
    from content: UnsafeRawBufferPointer, startingAt begin: Int = 0,
    into buffer: inout MutableRawSpan
  ) {
    // Pointers, because there may be thousands of short runs; the grid's runs lie within the
    // chunk and the range.
    buffer.withUnsafeMutableBytes { buffer in
      for run in self {
        (buffer.baseAddress! + run.startInRange).copyMemory(
          from: content.baseAddress! + run.startInChunk - begin, byteCount: run.count)
      }
    }
  }
}
