import CZlib
import Synchronization

/// Arrays on their way into an archive, uncompressed: each is a range of bytes.
final class NumPySink: TensorSink {
  let manifest: Manifest
  private let pending: PendingFile
  private let isComplete = Atomic(false)
  private let file: File
  private let members: [ZipMember]
  /// Where the elements of each tensor begin, and the directory after all.
  private let offsets: [Int]
  private let directoryOffset: Int
  private let remaining: Atomic<Int>
  /// The checksums of the pieces of each tensor by where they begin.
  private let pieces: Mutex<[[Int: (count: Int, checksum: UInt)]]>
  /// `nil` if flushing is left to the system.
  private let behind: WriteBehind?

  init(
    _ path: String, _ manifest: Manifest, synced isSynced: Bool
  ) throws(CheckpointError) {
    self.manifest = manifest
    pending = try PendingFile(for: path, synced: isSynced)
    file = try pending.open()
    var members: [ZipMember] = []
    var offsets: [Int] = []
    var offset = 0
    for tensor in manifest.tensors {
      let member = try ZipMember(tensor, at: offset, path: path)
      members.append(member)
      offsets.append(offset + member.localHeader().count + member.arrayHeader.count)
      offset = offsets.last! + tensor.byteCount
    }
    self.members = members
    self.offsets = offsets
    directoryOffset = offset
    behind =
      isSynced
      ? WriteBehind(of: zip(manifest.tensors, offsets).lazy.map { $1..<$1 + $0.byteCount }) : nil
    remaining = Atomic(manifest.byteCount)
    pieces = Mutex(Array(repeating: [:], count: members.count))
    do { try file.preallocate(offset) } catch { throw error.moved(to: path) }
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    precondition(offset >= 0 && offset + bytes.byteCount <= tensor.byteCount)
    let position = manifest.position(of: tensor.name)!
    do { try file.write(bytes, at: offsets[position] + offset) } catch {
      throw CheckpointError(
        file: pending.destination, tensor: tensor.name, error.problem, remedy: error.remedy)
    }
    let start = offsets[position] + offset
    behind?.add(start..<start + bytes.byteCount, of: file)
    let checksum = crc32(of: bytes)
    pieces.withLock { $0[position][offset] = (bytes.byteCount, checksum) }
    remaining.wrappingSubtract(bytes.byteCount, ordering: .relaxed)
  }

  func complete() throws(CheckpointError) {
    guard !isComplete.load(ordering: .relaxed) else { return }
    precondition(remaining.load(ordering: .relaxed) == 0, "a tensor was not wholly written")
    do { try writeHeaders() } catch { throw error.moved(to: pending.destination) }
    try pending.complete()
    try pending.prove(manifest) { (path) throws(CheckpointError) in try NumPy.open(path) }
    isComplete.store(true, ordering: .relaxed)
  }

  /// Writes what stands before every array, now that its checksum is known, and the directory.
  private func writeHeaders() throws(CheckpointError) {
    var directory: [UInt8] = []
    let pieces = pieces.withLock { $0 }
    let header = HeaderPieces(manifest, path: pending.destination)
    for (position, member) in members.enumerated() {
      // The pieces' checksums, which came in any order, joined in the right one.
      var checksum = crc32(of: member.arrayHeader.span.bytes)
      for (_, piece) in pieces[position].sorted(by: { $0.key < $1.key }) {
        checksum = crc32_combine(checksum, piece.checksum, piece.count)
      }
      let beginning = member.localHeader(checksum: checksum) + member.arrayHeader
      try file.write(beginning.span.bytes, at: offsets[position] - beginning.count)
      directory += member.directoryEntry(checksum: checksum, headerPiece: header[position])
    }
    directory += ZipMember.end(count: members.count, directory.count, at: directoryOffset)
    try file.write(directory.span.bytes, at: directoryOffset)
  }

  func finish() throws(CheckpointError) {
    try complete()
    try pending.commit()
  }
}

/// Arrays on their way into a compressed archive, by way of a temporary file: an entry can only
/// be compressed from its beginning to its end, but the pieces come in any order.
final class CompressedNumPySink: TensorSink {
  let manifest: Manifest
  private let pending: PendingFile
  private let isComplete = Atomic(false)
  private let offsets: [Int]
  private let temporary: File
  private let remaining: Atomic<Int>

