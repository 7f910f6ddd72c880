/// Tensors that can be read, in any order and from several threads.
public protocol TensorSource: Sendable {
  /// The file or folder the tensors are in, as the user named it.
  var path: String { get }
  var manifest: Manifest { get }
  /// What is odd about the checkpoint though no reason to refuse it, a sentence each.
  var warnings: [String] { get }

  /// Fills `buffer` with the tensor's bytes from byte `offset` on.
  ///
  /// The bytes are the tensor's own: row-major, little-endian, whatever the file's coding.
  /// - Precondition: `tensor` is in `manifest` and the range lies within it.
  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)

  /// Says that some of a tensor's bytes will not be read again, and need no place in memory.
  func forget(_ bytes: Range<Int>, of tensor: TensorInfo)

  /// - Throws: if a file was written to since it was opened: what was read of it may be a
  ///   mixture.
  func checkUnchanged() throws(CheckpointError)

  /// Writes these tensors to the tensors of `sink` with the same names, byte for byte; a source
  /// that has checksums of whole tensors verifies them.
  func copy(_ tensors: [TensorInfo], into sink: any TensorSink, workers: Int) throws

  /// The checksum that was recorded when the tensor was written, if one was.
  func recordedChecksum(of tensor: TensorInfo) -> TensorChecksum?

  /// The files whose recorded checksums are of tensors of other names, types or shapes than theirs,
  /// and so are compared with nothing.
  var foreignChecksums: [String] { get }

  /// Compares what was recorded otherwise, such as the checksums of a zip file's entries, of
  /// tensors that have just been read.
  /// - Throws: which tensor is damaged.
  func refuseDamage(of tensors: [TensorInfo], workers: Int) throws

  /// Reads every tensor and compares it with what was recorded of it on writing.
  /// - Throws: what keeps from reading on; a tensor that cannot be read is part of the result.
  func verifyData(workers: Int) throws -> Verification
}

extension TensorSource {
  public var warnings: [String] { [] }

  public func forget(_ bytes: Range<Int>, of tensor: TensorInfo) {}

  public func checkUnchanged() throws(CheckpointError) {}

  public func recordedChecksum(of tensor: TensorInfo) -> TensorChecksum? { nil }

  public var foreignChecksums: [String] { [] }

  public func refuseDamage(of tensors: [TensorInfo], workers: Int) throws {}

  /// The tensor of this name, or an error that says it is missing.
  public func tensor(_ name: String) throws(CheckpointError) -> TensorInfo {
    guard let tensor = manifest[name] else {
      throw CheckpointError(file: path, tensor: name, "is missing")
    }
    return tensor
  }

  /// A whole tensor as `Float`, for the small ones that are needed at once.
  public func floats(of name: String) throws -> [Float] {
    let tensor = try tensor(name)
    guard tensor.dtype.isArithmetic else {
      throw CheckpointError(
        file: path, tensor: name, "is \(tensor.dtype.rawValue), not a floating-point type")
    }
    let bytes = try self.bytes(of: tensor)
    var values = [Float](repeating: 0, count: tensor.elementCount)
    var span = values.mutableSpan
    tensor.dtype.decode(bytes.span.bytes, into: &span)
    return values
  }

  /// A whole tensor of whole numbers, for the small ones that are needed at once.
  public func integers(of tensor: TensorInfo) throws -> [Int] {
    func load<Element: FixedWidthInteger>(_ type: Element.Type) throws -> [Int] {
      let bytes = try self.bytes(of: tensor)
      return try bytes.withUnsafeBytes { bytes in
        try (0..<tensor.elementCount).map { index in
          let value = bytes.loadUnaligned(
            fromByteOffset: index * MemoryLayout<Element>.size, as: Element.self)
          guard let integer = Int(exactly: Element(littleEndian: value)) else {
            throw CheckpointError(
              file: path, tensor: tensor.name, "has the value \(value), which is too large")
          }
          return integer
        }
      }
    }
    switch tensor.dtype {
    case .u8: return try load(UInt8.self)
    case .i8: return try load(Int8.self)
    case .u16: return try load(UInt16.self)
    case .i16: return try load(Int16.self)
    case .u32: return try load(UInt32.self)
    case .i32: return try load(Int32.self)
    case .u64: return try load(UInt64.self)
    case .i64: return try load(Int64.self)
    default:
      throw CheckpointError(
        file: path, tensor: tensor.name,
        "is \(tensor.dtype.rawValue), not a type of whole numbers")
    }
  }

