import CZlib
import Glibc
import Synchronization

/// More than so many bytes deflate cannot make of one.
let largestDeflateRatio = 1032

/// zlib's checksum of some bytes.
func crc32(of bytes: RawSpan) -> UInt {
  bytes.withUnsafeBytes {
    crc32_z(0, $0.baseAddress?.assumingMemoryBound(to: UInt8.self), $0.count)
  }
}

/// Compresses a stream of bytes as zip files have it: deflated, without a header of zlib's.
final class Deflater {
  private var stream = z_stream()
  private var output = [UInt8](repeating: 0, count: 1 << 16)

  init() throws(CheckpointError) {
    let code = deflateInit2_(
      &stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -15, 8, Z_DEFAULT_STRATEGY, ZLIB_VERSION,
      Int32(MemoryLayout<z_stream>.size))
    precondition(code == Z_OK, "zlib has no memory")
  }

  deinit { deflateEnd(&stream) }

  func deflate(
    _ bytes: RawSpan, isLast: Bool, _ write: (RawSpan) throws(CheckpointError) -> Void
  ) throws(CheckpointError) {
    var done = 0
    var code = Z_OK
    // Until the input is used up and, at the end, until the stream is closed.
    while done < bytes.byteCount || (isLast && code != Z_STREAM_END) {
      let (taken, put, result) = step(bytes, from: done, isLast: isLast)
      done += taken
      code = result
      precondition(code == Z_OK || code == Z_STREAM_END || code == Z_BUF_ERROR)
      let packed = Array(output[..<put])
      try write(packed.span.bytes)
    }
  }

  private func step(_ bytes: RawSpan, from start: Int, isLast: Bool)
    -> (taken: Int, put: Int, code: Int32)
  {
    // Pieces are far below the 4 GiB that zlib counts to; it only reads its input.
    bytes.withUnsafeBytes { input in
      output.withUnsafeMutableBufferPointer { output in
        stream.next_in = input.baseAddress.map {
          UnsafeMutablePointer(mutating: $0.assumingMemoryBound(to: UInt8.self)) + start
        }
        stream.avail_in = UInt32(input.count - start)
        stream.next_out = output.baseAddress
        stream.avail_out = UInt32(output.count)
        let code = CZlib.deflate(&stream, isLast ? Z_FINISH : Z_NO_FLUSH)
        return (
          input.count - start - Int(stream.avail_in), output.count - Int(stream.avail_out), code
        )
      }
    }
  }
}

extension ZipArchive {
  /// The first bytes of an entry, unpacked; as many of `count` as there are.
  func beginning(of entry: Entry, _ count: Int) throws(CheckpointError) -> [UInt8] {
    let wanted = min(count, entry.size)
    guard entry.isCompressed else {
      return try file.bytes(at: offset(of: entry), count: wanted)
    }
    var bytes: [UInt8] = []
    try inflate(entry) { (piece) throws(CheckpointError) in
      piece.withUnsafeBytes { bytes += $0.prefix(wanted - bytes.count) }
      return bytes.count < wanted
    }
    guard bytes.count == wanted else { throw damaged(entry, "ends too early") }
    return bytes
  }

  /// Whether an entry has the checksum that was recorded of it; nil if none was: PyTorch can be
  /// told to leave it out, and then writes 0.
  func isSound(_ entry: Entry) throws(CheckpointError) -> Bool? {
    var checksum: UInt = 0
    if entry.isCompressed {
      try inflate(entry) { (piece) throws(CheckpointError) in
        checksum = crc32_combine(checksum, crc32(of: piece), piece.byteCount)
        return true
      }
    } else {
      let start = try offset(of: entry)
      var buffer = Buffer(byteCount: min(4 << 20, entry.size))
      for done in stride(from: 0, to: entry.size, by: 4 << 20) {
        var piece = buffer.first(min(4 << 20, entry.size - done))
        try file.read(at: start + done, into: &piece)
        checksum = crc32_combine(checksum, crc32(of: piece.bytes), piece.byteCount)
      }
    }
    if checksum == UInt(entry.checksum) { return true }
    return entry.checksum == 0 ? nil : false
  }

