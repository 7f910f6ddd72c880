internal import CZlib
internal import CZstd

extension HDF5 {
  /// Numbers from HDF5's registry of filters.
  static let lzfFilter: Int32 = 32000
  static let zstdFilter: Int32 = 32015

  /// What is done to a chunk's bytes before they are stored.
  enum Filter: Equatable, Sendable {
    /// First the first byte of every element, then the second bytes, and so on.
    case shuffle(width: Int)
    case deflate
    /// h5py's own quick compression.
    case lzf
    /// Four bytes of checksum at the end.
    case fletcher32
    /// A zstd frame.
    case zstd
  }

  /// A chunk as it is stored.
  struct Chunk: Equatable, Sendable {
    /// Its place in the grid of chunks, counted row by row.
    let number: Int
    let offset: Int
    let byteCount: Int
    /// Bit i says that filter i was left out.
    let skippedFilters: UInt32
  }
}

extension [HDF5.Filter] {
  /// Gives back what a chunk holds.
  func undo(_ stored: [UInt8], skipping skipped: UInt32, byteCount: Int) throws(HDF5Failure)
    -> [UInt8]
  {
    var bytes = stored
    for (index, filter) in enumerated().reversed() where skipped & 1 << UInt32(index) == 0 {
      // A checksum that was added before compression comes out of it too.
      let largest = byteCount + 4 * prefix(index).count { $0 == .fletcher32 }
      switch filter {
      case .shuffle(let width): bytes = unshuffled(bytes, width: width)
      case .deflate: bytes = try inflated(bytes, largest: largest)
      case .lzf: bytes = try unpackedLZF(bytes, largest: largest)
      case .zstd: bytes = try unpackedZstd(bytes, largest: largest)
      case .fletcher32: bytes = try checked(bytes)
      }
    }
    guard bytes.count == byteCount else {
      throw HDF5Failure("has a chunk of \(bytes.count) bytes instead of \(byteCount)")
    }
    return bytes
  }
}

private func unshuffled(_ bytes: [UInt8], width: Int) -> [UInt8] {
  guard width > 1 else { return bytes }
  let count = bytes.count / width
  return [UInt8](unsafeUninitializedCapacity: bytes.count) { result, initialized in
    // Pointers, because this loop decides the speed of reading; every index is below
    // `width * count`, and what does not fill an element follows as it is.
    bytes.withUnsafeBufferPointer { bytes in
      for byte in 0..<width {
        let plane = byte * count
        for i in 0..<count { result[i &* width &+ byte] = bytes[plane &+ i] }
      }
      for i in width * count..<bytes.count { result[i] = bytes[i] }
    }
    initialized = bytes.count
  }
}

private func inflated(_ bytes: [UInt8], largest: Int) throws(HDF5Failure) -> [UInt8] {
  var result = [UInt8](repeating: 0, count: largest)
  var count = uLongf(largest)
  var taken = uLong(bytes.count)
  let code = uncompress2(&result, &count, bytes, &taken)
  guard code == Z_OK else {
    throw HDF5Failure("has a damaged chunk: zlib says \(String(cString: zError(code)))")
  }
  result.removeLast(largest - Int(count))
  return result
}

private func unpackedZstd(_ bytes: [UInt8], largest: Int) throws(HDF5Failure) -> [UInt8] {
  var result = [UInt8](repeating: 0, count: largest)
  let count = ZSTD_decompress(&result, largest, bytes, bytes.count)
  guard ZSTD_isError(count) == 0 else {
    throw HDF5Failure(
      "has a damaged chunk: zstd says \(String(cString: ZSTD_getErrorName(count)))")
  }
  result.removeLast(largest - count)
  return result
}

/// http://oldhome.schmorp.de/marc/liblzf.html: a control byte, then literals or a reference back.
private func unpackedLZF(_ bytes: [UInt8], largest: Int) throws(HDF5Failure) -> [UInt8] {
  var result: [UInt8] = []
  result.reserveCapacity(largest)
  var at = 0
  func next() throws(HDF5Failure) -> Int {
    guard at < bytes.count else {
      throw HDF5Failure("has a damaged chunk: its LZF data ends early")
    }
    at += 1
    return Int(bytes[at - 1])
  }
  while at < bytes.count {
    let control = try next()
    if control < 32 {
      guard at + control < bytes.count else {
        throw HDF5Failure("has a damaged chunk: its LZF data ends early")
      }
      result.append(contentsOf: bytes[at...at + control])
      at += control + 1
    } else {
      let length = try 2 + (control >> 5 == 7 ? 7 + next() : control >> 5)
      let distance = try 1 + (control & 31) << 8 + next()
      guard distance <= result.count else {
        throw HDF5Failure("has a damaged chunk: its LZF data refers to before its beginning")
      }
      for _ in 0..<length { result.append(result[result.count - distance]) }
    }
    guard result.count <= largest else {
      throw HDF5Failure("has a damaged chunk: its LZF data holds more than \(largest) bytes")
    }
  }
  return result
}

/// The bytes without their checksum (Fletcher's, over 16-bit big-endian words), which must be
/// right.
private func checked(_ bytes: [UInt8]) throws(HDF5Failure) -> [UInt8] {
  guard bytes.count >= 4 else { throw HDF5Failure("has a chunk without its checksum") }
  let stored = bytes.suffix(4).reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
  let content = Array(bytes.dropLast(4))
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