  init(
    _ path: String, _ manifest: Manifest, synced isSynced: Bool
  ) throws(CheckpointError) {
    self.manifest = manifest
    pending = try PendingFile(for: path, synced: isSynced)
    offsets = manifest.tensors.reduce(into: [0]) { $0.append($0.last! + $1.byteCount) }
    temporary = try File(temporaryBeside: path)
    remaining = Atomic(manifest.byteCount)
    try temporary.preallocate(manifest.byteCount)
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    precondition(offset >= 0 && offset + bytes.byteCount <= tensor.byteCount)
    try temporary.write(bytes, at: offsets[manifest.position(of: tensor.name)!] + offset)
    remaining.wrappingSubtract(bytes.byteCount, ordering: .relaxed)
  }

  func complete() throws(CheckpointError) {
    guard !isComplete.load(ordering: .relaxed) else { return }
    precondition(remaining.load(ordering: .relaxed) == 0, "a tensor was not wholly written")
    do { try compress() } catch { throw error.moved(to: pending.destination) }
    try pending.complete()
    try pending.prove(manifest) { (path) throws(CheckpointError) in try NumPy.open(path) }
    isComplete.store(true, ordering: .relaxed)
  }

  private func compress() throws(CheckpointError) {
    let file = try pending.open()
    let header = HeaderPieces(manifest, path: pending.destination)
    var directory: [UInt8] = []
    var offset = 0
    for (position, tensor) in manifest.tensors.enumerated() {
      var member = try ZipMember(tensor, at: offset, path: pending.destination, isCompressed: true)
      let start = offset + member.localHeader().count
      var end = start
      var checksum = crc32(of: member.arrayHeader.span.bytes)
      let stream = try Deflater()
      func put(_ bytes: RawSpan, isLast: Bool) throws(CheckpointError) {
        try stream.deflate(bytes, isLast: isLast) { (packed) throws(CheckpointError) in
          try file.write(packed, at: end)
          end += packed.byteCount
        }
      }
      try put(member.arrayHeader.span.bytes, isLast: tensor.byteCount == 0)
      var done = 0
      while done < tensor.byteCount {
        let count = min(1 << 20, tensor.byteCount - done)
        let bytes = try temporary.bytes(at: offsets[position] + done, count: count)
        done += count
        checksum = crc32_combine(checksum, crc32(of: bytes.span.bytes), count)
        try put(bytes.span.bytes, isLast: done == tensor.byteCount)
      }
      member.storedSize = end - start
      try file.write(member.localHeader(checksum: checksum).span.bytes, at: offset)
      directory += member.directoryEntry(checksum: checksum, headerPiece: header[position])
      offset = end
    }
    directory += ZipMember.end(count: manifest.tensors.count, directory.count, at: offset)
    try file.write(directory.span.bytes, at: offset)
  }

  func finish() throws(CheckpointError) {
    try complete()
    try pending.commit()
  }
}

/// The safetensors header of some tensors, cut into a piece for each.
private struct HeaderPieces {
  private let header: [UInt8]
  private let size: Int

  /// An extra field has 64 KB, which a tensor's type and shape may share.
  private static let largest = 30_000

  /// The manifest's own header, or one that says its metadata; nothing if there is neither, or
  /// if it does not fit: a few tensors with metadata of many times their names.
  init(_ manifest: Manifest, path: String) {
    let layout =
      manifest.metadata.isEmpty ? nil : try? Safetensors.Layout(writing: manifest, path: path)
    let header = manifest.safetensorsHeader ?? layout?.manifest.safetensorsHeader ?? []
    let count = max(1, manifest.tensors.count)
    size = (header.count + count - 1) / count
    self.header = size <= Self.largest ? header : []
  }

  /// The piece of the tensor at this position of the manifest.
  subscript(position: Int) -> ArraySlice<UInt8> {
    header[min(header.count, position * size)..<min(header.count, (position + 1) * size)]
  }
}

