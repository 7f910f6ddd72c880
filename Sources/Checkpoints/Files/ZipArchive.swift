/// The list of a zip file's entries, each proven to lie within the file.
///
/// https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, with its 64-bit extension: what
/// PyTorch and numpy write. Everything a stranger's file says is checked before it is used.
final class ZipArchive: Sendable {
  struct Entry: Sendable {
    let name: String
    let isCompressed: Bool
    /// Bytes in the file, and bytes when it is unpacked.
    let storedSize: Int
    let size: Int
    let checksum: UInt32
    /// The text of our own extra field, if there is one.
    let note: String
    /// Where its local header begins.
    fileprivate let headerOffset: Int
  }

  /// The kind of our own extra field, of those that are free: "Sm".
  static let noteKind = 0x6D53

  /// The kind of the fields that hold, one after the other, the safetensors header: "Sh".
  static let headerKind = 0x6853

  let path: String
  let file: MappedFile
  let entries: [Entry]
  /// The safetensors header that the tensors came with, if a whole one is here.
  let safetensorsHeader: [UInt8]
  private let positions: [ExactName: Int]

  init(_ path: String) throws(CheckpointError) {
    self.path = path
    file = try MappedFile(path)
    let directory = try Self.findDirectory(file)
    var entries: [Entry] = []
    var header: [UInt8] = []
    var positions: [ExactName: Int] = [:]
    var bytes = LittleEndianReader(
      try file.bytes(at: directory.offset, count: directory.size), file: path,
      subject: "the zip directory")
    for _ in 0..<directory.count {
      let entry = try Self.readEntry(&bytes, before: directory.offset, &header)
      guard positions.updateValue(entries.count, forKey: ExactName(entry.name)) == nil else {
        throw CheckpointError(file: path, "has two zip entries \(quoted(entry.name))")
      }
      entries.append(entry)
    }
    self.entries = entries
    safetensorsHeader = header
    self.positions = positions
  }

  subscript(name: String) -> Entry? { positions[ExactName(name)].map { entries[$0] } }

  /// Where an entry's bytes begin in the file.
  /// - Throws: if what is there is no entry of this name.
  func offset(of entry: Entry) throws(CheckpointError) -> Int {
    guard file.size - entry.headerOffset >= 30 else { throw damaged(entry) }
    var header = LittleEndianReader(
      try file.bytes(at: entry.headerOffset, count: 30), file: path, subject: "a zip header")
    guard try header.unsigned(4) == 0x0403_4B50 else { throw damaged(entry) }
    try header.skip(22)
    let (nameLength, extraLength) = (Int(try header.unsigned(2)), Int(try header.unsigned(2)))
    let offset = entry.headerOffset + 30 + nameLength + extraLength
    let name = Array(entry.name.utf8)
    guard nameLength == name.count, file.size - entry.headerOffset - 30 >= nameLength,
      try file.bytes(at: entry.headerOffset + 30, count: nameLength) == name
    else {
      throw CheckpointError(
        file: path, "its zip entry \(quoted(entry.name)) has another name where its data begins",
        remedy: "the file is damaged: download it again")
    }
    guard offset <= file.size, entry.storedSize <= file.size - offset else { throw damaged(entry) }
    return offset
  }

  private func damaged(_ entry: Entry) -> CheckpointError {
    CheckpointError(
      file: path, "its zip entry \(quoted(entry.name)) is not where the zip directory says",
      remedy: "the file is damaged: download it again")
  }

  // MARK: The directory at the end

  private static func findDirectory(_ file: MappedFile) throws(CheckpointError)
    -> (offset: Int, size: Int, count: Int)
  {
    // The end record has 22 bytes and a comment of at most 65,535.
    let tailStart = max(0, file.size - 22 - 65_535)
    let tail = try file.bytes(at: tailStart, count: file.size - tailStart)
    let signature: [UInt8] = [0x50, 0x4B, 0x05, 0x06]
    guard tail.count >= 22,
      let at = (0...tail.count - 22).last(where: {
        tail[$0] == signature[0] && tail[$0..<$0 + 4].elementsEqual(signature)
      })
    else {
      throw CheckpointError(
        file: file.path, "has no zip directory at its end",
        remedy: "it is truncated: download it again")
    }
    var record = LittleEndianReader(
      Array(tail[(at + 4)...]), file: file.path, subject: "the zip directory")
    try record.skip(6)
    var count = UInt64(try record.unsigned(2))
    var size = UInt64(try record.unsigned(4))
    var offset = UInt64(try record.unsigned(4))
    let end = tailStart + at
    if count == 0xFFFF || size == 0xFFFF_FFFF || offset == 0xFFFF_FFFF, end >= 20,
      let large = try readLargeRecord(file, locatorAt: end - 20)
    {
      (count, size, offset) = large
    }
    guard let start = Int(exactly: offset), let length = Int(exactly: size), start <= end,
      length <= end - start, count <= UInt64(length / 46)
    else {
      throw CheckpointError(file: file.path, "has a zip directory that is not within the file")
    }
    return (start, length, Int(count))
  }

