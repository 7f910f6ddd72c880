/// Reinforced Agent Merging (arXiv 2601.13572): what one model alone has changed is kept whole,
/// what several have changed is averaged.
///
/// RAM+ enlarges a model's own changes by how many of its changes others share.
struct ReinforcedAgentMerging: TensorMerge {
  private let rows: Range<Int>
  private let epsilon: Float
  private let reinforcement: (r: Double, alpha: Double)?
  /// What each model's own changes are multiplied by; `nil` while it is unknown.
  private var factors: [Float]?

  init(_ setting: TensorSetting, isReinforced: Bool) {
    rows = setting.rows
    epsilon = Float(setting.number("epsilon"))
    reinforcement = isReinforced ? (setting.number("r"), setting.number("alpha")) : nil
    factors = isReinforced ? nil : rows.map { _ in 1 }
  }

  /// Of each model, how many changes are its own (x) and how many are shared (y).
  typealias Observation = [SIMD2<Int>]

  var isReady: Bool { factors != nil }
  var scratchRows: Int { 1 }

  func makeObservation() -> Observation { rows.map { _ in .zero } }

  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout Observation
  ) {
    scratch.resize(columns: tile.columns)
    countChanges(tile, into: &scratch)
    let counts = scratch[1]
    for (model, row) in rows.enumerated() {
      let values = tile[row]
      var (own, shared) = (0, 0)
      for i in values.indices where abs(values[i]) > epsilon {
        if counts[i] > 1 { shared += 1 } else { own += 1 }
      }
      observation[model] &+= SIMD2(own, shared)
    }
  }

  func combine(_ next: Observation, into total: inout Observation) {
    for model in total.indices { total[model] &+= next[model] }
  }

  mutating func learn(_ total: Observation) {
    guard let (r, alpha) = reinforcement else { return }
    factors = total.map { counts in
      let share = Double(counts.y) / max(Double(counts.x), Double(epsilon))
      return Float(1 + r * max(0, min(alpha, share)))
    }
  }

  /// Row 1 of the scratch tile: by how many models each element is changed.
  private func countChanges(_ tile: borrowing Tile, into scratch: inout Tile) {
    scratch.clear(row: 1)
    var counts = scratch.mutableRow(1)
    for row in rows {
      let values = tile[row]
      for i in values.indices { counts[i] += abs(values[i]) > epsilon ? 1 : 0 }
    }
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    countChanges(tile, into: &output)
    for (model, row) in rows.enumerated() {
      let factor = factors![model]
      let counts = output[1]
      var values = tile.mutableRow(row)
      for i in values.indices {
        let changed = abs(values[i]) > epsilon ? values[i] : 0
        values[i] = counts[i] > 1 ? changed / counts[i] : changed * factor
      }
    }
    output.clear(row: 0)
    for row in rows { output.add(tile, row: row, to: 0) }
  }
}

extension MergeMethod {
  static let ram = MergeMethod(
    "ram", "base + the only change, or the mean of the changes, above epsilon",
    operand: .differences, base: .required, parameters: [.number("epsilon", default: 1e-5)]
  ) { ReinforcedAgentMerging($0, isReinforced: false) }

  static let ramPlus = MergeMethod(
    "ramplus_tl", "ram with a model's own changes × (1 + r·clip(shared / own, 0, alpha))",
    operand: .differences, base: .required,
    parameters: [
      .number("epsilon", default: 1e-5), .number("r", default: 0.1), .number("alpha", default: 0.2),
    ]
  ) { ReinforcedAgentMerging($0, isReinforced: true) }
}
