import Synchronization

/// The tensors of a bundle, decoded as they are read.
///
/// A read decompresses the frames that it touches and no others. Their checksums are verified
/// each time; a whole tensor's checksum is verified by `verify` and `copy`.
public final class BundleSource: TensorSource {
  public let path: String
  public let manifest: Manifest
  private let file: BundleFile
  /// Where this source's tensors begin among the file's.
  private let first: Int

  /// Opens a bundle. The tensors of one that holds several models are named `MODEL/TENSOR`.
  ///
  /// - Parameter base: the model that the bundle's were packed against, if it is not inside.
  public convenience init(_ path: String, base: (any TensorSource)? = nil) throws(CheckpointError) {
    self.init(try BundleFile(path, base: base))
  }

  private init(_ file: BundleFile) {
    self.file = file
    path = file.path
    first = 0
    let models = file.models
    manifest =
      models.count == 1 && models[0].name.isEmpty
      ? models[0].manifest : Manifest(file.tensors.map { $0.tensor })
  }

  private init(_ file: BundleFile, model: BundleFile.Model) {
    self.file = file
    path = file.path
    first = model.first
    manifest = model.manifest
  }

  /// The names of the models; of a single checkpoint the empty name.
  public var models: [String] { file.models.map { $0.name } }

  /// One of the models alone, its tensors under their own names.
  public func model(_ name: String) throws(CheckpointError) -> BundleSource {
    guard let model = file.models.first(where: { ExactName($0.name) == ExactName(name) }) else {
      throw CheckpointError(
        file: path, "holds no model \(quoted(name))",
        remedy: "it holds \(models.map(quoted).joined(separator: ", "))")
    }
    return BundleSource(file, model: model)
  }

  /// How everything in the bundle is coded.
  var recipe: Bundle.Recipe { file.recipe }

  /// How many bytes of the file have been read since it was opened.
  public var bytesRead: Int { file.frames.bytesRead.load(ordering: .relaxed) }

  public func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    precondition(offset >= 0 && offset + buffer.byteCount <= tensor.byteCount)
    let index = first + manifest.position(of: tensor.name)!
    let file = file
    try buffer.withUnsafeMutableBytes { (bytes) throws(CheckpointError) in
      try file.read(index, at: offset, into: bytes)
    }
  }

  public func checkUnchanged() throws(CheckpointError) { try file.frames.checkUnchanged() }

  /// Decodes every tensor and compares it with its checksum.
  public func verify(workers: Int = 2) throws {
    try forEachVerifiedPiece(of: manifest.tensors, workers: workers) { _, _, _ in }
  }

  /// The first damaged tensor is an error: behind a wrong frame nothing can be told apart.
  public func verifyData(workers: Int) throws -> Verification {
    try verify(workers: workers)
    return Verification(damaged: [], checkedCount: manifest.tensors.count, unrecorded: [])
  }

  /// Writes tensors of `sink`, verified.
  ///
  /// - Throws: before the sink has been finished, if a tensor does not have its checksum.
  public func copy(_ tensors: [TensorInfo], into sink: any TensorSink, workers: Int) throws {
    try forEachVerifiedPiece(of: tensors, workers: workers) { (tensor, offset, bytes) in
      try sink.write(bytes, of: tensor, at: offset)
    }
    try checkUnchanged()
  }

  private func forEachVerifiedPiece(
    of tensors: [TensorInfo], workers: Int,
    _ body: @Sendable (TensorInfo, Int, RawSpan) throws -> Void
  ) throws {
    for tensor in tensors { _ = try self.tensor(tensor.name) }
    let pieces = Pieces(of: tensors, size: 4 << 20)
    let turnstile = Turnstile()
    // Touched only in the turnstile, by one thread at a time and in order.
    let running = RunningChecksum()
    try forEachStep(count: pieces.count, workers: workers) {
      Buffer(byteCount: pieces.largest)
    } body: { step, buffer in
      do {
        let (tensor, range) = pieces[step]
        var piece = buffer.first(range.count)
        try read(self.tensor(tensor.name), at: range.lowerBound, into: &piece)
        let bytes = piece.bytes
        try body(tensor, range.lowerBound, bytes)
        try turnstile.pass(step) {
          let value = running.update(bytes, isFirst: range.lowerBound == 0)
          guard range.upperBound == tensor.byteCount else { return }
          let index = first + manifest.position(of: tensor.name)!
          guard value == file.tensors[index].checksum else {
            throw CheckpointError(
              file: path, tensor: tensor.name, "does not have the checksum that was recorded",
              remedy: "the bundle is damaged: get it again")
          }
        }
      } catch {
        turnstile.close()
        throw error
      }
    }
  }
}

/// The checksum of the tensor that is being read in order.
private final class RunningChecksum: @unchecked Sendable {
  private var checksum = Checksum()

  /// The checksum of the tensor's bytes up to and with these.
  func update(_ bytes: RawSpan, isFirst: Bool) -> UInt64 {
    if isFirst { checksum = Checksum() }
    checksum.update(bytes)
    return checksum.value
  }
}
