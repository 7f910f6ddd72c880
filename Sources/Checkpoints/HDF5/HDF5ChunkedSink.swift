internal import CHDF5
import Synchronization

/// Writes the larger tensors of an HDF5 file as compressed chunks.
///
/// Chunks are compressed by the threads that write, and stored in the order they are done: the
/// same tensors give files that read the same but need not be the same.
final class HDF5ChunkedSink: TensorSink {
  let manifest: Manifest
  private let pending: PendingFile
  private let compression: HDF5.Compression
  private let file: File
  private let datasets: ChunkedDatasets
  private let places: [Place]
  private let unfinished = Mutex<[ChunkKey: UnfinishedChunk]>([:])
  private let idle = Mutex<[ChunkCompressor]>([])
  private let remaining: Atomic<Int>
  private let rows: HDF5.ChecksumRows?
  private let recorder: ChecksumRecorder?
  private let isComplete = Atomic(false)

  private enum Place {
    case range(from: Int)
    case chunks(ChunkGrid)
  }

  /// Takes over a pending file that is laid out.
  /// - Parameter offsets: where tensors begin that are not chunked.
  init(
    _ pending: PendingFile, _ manifest: Manifest, _ compression: HDF5.Compression,
    _ paths: [String], offsets: [Int?], _ rows: HDF5.ChecksumRows?
  ) throws(CheckpointError) {
    self.rows = rows
    recorder = rows.flatMap { TensorChecksum.Algorithm(rawValue: $0.algorithm) }
      .map { ChecksumRecorder(manifest.tensors, $0) }
    self.pending = pending
    self.manifest = manifest
    self.compression = compression
    file = try pending.open()
    places = zip(manifest.tensors, offsets).map { tensor, offset in
      offset.map { .range(from: $0) } ?? .chunks(HDF5.grid(of: tensor))
    }
    remaining = Atomic(manifest.byteCount)
    do { datasets = try ChunkedDatasets(pending.temporaryPath, manifest.tensors, paths) } catch {
      throw error.error(file: pending.destination)
    }
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    precondition(offset >= 0 && offset + bytes.byteCount <= tensor.byteCount)
    let position = manifest.position(of: tensor.name)!
    do {
      switch places[position] {
      case .range(let start): try file.write(bytes, at: start + offset)
      case .chunks(let grid):
        for (number, runs) in grid.runs(in: offset..<offset + bytes.byteCount) {
          // Our chunks are whole rows or a part of one: each has one run.
          let run = runs[0]
          let part = bytes.extracting(run.startInRange..<run.startInRange + run.count)
          try write(part, at: run.startInChunk, of: ChunkKey(tensor: position, chunk: number), grid)
        }
      }
    } catch {
      throw CheckpointError(
        file: pending.destination, tensor: tensor.name, error.problem, remedy: error.remedy)
    }
    recorder?.add(bytes, ofTensorAt: position, from: offset)
    remaining.wrappingSubtract(bytes.byteCount, ordering: .relaxed)
  }

  /// Stores a chunk that is complete; what is not waits for its other parts.
  private func write(_ part: RawSpan, at start: Int, of key: ChunkKey, _ grid: ChunkGrid)
    throws(CheckpointError)
  {
    let used = grid.usedByteCount(of: key.chunk)
    if part.byteCount == used { return try store(part, key, grid) }
    let complete: [UInt8]? = unfinished.withLock { unfinished in
      var chunk = unfinished.removeValue(forKey: key) ?? UnfinishedChunk(byteCount: used)
      chunk.add(part, at: start)
      if chunk.missing == 0 { return chunk.content }
      unfinished[key] = chunk
      return nil
    }
    if let complete { try store(complete.span.bytes, key, grid) }
  }

  private func store(_ content: RawSpan, _ key: ChunkKey, _ grid: ChunkGrid)
    throws(CheckpointError)
  {
    let compressor = idle.withLock { $0.popLast() } ?? ChunkCompressor(compression)
    defer { idle.withLock { $0.append(compressor) } }
    let width = manifest.tensors[key.tensor].dtype.hdf5StorageType.bitWidth / 8
    let result = content.withUnsafeBytes { content in
      let chunk = compressor.compress(content, byteCount: grid.chunkByteCount, width: width)
      return Result { () throws(HDF5Failure) in
        try datasets.write(chunk.bytes, skipping: chunk.skippedFilters, key, of: grid.count)
      }
    }
    do { try result.get() } catch { throw error.error(file: pending.destination) }
  }

