import Synchronization

/// Tensors of an HDF5 file of which some are stored in chunks.
final class HDF5Source: TensorSource {
  let path: String
  private let contents: HDF5.Contents
  private let file: File
  private let recent = Mutex(RecentChunks())

  init(_ path: String, _ contents: HDF5.Contents) throws(CheckpointError) {
    self.path = path
    self.contents = contents
    self.file = try File(reading: path)
  }

  var manifest: Manifest { contents.manifest }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    let count = buffer.byteCount
    precondition(offset >= 0 && offset + count <= tensor.byteCount)
    let position = manifest.position(of: tensor.name)!
    switch contents.places[position] {
    case .range(let start): try file.read(at: start + offset, into: &buffer)
    case .inline(let bytes):
      buffer.withUnsafeMutableBytes { $0.copyBytes(from: bytes[offset..<offset + count]) }
    case .chunks(let grid, let filters, let chunks):
      for (number, runs) in grid.runs(in: offset..<offset + count) {
        let content = try content(of: chunks[number], grid, filters, tensor, position)
        // Pointers, because there may be thousands of short runs; the grid's runs lie within
        // the chunk and the range.
        buffer.withUnsafeMutableBytes { buffer in
          content.withUnsafeBytes { content in
            for run in runs {
              (buffer.baseAddress! + run.startInRange).copyMemory(
                from: content.baseAddress! + run.startInChunk, byteCount: run.count)
            }
          }
        }
      }
    }
  }

  private func content(
    of chunk: HDF5.Chunk, _ grid: ChunkGrid, _ filters: [HDF5.Filter], _ tensor: TensorInfo,
    _ position: Int
  ) throws(CheckpointError) -> [UInt8] {
    let key = RecentChunks.Key(tensor: position, chunk: chunk.number)
    if let content = recent.withLock({ $0[key] }) { return content }
    let stored = try file.bytes(at: chunk.offset, count: chunk.byteCount)
    let content: [UInt8]
    do {
      content = try filters.undo(
        stored, skipping: chunk.skippedFilters, byteCount: grid.chunkByteCount)
    } catch { throw error.of(tensor.name).error(file: path) }
    recent.withLock { $0.keep(content, as: key) }
    return content
  }
}

/// The chunks decoded last: neighbouring pieces of a tensor often share one.
private struct RecentChunks {
  struct Key: Hashable {
    let tensor: Int
    let chunk: Int
  }

  /// How many bytes are kept.
  private static let capacity = 16 << 20
  private var contents: [Key: [UInt8]] = [:]
  private var order: [Key] = []
  private var byteCount = 0

  subscript(key: Key) -> [UInt8]? { contents[key] }

  mutating func keep(_ content: [UInt8], as key: Key) {
    guard content.count <= RecentChunks.capacity, contents[key] == nil else { return }
    while byteCount + content.count > RecentChunks.capacity {
      byteCount -= contents.removeValue(forKey: order.removeFirst())!.count
    }
    contents[key] = content
    order.append(key)
    byteCount += content.count
  }
}