  /// A whole tensor as it is stored, for the small ones that are needed at once.
  public func bytes(of tensor: TensorInfo) throws -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: tensor.byteCount)
    var span = bytes.mutableSpan
    var raw = span.mutableBytes
    try read(tensor, at: 0, into: &raw)
    return bytes
  }
}

/// Where tensors are written: in any order, in pieces, from several threads.
///
/// Nothing appears at the destination before `finish()`; a sink that is dropped leaves nothing.
public protocol TensorSink: Sendable {
  /// The tensors that will be written, fixed when the sink was made.
  var manifest: Manifest { get }
  /// What the output will lack though nothing is wrong, a sentence each.
  var warnings: [String] { get }

  /// Writes some of the tensor's bytes, from byte `offset` on. Each byte is written once.
  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError)

  /// Does all that can fail for want of room, short of moving the whole to its place: where
  /// several outputs belong together, complete all before the first is finished.
  func complete() throws(CheckpointError)

  /// Makes the whole durable, if that has not been done, and moves it to its place.
  func finish() throws(CheckpointError)
}

extension TensorSink {
  public var warnings: [String] { [] }
}

extension Checkpoint {
  /// Finishes outputs that belong together: if one cannot be completed, none appears.
  public static func finish(_ sinks: [any TensorSink]) throws(CheckpointError) {
    for sink in sinks { try sink.complete() }
    for sink in sinks { try sink.finish() }
  }
}

/// A way to keep tensors in files.
public protocol CheckpointFormat: SendableMetatype {
  /// The format's name as people write it.
  static var name: String { get }
  /// How its file names end, without the leading dot.
  static var fileExtensions: [String] { get }
  /// Whether a file that begins with these bytes (up to 16) is of this format.
  static func recognises(_ beginning: [UInt8]) -> Bool
  static func open(_ path: String) throws(CheckpointError) -> any TensorSource
  static func create(_ path: String, _ manifest: Manifest, _ options: WritingOptions)
    throws(CheckpointError) -> any TensorSink
  /// Writes everything a source holds; a format that wants to see the data before it lays the
  /// file out does it here.
  /// - Returns: the sink's warnings.
  @discardableResult
  static func write(
    _ source: any TensorSource, to path: String, _ options: WritingOptions, workers: Int
  ) throws -> [String]
}

/// How a checkpoint is written, beside what it holds. A format takes what concerns it.
public struct WritingOptions: Sendable {
  /// What is recorded of every tensor, to find damage later. If it is not said, that is the fast
  /// checksum, or what a safetensors header has that is kept as it is.
  public var checksums: TensorChecksum.Algorithm?
  /// Where HDF5's datasets go.
  public var layout: HDF5.Layout
  /// For HDF5 and numpy archives, which are otherwise not compressed.
  public var compression: HDF5.Compression?
  /// The most bytes of tensors in one file of a model's folder.
  public var shardSize = ModelFolder.defaultShardSize
  /// The model's folder, or a file in it, whose side files a new folder gets.
  public var sideFilesOf: String?
  /// Small files for a new folder, by name; they take the place of the original's.
  public var files: [String: [UInt8]] = [:]
  /// Whether a folder that is there may go, with all its files.
  public var isReplacing = false
  /// Whether the output is on the disk before it has its name. If not, the system writes it when
  /// it likes, as after `cp`: a machine that stops meanwhile can leave the name with less than all.
  public var isSynced = true
  /// Bytes that buffers may take where the data waits to be packed or is, and how many workers
  /// pack it: for bundles.
  public var memory = 1 << 30
  public var workers = 2

  public init(layout: HDF5.Layout = .flat, compression: HDF5.Compression? = nil) {
    self.layout = layout
    self.compression = compression
  }
}

extension WritingOptions {
  /// For formats whose checksums are what they are.
  func refuseSHA256(in path: String, whichRecords checksum: String) throws(CheckpointError) {
    guard checksums != .sha256 else {
      throw CheckpointError(
        file: path, "records \(checksum) of its own; --sha256 is for safetensors and HDF5")
    }
  }
}

