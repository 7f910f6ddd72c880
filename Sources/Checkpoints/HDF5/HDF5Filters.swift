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
