import Synchronization

/// The tensors of a bundle, decoded as they are read.
///
/// A read decompresses the frames that it touches and no others. Their checksums are verified
/// each time; a whole tensor's checksum is verified by `verify` and `copy`.
public final class BundleSource: TensorSource {
  public let path: String
  public let manifest: Manifest
  private let file: BundleFile
  /// Where each of this source's tensors is among the file's.
  private let positions: [Int]
  /// Whether it is one model alone, under its tensors' own names.
  private let isModel: Bool

  /// Opens a bundle. The tensors of one that holds several models are named `MODEL/TENSOR`.
  ///
  /// - Parameter base: the model that the bundle's were packed against, if it is not inside.
  public convenience init(_ path: String, base: (any TensorSource)? = nil) throws(CheckpointError) {
    self.init(try BundleFile(path, base: base))
  }

  private init(_ file: BundleFile) {
    self.file = file
    isModel = false
    path = file.path
    positions = Array(file.tensors.indices)
    let models = file.models
    manifest =
      models.count == 1 && models[0].name.isEmpty
      ? models[0].manifest : Manifest(file.tensors.map { $0.tensor })
  }

  private init(
    _ file: BundleFile, _ manifest: Manifest, _ positions: [Int], isModel: Bool = false
  ) {
    self.file = file
    self.isModel = isModel
    path = file.path
    self.positions = positions
    self.manifest = manifest
  }

  /// If this is all of a bundle that has named models: these, each with its name.
  public var family: [(name: String, source: BundleSource)]? {
    let names = models
    guard names != [""], positions.count == file.tensors.count, !isModel else { return nil }
    return names.map { ($0, try! model($0)) }
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
    let count = model.manifest.tensors.count
    return BundleSource(
      file, model.manifest, Array(model.first..<model.first + count), isModel: true)
  }

  /// The tensors for which `isIncluded` is true.
  public func selecting(_ isIncluded: (TensorInfo) -> Bool) -> BundleSource {
    let chosen = manifest.tensors.indices.filter { isIncluded(manifest.tensors[$0]) }
    guard chosen.count < positions.count else { return self }
    return BundleSource(
      file, Manifest(chosen.map { manifest.tensors[$0] }, metadata: manifest.metadata),
      chosen.map { positions[$0] })
  }

  /// Where one of its tensors is among the file's.
  private func position(of tensor: TensorInfo) -> Int {
    positions[manifest.position(of: tensor.name)!]
  }

  /// The name of the codec by which a tensor is kept, as FORMAT.md has it.
  public func codec(of tensor: TensorInfo) -> String {
    file.tensors[position(of: tensor)].codec.rawValue
  }

  /// What a lossy codec has lost of a tensor, as the recipe says it: the root mean square of the
  /// errors over that of the elements. Nil for a tensor that is kept exactly.
  public func error(of tensor: TensorInfo) -> Double? {
    file.tensors[position(of: tensor)].error
  }

  /// How everything in the bundle is coded.
  var recipe: Bundle.Recipe { file.recipe }

  /// How many bytes of the file have been read since it was opened.
  public var bytesRead: Int { file.frames.bytesRead.load(ordering: .relaxed) }

