extension AdaptiveWeightDisentanglement {
  /// The coefficients that minimise Σ cos² between cleaned vectors, by Levenberg–Marquardt
  /// in k variables from δ = 0.
  ///
  /// Steps are damped in the norm of δ, so that of the many δ that may do the nearest is found.
  func orthogonalize(_ gram: GramMatrix) -> [Double] {
    let order = gram.order
    let live = (0..<order).filter { gram[$0, $0] > 0 }
    guard live.count > 1 else { return Array(repeating: 0, count: order) }
    let scale = live.reduce(0) { $0 + gram[$1, $1] } / Double(live.count)
    var coefficients = Array(repeating: 0.0, count: order)
    var cleaned = CleanedProducts(gram, coefficients)
    var loss = cleaned.loss(.squared)
    var damping = 1e-3

    for _ in 0..<iterations {
      var normal = Array(repeating: 0.0, count: order * order)
      var slope = Array(repeating: 0.0, count: order)
      for i in live {
        for j in live where j < i {
          guard let (cosine, row) = cleaned.cosineAndGradient(i, j, gram) else { continue }
          for m in 0..<order {
            slope[m] += row[m] * cosine
            for n in 0..<order { normal[m * order + n] += row[m] * row[n] }
          }
        }
      }
      // Rejected steps are tried again with more damping.
      var isAccepted = false
      for _ in 0..<12 where !isAccepted {
        var system = normal
        for m in 0..<order {
          for n in 0..<order { system[m * order + n] += damping * gram[m, n] / scale }
          // Keeps the system definite where task vectors depend on each other or vanish.
          system[m * order + m] += damping * 1e-9 + 1e-300
        }
        guard let step = solveDefinite(system, slope) else { damping *= 10; continue }
        let candidate = zip(coefficients, step).map { $0 - $1 }
        let candidateCleaned = CleanedProducts(gram, candidate)
        let candidateLoss = candidateCleaned.loss(.squared)
        if candidateLoss < loss {
          (coefficients, cleaned, loss) = (candidate, candidateCleaned, candidateLoss)
          damping *= 0.01
          isAccepted = true
        } else {
          damping *= 10
        }
      }
      guard isAccepted else { break }
    }
    return coefficients
  }
}

extension CleanedProducts {
  /// cos(vᵢ, vⱼ) and its derivatives with respect to a; nil where a vector vanishes.
  fileprivate func cosineAndGradient(
    _ i: Int, _ j: Int, _ gram: GramMatrix
  ) -> (Double, [Double])? {
    let (square, otherSquare) = (products[i, i], products[j, j])
    guard square > 0, otherSquare > 0 else { return nil }
    let scale = 1 / (square * otherSquare).squareRoot()
    let cosine = products[i, j] * scale
    let gradient = (0..<gram.order).map { m in
      (2 * g[m] - gram[i, m] - gram[j, m]) * scale
        - cosine * ((g[m] - gram[i, m]) / square + (g[m] - gram[j, m]) / otherSquare)
    }
    return (cosine, gradient)
  }
}
