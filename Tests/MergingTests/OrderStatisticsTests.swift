import Merging
import TestSupport
import Testing

/// The quantile of values that come in tiles.
private func quantile(_ ratio: Double, of values: [Float], tile: Int = .max) throws
  -> Double
{
  var quantile = MagnitudeQuantile(ratio, of: values.count)
  while !quantile.statistics.isComplete {
    for start in stride(from: 0, to: values.count, by: min(tile, values.count)) {
      let end = min(values.count, start + min(tile, values.count))
      quantile.statistics.observe(values.span.extracting(start..<end))
    }
    try quantile.statistics.finishPass()
  }
  return quantile.value
}

@Suite struct `order statistics of magnitudes` {
  static let oracle: [Float] = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0]

  @Test(
    arguments: [
      (0.9, 0.91, [-1.0]), (0.85, 0.865, [0.9, -1.0]), (0.5, 0.55, [-0.6, 0.7, -0.8, 0.9, -1.0]),
      (1.0, 1.0, []),
    ] as [(Double, Double, [Float])])
  func `pruning follows the oracle`(ratio: Double, threshold: Double, kept: [Float]) throws {
    let quantile = try quantile(ratio, of: Self.oracle)
    #expect(abs(quantile - threshold) < 1e-6)
    var pruned = Self.oracle
    var span = pruned.mutableSpan
    prune(&span, above: quantile)
    #expect(pruned.filter { $0 != 0 } == kept)
  }

  @Test(arguments: [1, 2, 3, 2049], [0, 0.01, 0.9, 1])
  func `two passes find what sorting finds`(count: Int, ratio: Double) throws {
    var generator = SeededGenerator(seed: UInt64(count))
    // Many are equal, many lie close together.
    let values = (0..<count).map { index -> Float in
      switch index % 4 {
      case 0: Float(Int.random(in: -3...3, using: &generator))
      case 1: 1 + Float(Int.random(in: 0...50, using: &generator)) * .ulpOfOne
      default: Float.random(in: -1e-3...1e-3, using: &generator)
      }
    }
    let sorted = values.map(\.magnitude).sorted()
    let position = ratio * Double(count - 1)
    let low = Double(sorted[Int(position)])
    let high = Double(sorted[min(Int(position) + 1, count - 1)])
    let expected = low + (high - low) * (position - position.rounded(.down))
    #expect(try quantile(ratio, of: values) == expected)
    #expect(try quantile(ratio, of: values, tile: 100) == expected)

    let ranks = Set([0, count / 3, count / 2, count - 1])
    var statistics = OrderStatistics(ranks: ranks)
    statistics.observe(values.span)
    try statistics.finishPass()
    statistics.observe(values.span)
    try statistics.finishPass()
    for rank in ranks {
      let statistic = statistics[rank]
      #expect(statistic.magnitude == sorted[rank])
      #expect(statistic.smallerCount == sorted.firstIndex(of: sorted[rank])!)
      #expect(statistic.equalCount == sorted.count { $0 == sorted[rank] })
    }
  }

  @Test func `values of BF16 need one pass`() throws {
    let values = (0..<1000).map { Float(bitPattern: UInt32($0 * 31) << 16) }
    var statistics = OrderStatistics(ranks: [0, 500, 999])
    statistics.observe(values.span)
    try statistics.finishPass()
    #expect(statistics.isComplete)
    #expect(statistics[500].magnitude == values.map(\.magnitude).sorted()[500])
  }

  @Test func `workers count apart and add up`() throws {
    let values = (0..<999).map { Float($0 * 7919 % 1009) + 0.1 }
    var parts = Array(repeating: OrderStatistics(ranks: [10, 900]), count: 3)
    while !parts[0].isComplete {
      for worker in 0..<3 {
        parts[worker].observe(values.span.extracting(worker * 333..<(worker + 1) * 333))
      }
      parts[0] += parts[1]
      parts[0] += parts[2]
      try parts[0].finishPass()
      parts = Array(repeating: parts[0], count: 3)
    }
    #expect(parts[0][900].magnitude == values.sorted()[900])
  }

  @Test func `other values in the second pass are an error`() throws {
    var statistics = OrderStatistics(ranks: [1, 3])
    statistics.observe(([0.1, 0.2, 0.3, 0.4] as [Float]).span)
    try statistics.finishPass()
    statistics.observe(([5.1, 5.2, 5.3, 5.4] as [Float]).span)
    #expect(throws: PassesDiffer()) { try statistics.finishPass() }
  }

  @Test func `infinities and NaN are ordered last`() throws {
    let values: [Float] = [.nan, 1, -.infinity, 0.3, 2]
    #expect(try quantile(0.5, of: values) == 2)
    #expect(try quantile(0.75, of: values) == .infinity)
    #expect(try quantile(1, of: values).isNaN)
  }
}
