/// NearSwap: the nearer an element of the other model is to the base, the more it is taken.
struct NearSwap: TensorMerge {
  private let t: Float

  init(_ setting: TensorSetting) { t = Float(setting.number("t")) }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    let difference = tile[1]
    var result = output.mutableRow(0)
    for i in difference.indices {
      let weight = max(0, min(1, t / max(abs(difference[i]), 1e-6)))
      result[i] = weight * difference[i]
    }
  }
}

extension MergeMethod {
  static let nearSwap = MergeMethod(
    "nearswap", "base + clip(t / |d|, 0, 1)·d", operand: .differences, base: .required,
    models: 2...2,
    parameters: [.number("t", .shared)]
  ) { NearSwap($0) }
}
