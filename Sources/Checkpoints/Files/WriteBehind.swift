import Synchronization

/// Sends what is written on to the disk, and drops it from the page cache once it is there.
///
/// A large output that fills the cache takes fresh pages for every byte, which can cost several
/// times the writing itself; with few bytes on their way, the kernel uses the same pages again and
/// again. What is on its way at the end stays in the cache, so that small files stay there whole.
final class WriteBehind: Sendable {
  /// So many bytes may be on their way to the disk.
  private static let lag = 32 << 20
  /// A range that cuts one of the cache's larger pages drops nothing.
  private static let windowSize = 4 << 20

  private struct Underway {
    var ranges: [Range<Int>] = []
    var size = 0
  }

  private let underway = Mutex(Underway())

  /// Takes note that these bytes have been written.
  ///
  /// A small piece is left to the kernel: flushed each by itself, a million small tensors are a
  /// million writes of the same few pages.
  func add(_ range: Range<Int>, of file: borrowing File) {
    guard range.count >= 1 << 18 else { return }
    file.startFlush(at: range.lowerBound, count: range.count)
    let oldest: Range<Int>? = underway.withLock { underway in
      underway.ranges.append(range)
      underway.size += range.count
      guard underway.size > WriteBehind.lag else { return nil }
      let oldest = underway.ranges.removeFirst()
      underway.size -= oldest.count
      return oldest
    }
    guard let oldest else { return }
    file.finishFlush(at: oldest.lowerBound, count: oldest.count)
    let size = WriteBehind.windowSize
    let begin = oldest.lowerBound / size * size
    let end = (oldest.upperBound + size - 1) / size * size
    file.dropCache(at: begin, count: end - begin)
  }
}
