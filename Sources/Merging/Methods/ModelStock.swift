/// Model Stock (Jang et al., arXiv 2403.19522): how far to go from the base to the mean follows
/// from the angles between the models.
extension MergeMethod {
  static let modelStock = MergeMethod(
    "model_stock", "t·mean(x) + (1−t)·base, t = Nc / (1 + (N−1)c), c the mean cosine of the dᵢ",
    operand: .differences, base: .required, models: 3...Int.max,
    parameters: [.flag("filter_wise", false)]
  ) { setting in
    let group: GramWeighted.Group =
      setting.flag("filter_wise") ? .row(length: setting.rowLength) : .tensor
    return GramWeighted(rows: setting.rows, group: group) { gram in
      let count = Double(gram.order)
      var sum = 0.0
      for i in 0..<gram.order {
        for j in 0..<i {
          let norms = (gram[i, i] * gram[j, j]).squareRoot()
          sum += max(-1, min(1, gram[i, j] / max(norms, 1e-6)))
        }
      }
      let cosine = sum / (count * (count - 1) / 2)
      let denominator = 1 + (count - 1) * cosine
      // Opposing models leave nothing to estimate from: the base stays.
      let t = abs(denominator) < 1e-6 ? 0 : count * cosine / denominator
      return Array(repeating: t / count, count: gram.order)
    }
  }
}
