extension RandomAccessCollection where Index == Int {
  /// Where the elements begin that belong, by bisection: behind the first there are no others.
  package func partitioningIndex(_ belongs: (Element) -> Bool) -> Int {
    var (low, high) = (startIndex, endIndex)
    while low < high {
      let middle = low + (high - low) / 2
      if belongs(self[middle]) { high = middle } else { low = middle + 1 }
    }
    return low
  }
}
