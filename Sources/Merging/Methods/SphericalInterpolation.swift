import Glibc

/// SLERP (Shoemake 1985) over whole tensors, and the variants of it.
extension MergeMethod {
  static let slerp = MergeMethod(
    "slerp", "(sin((1−t)θ)·base + sin(tθ)·other) / sin θ, linear where |cos θ| > 0.9995",
    operand: .weights, base: .required, models: 2...2, parameters: [.number("t", .shared)]
  ) { setting in
    let t = setting.number("t")
    let baseIsFirst = setting.baseRow == 0
    return GramWeighted(rows: setting.rows) { gram in
      let norms = (0..<2).map { gram[$0, $0].squareRoot() }.map { $0 > 1e-8 ? $0 : 1 }
      let cosine = max(-1, min(1, gram[0, 1] / (norms[0] * norms[1])))
      let weights = arcWeights(t, cosine: cosine, isStraight: abs(cosine) > 0.9995)
      return baseIsFirst ? weights : weights.reversed()
    }
  }

  static let nuSlerp = MergeMethod(
    "nuslerp", "slerp by t = w₂ / (w₁ + w₂), of the differences if there is a base",
    operand: .differencesIfBased, base: .optional, models: 2...3,
    parameters: [
      .number("weight", .perModelButBase), .flag("nuslerp_flatten", true),
      .flag("nuslerp_row_wise", false),
    ]
  ) { setting in
    guard setting.models == 2 else {
      throw MergeError("nuslerp needs two models beside the base and has \(setting.models)")
    }
    let weights = setting.numbers("weight")
    let sum = weights[0] + weights[1]
    let t = abs(sum) < 1e-6 ? 0.5 : weights[1] / sum
    let group: GramWeighted.Group =
      setting.flag("nuslerp_flatten") || setting.shape.isEmpty
      ? .tensor
      : setting.flag("nuslerp_row_wise") && setting.shape.count > 1
        ? .column(length: setting.elementCount / max(1, setting.shape[0]))
        : .row(length: setting.rowLength)
    return GramWeighted(rows: setting.rows, group: group) { gram in
      let norms = (0..<2).map { max(gram[$0, $0].squareRoot(), 1e-7) }
      let cosine = max(-1, min(1, gram[0, 1] / (norms[0] * norms[1])))
      return arcWeights(t, cosine: cosine, isStraight: 1 - cosine * cosine <= 1e-16)
    }
  }
}

/// The weights of both ends of an arc at its fraction `t`.
private func arcWeights(_ t: Double, cosine: Double, isStraight: Bool) -> [Double] {
  // Nearly parallel models have no great circle to follow.
  guard !isStraight else { return [1 - t, t] }
  let angle = acos(cosine)
  return [sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)]
}