  /// Reads the entries that tensors are in, and compares them with their checksums.
  /// - Parameter entryOf: the entry of the tensor at this position of the list.
  func verify(
    _ tensors: [TensorInfo], workers: Int, in entryOf: @Sendable (Int) -> Entry
  ) throws -> Verification {
    // Tensors may share an entry, which is read once.
    let positions = Dictionary(grouping: tensors.indices) { ExactName(entryOf($0).name) }
      .values.sorted { $0[0] < $1[0] }
    let sound = Mutex<[Bool?]>(.init(repeating: nil, count: tensors.count))
    let failures = ReadingFailures()
    try forEachStep(count: positions.count, workers: workers) {
    } body: { step, _ in
      do throws(CheckpointError) {
        let isSound = try isSound(entryOf(positions[step][0]))
        sound.withLock { sound in positions[step].forEach { sound[$0] = isSound } }
      } catch {
        for position in positions[step] { failures.add(error, ofTensorAt: position, step: step) }
      }
    }
    try file.checkUnchanged()
    let (results, causes) = (sound.withLock { $0 }, failures.causes)
    func found(_ isSound: Bool?) -> [TensorInfo] {
      tensors.indices.filter { results[$0] == isSound && causes[$0] == nil }.map { tensors[$0] }
    }
    return Verification(
      tensors, damaged: found(false), unreadable: failures.unreadable(of: tensors),
      unrecorded: found(nil))
  }

  /// Unpacks an entry into a temporary file without a name and checks its size and checksum.
  ///
  /// It lies in $TMPDIR or else in /var/tmp, which is for what is large: /tmp may be memory.
  func unpack(_ entry: Entry) throws(CheckpointError) -> MappedFile {
    guard entry.size / largestDeflateRatio <= entry.storedSize else {
      throw damaged(entry, "says that it is larger than it can be")
    }
    let target = try room(for: entry)
    var size = 0
    var checksum: UInt = 0
    try inflate(entry) { (piece) throws(CheckpointError) in
      guard piece.byteCount <= entry.size - size else {
        throw damaged(entry, "is larger than it says")
      }
      try target.write(piece, at: size)
      checksum = crc32_combine(checksum, crc32(of: piece), piece.byteCount)
      size += piece.byteCount
      return true
    }
    guard size == entry.size else { throw damaged(entry, "ends too early") }
    guard checksum == UInt(entry.checksum) else {
      throw damaged(entry, "is not what its checksum was made of")
    }
    return try MappedFile(target, path: path)
  }

  /// An empty temporary file of an entry's size.
  private func room(for entry: Entry) throws(CheckpointError) -> File {
    do {
      let file = try File(temporaryBeside: temporaryFolder + "/smelt")
      try file.preallocate(entry.size)
      return file
    } catch {
      throw CheckpointError(
        file: path,
        "its zip entry \(quoted(entry.name)) cannot be unpacked in \(temporaryFolder): \(error.problem)",
        remedy: "set TMPDIR to a folder with room for \(entry.size) bytes")
    }
  }

  func damaged(_ entry: Entry, _ problem: String) -> CheckpointError {
    CheckpointError(
      file: path, "its zip entry \(quoted(entry.name)) \(problem)",
      remedy: "the file is damaged: download it again")
  }

  /// Unpacks an entry piece by piece, until its end or `take` has enough.
  private func inflate(
    _ entry: Entry, _ take: (RawSpan) throws(CheckpointError) -> Bool
  ) throws(CheckpointError) {
    var stream = z_stream()
    let start = try offset(of: entry)
    guard
      inflateInit2_(&stream, -15, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK
    else { throw damaged(entry, "cannot be unpacked: no memory") }
    defer { inflateEnd(&stream) }
    var output = [UInt8](repeating: 0, count: 1 << 18)
    var done = 0
    var code = Z_OK
    while done < entry.storedSize, code != Z_STREAM_END {
      var input = try file.bytes(at: start + done, count: min(1 << 18, entry.storedSize - done))
      var used = 0
      while used < input.count, code != Z_STREAM_END {
        let (taken, put): (Int, Int) = input.withUnsafeMutableBufferPointer { input in
          output.withUnsafeMutableBufferPointer { output in
            stream.next_in = input.baseAddress! + used
            stream.avail_in = UInt32(input.count - used)
            stream.next_out = output.baseAddress
            stream.avail_out = UInt32(output.count)
            code = CZlib.inflate(&stream, Z_NO_FLUSH)
            return (
              input.count - used - Int(stream.avail_in), output.count - Int(stream.avail_out)
            )
          }
        }
        guard code == Z_OK || code == Z_STREAM_END || code == Z_BUF_ERROR, taken + put > 0 else {
          throw damaged(entry, "cannot be unpacked")
        }
        used += taken
        if put > 0, try !take(output.span.bytes.extracting(0..<put)) { return }
      }
      done += used
    }
    // What zlib still holds when its input is at an end, a truncated stream among it.
    while code != Z_STREAM_END {
      let put = output.withUnsafeMutableBufferPointer { output in
        stream.avail_in = 0
        stream.next_out = output.baseAddress
        stream.avail_out = UInt32(output.count)
        code = CZlib.inflate(&stream, Z_NO_FLUSH)
        return output.count - Int(stream.avail_out)
      }
      guard put > 0, code == Z_OK || code == Z_STREAM_END else {
        throw damaged(entry, "cannot be unpacked")
      }
      if try !take(output.span.bytes.extracting(0..<put)) { return }
    }
  }
}
