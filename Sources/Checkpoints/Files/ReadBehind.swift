import Synchronization

/// Drops from the page cache what has been read of a file for the last time.
///
/// Filling the cache with gigabytes that nobody will ask for again costs more than reading them.
/// The cache is dropped by aligned windows, because a range that cuts one of its larger pages
/// drops nothing, and one window late, because the newest pages are still held.
final class ReadBehind: Sendable {
  private static let windowSize = 4 << 20

  private struct State {
    var windows: FileWindows
    var finished: Int?
  }

  private let state: Mutex<State>

  /// - Parameter ranges: where the file's tensors are.
  init(of ranges: [Range<Int>]) {
    state = Mutex(State(windows: FileWindows(of: ranges, size: Self.windowSize)))
  }

  /// Takes note that these bytes will not be read again.
  func forget(_ range: Range<Int>, of file: MappedFile) {
    state.withLock { state in
      var finished = state.finished
      state.windows.pass(range) { window in
        if let finished {
          file.dropCache(at: finished * Self.windowSize, count: Self.windowSize)
        }
        finished = window
      }
      state.finished = finished
    }
  }
}
