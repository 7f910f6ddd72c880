import Glibc

// Means on the sphere. Every vector that occurs is a combination of the models, so it is kept as
// its coefficients, and the Gram matrix gives all lengths and angles.

extension MergeMethod {
  static let multiSlerp = MergeMethod(
    "multislerp", "the weighted mean of the directions on the sphere, times the weighted mean norm",
    operand: .differencesIfBased, base: .optional, models: 2...Int.max,
    parameters: [
      .number("weight", .perModelButBase), .flag("normalize_weights", true),
      .number("eps", default: 1e-8),
    ]
  ) { setting in
    var weights = setting.numbers("weight")
    if setting.flag("normalize_weights") {
      let sum = weights.reduce(0, +)
      guard sum != 0 else {
        throw MergeError(
          "the weights of \(setting.name) add up to 0 and cannot be normalised",
          remedy: "change them or set normalize_weights: false")
      }
      weights = weights.map { $0 / sum }
    }
    let eps = setting.number("eps")
    let (rows, given) = (setting.rows, weights)
    return GramWeighted(rows: rows) { multiSlerpWeights($0, given, eps: eps) }
  }

  static let karcher = MergeMethod(
    "karcher", "the Karcher mean of the directions, times the mean norm", operand: .weights,
    base: .optional, parameters: [.number("max_iter", default: 10), .number("tol", default: 1e-5)]
  ) { setting in
    let (iterations, tolerance) = (setting.number("max_iter"), setting.number("tol"))
    guard iterations >= 0, iterations <= 1e6 else {
      throw MergeError("max_iter is \(iterations); it must be between 0 and 1000000")
    }
    return GramWeighted(rows: setting.rows) {
      karcherWeights($0, iterations: Int(iterations), tolerance: tolerance)
    }
  }
}

private func multiSlerpWeights(_ gram: GramMatrix, _ weights: [Double], eps: Double) -> [Double] {
  let models = weights.indices
  guard models.count > 1 else { return [1] }
  let norms = models.map { gram[$0, $0].squareRoot() }
  guard norms.contains(where: { $0 > 0 }) else { return models.map { _ in 0 } }
  let mean = models.map { weights[$0] / (norms[$0] + eps) }
  let length = gram.squaredNorm(of: mean).squareRoot()
  // Models that cancel out have no mean direction; of two the straight line is left.
  guard length >= eps else {
    return models.count == 2 ? weights : models.map { _ in .nan }
  }
  // The tangents at the mean add up to Σwᵢuᵢ − (Σwᵢuᵢ·m)m = 0, so the mean is the result.
  let norm = models.reduce(0) { $0 + weights[$1] * norms[$1] }
  return mean.map { $0 / length * norm }
}

private func karcherWeights(_ gram: GramMatrix, iterations: Int, tolerance: Double) -> [Double] {
  let all = 0..<gram.order
  guard all.count > 1 else { return [1] }
  let norms = all.map { gram[$0, $0].squareRoot() }
  let valid = all.filter { norms[$0] > tolerance }
  guard let first = valid.first else { return all.map { _ in 0 } }
  let share = 1 / Double(valid.count)

  func unit(_ coefficients: [Double]) -> [Double]? {
    let length = gram.squaredNorm(of: coefficients).squareRoot()
    return length < tolerance ? nil : coefficients.map { $0 / length }
  }
  func product(_ coefficients: [Double], with model: Int) -> Double {
    all.reduce(0) { $0 + coefficients[$1] * gram[$1, model] } / norms[model]
  }

  let sum = all.map { norms[$0] > tolerance ? share / norms[$0] : 0 }
  var mean = unit(sum) ?? all.map { $0 == first ? 1 / norms[first] : 0 }
  for _ in 0..<iterations {
    var tangent = all.map { _ in 0.0 }
    for model in valid {
      let cosine = max(-1, min(1, product(mean, with: model)))
      let angle = acos(cosine)
      guard angle >= tolerance else { continue }
      let factor = share * angle / sin(angle)
      for i in all { tangent[i] -= factor * cosine * mean[i] }
      tangent[model] += factor / norms[model]
    }
    let length = gram.squaredNorm(of: tangent).squareRoot()
    guard length >= tolerance else { break }
    mean = all.map { cos(length) * mean[$0] + sin(length) / length * tangent[$0] }
    mean = unit(mean) ?? mean
  }
  let scale = norms.reduce(0, +) / Double(all.count)
  return mean.map { $0 * scale }
}