  /// The record of the 64-bit extension, which a locator before the end record points to.
  private static func readLargeRecord(_ file: MappedFile, locatorAt offset: Int)
    throws(CheckpointError) -> (count: UInt64, size: UInt64, offset: UInt64)?
  {
    var locator = LittleEndianReader(
      try file.bytes(at: offset, count: 20), file: file.path, subject: "the zip directory")
    guard try locator.unsigned(4) == 0x0706_4B50 else { return nil }
    try locator.skip(4)
    guard let at = Int(exactly: try locator.unsigned(8)), at <= file.size, file.size - at >= 56
    else {
      throw CheckpointError(file: file.path, "has a zip directory that is not within the file")
    }
    var record = LittleEndianReader(
      try file.bytes(at: at, count: 56), file: file.path, subject: "the zip directory")
    guard try record.unsigned(4) == 0x0606_4B50 else { return nil }
    try record.skip(28)
    return (try record.unsigned(8), try record.unsigned(8), try record.unsigned(8))
  }

  private static func readEntry(
    _ bytes: inout LittleEndianReader, before end: Int, _ header: inout [UInt8]
  ) throws(CheckpointError) -> Entry {
    guard try bytes.unsigned(4) == 0x0201_4B50 else {
      throw bytes.failure("has a damaged zip directory")
    }
    try bytes.skip(4)
    let flags = try bytes.unsigned(2)
    let method = try bytes.unsigned(2)
    try bytes.skip(4)
    let checksum = UInt32(truncatingIfNeeded: try bytes.unsigned(4))
    var storedSize = try bytes.unsigned(4)
    var size = try bytes.unsigned(4)
    let nameLength = Int(try bytes.unsigned(2))
    let extraLength = Int(try bytes.unsigned(2))
    let commentLength = Int(try bytes.unsigned(2))
    try bytes.skip(8)
    var headerOffset = try bytes.unsigned(4)
    let nameBytes = try bytes.take(nameLength)
    guard let name = String(validating: nameBytes, as: UTF8.self) else {
      throw bytes.failure("has a zip entry whose name is not UTF-8 text")
    }
    var extra = LittleEndianReader(
      try bytes.take(extraLength), file: bytes.file, subject: "a zip entry")
    try bytes.skip(commentLength)
    var note = ""
    while extra.remaining >= 4 {
      let kind = try extra.unsigned(2)
      let length = Int(try extra.unsigned(2))
      let content = try extra.take(length)
      if kind == ZipArchive.headerKind { header += content }
      if kind == ZipArchive.noteKind { note = String(decoding: content, as: UTF8.self) }
      var field = LittleEndianReader(content, file: bytes.file, subject: "a zip entry")
      // The 64-bit sizes: only those that did not fit, in this order.
      guard kind == 1 else { continue }
      if size == 0xFFFF_FFFF { size = try field.unsigned(8) }
      if storedSize == 0xFFFF_FFFF { storedSize = try field.unsigned(8) }
      if headerOffset == 0xFFFF_FFFF { headerOffset = try field.unsigned(8) }
    }
    guard flags & 1 == 0 else { throw bytes.failure("has the encrypted zip entry \(quoted(name))") }
    guard method == 0 || method == 8 else {
      throw bytes.failure("has the zip entry \(quoted(name)) in unknown compression \(method)")
    }
    guard let offset = Int(exactly: headerOffset), offset <= end,
      let stored = Int(exactly: storedSize), stored <= end - offset, let whole = Int(exactly: size),
      method == 8 || whole == stored
    else { throw bytes.failure("has the zip entry \(quoted(name)) outside the file") }
    return Entry(
      name: name, isCompressed: method == 8, storedSize: stored, size: whole, checksum: checksum,
      note: note, headerOffset: offset)
  }
}

/// Takes little-endian numbers from bytes, one after the other.
struct LittleEndianReader {
  private let bytes: [UInt8]
  private(set) var position = 0
  let file: String
  /// What the bytes are, for errors: "the zip directory".
  private let subject: String

  init(_ bytes: [UInt8], file: String, subject: String) {
    self.bytes = bytes
    self.file = file
    self.subject = subject
  }

  var remaining: Int { bytes.count - position }

  func failure(_ problem: String, remedy: String? = nil) -> CheckpointError {
    CheckpointError(file: file, problem, remedy: remedy)
  }

  /// The next few bytes; that there are so many is checked.
  mutating func take(_ count: Int) throws(CheckpointError) -> [UInt8] {
    guard count >= 0, count <= remaining else {
      throw failure("ends within \(subject)", remedy: "it is truncated: download it again")
    }
    defer { position += count }
    return Array(bytes[position..<position + count])
  }

  mutating func skip(_ count: Int) throws(CheckpointError) { _ = try take(count) }

  /// A number of one to eight bytes.
  mutating func unsigned(_ width: Int) throws(CheckpointError) -> UInt64 {
    guard width <= remaining else {
      throw failure("ends within \(subject)", remedy: "it is truncated: download it again")
    }
    var value: UInt64 = 0
    for index in (0..<width).reversed() { value = value << 8 | UInt64(bytes[position + index]) }
    position += width
    return value
  }

  /// The bytes before the next line feed, which is taken too.
  mutating func line() throws(CheckpointError) -> [UInt8] {
    guard let end = bytes[position...].firstIndex(of: 0x0A) else {
      throw failure("ends within \(subject)", remedy: "it is truncated: download it again")
    }
    defer { position = end + 1 }
    return Array(bytes[position..<end])
  }
}
