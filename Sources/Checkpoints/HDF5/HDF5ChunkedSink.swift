internal import CHDF5
import Synchronization

/// Writes the larger tensors of an HDF5 file as compressed chunks.
///
/// Chunks are compressed by the threads that write, and stored in the tensors' order.
final class HDF5ChunkedSink: TensorSink {
  let manifest: Manifest
  private let pending: PendingFile
  private let compression: HDF5.Compression
  private let file: File
  private let datasets: ChunkedDatasets
  private let places: [Place]
  private let queue: ChunkQueue
  private let unfinished = Mutex<[Int: UnfinishedChunk]>([:])
  private let idle = Mutex<[ChunkCompressor]>([])
  private let remaining: Atomic<Int>
  private let rows: HDF5.ChecksumRows?
  private let recorder: ChecksumRecorder?
  private let isComplete = Atomic(false)

  private enum Place {
    case range(from: Int)
    /// The first chunk has this number among those of all tensors.
    case chunks(ChunkGrid, from: Int)
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
    var chunks: [ChunkKey] = []
    places = zip(manifest.tensors.indices, offsets).map { position, offset in
      if let offset { return .range(from: offset) }
      let grid = HDF5.grid(of: manifest.tensors[position])
      defer { chunks += (0..<grid.count).map { ChunkKey(tensor: position, chunk: $0) } }
      return .chunks(grid, from: chunks.count)
    }
    remaining = Atomic(manifest.byteCount)
    let datasets: ChunkedDatasets
    do { datasets = try ChunkedDatasets(pending.temporaryPath, manifest.tensors, paths) } catch {
      throw error.error(file: pending.destination)
    }
    self.datasets = datasets
    let flushing = pending.isSynced ? Flushing(try pending.open()) : nil
    queue = ChunkQueue(besides: pending.temporaryPath) {
      [chunks] (number, chunk) throws(CheckpointError) in
      let key = chunks[number]
      do throws(HDF5Failure) {
        try datasets.write(chunk.bytes, skipping: chunk.skippedFilters, key)
      } catch {
        throw error.of(manifest.tensors[key.tensor].name).error(file: pending.destination)
      }
      flushing?.note(chunk.count)
    }
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    precondition(offset >= 0 && offset + bytes.byteCount <= tensor.byteCount)
    let position = manifest.position(of: tensor.name)!
    do {
      switch places[position] {
      case .range(let start): try file.write(bytes, at: start + offset)
      case .chunks(let grid, let first):
        let width = tensor.dtype.hdf5StorageType.bitWidth / 8
        for (number, runs) in grid.runs(in: offset..<offset + bytes.byteCount) {
          // Our chunks are whole rows or a part of one: each has one run.
          let run = runs[0]
          let part = bytes.extracting(run.startInRange..<run.startInRange + run.count)
          try write(
            part, at: run.startInChunk, of: first + number, used: grid.usedByteCount(of: number),
            grid.chunkByteCount, width: width)
        }
      }
    } catch {
      throw CheckpointError(
        file: pending.destination, tensor: error.tensor ?? tensor.name, error.problem,
        remedy: error.remedy)
    }
    recorder?.add(bytes, ofTensorAt: position, from: offset)
    remaining.wrappingSubtract(bytes.byteCount, ordering: .relaxed)
  }

