import Synchronization

/// numpy's archives of named arrays: a zip file with a `.npy` file for each.
///
/// numpy has no name for the small floats: as numpy itself does with arrays of ml_dtypes, they
/// are written as elements of one or two opaque bytes, and `f["name"].view(ml_dtypes.bfloat16)`
/// gives the numbers. Types below a byte become bytes. The true type and shape stand in an
/// extra field of the zip entry, which numpy passes over.
///
/// So does the safetensors header, with metadata and order, cut into a field for each entry of
/// the zip directory. (A member of its own would be one more array to whoever goes through all
/// of `numpy.load(…)`.)
public enum NumPy: CheckpointFormat {
  public static let name = "numpy"
  public static let fileExtensions = ["npz"]

  /// See `PyTorch.open`: both are zip files.
  public static func recognises(_ beginning: [UInt8]) -> Bool { false }

  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    try open(ZipArchive(path))
  }

  static func open(_ archive: ZipArchive) throws(CheckpointError) -> any TensorSource {
    try NumPySource(archive)
  }

  public static func create(_ path: String, _ manifest: Manifest, _ options: WritingOptions)
    throws(CheckpointError) -> any TensorSink
  {
    try options.refuseSHA256(in: path, whichRecords: "CRC-32")
    return try create(
      path, manifest, isCompressed: options.compression != nil, synced: options.isSynced)
  }

  /// Begins an archive, which `numpy.savez` or `numpy.savez_compressed` could have written.
  public static func create(
    _ path: String, _ manifest: Manifest, isCompressed: Bool, synced isSynced: Bool = true
  ) throws(CheckpointError) -> any TensorSink {
    isCompressed
      ? try CompressedNumPySink(path, manifest, synced: isSynced)
      : try NumPySink(path, manifest, synced: isSynced)
  }

  /// How numpy names a type.
  static func descr(_ dtype: DType) -> String {
    switch dtype {
    case .bool: "|b1"
    case .u8, .f4, .f6E2M3, .f6E3M2: "|u1"
    case .i8: "|i1"
    case .f8E5M2, .f8E4M3, .f8E8M0, .f8E4M3FNUZ, .f8E5M2FNUZ: "<V1"
    case .bf16: "<V2"
    case .u16: "<u2"
    case .i16: "<i2"
    case .f16: "<f2"
    case .u32: "<u4"
    case .i32: "<i4"
    case .f32: "<f4"
    case .u64: "<u8"
    case .i64: "<i8"
    case .f64: "<f8"
    case .c64: "<c8"
    }
  }

  /// The shape that numpy sees: bytes, where elements are smaller.
  static func shape(_ tensor: TensorInfo) -> [Int] {
    tensor.dtype.bitWidth < 8 ? [tensor.byteCount] : tensor.shape
  }

  /// The type that numpy means; opaque pairs of bytes can only be BF16.
  static func dtype(_ descr: String) -> DType? {
    switch descr {
    case "|V2", "<V2": return .bf16
    case "|V1", "<V1": return .u8
    case "<b1", "=b1": return .bool
    case "<u1", "=u1": return .u8
    case "<i1", "=i1": return .i8
    default:
      let native = descr.hasPrefix("=") ? "<" + descr.dropFirst() : descr
      return DType.allCases.first { self.descr($0) == native && $0.bitWidth >= 8 }
    }
  }
}

/// The arrays of an archive, each a range of bytes of it or, if it is compressed, of a
/// temporary file that takes them when they are first needed. So their checksum is known to be
/// right before any of them is handed out.
private final class NumPySource: TensorSource {
  private struct Place {
    let entry: ZipArchive.Entry
    /// Where its elements begin: in the file, or in the unpacked entry.
    let offset: Int
    /// Of an array in Fortran's order.
    let strides: [Int]?
  }

  let path: String
  let manifest: Manifest
  let warnings: [String]
  private let archive: ZipArchive
  private let places: [Place]
  /// The entries that were unpacked last, and their positions.
  private let unpacked = Mutex<[(position: Int, file: MappedFile)]>([])
  /// Readers go from tensor to tensor; each worker may still be at one of its own.
  private static let mostUnpacked = 16

  init(_ archive: ZipArchive) throws(CheckpointError) {
    var tensors: [TensorInfo] = []
    var places: [Place] = []
    var others: [String] = []
    for entry in archive.entries {
      guard entry.name.hasSuffix(".npy") else {
        // An array, if it is its ending that is damaged.
        _ = try archive.offset(of: entry)
        others.append(entry.name)
        continue
      }
      let (tensor, place) = try Self.prove(entry, of: archive)
      tensors.append(tensor)
      places.append(place)
    }
    guard !tensors.isEmpty || others.isEmpty else {
      throw CheckpointError(
        file: archive.path, "is a zip archive, but neither PyTorch's nor numpy's")
    }
    path = archive.path
    let found = try Manifest(proving: tensors) {
      CheckpointError(file: archive.path, tensor: $0.name, "is there twice")
    }
    let original = Self.original(of: found, archive)
    manifest = original ?? found
    if let original { places = original.tensors.map { places[found.position(of: $0.name)!] } }
    warnings = others.map { "\(archive.path): zip entry \(quoted($0)) left out: no array" }
    self.archive = archive
    self.places = places
  }

