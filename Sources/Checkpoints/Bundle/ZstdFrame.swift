internal import CXXHash
internal import CZstd

/// Independent zstd frames of at most 1 MiB, each with its content size and checksum.
///
/// The frame format: https://www.rfc-editor.org/rfc/rfc8878
enum ZstdFrame {
  /// What every frame but the last of a stream holds.
  static let contentSize = 1 << 20
  /// Bytes that have Huffman codes of their own in `Mode.runs`.
  static let runSize = 1 << 15
  /// The size of a frame whose content, so many bytes, is stored as it is.
  static func storedSize(_ count: Int) -> Int {
    let blocks = max(1, (count + 1 << 17 - 1) >> 17)
    return 4 + 1 + (count < 256 ? 1 : count < 65_792 ? 2 : 4) + 3 * blocks + count + 4
  }

  /// No frame is larger: the worst case of compression.
  static let largest = ZSTD_compressBound(contentSize)

  /// How a frame's content is compressed.
  enum Mode: Sendable, CaseIterable {
    /// Not at all, unless a frame by itself gains from Huffman codes.
    case stored
    /// Not at all: its size is known before its content is.
    case fixed
    /// By Huffman codes alone: right for bytes that repeat in frequency but never in sequence.
    case literals
    /// By Huffman codes alone, new ones every 32 KiB: right for bytes that are sorted by something
    /// on which their frequencies depend.
    case runs
    /// As zstd usually does, at its fastest.
    case matches
    /// As zstd usually does, thoroughly; for headers.
    case text
  }
}

/// Makes zstd frames; a worker keeps one and its contexts.
struct FrameEncoder: ~Copyable {
  private let contexts: [ZstdFrame.Mode: OpaquePointer]

  init() {
    func context(_ parameters: [(ZSTD_cParameter, Int32)]) -> OpaquePointer {
      let context = ZSTD_createCCtx()!
      for (parameter, value) in parameters {
        // A zstd without the experimental parameter compresses at plain level 1 instead.
        _ = ZSTD_CCtx_setParameter(context, parameter, value)
      }
      return context
    }
    let checked = (ZSTD_c_checksumFlag, Int32(1))
    let fastest = (ZSTD_c_compressionLevel, Int32(1))
    let literals = [
      checked, fastest, (smelt_zstd_literal_mode, 1),
      // Steps so long that no match is ever found: nobody looks for any.
      (ZSTD_c_targetLength, 131_072), (ZSTD_c_minMatch, 7), (ZSTD_c_hashLog, 6),
    ]
    contexts = [
      .literals: context(literals),
      // No block of a frame is larger than its window.
      .runs: context(
        literals + [(ZSTD_c_windowLog, Int32(ZstdFrame.runSize.trailingZeroBitCount))]),
      .matches: context([checked, fastest]),
      .text: context([checked, (ZSTD_c_compressionLevel, 12)]),
    ]
  }

  /// Bytes that the contexts take, about, for frames of tensors.
  static let memory = 4 << 20

  deinit { contexts.values.forEach { ZSTD_freeCCtx($0) } }

  /// Writes one frame that holds `content` and returns its size.
  /// - Precondition: `frame` has room for `ZstdFrame.largest` bytes.
  func encode(
    _ content: UnsafeRawBufferPointer, _ mode: ZstdFrame.Mode,
    into frame: UnsafeMutableRawBufferPointer
  ) -> Int {
    precondition(content.count <= ZstdFrame.contentSize && frame.count >= ZstdFrame.largest)
    guard let context = contexts[mode] else { return store(content, into: frame) }
    let size = ZSTD_compress2(
      context, frame.baseAddress, frame.count, content.baseAddress, content.count)
    precondition(ZSTD_isError(size) == 0, "zstd cannot compress into a buffer of its own bound")
    return size
  }

  /// A frame of uncompressed blocks (RFC 8878, 3.1.1), written by hand: zstd has no such level.
  private func store(
    _ content: UnsafeRawBufferPointer, into frame: UnsafeMutableRawBufferPointer
  ) -> Int {
    var end = 0
    func put(_ value: UInt64, _ width: Int) {
      for byte in 0..<width { frame[end + byte] = UInt8(truncatingIfNeeded: value >> (8 * byte)) }
      end += width
    }
    let count = UInt64(content.count)
    let (sizeFlag, size, width): (UInt64, UInt64, Int) =
      count < 256 ? (0, count, 1) : count < 65_792 ? (1, count - 256, 2) : (2, count, 4)
    put(0xFD2F_B528, 4)
    put(sizeFlag << 6 | 0b10_0100, 1)  // One segment, with a checksum.
    put(size, width)
    var begin = 0
    repeat {
      let block = min(content.count - begin, 1 << 17)
      let isLast = begin + block == content.count
      put(UInt64(block) << 3 | (isLast ? 1 : 0), 3)
      if block > 0 {
        (frame.baseAddress! + end).copyMemory(
          from: content.baseAddress! + begin, byteCount: block)
      }
      end += block
      begin += block
    } while begin < content.count
    put(XXH64(content.baseAddress, content.count, 0), 4)
    return end
  }
}

/// Reads zstd frames; a reader keeps one and its context.
struct FrameDecoder: ~Copyable {
  private let context = ZSTD_createDCtx()!

  deinit { ZSTD_freeDCtx(context) }

  /// Fills `content` from a frame that must hold exactly so much.
  /// - Returns: what is wrong with the frame, if anything.
  func decode(
    _ frame: UnsafeRawBufferPointer, into content: UnsafeMutableRawBufferPointer
  ) -> String? {
    // The descriptor: a checksum, no dictionary, the two reserved bits 0.
    guard frame.count > 8, frame.starts(with: [0x28, 0xB5, 0x2F, 0xFD]),
      frame[4] & 0b1_1111 == 0b100
    else {
      return "has a frame without a checksum or of an unknown kind"
    }
    guard ZSTD_getFrameContentSize(frame.baseAddress, frame.count) == UInt64(content.count) else {
      return "has a frame of another size than the seek table says"
    }
    guard ZSTD_findFrameCompressedSize(frame.baseAddress, frame.count) == frame.count else {
      return "has a frame that does not end where the seek table says"
    }
    let size = ZSTD_decompressDCtx(
      context, content.baseAddress, content.count, frame.baseAddress, frame.count)
    guard ZSTD_isError(size) == 0 else {
      return "has a damaged frame: \(String(cString: ZSTD_getErrorName(size)))"
    }
    return size == content.count ? nil : "has a frame that holds \(size) bytes"
  }
}

/// XXH3's 64 bits of bytes that come in pieces.
struct Checksum: ~Copyable {
  private let state = XXH3_createState()!

  init() { XXH3_64bits_reset(state) }

  deinit { XXH3_freeState(state) }

  func update(_ bytes: RawSpan) { bytes.withUnsafeBytes { update($0) } }

  func update(_ bytes: UnsafeRawBufferPointer) {
    smelt_xxh3_update(state, bytes.baseAddress, bytes.count)
  }

  var value: UInt64 { XXH3_64bits_digest(state) }
}