/// One entry of a zip file that is written. Sizes are always in the 64-bit extension, as
/// numpy has it too.
private struct ZipMember {
  let name: [UInt8]
  let arrayHeader: [UInt8]
  let size: Int
  var storedSize: Int
  private let offset: Int
  private let method: Int
  /// Type and shape where numpy has no name for them.
  private let note: [UInt8]

  init(_ tensor: TensorInfo, at offset: Int, path: String, isCompressed: Bool = false)
    throws(CheckpointError)
  {
    name = Array((tensor.name + ".npy").utf8)
    guard name.count <= 0xFFFF else {
      throw CheckpointError(file: path, tensor: tensor.name, "has a name too long for a zip file")
    }
    arrayHeader = ArrayHeader.describe(
      NumPy.descr(tensor.dtype), shape: NumPy.shape(tensor))
    size = arrayHeader.count + tensor.byteCount
    storedSize = size
    self.offset = offset
    method = isCompressed ? 8 : 0
    let shape = tensor.shape.map(String.init).joined(separator: ",")
    note =
      NumPy.dtype(NumPy.descr(tensor.dtype)) == tensor.dtype
      ? [] : Array("\(tensor.dtype.rawValue) \(shape)".utf8)
    guard note.count <= 30_000 else {
      throw CheckpointError(
        file: path, tensor: tensor.name, "has too many dimensions for a zip file")
    }
  }

  private func number(_ value: Int, _ width: Int) -> [UInt8] {
    (0..<width).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) }
  }

  /// Version 4.5 for the 64-bit extension; flag 11 for names in UTF-8; 1 January 1980.
  private func beginning(_ checksum: UInt, extra: [UInt8]) -> [UInt8] {
    number(45, 2) + number(1 << 11, 2) + number(method, 2) + number(0, 2) + number(0x21, 2)
      + number(Int(checksum), 4) + number(0xFFFF_FFFF, 4) + number(0xFFFF_FFFF, 4)
      + number(name.count, 2) + number(extra.count, 2)
  }

  private func extra(_ fields: [Int], headerPiece: ArraySlice<UInt8> = []) -> [UInt8] {
    func field(_ kind: Int, _ content: some Collection<UInt8>) -> [UInt8] {
      content.isEmpty ? [] : number(kind, 2) + number(content.count, 2) + content
    }
    return field(1, fields.flatMap { number($0, 8) }) + field(ZipArchive.noteKind, note)
      + field(ZipArchive.headerKind, headerPiece)
  }

  /// As long before the checksum and the stored size are known as after.
  func localHeader(checksum: UInt = 0) -> [UInt8] {
    let extra = extra([size, storedSize])
    return number(0x0403_4B50, 4) + beginning(checksum, extra: extra) + name + extra
  }

  func directoryEntry(checksum: UInt, headerPiece: ArraySlice<UInt8>) -> [UInt8] {
    let extra = extra([size, storedSize, offset], headerPiece: headerPiece)
    return number(0x0201_4B50, 4) + number(45, 2) + beginning(checksum, extra: extra)
      + number(0, 10) + number(0xFFFF_FFFF, 4) + name + extra
  }

  /// The records at the end of a zip file.
  static func end(count: Int, _ size: Int, at offset: Int) -> [UInt8] {
    func number(_ value: Int, _ width: Int) -> [UInt8] {
      (0..<width).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) }
    }
    let large =
      number(0x0606_4B50, 4) + number(44, 8) + number(45, 2) + number(45, 2) + number(0, 8)
      + number(count, 8) + number(count, 8) + number(size, 8) + number(offset, 8)
    let locator =
      number(0x0706_4B50, 4) + number(0, 4) + number(offset + size, 8) + number(1, 4)
    // An archive of nothing is the last record alone: numpy knows it by its first bytes.
    guard count > 0 else { return number(0x0605_4B50, 4) + number(0, 18) }
    // numpy's zip module takes the 64-bit records only where these are at their limits.
    let end =
      number(0x0605_4B50, 4) + number(0, 4) + number(0xFFFF, 2) + number(0xFFFF, 2)
      + number(0xFFFF_FFFF, 4) + number(0xFFFF_FFFF, 4) + number(0, 2)
    return large + locator + end
  }
}
