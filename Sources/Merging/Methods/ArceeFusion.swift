import Glibc

/// Arcee Fusion: takes the other model's elements where they matter most.
///
/// An element's importance is its change times the divergence of its row's softmax; what is at
/// least the median plus 1.5 interquartile ranges is taken. Quantiles are exact here.
struct ArceeFusion: TensorMerge {
  private let base: Int
  private let rowLength: Int
  /// The ranks of the quartiles.
  private let ranks: [Int]
  private var statistics: OrderStatistics
  private var threshold: Float?

  init(_ setting: TensorSetting) {
    base = setting.baseRow ?? 0
    rowLength = max(1, setting.rowLength)
    let last = max(0, setting.elementCount - 1)
    ranks = [0.25, 0.5, 0.75].map { min(Int(Float($0) * Float(last)), last) }
    statistics = OrderStatistics(ranks: ranks)
  }

  typealias Observation = OrderStatistics

  var grain: Int { rowLength }
  var scratchRows: Int { 1 }
  var isReady: Bool { threshold != nil }
  var observingPasses: Int { isReady ? 0 : 2 }

  var observationBytes: Int { OrderStatistics.counterBytes(ranks: ranks.count) }

  func makeObservation() -> Observation { statistics }

  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout Observation
  ) {
    weigh(tile, into: &scratch)
    observation.observe(scratch[1])
  }

  func combine(_ next: Observation, into total: inout Observation) { total += next }

  mutating func learn(_ total: Observation) throws(PassesDiffer) {
    statistics = total
    try statistics.finishPass()
    guard statistics.isComplete else { return }
    let quartiles = ranks.map { statistics[$0].magnitude }
    threshold = quartiles[1] + 1.5 * (quartiles[2] - quartiles[0])
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    weigh(tile, into: &output)
    output.copyRow(0, from: tile, base)
    output.addWhere(tile, row: 1 - base, minus: base, atLeast: threshold!)
  }

  /// Row 1 of the scratch tile: the importance of each element.
  private func weigh(_ tile: borrowing Tile, into scratch: inout Tile) {
    scratch.resize(columns: tile.columns)
    var importance = scratch.mutableRow(1)
    let (own, other) = (tile[base], tile[1 - base])
    for start in stride(from: 0, to: tile.columns, by: rowLength) {
      let row = start..<start + rowLength
      // Rounding can make a divergence of zero slightly negative.
      let divergence = max(0, divergence(of: other.extracting(row), from: own.extracting(row)))
      for i in row { importance[i] = abs(other[i] - own[i]) * divergence }
    }
  }

  /// Σ p log(p/q) of the two softmaxes, each raised by 1e-8.
  private func divergence(of row: Span<Float>, from base: Span<Float>) -> Float {
    let p = softmax(row)
    let q = softmax(base)
    var sum = 0.0
    for i in row.indices {
      let (p, q) = (exp(row[i] - p.largest) / p.sum + 1e-8, exp(base[i] - q.largest) / q.sum + 1e-8)
      sum += Double(p * log(p / q))
    }
    return Float(sum)
  }

  private func softmax(_ row: Span<Float>) -> (largest: Float, sum: Float) {
    var largest = -Float.infinity
    for i in row.indices { largest = max(largest, row[i]) }
    var sum = 0.0
    for i in row.indices { sum += Double(exp(row[i] - largest)) }
    return (largest, Float(sum))
  }
}

extension MergeMethod {
  static let arceeFusion = MergeMethod(
    "arcee_fusion", "the other model where |d|·KL(softmax rows) ≥ median + 1.5 IQR, else the base",
    operand: .weights, base: .required, models: 2...2
  ) { ArceeFusion($0) }
}
