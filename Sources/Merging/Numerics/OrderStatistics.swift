import CKernels

/// Exact order statistics of |x| over values that stream by twice, in half a megabyte of counters,
/// then a quarter for every rank.
///
/// The order of magnitudes is the order of their bit patterns. The first pass counts the upper
/// 16 of their 31 bits, which tells where each wanted rank lies; the second counts the lower 15
/// bits of the values there. Values whose lower bits are all zero (BF16) need one pass only.
/// Counts are whole numbers: neither tiles nor workers change a result. NaN counts as larger than
/// infinity.
public struct OrderStatistics: Sendable {
  /// The value of a rank, and how many values are smaller than it or equal to it.
  public struct Statistic: Sendable, Equatable {
    public let magnitude: Float
    public let smallerCount: Int
    public let equalCount: Int
  }

  private let ranks: [Int]
  private var found: [Statistic] = []
  /// Empty until something is observed: plans keep one of these for every tensor and model.
  private var counts: [Int64] = []
  private var lowerBits: UInt32 = 0
  private var isInSecondPass = false
  /// Of the second pass: the upper halves that hold a rank, and what is smaller than all in them.
  private var wanted: [UInt32] = []
  private var smallerCounts: [Int] = []

  /// - Parameter ranks: Positions in ascending order of magnitude, from 0.
  public init(ranks: some Sequence<Int>) {
    self.ranks = ranks.sorted()
  }

  /// Bytes of the counters of a pass over so many ranks, at most.
  static func counterBytes(ranks: Int) -> Int { 8 * max(1 << 16, ranks << 15) }

  private var counterCount: Int { isInSecondPass ? wanted.count << 15 : 1 << 16 }

  /// Whether all ranks are known, and no (further) pass is needed.
  public var isComplete: Bool { found.count == ranks.count }

  /// Takes in some of the values of this pass.
  public mutating func observe(_ values: Span<Float>) {
    if counts.isEmpty { counts = Array(repeating: 0, count: counterCount) }
    // Sound: the kernels read the span's elements; there is a counter for every pattern.
    values.withUnsafeBufferPointer { values in
      guard let start = values.baseAddress else { return }
      if isInSecondPass {
        smelt_count_lower(start, values.count, wanted, wanted.count, &counts)
      } else {
        lowerBits |= smelt_count_upper(start, values.count, &counts)
      }
    }
  }

  /// Takes in what another observed of the same pass.
  public static func += (sum: inout Self, other: Self) {
    precondition(sum.ranks == other.ranks && sum.isInSecondPass == other.isInSecondPass)
    guard !sum.counts.isEmpty, !other.counts.isEmpty else {
      if sum.counts.isEmpty { sum = other }
      return
    }
    for index in sum.counts.indices { sum.counts[index] += other.counts[index] }
    sum.lowerBits |= other.lowerBits
  }

  /// Ends a pass over all values.
  /// - Throws: `PassesDiffer` if the values of the passes cannot have been the same.
  public mutating func finishPass() throws(PassesDiffer) {
    guard !isComplete else { return }
    if isInSecondPass { try finishSecondPass() } else { finishFirstPass() }
  }

  /// The statistic of a rank that was asked for, after the last pass.
  public subscript(rank: Int) -> Statistic { found[ranks.firstIndex(of: rank)!] }

  private mutating func finishFirstPass() {
    var halves: [Statistic] = []
    locate(in: counts[...], smallerCount: 0, bitsOf: { UInt32($0) << 15 }, into: &halves)
    precondition(halves.count == ranks.count, "a rank beyond the number of values")
    if lowerBits == 0 {
      counts = []
      return found = halves
    }

    isInSecondPass = true
    for half in halves {
      let upper = half.magnitude.bitPattern >> 15
      guard !wanted.contains(upper) else { continue }
      wanted.append(upper)
      smallerCounts.append(half.smallerCount)
    }
    counts = []
  }

  private mutating func finishSecondPass() throws(PassesDiffer) {
    precondition(!counts.isEmpty, "a pass without values")
    for (index, upper) in wanted.enumerated() {
      locate(
        in: counts[index << 15..<(index + 1) << 15], smallerCount: smallerCounts[index],
        bitsOf: { upper << 15 | UInt32($0) }, into: &found)
    }
    counts = []
    guard isComplete else { throw PassesDiffer() }
  }

  /// Appends the statistics of all further ranks that lie within these counters.
  private func locate(
    in counts: ArraySlice<Int64>, smallerCount: Int, bitsOf: (Int) -> UInt32,
    into statistics: inout [Statistic]
  ) {
    var smallerCount = smallerCount
    for index in counts.indices {
      guard statistics.count < ranks.count else { return }
      let count = Int(counts[index])
      while statistics.count < ranks.count, ranks[statistics.count] < smallerCount + count {
        let magnitude = Float(bitPattern: bitsOf(index - counts.startIndex))
        statistics.append(
          Statistic(magnitude: magnitude, smallerCount: smallerCount, equalCount: count))
      }
      smallerCount += count
    }
  }
}

/// The quantile of |x| by linear interpolation between order statistics at position ρ·(n−1), as
/// E-WEMoE prunes (Shen et al., arXiv 2410.21804): a value is kept if its magnitude is greater.
public struct MagnitudeQuantile: Sendable {
  private let below: Int
  private let above: Int
  private let share: Double
  /// Observes the values, in one pass or two.
  public var statistics: OrderStatistics

  /// - Parameters:
  ///   - ratio: ρ, from 0 to 1.
  ///   - count: n, the number of values; at least one.
  public init(_ ratio: Double, of count: Int) {
    precondition(count > 0 && (0...1).contains(ratio))
    let position = ratio * Double(count - 1)
    below = min(Int(position), count - 1)
    above = min(below + 1, count - 1)
    share = position - Double(below)
    statistics = OrderStatistics(ranks: [below, above])
  }

  /// The quantile, after the last pass.
  public var value: Double {
    let (low, high) = (
      Double(statistics[below].magnitude), Double(statistics[above].magnitude)
    )
    // ∞ − ∞ and 0·∞ are no numbers.
    return low == high || share == 0 ? low : low + (high - low) * share
  }
}

/// Sets every value to zero whose magnitude is not greater than the threshold.
public func prune(_ values: inout MutableSpan<Float>, above threshold: Double) {
  for index in values.indices where !(Double(values[index].magnitude) > threshold) {
    values[index] = 0
  }
}