  public func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    precondition(offset >= 0 && offset + buffer.byteCount <= tensor.byteCount)
    let index = position(of: tensor)
    let file = file
    try buffer.withUnsafeMutableBytes { (bytes) throws(CheckpointError) in
      try file.read(index, at: offset, into: bytes)
    }
  }

  public func checkUnchanged() throws(CheckpointError) { try file.frames.checkUnchanged() }

  /// Compares all that these tensors need of the base with what the bundle was packed against.
  ///
  /// Reading a tensor does so too; this finds out before anything is done with another.
  public func proveBase(workers: Int) throws {
    try file.base.prove(for: file.withReferences(positions), workers: workers)
  }

  /// Bytes that a worker takes to decode and to hold a piece of a tensor.
  public var memoryPerWorker: Int {
    let blockSize = file.tensors.reduce(1 << 20) { max($0, $1.blockSize) }
    return BlockReader.memory(blockSize: blockSize) + Self.pieceSize
  }

  private static let pieceSize = 4 << 20

  /// Decodes every tensor and compares it with its checksum.
  public func verify(workers: Int = 2) throws {
    try forEachVerifiedPiece(of: manifest.tensors, workers: workers) { _, _, _ in
    } failed: { (tensor, _, error) throws(CheckpointError) in
      try refuse(tensor, error)
    }
  }

  /// A tensor whose frames, or those of what it is a difference from, are damaged cannot be read.
  public func verifyData(workers: Int) throws -> Verification {
    let failures = ReadingFailures()
    let damaged = Mutex<[TensorInfo]>([])
    try forEachVerifiedPiece(of: manifest.tensors, workers: workers) { _, _, _ in
    } failed: { (tensor, step, error) throws(CheckpointError) in
      guard let error else { return damaged.withLock { $0.append(tensor) } }
      guard error.tensor != nil else { throw error }
      failures.add(error, ofTensorAt: manifest.position(of: tensor.name)!, step: step)
    }
    try checkUnchanged()
    return Verification(
      manifest.tensors, damaged: damaged.withLock { $0 },
      unreadable: failures.unreadable(of: manifest.tensors))
  }

  /// Writes tensors of `sink`, verified.
  ///
  /// - Throws: before the sink has been finished, if a tensor does not have its checksum.
  public func copy(_ tensors: [TensorInfo], into sink: any TensorSink, workers: Int) throws {
    try forEachVerifiedPiece(of: tensors, workers: workers) { (tensor, offset, bytes) in
      try sink.write(bytes, of: tensor, at: offset)
    } failed: { (tensor, _, error) throws(CheckpointError) in
      try refuse(tensor, error)
    }
    try checkUnchanged()
  }

  /// - Parameters:
  ///   - body: is shown each piece, whatever the whole tensor's checksum is found to be.
  ///   - failed: decides what becomes of a tensor of which a piece cannot be read, in this step
  ///     and for this reason, or that does not have its checksum (nil): another one can still be
  ///     read if nothing is thrown.
  private func forEachVerifiedPiece(
    of tensors: [TensorInfo], workers: Int,
    _ body: @Sendable (TensorInfo, Int, RawSpan) throws -> Void,
    failed: @Sendable (TensorInfo, Int, CheckpointError?) throws(CheckpointError) -> Void
  ) throws {
    let wanted = try tensors.map { position(of: try tensor($0.name)) }
    try file.base.prove(for: file.withReferences(wanted), workers: workers)
    let pieces = Pieces(of: tensors, size: Self.pieceSize)
    let turnstile = Turnstile()
    // Touched only in the turnstile, by one thread at a time and in order.
    let running = RunningChecksum()
    try forEachStep(count: pieces.count, workers: workers) {
      Buffer(byteCount: pieces.largest)
    } body: { step, buffer in
      do {
        let (tensor, range) = pieces[step]
        let isFirst = range.lowerBound == 0
        var piece = buffer.first(range.count)
        do throws(CheckpointError) {
          try read(self.tensor(tensor.name), at: range.lowerBound, into: &piece)
        } catch {
          try failed(tensor, step, error)
          _ = turnstile.pass(step) { running.skip(isFirst: isFirst) }
          return
        }
        let bytes = piece.bytes
        try body(tensor, range.lowerBound, bytes)
        try turnstile.pass(step) {
          let value = running.update(bytes, isFirst: isFirst)
          guard range.upperBound == tensor.byteCount, let value else { return }
          if value != file.tensors[position(of: tensor)].checksum { try failed(tensor, step, nil) }
        }
      } catch {
        turnstile.close()
        throw error
      }
    }
  }

  /// - Throws: why a tensor is not what the bundle was made of.
  private func refuse(_ tensor: TensorInfo, _ error: CheckpointError?) throws(CheckpointError) {
    throw error
      ?? CheckpointError(
        file: path, tensor: tensor.name, "does not have the checksum that was recorded",
        remedy: "the bundle is damaged: get it again")
  }
}

/// The checksum of the tensor that is being read in order.
private final class RunningChecksum: @unchecked Sendable {
  private var checksum = Checksum()
  /// Whether a piece of the tensor was skipped.
  private var isCut = false

  /// The checksum of the tensor's bytes up to and with these; nil if some are missing.
  func update(_ bytes: RawSpan, isFirst: Bool) -> UInt64? {
    if isFirst { begin() }
    checksum.update(bytes)
    return isCut ? nil : checksum.value
  }

  /// Goes on without a piece.
  func skip(isFirst: Bool) {
    if isFirst { begin() }
    isCut = true
  }

  private func begin() {
    checksum = Checksum()
    isCut = false
  }
}
