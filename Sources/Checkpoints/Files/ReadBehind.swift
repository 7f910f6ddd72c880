import Synchronization

/// Drops from the page cache what has been read of a file for the last time.
///
/// Filling the cache with gigabytes that nobody will ask for again costs more than reading them.
/// The cache is dropped by aligned windows, because a range that cuts one of its larger pages
/// drops nothing, and one window late, because the newest pages are still held.
final class ReadBehind: Sendable {
  private static let windowSize = 4 << 20

  private struct State {
    /// Of each window, the bytes of tensors that have not been read yet.
    var unread: [Int]
    var finished: Int?
  }

  private let state: Mutex<State>

  /// - Parameter ranges: where the file's tensors are.
  init(of ranges: [Range<Int>], fileSize: Int) {
    var unread = Array(repeating: 0, count: fileSize / ReadBehind.windowSize + 1)
    for range in ranges {
      ReadBehind.forEachWindow(in: range) { window, count in unread[window] += count }
    }
    state = Mutex(State(unread: unread))
  }

  /// Takes note that these bytes will not be read again.
  func forget(_ range: Range<Int>, of file: MappedFile) {
    state.withLock { state in
      ReadBehind.forEachWindow(in: range) { window, count in
        state.unread[window] -= count
        guard state.unread[window] == 0 else { return }
        if let finished = state.finished {
          file.dropCache(at: finished * ReadBehind.windowSize, count: ReadBehind.windowSize)
        }
        state.finished = window
      }
    }
  }

  private static func forEachWindow(
    in range: Range<Int>, _ body: (_ window: Int, _ count: Int) -> Void
  ) {
    var begin = range.lowerBound
    while begin < range.upperBound {
      let window = begin / windowSize
      let end = min(range.upperBound, (window + 1) * windowSize)
      body(window, end - begin)
      begin = end
    }
  }
}
