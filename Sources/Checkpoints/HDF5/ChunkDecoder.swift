internal import CZlib
internal import CZstd

/// Reads chunks and undoes their filters; a thread takes one, with its buffers, for as long as
/// it needs it.
///
/// It works on pointers: its loops decide the speed of reading, and what it calls is in C.
final class ChunkDecoder: @unchecked Sendable {  // Sound: one thread has it at a time.
  private let zstd = ZSTD_createDCtx()!
  private var stored = Scratch()
  private var even = Scratch()
  private var odd = Scratch()

  deinit { ZSTD_freeDCtx(zstd) }

  /// What a chunk holds, used or not: bytes that stay until the next call.
  func content(
    of chunk: HDF5.Chunk, in file: borrowing File, _ filters: [HDF5.Filter], byteCount: Int
  ) throws(CheckpointError) -> UnsafeRawBufferPointer {
    let room = stored.room(chunk.byteCount)
    var span = MutableRawSpan(_unsafeBytes: room)
    try file.read(at: chunk.offset, into: &span)
    do { return try undo(filters, on: UnsafeRawBufferPointer(room), chunk, byteCount) } catch {
      throw error.error(file: file.path)
    }
  }

  private func undo(
    _ filters: [HDF5.Filter], on stored: UnsafeRawBufferPointer, _ chunk: HDF5.Chunk,
    _ byteCount: Int
  ) throws(HDF5Failure) -> UnsafeRawBufferPointer {
    var bytes = stored
    for (index, filter) in filters.enumerated().reversed()
    where chunk.skippedFilters & 1 << UInt32(index) == 0 {
      // A checksum that was added before compression comes out of it too.
      let largest = byteCount + 4 * filters.prefix(index).count { $0 == .fletcher32 }
      // No filter reads where it writes: they take turns.
      let room = index.isMultiple(of: 2) ? even.room(largest) : odd.room(largest)
      let count: Int
      switch filter {
      case .fletcher32:
        bytes = try checked(bytes)
        continue
      case .shuffle(let width):
        guard bytes.count <= largest else {
          throw HDF5Failure("has a chunk of more than \(byteCount) bytes")
        }
        unshuffle(bytes, width: width, into: room)
        count = bytes.count
      case .deflate: count = try inflate(bytes, into: room)
      case .lzf: count = try unpackLZF(bytes, into: room)
      case .zstd:
        count = ZSTD_decompressDCtx(
          zstd, room.baseAddress, room.count, bytes.baseAddress, bytes.count)
        guard ZSTD_isError(count) == 0 else {
          let reason = String(cString: ZSTD_getErrorName(count))
          throw HDF5Failure("has a damaged chunk: zstd says \(reason)")
        }
      }
      bytes = UnsafeRawBufferPointer(rebasing: room[..<count])
    }
    guard bytes.count == byteCount else {
      throw HDF5Failure("has a chunk of \(bytes.count) bytes instead of \(byteCount)")
    }
    return bytes
  }
}

/// Elements from the first bytes of all, then their second bytes, and so on.
private func unshuffle(
  _ bytes: UnsafeRawBufferPointer, width: Int, into elements: UnsafeMutableRawBufferPointer
) {
  let count = width > 1 ? bytes.count / width : 0
  func join<Bits: FixedWidthInteger & UnsignedInteger>(_: Bits.Type) {
    for i in 0..<count {
      var bits: Bits = 0
      for byte in 0..<MemoryLayout<Bits>.size {
        bits |= Bits(truncatingIfNeeded: bytes[byte &* count &+ i]) &<< Bits(8 * byte)
      }
      elements.storeBytes(of: bits, toByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
    }
  }
  switch width {
  case 2: join(UInt16.self)
  case 4: join(UInt32.self)
  case 8: join(UInt64.self)
  default:
    for i in 0..<count {
      for byte in 0..<width { elements[i * width + byte] = bytes[byte * count + i] }
    }
  }
  // What does not fill an element follows as it is.
  for i in width * count..<bytes.count { elements[i] = bytes[i] }
}

private func inflate(_ bytes: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer)
  throws(HDF5Failure) -> Int
{
  var count = uLongf(room.count)
  var taken = uLong(bytes.count)
  let code = uncompress2(
    room.baseAddress?.assumingMemoryBound(to: UInt8.self), &count,
    bytes.baseAddress?.assumingMemoryBound(to: UInt8.self), &taken)
  guard code == Z_OK else {
    throw HDF5Failure("has a damaged chunk: zlib says \(String(cString: zError(code)))")
  }
  return Int(count)
}

/// LZF: a control byte, then literals or a reference back.
private func unpackLZF(_ bytes: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer)
  throws(HDF5Failure) -> Int
{
  let damaged = HDF5Failure("has a damaged chunk: its LZF data is wrong")
  var at = 0
  var count = 0
  func next() throws(HDF5Failure) -> Int {
    guard at < bytes.count else { throw damaged }
    at += 1
    return Int(bytes[at - 1])
  }
  while at < bytes.count {
    let control = try next()
    if control < 32 {
      let length = control + 1
      guard length <= bytes.count - at, length <= room.count - count else { throw damaged }
      for i in 0..<length { room[count + i] = bytes[at + i] }
      at += length
      count += length
    } else {
      let length = try 2 + (control >> 5 == 7 ? 7 + next() : control >> 5)
      let distance = try 1 + (control & 31) << 8 + next()
      guard distance <= count, length <= room.count - count else { throw damaged }
      // One by one: a reference may reach into what it makes.
      for i in count..<count + length { room[i] = room[i - distance] }
      count += length
    }
  }
  return count
}

/// The bytes without their checksum (Fletcher's, over 16-bit big-endian words), which must be
/// right.
private func checked(_ bytes: UnsafeRawBufferPointer) throws(HDF5Failure)
  -> UnsafeRawBufferPointer
{
  guard bytes.count >= 4 else { throw HDF5Failure("has a chunk without its checksum") }
  let content = UnsafeRawBufferPointer(rebasing: bytes.dropLast(4))
  let stored = bytes.suffix(4).reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
  func fold(_ sum: UInt32) -> UInt32 { (sum & 0xFFFF) + sum >> 16 }
  var sums: (UInt32, UInt32) = (0, 0)
  for i in stride(from: 0, to: content.count, by: 2) {
    let low = i + 1 < content.count ? UInt32(content[i + 1]) : 0
    sums.0 = fold(sums.0 + (UInt32(content[i]) << 8 | low))
    sums.1 = fold(sums.1 + sums.0)
  }
  guard fold(sums.1) << 16 | fold(sums.0) == stored else {
    throw HDF5Failure("has a damaged chunk: its checksum is wrong")
  }
  return content
}
