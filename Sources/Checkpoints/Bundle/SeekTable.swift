/// Where every frame of a bundle lies: zstd's seekable format, version 0.1.0.
///
/// A skippable frame at the end of the file:
/// https://github.com/facebook/zstd/blob/dev/contrib/seekable_format/zstd_seekable_compression_format.md
struct SeekTable: Sendable {
  /// Where each frame begins in the file, and where the last one ends.
  private(set) var starts = [0]
  /// What each frame holds.
  private(set) var contentSizes: [Int] = []

  private static let frameMagic: UInt32 = 0x184D_2A5E
  private static let footerMagic: UInt32 = 0x8F92_EAB1
  private static let footerSize = 9

  /// Bytes that the tables take for a frame.
  static let costOfFrame = 12

  init() {}

  var count: Int { contentSizes.count }

  mutating func append(frame size: Int, content: Int) {
    starts.append(starts.last! + size)
    contentSizes.append(content)
  }

  /// Takes the last frame off the table.
  mutating func removeLast() -> (range: Range<Int>, content: Int) {
    let range = self[count - 1]
    starts.removeLast()
    return (range, contentSizes.removeLast())
  }

  subscript(frame: Int) -> Range<Int> { starts[frame]..<starts[frame + 1] }

  /// The frame that is the table.
  var bytes: [UInt8] {
    var bytes: [UInt8] = []
    func put(_ value: UInt32) { bytes.append(contentsOf: (0..<4).map { byte(value, $0) }) }
    bytes.reserveCapacity(8 + 8 * count + SeekTable.footerSize)
    put(SeekTable.frameMagic)
    put(UInt32(8 * count + SeekTable.footerSize))
    for frame in 0..<count {
      put(UInt32(self[frame].count))
      put(UInt32(contentSizes[frame]))
    }
    put(UInt32(count))
    bytes.append(0)  // No checksums here: every frame has its own.
    put(SeekTable.footerMagic)
    return bytes
  }

  /// Reads the table from the end of a file and proves that it describes the whole file.
  init(_ file: borrowing File) throws(CheckpointError) {
    let path = file.path
    let size = try file.size()
    func malformed(_ problem: String) -> CheckpointError {
      CheckpointError(
        file: path, problem, remedy: "it is not a bundle, or truncated: copy or download it again")
    }
    guard size >= 8 + SeekTable.footerSize else { throw malformed("has no seek table at its end") }
    let footer = try file.bytes(at: size - SeekTable.footerSize, count: SeekTable.footerSize)
    guard word(footer, 5) == SeekTable.footerMagic else {
      throw malformed("has no seek table at its end")
    }
    guard footer[4] == 0 else { throw malformed("has a seek table of an unknown kind") }
    let count = Int(word(footer, 0))
    let tableSize = 8 + 8 * count + SeekTable.footerSize
    guard tableSize <= size else {
      throw malformed("has a seek table of \(count) frames, more than fit into the file")
    }
    let table = try file.bytes(at: size - tableSize, count: tableSize - SeekTable.footerSize)
    guard word(table, 0) == SeekTable.frameMagic, Int(word(table, 4)) == tableSize - 8 else {
      throw malformed("has a seek table that does not begin where it should")
    }
    for frame in 0..<count {
      let (frameSize, content) = (Int(word(table, 8 + 8 * frame)), Int(word(table, 12 + 8 * frame)))
      guard content <= ZstdFrame.contentSize, frameSize <= ZstdFrame.largest else {
        throw malformed("has a seek table with a frame of \(frameSize) bytes for \(content)")
      }
      append(frame: frameSize, content: content)
    }
    guard starts.last! == size - tableSize else {
      throw malformed(
        "has a seek table for \(starts.last!) bytes of frames where there are \(size - tableSize)")
    }
  }
}

/// A checksum of every frame's compressed bytes: a skippable frame of our own, the last in the
/// seek table.
///
/// zstd's own checksum is of the content. It leaves bits of a frame on which the content does
/// not depend, and lets the decoder work on damaged bytes before it finds out.
struct FrameChecksums: Sendable {
  private var values: [UInt32] = []

  private static let frameMagic: UInt32 = 0x184D_2A5B

  init() {}

  /// The lower half of XXH3.
  static func of(_ frame: UnsafeRawBufferPointer) -> UInt32 {
    let checksum = Checksum()
    checksum.update(frame)
    return UInt32(truncatingIfNeeded: checksum.value)
  }

  subscript(frame: Int) -> UInt32 {
    get { values[frame] }
    set { values[frame] = newValue }
  }

  mutating func append(_ checksum: UInt32) { values.append(checksum) }

  /// The frame.
  var bytes: [UInt8] {
    ([FrameChecksums.frameMagic, UInt32(4 * values.count)] + values).flatMap { value in
      (0..<4).map { byte(value, $0) }
    }
  }

  /// - Returns: nil if these are not the checksums of so many frames.
  init?(_ bytes: [UInt8], count: Int) {
    guard bytes.count == 8 + 4 * count, word(bytes, 0) == FrameChecksums.frameMagic,
      Int(word(bytes, 4)) == 4 * count
    else { return nil }
    values = (0..<count).map { word(bytes, 8 + 4 * $0) }
  }
}

private func byte(_ value: UInt32, _ place: Int) -> UInt8 {
  UInt8(truncatingIfNeeded: value >> (8 * place))
}

private func word(_ bytes: [UInt8], _ at: Int) -> UInt32 {
  (0..<4).reduce(0) { $0 | UInt32(bytes[at + $1]) << (8 * $1) }
}
