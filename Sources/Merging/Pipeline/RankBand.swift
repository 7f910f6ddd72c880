import CKernels

/// The elements of a row whose magnitudes rank in a given range, chosen exactly.
///
/// Of equal magnitudes at either end the ones with the lowest index are kept. When not all of
/// them are, a third pass counts them tile by tile, so that any tile knows how many came before.
struct RankBand: Sendable {
  enum Observation: Sendable {
    case statistics(OrderStatistics)
    /// Of each tile, how many elements equal the lower and the upper end.
    case ties([(lower: Int32, upper: Int32)])
    case nothing
  }

  /// One end of the band: a magnitude, and how many of the elements that have it are kept.
  private struct End: Sendable {
    var bits: UInt32
    var kept: Int
    var equal: Int
    /// Before each tile, how many elements with this magnitude there are; empty if all or none
    /// of them are kept.
    var before: [Int] = []

    var isSplit: Bool { kept > 0 && kept < equal }
  }

  private enum Stage: Sendable {
    case selecting(OrderStatistics)
    case counting
    case known
  }

  /// The ranks that are kept, counted from the smallest magnitude.
  private let kept: Range<Int>
  private var stage: Stage
  private var lower = End(bits: 0, kept: 0, equal: 0)
  private var upper = End(bits: 0, kept: 0, equal: 0)

  init(keeping kept: Range<Int>) {
    self.kept = kept
    stage = .selecting(
      OrderStatistics(ranks: kept.isEmpty ? [] : [kept.lowerBound, kept.upperBound - 1]))
  }

  static let largestNumberOfPasses = 3
  static let observationBytes = OrderStatistics.counterBytes(ranks: 2)

  var isKnown: Bool {
    if kept.isEmpty { return true }
    if case .known = stage { return true }
    return false
  }

  func makeObservation() -> Observation {
    guard !isKnown else { return .nothing }
    switch stage {
    case .selecting(let statistics): return .statistics(statistics)
    case .counting: return .ties([])
    case .known: return .nothing
    }
  }

  func observe(_ values: Span<Float>, into observation: inout Observation) {
    // Taken out while it is changed, so that its counts have one owner and are not copied.
    if case .statistics(var statistics) = observation {
      observation = .nothing
      statistics.observe(values)
      observation = .statistics(statistics)
    } else if case .ties(var ties) = observation {
      observation = .nothing
      ties.append(values.count(of: lower.bits, and: upper.bits))
      observation = .ties(ties)
    }
  }

  func combine(_ next: Observation, into total: inout Observation) {
    switch (next, total) {
    case (.statistics(let next), .statistics(var sum)):
      total = .nothing
      sum += next
      total = .statistics(sum)
    case (.ties(let next), .ties(let before)): total = .ties(before + next)
    default: break
    }
  }

  /// - Throws: `PassesDiffer` if the values of the passes cannot have been the same.
  mutating func learn(_ total: Observation) throws(PassesDiffer) {
    switch (stage, total) {
    case (.selecting, .statistics(var statistics)) where !kept.isEmpty:
      try statistics.finishPass()
      stage = .selecting(statistics)
      if statistics.isComplete {
        setEnds(statistics[kept.lowerBound], statistics[kept.upperBound - 1])
      }
    case (.counting, .ties(let ties)):
      var (belowLower, belowUpper) = (0, 0)
      for tile in ties {
        lower.before.append(belowLower)
        upper.before.append(belowUpper)
        belowLower += Int(tile.lower)
        belowUpper += Int(tile.upper)
      }
      guard belowLower == lower.equal, belowUpper == upper.equal else { throw PassesDiffer() }
      stage = .known
    default: break
    }
  }

  private mutating func setEnds(
    _ first: OrderStatistics.Statistic, _ last: OrderStatistics.Statistic
  ) {
    lower = End(
      bits: first.magnitude.bitPattern,
      kept: min(first.smallerCount + first.equalCount, kept.upperBound) - kept.lowerBound,
      equal: first.equalCount)
    upper = End(
      bits: last.magnitude.bitPattern,
      kept: kept.upperBound - max(last.smallerCount, kept.lowerBound), equal: last.equalCount)
    stage = lower.isSplit || upper.isSplit ? .counting : .known
  }

  /// Sets to zero what is outside the band.
  /// - Parameter tile: the number of this tile among those of a pass.
  func restrict(_ values: inout MutableSpan<Float>, tile: Int) {
    guard !kept.isEmpty else {
      for i in values.indices { values[i] = 0 }
      return
    }
    // In all tiles but one, either all ties with an end are kept or none.
    guard let low = keepsTies(with: lower, tile, values.span),
      let high = keepsTies(with: upper, tile, values.span)
    else { return restrictTieByTie(&values, tile: tile) }
    let smallest = low ? lower.bits : lower.bits &+ 1
    let largest = high ? upper.bits : upper.bits &- 1
    for i in values.indices {
      let bits = values[i].magnitudeBits
      values[i] = bits >= smallest && bits <= largest ? values[i] : 0
    }
  }

  /// Whether all (true) or none (false) of the tile's ties with an end are kept.
  private func keepsTies(with end: End, _ tile: Int, _ values: Span<Float>) -> Bool? {
    guard end.isSplit else { return end.kept > 0 }
    let left = end.kept - end.before[tile]
    if left <= 0 { return false }
    return values.count(of: end.bits, and: end.bits).0 <= left ? true : nil
  }

  private func restrictTieByTie(_ values: inout MutableSpan<Float>, tile: Int) {
    var lowerLeft = lower.isSplit ? lower.kept - lower.before[tile] : lower.kept
    var upperLeft = upper.isSplit ? upper.kept - upper.before[tile] : upper.kept
    for i in values.indices {
      let bits = values[i].magnitudeBits
      var isKept = bits > lower.bits && bits < upper.bits
      if bits == lower.bits {
        isKept = lowerLeft > 0
        lowerLeft -= lower.isSplit ? 1 : 0
      } else if bits == upper.bits {
        isKept = upperLeft > 0
        upperLeft -= upper.isSplit ? 1 : 0
      }
      if !isKept { values[i] = 0 }
    }
  }
}

extension Span<Float> {
  /// How many elements have the one magnitude, and the other.
  fileprivate func count(of one: UInt32, and other: UInt32) -> (Int32, Int32) {
    var counts = [0, 0]
    // Sound: the kernel reads the span's elements and nothing else.
    withUnsafeBufferPointer { values in
      guard let start = values.baseAddress else { return }
      smelt_count_equal(start, values.count, one, other, &counts)
    }
    return (Int32(counts[0]), Int32(counts[1]))
  }
}

extension Float {
  /// The bit pattern without the sign: ordered as the magnitudes are, NaN above infinity.
  var magnitudeBits: UInt32 { bitPattern & 0x7FFF_FFFF }
}
