/// SCE (Wan et al., arXiv 2408.07990): selects the elements that vary most between the models,
/// weighs each model by its mean squared change and erases minority signs.
struct SelectCalculateErase: TensorMerge {
  private let rows: Range<Int>
  private let elementCount: Int
  private let share: Double
  let grain: Int
  /// The elements that are selected.
  private enum Selection: Sendable {
    case all
    /// How many elements vary between the models at all has to be counted first.
    case uncounted
    case band(RankBand)
  }
  private var selection: Selection
  private var weights: [Float]?

  init(_ setting: TensorSetting) throws {
    rows = setting.rows
    elementCount = setting.elementCount
    grain = setting.grain
    share = setting.number("select_topk")
    guard share >= 0 else { throw MergeError("select_topk is \(share); it must be at least 0") }
    selection = share < 1 ? .uncounted : .all
  }

  struct Observation: Sendable {
    fileprivate var varying = 0
    fileprivate var band = RankBand.Observation.nothing
    fileprivate var squares: [Double]
  }

  /// Row 1: the variances, and then the weights that agreed.
  var scratchRows: Int { 1 }
  var isReady: Bool { weights != nil }
  var observingPasses: Int { share < 1 ? 2 + RankBand.largestNumberOfPasses : 1 }

  var observationBytes: Int { share < 1 ? RankBand.observationBytes : 0 }

  func makeObservation() -> Observation {
    var observation = Observation(squares: rows.map { _ in 0 })
    if case .band(let band) = selection { observation.band = band.makeObservation() }
    return observation
  }

  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout Observation
  ) {
    switch selection {
    case .uncounted:
      measure(tile, into: &scratch)
      let variances = scratch[1]
      for i in variances.indices where variances[i] != 0 { observation.varying += 1 }
    case .band(let band) where !band.isKnown:
      measure(tile, into: &scratch)
      band.observe(scratch[1], into: &observation.band)
    case .all, .band:
      select(&tile, at: position, scratch: &scratch)
      for (model, row) in rows.enumerated() {
        observation.squares[model] += dotProduct(tile[row], tile[row])
      }
    }
  }

  func combine(_ next: Observation, into total: inout Observation) {
    total.varying += next.varying
    if case .band(let band) = selection { band.combine(next.band, into: &total.band) }
    for model in next.squares.indices { total.squares[model] += next.squares[model] }
  }

  mutating func learn(_ total: Observation) throws(PassesDiffer) {
    switch selection {
    case .uncounted:
      let kept = Int(Double(total.varying) * share)
      selection = .band(RankBand(keeping: elementCount - kept..<elementCount))
    case .band(var band) where !band.isKnown:
      try band.learn(total.band)
      selection = .band(band)
    case .all, .band:
      let means = total.squares.map { Float($0 / Double(max(1, elementCount))) }
      let sum = means.reduce(0, +)
      weights = means.map { abs(sum) < 1e-6 ? 1 / Float(means.count) : $0 / sum }
    }
  }

  /// Row 1 of the scratch tile: the variance of each element between the models.
  private func measure(_ tile: borrowing Tile, into scratch: inout Tile) {
    scratch.clear(row: 0)
    scratch.clear(row: 1)
    for row in rows { scratch.add(tile, row: row, to: 0) }
    scratch.divide(row: 0, by: Float(rows.count))
    for row in rows { scratch.addSquaredDistance(to: 1, tile, row: row, from: 0) }
    scratch.divide(row: 1, by: Float(rows.count))
  }

  /// Sets to zero what is not selected.
  private func select(_ tile: inout Tile, at position: Int, scratch: inout Tile) {
    guard case .band(let band) = selection else { return }
    measure(tile, into: &scratch)
    var variances = scratch.mutableRow(1)
    band.restrict(&variances, tile: position / Tile.width(grain: grain))
    for row in rows { tile.clear(row: row, where: scratch, isZero: 1) }
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    select(&tile, at: position, scratch: &output)
    output.elect(
      tile, from: rows.lowerBound, weights: weights!, weighsVotes: false, agreed: 1)
    output.divide(row: 0, byRow: 1, atLeast: 1e-6)
  }
}

extension MergeMethod {
  static let sce = MergeMethod(
    "sce", "base + Σ mᵢwᵢdᵢ / Σ mᵢwᵢ, wᵢ ~ mean dᵢ², of the elements that vary most",
    operand: .differences, base: .required,
    parameters: [.number("select_topk", default: 1), .int8Mask]
  ) { try SelectCalculateErase($0) }
}
