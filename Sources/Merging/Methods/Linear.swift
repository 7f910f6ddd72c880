/// Σ wᵢxᵢ, divided by Σ wᵢ if normalised: model soups (Wortsman et al., arXiv 2203.05482).
struct Linear: TensorMerge {
  private let rows: Range<Int>
  private let weights: [Float]
  private let divisor: Float?

  init(_ setting: TensorSetting) throws {
    rows = setting.rows
    weights = setting.numbers("weight").map { Float($0) }
    let sum = weights.reduce(0, +)
    divisor = setting.flag("normalize") ? sum : nil
    guard divisor != 0 else {
      throw MergeError(
        "the weights of \(setting.name) add up to 0 and cannot be normalised",
        remedy: "change them or set normalize: false")
    }
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    output.clear(row: 0)
    for (model, row) in rows.enumerated() {
      output.addFused(to: 0, tile, row: row, times: weights[model])
    }
    if let divisor { output.divide(row: 0, by: divisor) }
  }
}

extension MergeMethod {
  static let linear = MergeMethod(
    "linear", "Σ wᵢxᵢ / Σ wᵢ", operand: .weights, base: .optional,
    parameters: [.number("weight", .perModel), .flag("normalize", true)]
  ) { try Linear($0) }
}
