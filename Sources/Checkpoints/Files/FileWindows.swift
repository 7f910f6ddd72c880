/// A file cut into windows of one size, each done with when all bytes of it that count have passed.
struct FileWindows {
  let size: Int
  /// Of each window, the bytes that have not passed yet.
  private var missing: [Int] = []
  /// Whether the file has no end yet: every byte of a window that is not on the list counts.
  private let isGrowing: Bool

  /// The windows of a file that is written from its beginning on, without a gap.
  init(ofGrowingFile size: Int) {
    self.size = size
    isGrowing = true
  }

  /// - Parameter ranges: the bytes that count.
  init(of ranges: some Sequence<Range<Int>>, size: Int) {
    self.size = size
    isGrowing = false
    for range in ranges {
      forEachPart(of: range) { windows, window, count in
        windows.grow(to: window, with: 0)
        windows.missing[window] += count
      }
    }
  }

  /// Takes note that these bytes have passed, and names the windows that are done with.
  mutating func pass(_ range: Range<Int>, _ isDone: (_ window: Int) -> Void) {
    forEachPart(of: range) { windows, window, count in
      if windows.isGrowing { windows.grow(to: window, with: windows.size) }
      windows.missing[window] -= count
      if windows.missing[window] == 0 { isDone(window) }
    }
  }

  private mutating func grow(to window: Int, with count: Int) {
    while missing.count <= window { missing.append(count) }
  }

  private mutating func forEachPart(
    of range: Range<Int>, _ body: (inout FileWindows, _ window: Int, _ count: Int) -> Void
  ) {
    var begin = range.lowerBound
    while begin < range.upperBound {
      let window = begin / size
      let end = min(range.upperBound, (window + 1) * size)
      body(&self, window, end - begin)
      begin = end
    }
  }
}
