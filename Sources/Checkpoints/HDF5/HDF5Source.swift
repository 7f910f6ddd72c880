import Synchronization

/// Tensors of an HDF5 file of which some are stored in chunks.
final class HDF5Source: TensorSource {
  let path: String
  private let contents: HDF5.Contents
  private let file: File
  private let stamp: FileStamp
  private let recent = Mutex(RecentChunks())
  private let idle = Mutex<[ChunkDecoder]>([])

  init(_ path: String, _ contents: HDF5.Contents) throws(CheckpointError) {
    self.path = path
    self.contents = contents
    self.file = try File(reading: path)
    self.stamp = try FileStamp(file)
  }

  var manifest: Manifest { contents.manifest }

  func checkUnchanged() throws(CheckpointError) { try file.checkUnchanged(since: stamp) }

  func recordedChecksum(of tensor: TensorInfo) -> TensorChecksum? {
    contents.checksums?[manifest.position(of: tensor.name)!]
  }

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
      let decoder = idle.withLock { $0.popLast() } ?? ChunkDecoder()
      defer { idle.withLock { $0.append(decoder) } }
      for (number, runs) in grid.runs(in: offset..<offset + count) {
        let key = RecentChunks.Key(tensor: position, chunk: number)
        if let content = recent.withLock({ $0[key] }) {
          content.withUnsafeBytes { copy(runs, from: $0, into: &buffer) }
          continue
        }
        let content: UnsafeRawBufferPointer
        do {
          content = try decoder.content(
            of: chunks[number], in: file, filters, byteCount: grid.chunkByteCount)
        } catch {
          throw CheckpointError(
            file: path, tensor: tensor.name, error.problem, remedy: error.remedy)
        }
        copy(runs, from: content, into: &buffer)
        // A neighbouring range will want the rest.
        if runs.reduce(0, { $0 + $1.count }) < grid.usedByteCount(of: number) {
          recent.withLock { $0.keep(content, as: key) }
        }
      }
    }
  }

  private func copy(
    _ runs: [ChunkGrid.Run], from content: UnsafeRawBufferPointer,
    into buffer: inout MutableRawSpan
  ) {
    // Pointers, because there may be thousands of short runs; the grid's runs lie within the
    // chunk and the range.
    buffer.withUnsafeMutableBytes { buffer in
      for run in runs {
        (buffer.baseAddress! + run.startInRange).copyMemory(
          from: content.baseAddress! + run.startInChunk, byteCount: run.count)
      }
    }
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

  mutating func keep(_ content: UnsafeRawBufferPointer, as key: Key) {
    guard content.count <= RecentChunks.capacity, contents[key] == nil else { return }
    while byteCount + content.count > RecentChunks.capacity {
      byteCount -= contents.removeValue(forKey: order.removeFirst())!.count
    }
    contents[key] = Array(content)
    order.append(key)
    byteCount += content.count
  }
}