  /// Stores a chunk that is complete; what is not waits for its other parts.
  /// - Parameters:
  ///   - used: how many bytes of the chunk belong to the tensor.
  ///   - byteCount: how many bytes every chunk of the tensor has.
  private func write(
    _ part: RawSpan, at start: Int, of number: Int, used: Int, _ byteCount: Int, width: Int
  ) throws(CheckpointError) {
    func store(_ content: UnsafeRawBufferPointer) -> Result<Void, CheckpointError> {
      let compressor = idle.withLock { $0.popLast() } ?? ChunkCompressor(compression)
      let chunk = compressor.compress(
        content, byteCount: byteCount, width: width,
        into: queue.memory(ChunkCompressor.room(for: byteCount)))
      idle.withLock { $0.append(compressor) }
      return Result { () throws(CheckpointError) in try queue.put(number, chunk) }
    }
    if part.byteCount == used { return try part.withUnsafeBytes { store($0) }.get() }
    let memory = unfinished.withLock { unfinished in
      if let begun = unfinished[number] { return begun.memory }
      let memory = queue.memory(ChunkCompressor.room(for: byteCount))
      unfinished[number] = UnfinishedChunk(memory: memory, missing: used)
      return memory
    }
    // Without the lock: every byte is written by one thread.
    part.withUnsafeBytes { memory.part(start..<start + $0.count).copyMemory(from: $0) }
    let isComplete = unfinished.withLock { unfinished in
      unfinished[number]!.missing -= part.byteCount
      guard unfinished[number]!.missing == 0 else { return false }
      unfinished[number] = nil
      return true
    }
    guard isComplete else { return }
    defer { queue.giveBack(memory) }
    try store(memory.first(used)).get()
  }

  func complete() throws(CheckpointError) {
    guard !isComplete.load(ordering: .relaxed) else { return }
    precondition(remaining.load(ordering: .relaxed) == 0, "a tensor was not wholly written")
    do { try datasets.close() } catch { throw error.error(file: pending.destination) }
    do throws(CheckpointError) {
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
    } catch { throw error.moved(to: pending.destination) }
    try pending.complete()
    try pending.prove(manifest) { (path) throws(CheckpointError) in try HDF5.openOwn(path) }
    isComplete.store(true, ordering: .relaxed)
  }

  func finish() throws(CheckpointError) {
    try complete()
    try pending.commit()
  }
}

private struct ChunkKey {
  let tensor: Int
  let chunk: Int
}

/// A chunk of which some bytes are still to come.
private struct UnfinishedChunk {
  let memory: PinnedBytes
  var missing: Int
}

/// Starts writing a growing file to the disk as it grows, so that little is left to do at the end.
private final class Flushing: @unchecked Sendable {  // Sound: used by who stores chunks.
  private let file: File
  private var pending = 0
  private var flushed = 0
  private let behind = WriteBehind()

  init(_ file: consuming File) { self.file = file }

  /// Takes note of so many bytes that were added.
  func note(_ count: Int) {
    pending += count
    // If the size cannot be asked for, the file is flushed at the end.
    guard pending >= 4 << 20, let size = try? file.size() else { return }
    behind.add(flushed..<size, of: file)
    flushed = size
    pending = 0
  }
}

/// The datasets of an open file that are being filled with chunks.
private final class ChunkedDatasets: @unchecked Sendable {
  // Sound: what varies is touched with the library's lock held.
  private var file: HDF5Handle?
  private let fileID: hid_t
  /// The dataset that is being filled; chunks come in the order of the tensors.
  private var dataset: HDF5Handle?
  private var datasetID = hid_t(-1)
  private var openTensor: Int?
  private let tensors: [TensorInfo]
  private let paths: [String]

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

  /// Stores one of a tensor's chunks.
  func write(_ bytes: UnsafeRawBufferPointer, skipping skipped: UInt32, _ key: ChunkKey)
    throws(HDF5Failure)
  {
    try HDF5Library.withLock { () throws(HDF5Failure) in
      if openTensor != key.tensor { try open(key.tensor) }
      let corner = HDF5.corner(ofChunk: key.chunk, of: tensors[key.tensor]).map { hsize_t($0) }
      try HDF5Library.check(
        H5Dwrite_chunk(
          datasetID, hid_t(H5P_DEFAULT), skipped, corner, bytes.count, bytes.baseAddress))
    }
  }

  private func open(_ tensor: Int) throws(HDF5Failure) {
    let handle = try HDF5Handle(H5Dopen2(fileID, paths[tensor], hid_t(H5P_DEFAULT)))
    datasetID = handle.id
    openTensor = tensor
    dataset = consume handle
  }

  func close() throws(HDF5Failure) {
    try HDF5Library.withLock { () throws(HDF5Failure) in
      if let dataset = dataset.take() { try dataset.close() }
      if let file = file.take() { try file.close() }
    }
  }
}
