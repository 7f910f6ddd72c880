extension HDF5 {
  /// How chunks are compressed, after their bytes were shuffled.
  ///
  /// Weights repeat in frequency but not in sequence, so that by default only Huffman codes
  /// are used: as small as any level finds, in a fraction of the time.
  public enum Compression: Equatable, Sendable {
    /// Needs hdf5plugin in Python. With a level, matches are sought too.
    case zstd(level: Int? = nil)
    /// Read by every HDF5. With a level, matches are sought too.
    case deflate(level: Int? = nil)

    /// `zstd`, `zstd:LEVEL`, `deflate` or `deflate:LEVEL`.
    public init?(_ text: String) {
      let parts = text.split(separator: ":", omittingEmptySubsequences: false)
      let level = parts.count == 2 ? Int(parts[1]) : nil
      guard parts.count == 1 || level != nil && parts.count == 2 else { return nil }
      switch (parts[0], level ?? 1) {
      case ("zstd", 1...22): self = .zstd(level: level)
      case ("deflate", 1...9): self = .deflate(level: level)
      default: return nil
      }
    }
  }

  /// Large enough to compress well and to cost little each, small enough to hold a few.
  private static let chunkByteCount = 1 << 20
  /// Smaller tensors stay as they are: the list of chunks would take what they save.
  private static let smallestCompressed = 64 << 10

  /// The chunks of a tensor that is worth compressing: whole rows, about equally many in each.
  static func chunkDimensions(for tensor: TensorInfo) -> [Int]? {
    guard tensor.byteCount >= smallestCompressed else { return nil }
    var room = chunkByteCount / (tensor.dtype.hdf5StorageType.bitWidth / 8)
    var chunk: [Int] = []
    for length in tensor.hdf5Dimensions.reversed() {
      let parts = 1 + (length - 1) / max(room, 1)
      chunk.insert(1 + (length - 1) / parts, at: 0)
      room /= length
    }
    return chunk
  }

  /// - Precondition: the tensor is worth compressing.
  static func grid(of tensor: TensorInfo) -> ChunkGrid {
    ChunkGrid(
      dimensions: tensor.hdf5Dimensions, chunk: chunkDimensions(for: tensor)!,
      elementSize: tensor.dtype.hdf5StorageType.bitWidth / 8)!
  }

  /// The indices of a chunk's first element.
  static func corner(ofChunk number: Int, of tensor: TensorInfo) -> [Int] {
    var rest = number
    let corner = zip(tensor.hdf5Dimensions, chunkDimensions(for: tensor)!).reversed().map {
      (length, chunk) in
      let count = 1 + (length - 1) / chunk
      defer { rest /= count }
      return rest % count * chunk
    }
    return corner.reversed()
  }
}
