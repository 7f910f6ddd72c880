/// The safetensors format: a JSON header, then the tensors' bytes without a gap.
///
/// https://github.com/huggingface/safetensors#format — what it forbids is refused here,
/// each violation with a sentence of its own, so that no later code has to check again.
public enum Safetensors: CheckpointFormat {
  public static let name = "safetensors"
  public static let fileExtensions = ["safetensors"]

  /// The reference implementation's limit.
  static let largestHeader = 100_000_000

  /// safetensors has no magic number: see `Checkpoint.open`.
  public static func recognises(_ beginning: [UInt8]) -> Bool {
    guard beginning.count > 8, beginning[8] == UInt8(ascii: "{") else { return false }
    // What has a magic number may have this byte too; taken as a length, the number is too large.
    let length = beginning[..<8].reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
    return length <= UInt64(largestHeader)
  }

  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    let file = try MappedFile(path)
    let header = try readHeader(file)
    let layout = try Layout(parsing: header, fileSize: file.size, path: path)
    return FlatSource(
      file, layout.manifest, offsets: layout.offsets, checksums: layout.recorded,
      hasForeignChecksums: layout.hasForeignChecksums)
  }

  public static func create(_ path: String, _ manifest: Manifest, _ options: WritingOptions)
    throws(CheckpointError) -> any TensorSink
  {
    try create(
      path, manifest, checksums: options.checksums ?? .xxh3,
      keepsHeader: options.checksums == nil, synced: options.isSynced)
  }

  /// Begins a file that records the checksums of its tensors, if it is to.
  ///
  /// A manifest's own header is kept as it is; if it has checksums, they become those of the
  /// tensors that are written: the same tensors give the same file.
  /// - Parameters:
  ///   - keepsHeader: false if the file is to have these checksums though the header has others
  ///     or none. Else they are left out, with a warning, where they alone make the header too
  ///     large.
  ///   - isSynced: as in `WritingOptions`.
  public static func create(
    _ path: String, _ manifest: Manifest, checksums: TensorChecksum.Algorithm?,
    keepsHeader: Bool = true, synced isSynced: Bool = true
  ) throws(CheckpointError) -> any TensorSink {
    let layout = try Layout(
      writing: manifest, checksums: checksums, keepsHeader: keepsHeader, path: path)
    let pending = try PendingFile(for: path, synced: isSynced)
    let file = try pending.open()
    do {
      try file.preallocate(layout.fileSize)
      try file.write(layout.prefix.span.bytes, at: 0)
    } catch {
      throw CheckpointError(file: path, error.problem, remedy: error.remedy)
    }
    return try FlatSink(
      pending, layout.manifest, offsets: layout.offsets,
      checksums: layout.checksums?.algorithm,
      warnings: layout.lacksRoomForChecksums
        ? [
          "\(path): written without checksums: they would make the header larger than the format allows"
        ]
        : [],
      open: { (path) throws(CheckpointError) in
        try Safetensors.open(path)
      }
    ) { (file, checksums) throws(CheckpointError) in
      let text = ChecksumText(checksums, of: layout.manifest, at: layout.checksums!.offset)
      try file.write(text.bytes.span.bytes, at: text.offset)
    }
  }

  /// The header's bytes, without the length in front.
  private static func readHeader(_ file: MappedFile) throws(CheckpointError) -> [UInt8] {
    func malformed(_ problem: String, remedy: String? = nil) -> CheckpointError {
      CheckpointError(file: file.path, problem, remedy: remedy)
    }
    let size = file.size
    guard size > 0 else {
      throw malformed("is empty", remedy: "download it again")
    }
    let beginning = try file.bytes(at: 0, count: min(512, size))
    if let likeness = likeness(of: beginning) {
      throw malformed(
        "is not a safetensors file: it looks like \(likeness.kind)", remedy: likeness.remedy)
    }
    guard size >= 8 else {
      throw malformed("has \(size) bytes; a safetensors file begins with 8 bytes of header length")
    }
    let declared = beginning.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
    guard declared > 0 else { throw malformed("declares a header of 0 bytes") }
    guard declared <= UInt64(largestHeader) else {
      throw malformed(
        "declares a header of \(declared) bytes; the format's limit is \(largestHeader)",
        remedy: "it may not be a safetensors file")
    }
    let length = Int(declared)
    guard length <= size - 8 else {
      throw malformed(
        "declares a header of \(length) bytes but has only \(size - 8) after the length",
        remedy: "it is truncated: download it again")
    }
    return try file.bytes(at: 8, count: length)
  }
}
