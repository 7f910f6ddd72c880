import Synchronization

/// Sends what is written on to the disk, and drops it from the page cache once it is there.
///
/// A large output that fills the cache takes fresh pages for every byte, which can cost several
/// times the writing itself; with few bytes on their way, the kernel uses the same pages again and
/// again. What is on its way at the end stays in the cache, so that small files stay there whole.
///
/// It goes by aligned windows, each when all of it has been written: a flush that cuts one of the
/// cache's larger pages writes it twice, and a range that cuts one drops nothing.
final class WriteBehind: Sendable {
  /// So many bytes may be on their way to the disk.
  private static let lag = 32 << 20
  private static let windowSize = 2 << 20

  private struct State {
    var windows: FileWindows
    /// The windows on their way, the oldest first.
    var underway: [Int] = []
  }

  private let state: Mutex<State>

  /// For a file that is written from its beginning on.
  init() { state = Mutex(State(windows: FileWindows(ofGrowingFile: Self.windowSize))) }

  /// - Parameter ranges: all that will be written, in whatever order.
  init(of ranges: some Sequence<Range<Int>>) {
    state = Mutex(State(windows: FileWindows(of: ranges, size: Self.windowSize)))
  }

  /// Takes note that these bytes have been written.
  func add(_ range: Range<Int>, of file: borrowing File) {
    // Usually one, and seldom any for a piece of a small tensor.
    var complete: [Int] = []
    state.withLock { $0.windows.pass(range) { complete.append($0) } }
    for window in complete {
      file.startFlush(at: window * Self.windowSize, count: Self.windowSize)
      let oldest: Int? = state.withLock { state in
        state.underway.append(window)
        guard state.underway.count > Self.lag / Self.windowSize else { return nil }
        return state.underway.removeFirst()
      }
      guard let oldest else { continue }
      file.finishFlush(at: oldest * Self.windowSize, count: Self.windowSize)
      file.dropCache(at: oldest * Self.windowSize, count: Self.windowSize)
    }
  }
}
