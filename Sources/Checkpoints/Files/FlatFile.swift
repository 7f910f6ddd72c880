import Synchronization

/// Tensors that are byte ranges of one file: the reading side of safetensors and of
/// contiguous HDF5.
final class FlatSource: TensorSource {
  let path: String
  let manifest: Manifest
  /// Where each tensor of the manifest begins in the file.
  private let offsets: [Int]
  private let file: MappedFile
  /// The checksums of the manifest's tensors, if the file records them.
  private let checksums: TensorChecksums?
  let warnings: [String]
  let foreignChecksums: [String]
  /// `nil` if the file is small or was in memory before it was opened: there it stays.
  private let behind: ReadBehind?

  /// - Parameter hasForeignChecksums: whether the file records checksums, but of other tensors.
  /// - Precondition: every tensor lies within the file; the format has checked it.
  init(
    _ file: MappedFile, _ manifest: Manifest, offsets: [Int], checksums: TensorChecksums? = nil,
    hasForeignChecksums: Bool = false, warnings: [String] = []
  ) {
    foreignChecksums = hasForeignChecksums ? [file.path] : []
    self.warnings = warnings + foreignChecksums.map { warning(ofForeignChecksumsIn: $0) }
    precondition(offsets.count == manifest.tensors.count)
    precondition(checksums.map { $0.count == offsets.count } ?? true)
    self.checksums = checksums
    self.path = file.path
    self.manifest = manifest
    self.offsets = offsets
    self.file = file
    behind =
      file.size < 64 << 20 || file.isCached
      ? nil
      : ReadBehind(of: zip(manifest.tensors, offsets).map { $1..<$1 + $0.byteCount })
  }

  func forget(_ bytes: Range<Int>, of tensor: TensorInfo) {
    guard let behind else { return }
    let start = offsets[manifest.position(of: tensor.name)!]
    behind.forget(start + bytes.lowerBound..<start + bytes.upperBound, of: file)
  }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    precondition(offset >= 0 && offset + buffer.byteCount <= tensor.byteCount)
    try file.read(at: offsets[manifest.position(of: tensor.name)!] + offset, into: &buffer)
  }

  func checkUnchanged() throws(CheckpointError) { try file.checkUnchanged() }

  func recordedChecksum(of tensor: TensorInfo) -> TensorChecksum? {
    checksums?[manifest.position(of: tensor.name)!]
  }
}

/// Tensors that become byte ranges of one file, whose layout is known before the data: pieces
/// go to their final place in any order.
final class FlatSink: TensorSink {
  /// Puts the checksums of the manifest's tensors into the finished file.
  typealias Seal = @Sendable (borrowing File, TensorChecksums) throws(CheckpointError) -> Void

  /// The reader of the file's format.
  typealias Open = @Sendable (String) throws(CheckpointError) -> any TensorSource

  let manifest: Manifest
  let warnings: [String]
  private let offsets: [Int]
  private let pending: PendingFile
  private let file: File
  private let remaining: Atomic<Int>
  private let recorder: ChecksumRecorder?
  /// `nil` if flushing is left to the system.
  private let behind: WriteBehind?
  private let seal: Seal
  private let open: Open
  private let isComplete = Atomic(false)

  /// Takes over a pending file whose header is already written.
  /// - Parameters:
  ///   - checksums: what to hash the tensors with on their way, for `seal`.
  ///   - open: the format's reader, to prove the file before it is moved to its place.
  init(
    _ pending: PendingFile, _ manifest: Manifest, offsets: [Int],
    checksums: TensorChecksum.Algorithm? = nil, warnings: [String] = [], open: @escaping Open,
    seal: @escaping Seal = { (_, _) throws(CheckpointError) in }
  ) throws(CheckpointError) {
    self.pending = pending
    self.manifest = manifest
    self.warnings = warnings
    self.offsets = offsets
    self.file = try pending.open()
    behind =
      pending.isSynced
      ? WriteBehind(of: zip(manifest.tensors, offsets).lazy.map { $1..<$1 + $0.byteCount }) : nil
    self.remaining = Atomic(manifest.byteCount)
    self.recorder = checksums.map { ChecksumRecorder(manifest.tensors, $0) }
    self.seal = seal
    self.open = open
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    precondition(offset >= 0 && offset + bytes.byteCount <= tensor.byteCount)
    let position = manifest.position(of: tensor.name)!
    let start = offsets[position] + offset
    do { try file.write(bytes, at: start) } catch {
      throw CheckpointError(
        file: pending.destination, tensor: tensor.name, error.problem, remedy: error.remedy)
    }
    behind?.add(start..<start + bytes.byteCount, of: file)
    recorder?.add(bytes, ofTensorAt: position, from: offset)
    remaining.wrappingSubtract(bytes.byteCount, ordering: .relaxed)
  }

  func complete() throws(CheckpointError) {
    guard !isComplete.load(ordering: .relaxed) else { return }
    precondition(remaining.load(ordering: .relaxed) == 0, "a tensor was not wholly written")
    do throws(CheckpointError) {
      if let recorder {
        let checksums = try recorder.finish {
          (tensor, offset, buffer) throws(CheckpointError) in
          try file.read(at: offsets[manifest.position(of: tensor.name)!] + offset, into: &buffer)
        }
        try seal(file, checksums)
      }
    } catch { throw error.moved(to: pending.destination) }
    try pending.complete()
    try pending.prove(manifest, opening: open)
    isComplete.store(true, ordering: .relaxed)
  }

  func finish() throws(CheckpointError) {
    try complete()
    try pending.commit()
  }
}
