import Synchronization

/// Tensors that are byte ranges of one file: the reading side of safetensors and of
/// contiguous HDF5.
final class FlatSource: TensorSource {
  let path: String
  let manifest: Manifest
  /// Where each tensor of the manifest begins in the file.
  private let offsets: [Int]
  private let file: MappedFile

  /// - Precondition: every tensor lies within the file; the format has checked it.
  init(_ file: MappedFile, _ manifest: Manifest, offsets: [Int]) {
    precondition(offsets.count == manifest.tensors.count)
    self.path = file.path
    self.manifest = manifest
    self.offsets = offsets
    self.file = file
  }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    precondition(offset >= 0 && offset + buffer.byteCount <= tensor.byteCount)
    try file.read(at: offsets[manifest.position(of: tensor.name)!] + offset, into: &buffer)
  }
}

/// Tensors that become byte ranges of one file, whose layout is known before the data: pieces
/// go to their final place in any order.
final class FlatSink: TensorSink {
  let manifest: Manifest
  private let offsets: [Int]
  private let pending: PendingFile
  private let file: File
  private let remaining: Atomic<Int>

  /// Takes over a pending file whose header is already written.
  init(_ pending: PendingFile, _ manifest: Manifest, offsets: [Int]) throws(CheckpointError) {
    self.pending = pending
    self.manifest = manifest
    self.offsets = offsets
    self.file = try pending.open()
    self.remaining = Atomic(manifest.byteCount)
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    precondition(offset >= 0 && offset + bytes.byteCount <= tensor.byteCount)
    let start = offsets[manifest.position(of: tensor.name)!] + offset
    do { try file.write(bytes, at: start) } catch {
      throw CheckpointError(
        file: pending.destination, tensor: tensor.name, error.problem, remedy: error.remedy)
    }
    // Flushing as we go keeps dirty pages few; the fsync at the end then has little to do.
    file.startFlush(at: start, count: bytes.byteCount)
    remaining.wrappingSubtract(bytes.byteCount, ordering: .relaxed)
  }

  func finish() throws(CheckpointError) {
    precondition(remaining.load(ordering: .relaxed) == 0, "a tensor was not wholly written")
    try pending.commit()
  }
}
