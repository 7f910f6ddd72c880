internal import CZlib
internal import CZstd

/// Compresses chunks; a thread takes one, with its buffers, for as long as it needs it.
///
/// It works on pointers: its loop decides the speed of writing, and what it calls is in C.
final class ChunkCompressor: @unchecked Sendable {  // Sound: one thread has it at a time.
  private let compression: HDF5.Compression
  private let zstd = ZSTD_createCCtx()!
  private var padded = Scratch()
  private var shuffled = Scratch()

  init(_ compression: HDF5.Compression) {
    self.compression = compression
    guard case .zstd(let level) = compression else { return }
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_compressionLevel, Int32(level ?? 1))
    guard level == nil else { return }
    // ZSTD_c_literalCompressionMode: experimental, so that its name is kept from us. A zstd
    // without it compresses at plain level 1.
    let literalMode = ZSTD_cParameter(rawValue: 1002)
    guard ZSTD_isError(ZSTD_CCtx_setParameter(zstd, literalMode, 1)) == 0 else { return }
    // Steps so long that no match is ever found: nobody looks for any.
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_targetLength, 131_072)
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_minMatch, 7)
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_hashLog, 6)
  }

  deinit { ZSTD_freeCCtx(zstd) }

  /// The memory that any chunk of so many bytes fits when it is compressed.
  static func room(for byteCount: Int) -> Int {
    max(ZSTD_compressBound(byteCount), Int(compressBound(uLong(byteCount))))
  }

  /// Makes a chunk as it is to be stored.
  /// - Parameters:
  ///   - content: the used bytes of the chunk, which lie at its beginning.
  ///   - byteCount: how many bytes every chunk has.
  ///   - width: the bytes of an element.
  ///   - memory: at least `room(for: byteCount)` bytes, which the chunk takes over.
  func compress(
    _ content: UnsafeRawBufferPointer, byteCount: Int, width: Int, into memory: PinnedBytes
  ) -> PackedChunk {
    var content = content
    if content.count < byteCount {
      let room = padded.room(byteCount)
      room.copyMemory(from: content)
      for i in content.count..<byteCount { room[i] = 0 }
      content = UnsafeRawBufferPointer(room)
    }
    if width > 1 {
      let room = shuffled.room(byteCount)
      shuffle(content, width: width, into: room)
      content = UnsafeRawBufferPointer(room)
    }
    let count = pack(content, into: memory.bytes)
    guard count < content.count else {
      memory.bytes.copyMemory(from: content)
      return PackedChunk(
        memory: memory, count: content.count, skippedFilters: width > 1 ? 0b10 : 0b1)
    }
    return PackedChunk(memory: memory, count: count, skippedFilters: 0)
  }

  /// - Returns: how many bytes it takes; more than there were if it does not become smaller.
  private func pack(_ content: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer)
    -> Int
  {
    switch compression {
    case .zstd:
      let count = ZSTD_compress2(
        zstd, room.baseAddress, room.count, content.baseAddress, content.count)
      precondition(ZSTD_isError(count) == 0, "zstd cannot compress into its own bound")
      return count
    case .deflate(let level):
      var stream = z_stream()
      let strategy = level == nil ? Z_HUFFMAN_ONLY : Z_DEFAULT_STRATEGY
      let code = deflateInit2_(
        &stream, Int32(level ?? 1), Z_DEFLATED, 15, 9, strategy, ZLIB_VERSION,
        Int32(MemoryLayout<z_stream>.size))
      precondition(code == Z_OK, "zlib cannot begin")
      defer { deflateEnd(&stream) }
      stream.next_in = UnsafeMutablePointer(
        mutating: content.baseAddress!.assumingMemoryBound(to: UInt8.self))
      stream.avail_in = UInt32(content.count)
      stream.next_out = room.baseAddress!.assumingMemoryBound(to: UInt8.self)
      stream.avail_out = UInt32(room.count)
      // With Huffman codes only, the bound is not one; what does not fit is not smaller.
      return deflate(&stream, Z_FINISH) == Z_STREAM_END ? Int(stream.total_out) : .max
    }
  }
}

/// The first bytes of all elements, then their second bytes, and so on.
private func shuffle(
  _ bytes: UnsafeRawBufferPointer, width: Int, into shuffled: UnsafeMutableRawBufferPointer
) {
  let count = bytes.count / width
  func split<Bits: FixedWidthInteger>(_: Bits.Type) {
    for byte in 0..<width {
      // Plain pointers, or the loop does not become vectors.
      let plane = (shuffled.baseAddress! + byte * count).assumingMemoryBound(to: UInt8.self)
      let elements = bytes.baseAddress!
      for i in 0..<count {
        let bits = elements.loadUnaligned(
          fromByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
        plane[i] = UInt8(truncatingIfNeeded: bits &>> Bits(8 &* byte))
      }
    }
  }
  switch width {
  case 2: split(UInt16.self)
  case 4: split(UInt32.self)
  case 8: split(UInt64.self)
  default: preconditionFailure("no element has \(width) bytes")
  }
}