  /// What the kept safetensors header says, if it still says what the archive holds.
  private static func original(of found: Manifest, _ archive: ZipArchive) -> Manifest? {
    let header = archive.safetensorsHeader
    var size = 8 + header.count
    for tensor in found.tensors {
      let sum = size.addingReportingOverflow(tensor.byteCount)
      guard !sum.overflow else { return nil }
      size = sum.partialValue
    }
    // A header that is wrong in itself is one that was damaged: the arrays are what counts.
    let layout = try? Safetensors.Layout(parsing: header, fileSize: size, path: archive.path)
    guard let manifest = layout?.manifest, manifest.tensors.count == found.tensors.count,
      found.tensors.allSatisfy({ manifest[$0.name] == $0 })
    else { return nil }
    return manifest
  }

  /// Proves that an array's elements are exactly what its header says.
  private static func prove(_ entry: ZipArchive.Entry, of archive: ZipArchive)
    throws(CheckpointError) -> (TensorInfo, Place)
  {
    let name = String(entry.name.dropLast(4))
    func malformed(_ problem: String, remedy: String? = nil) -> CheckpointError {
      CheckpointError(file: archive.path, tensor: name, problem, remedy: remedy)
    }
    let header = try ArrayHeader(
      archive.beginning(of: entry, ArrayHeader.largest), tensor: name, path: archive.path)
    guard let dtype = NumPy.dtype(header.descr) else {
      throw malformed("has elements of numpy's type \(quoted(header.descr)), which is not known")
    }
    let tensor: TensorInfo
    do { tensor = try TensorInfo(name: name, dtype: dtype, shape: header.shape) } catch {
      throw malformed("has a shape too large to count its bytes")
    }
    guard tensor.byteCount == entry.size - header.byteCount else {
      throw malformed(
        "has \(entry.size - header.byteCount) bytes but its shape \(tensor.shapeDescription) of \(dtype.rawValue) needs \(tensor.byteCount)"
      )
    }
    var strides: [Int]?
    if header.isFortranOrder, tensor.shape.count > 1, tensor.elementCount > 0 {
      strides = tensor.shape.reduce(into: [1]) { $0.append($0.last! * $1) }.dropLast()
    }
    let start = entry.isCompressed ? 0 : try archive.offset(of: entry)
    return (
      try trueTensor(tensor, entry) ?? tensor,
      Place(entry: entry, offset: start + header.byteCount, strides: strides)
    )
  }

  /// What the extra field says that the tensor was, if that can be.
  private static func trueTensor(_ tensor: TensorInfo, _ entry: ZipArchive.Entry)
    throws(CheckpointError) -> TensorInfo?
  {
    let fields = entry.note.split(separator: " ", omittingEmptySubsequences: false)
    guard fields.count == 2, let dtype = DType(rawValue: String(fields[0])) else { return nil }
    let dimensions = fields[1].split(separator: ",").map { Int($0) }
    guard dimensions.allSatisfy({ $0 != nil }) else { return nil }
    let info = try? TensorInfo(
      name: tensor.name, dtype: dtype, shape: dimensions.compactMap { $0 })
    guard let info, NumPy.descr(dtype) == NumPy.descr(tensor.dtype) || dtype.bitWidth <= 8,
      info.byteCount == tensor.byteCount,
      tensor.shape == NumPy.shape(info)
    else { return nil }
    return info
  }

  func verifyData(workers: Int) throws -> Verification {
    try archive.verify(manifest.tensors, workers: workers) { [places] in places[$0].entry }
  }

  func refuseDamage(of tensors: [TensorInfo], workers: Int) throws {
    // What is compressed has been compared when it was unpacked.
    let entries = tensors.map { ($0, places[manifest.position(of: $0.name)!].entry) }
      .filter { !$0.1.isCompressed }
    try archive.verify(entries.map { $0.0 }, workers: workers) { entries[$0].1 }
      .refuseDamage(in: path)
  }

  func checkUnchanged() throws(CheckpointError) { try archive.file.checkUnchanged() }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    precondition(offset >= 0 && offset + buffer.byteCount <= tensor.byteCount)
    let position = manifest.position(of: tensor.name)!
    let place = places[position]
    let file = place.entry.isCompressed ? try unpack(position) : archive.file
    guard let strides = place.strides else {
      return try file.read(at: place.offset + offset, into: &buffer)
    }
    try file.gather(
      from: place.offset, shape: tensor.shape, strides: strides,
      width: tensor.dtype.bitWidth / 8, at: offset, into: &buffer)
  }

  private func unpack(_ position: Int) throws(CheckpointError) -> MappedFile {
    // The lock is held while an entry is unpacked: whoever wants it must wait anyway.
    try unpacked.withLock { (files) throws(CheckpointError) in
      if let known = files.firstIndex(where: { $0.position == position }) {
        files.append(files.remove(at: known))
      } else {
        if files.count == Self.mostUnpacked { files.removeFirst() }
        do throws(CheckpointError) {
          files.append((position, try archive.unpack(places[position].entry)))
        } catch { throw error.of(manifest.tensors[position].name) }
      }
      return files.last!.file
    }
  }
}