/// The checkpoint formats that Smelt knows. A new one is a file and a line here.
public enum Checkpoint {
  public static let formats: [any CheckpointFormat.Type] = [
    Safetensors.self,
    HDF5.self,
    Bundle.self,
    NumPy.self,
    PyTorch.self,
  ]

  /// Opens a checkpoint, which may be a model's folder or the index of one, `BUNDLE/NAME`, one
  /// model of a bundle, or `BUNDLE@BASE` (`BUNDLE/NAME@BASE`), a bundle of differences and what it
  /// was packed against, itself any of these; the first bytes of any other file, not its name, say what it is.
  ///
  /// safetensors has no magic number, so whatever is nothing else is opened as safetensors,
  /// whose reader knows what the usual confusions look like and says so.
  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    if isFolder(path) { return try ModelFolder.open(path) }
    if path.hasSuffix(".index.json") { return try ModelFolder.openShards(path, as: path) }
    if let part = try Bundle.part(path) { return part }
    return try openFile(path)
  }

  /// Opens a checkpoint that is one file of tensors.
  static func openFile(_ path: String) throws(CheckpointError) -> any TensorSource {
    let beginning = try File(reading: path).beginning(16)
    if let format = formats.first(where: { $0.recognises(beginning) }) {
      return try format.open(path)
    }
    do { return try Safetensors.open(path) } catch {
      guard try HDF5.hasUserBlock(path) else { throw error }
      return try HDF5.open(path)
    }
  }

  /// The files that `open` reads: of a model's folder the weights, and all shards of an index.
  public static func files(of path: String) throws(CheckpointError) -> [String] {
    if let (bundle, _, base) = Bundle.difference(path) { return [bundle] + (try files(of: base)) }
    if let (bundle, _) = Bundle.member(path) { return [bundle] }
    let file = isFolder(path) ? try ModelFolder.weights(in: path) : path
    guard file.hasSuffix(".index.json") else { return [file] }
    let folder = split(file).folder
    return [file] + (try ShardIndex(reading: file)).files.map { "\(folder)/\($0)" }
  }

  /// Begins a checkpoint; the name's ending says which format it will be. A name that ends in
  /// a slash is that of a model's folder.
  public static func create(
    _ path: String, _ manifest: Manifest, _ options: WritingOptions = WritingOptions()
  ) throws(CheckpointError) -> any TensorSink {
    if path.hasSuffix("/") { return try ModelFolder.create(path, manifest, options) }
    return try format(writing: path).create(path, manifest, options)
  }

  /// The format that the name's ending calls for.
  private static func format(writing path: String) throws(CheckpointError)
    -> any CheckpointFormat.Type
  {
    for format in formats
    where format.fileExtensions.contains(where: { path.lowercased().hasSuffix("." + $0) }) {
      return format
    }
    let endings = formats.flatMap { $0.fileExtensions }.map { "." + $0 }
    throw CheckpointError(
      file: path, "has no ending that names a format",
      remedy: "end it in one of \(endings.joined(separator: ", ")), or in / for a model's folder")
  }

  /// Writes everything a source holds to a new checkpoint, byte for byte; the path says what it
  /// will be, as for `create`.
  /// - Returns: what the output lacks though nothing is wrong, a sentence each.
  @discardableResult
  public static func write(
    _ source: any TensorSource, to path: String, _ options: WritingOptions = WritingOptions(),
    workers: Int = 2
  ) throws -> [String] {
    if path.hasSuffix("/") {
      let sink = try ModelFolder.create(path, source.manifest, options)
      try source.copy(into: sink, workers: workers)
      try sink.finish()
      return sink.warnings
    }
    return try format(writing: path).write(source, to: path, options, workers: workers)
  }
}

extension CheckpointFormat {
  public static func create(_ path: String, _ manifest: Manifest) throws(CheckpointError)
    -> any TensorSink
  {
    try create(path, manifest, WritingOptions())
  }

  @discardableResult
  public static func write(
    _ source: any TensorSource, to path: String, _ options: WritingOptions, workers: Int
  ) throws -> [String] {
    let sink = try create(path, source.manifest, options)
    try source.copy(into: sink, workers: workers)
    try sink.finish()
    return sink.warnings
  }
}
