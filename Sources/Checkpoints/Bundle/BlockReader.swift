/// What one thread at a time decodes blocks with.
final class BlockReader: @unchecked Sendable {
  // Sound: readers are shared through a lock and each is with one thread at a time.
  let decoder = FrameDecoder()
  let compressed = PinnedBytes(count: ZstdFrame.largest)
  /// The streams of a block, 1 MiB apart.
  let planes: PinnedBytes
  /// Values of a sparse block, coded elements, or a reference's block.
  let elements: PinnedBytes
  /// One frame's bytes.
  let octets = PinnedBytes(count: ZstdFrame.contentSize)
  /// Which frame's, if they are still all there.
  var octetsFrame: Int?
  private let floats = PinnedBytes(count: 4 * Codec.blockCount)
  let scales = PinnedBytes(count: 4 * (Codec.blockCount / Quantisation.smallestGroup + 2))
  private(set) lazy var scratch = PinnedBytes(count: Steps.scratch)
  /// The factors of a block's rows.
  private(set) lazy var left = PinnedBytes(
    count: 4 * (Codec.blockCount + 2 * ThinProduct.largestRank))
  /// A row of the other factors.
  private(set) lazy var row = PinnedBytes(count: 4 * ThinProduct.largestRowLength)
  /// The block that was last read in pieces.
  let block: PinnedBytes
  var held: (tensor: Int, block: Int)?

  init(blockSize: Int) {
    planes = PinnedBytes(count: blockSize)
    elements = PinnedBytes(count: blockSize)
    block = PinnedBytes(count: blockSize)
  }

  /// Room for a block's elements as numbers.
  func values(_ count: Int) -> UnsafeMutableBufferPointer<Float> {
    UnsafeMutableBufferPointer(
      start: floats.start.assumingMemoryBound(to: Float.self), count: count)
  }

  /// Bytes that all of it takes.
  static func memory(blockSize: Int) -> Int {
    3 * blockSize + Steps.scratch + (2 + 4 + 1 + 4 + 4) << 20
  }
}