  func complete() throws(CheckpointError) {
    guard !isComplete.load(ordering: .relaxed) else { return }
    precondition(remaining.load(ordering: .relaxed) == 0, "a tensor was not wholly written")
    do { try datasets.close() } catch { throw error.error(file: pending.destination) }
    if let recorder {
      // Opened only if some block came in pieces out of order.
      var written: (any TensorSource)?
      let checksums = try recorder.finish {
        (tensor, offset, buffer) throws(CheckpointError) in
        if written == nil { written = try HDF5.open(pending.temporaryPath) }
        try written!.read(tensor, at: offset, into: &buffer)
      }
      try rows?.write(checksums, of: manifest, to: file)
    }
    try pending.complete()
    try pending.prove(manifest) { (path) throws(CheckpointError) in try HDF5.openOwn(path) }
    isComplete.store(true, ordering: .relaxed)
  }

  func finish() throws(CheckpointError) {
    try complete()
    try pending.commit()
  }
}

private struct ChunkKey: Hashable {
  let tensor: Int
  let chunk: Int
}

/// A chunk of which some bytes are still to come.
private struct UnfinishedChunk {
  private(set) var content: [UInt8]
  private(set) var missing: Int

  init(byteCount: Int) {
    content = [UInt8](repeating: 0, count: byteCount)
    missing = byteCount
  }

  mutating func add(_ part: RawSpan, at start: Int) {
    part.withUnsafeBytes { content.replaceSubrange(start..<start + $0.count, with: $0) }
    missing -= part.byteCount
  }
}

/// The datasets of an open file that are being filled with chunks.
private final class ChunkedDatasets: @unchecked Sendable {
  // Sound: what varies is touched with the library's lock held.
  private var file: HDF5Handle?
  private let fileID: hid_t
  private var open: [Int: Dataset] = [:]
  private let tensors: [TensorInfo]
  private let paths: [String]

  private final class Dataset {
    let handle: HDF5Handle
    var missing: Int

    init(_ handle: consuming HDF5Handle, missing: Int) {
      self.handle = handle
      self.missing = missing
    }
  }

  init(_ file: String, _ tensors: [TensorInfo], _ paths: [String]) throws(HDF5Failure) {
    self.tensors = tensors
    self.paths = paths
    let handle = try HDF5Library.withLock { () throws(HDF5Failure) in
      let access = try HDF5Writer.access()
      return try HDF5Handle(H5Fopen(file, smelt_h5_read_write(), access.id))
    }
    fileID = handle.id
    self.file = consume handle
  }

  deinit { HDF5Library.withLock { open = [:] } }

  /// Stores one of a tensor's `count` chunks.
  func write(
    _ bytes: UnsafeRawBufferPointer, skipping skipped: UInt32, _ key: ChunkKey, of count: Int
  ) throws(HDF5Failure) {
    try HDF5Library.withLock { () throws(HDF5Failure) in
      let dataset = try dataset(key.tensor, chunkCount: count)
      let corner = HDF5.corner(ofChunk: key.chunk, of: tensors[key.tensor]).map { hsize_t($0) }
      try HDF5Library.check(
        H5Dwrite_chunk(
          dataset.handle.id, hid_t(H5P_DEFAULT), skipped, corner, bytes.count, bytes.baseAddress))
      dataset.missing -= 1
      // The last one closes it, so that few are open however many tensors there are.
      open[key.tensor] = dataset.missing == 0 ? nil : dataset
    }
  }

  private func dataset(_ tensor: Int, chunkCount: Int) throws(HDF5Failure) -> Dataset {
    if let dataset = open[tensor] { return dataset }
    let handle = try HDF5Handle(H5Dopen2(fileID, paths[tensor], hid_t(H5P_DEFAULT)))
    return Dataset(handle, missing: chunkCount)
  }

  func close() throws(HDF5Failure) {
    try HDF5Library.withLock { () throws(HDF5Failure) in
      if let file = file.take() { try file.close() }
    }
  }
}
