import Synchronization

/// Tensors of an HDF5 file of which some are stored in chunks.
final class HDF5Source: TensorSource {
  let path: String
  private let contents: HDF5.Contents
  private let file: File
  private let stamp: FileStamp
  private let recent: Mutex<DecodedChunks>
  private let idle = Mutex<[ChunkDecoder]>([])

  init(_ path: String, _ contents: HDF5.Contents) throws(CheckpointError) {
    self.path = path
    self.contents = contents
    self.file = try File(reading: path)
    self.stamp = try FileStamp(file)
    recent = Mutex(DecodedChunks(of: path))
  }

  var manifest: Manifest { contents.manifest }
  var foreignChecksums: [String] { contents.hasForeignChecksums ? [path] : [] }

  var warnings: [String] {
    contents.warnings + foreignChecksums.map { warning(ofForeignChecksumsIn: $0) }
  }

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
    case .fill(let element): fill(&buffer, with: element, from: offset)
    case .chunks(let grid, let filters, let chunks, let element):
      let decoder = idle.withLock { $0.popLast() } ?? ChunkDecoder()
      defer { idle.withLock { $0.append(decoder) } }
      if chunks.count < grid.count { fill(&buffer, with: element, from: offset) }
      for (number, runs) in grid.runs(in: offset..<offset + count) {
        guard let chunk = chunks.first(numbered: number) else { continue }
        do {
          let key = DecodedChunks.Key(tensor: position, chunk: number)
          let isKept = try recent.withLock { (recent) throws(CheckpointError) in
            try recent.copy(runs, of: key, into: &buffer)
          }
          if isKept { continue }
          let content = try decoder.content(
            of: chunk, in: file, filters, byteCount: grid.chunkByteCount)
          runs.copy(from: content, into: &buffer)
          // A neighbouring range will want the rest.
          let missing = grid.usedByteCount(of: number) - runs.reduce(0) { $0 + $1.count }
          guard missing > 0 else { continue }
          try recent.withLock { (recent) throws(CheckpointError) in
            try recent.keep(content, as: key, missing: missing)
          }
        } catch {
          throw CheckpointError(
            file: path, tensor: tensor.name, error.problem, remedy: error.remedy)
        }
      }
    }
  }

  /// Fills the buffer, which begins at byte `offset` of the tensor, with an element's bytes.
  private func fill(_ buffer: inout MutableRawSpan, with element: [UInt8], from offset: Int) {
    buffer.withUnsafeMutableBytes { bytes in
      guard element.contains(where: { $0 != 0 }) else {
        _ = bytes.initializeMemory(as: UInt8.self, repeating: 0)
        return
      }
      for i in bytes.indices { bytes[i] = element[(offset + i) % element.count] }
    }
  }
}

extension [HDF5.Chunk] {
  /// The chunk of this number: they are in order.
  fileprivate func first(numbered number: Int) -> HDF5.Chunk? {
    let index = partitioningIndex { $0.number >= number }
    return index < count && self[index].number == number ? self[index] : nil
  }
}
