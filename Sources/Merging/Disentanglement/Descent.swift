/// Gradient descent on the mean |cos| (or cos²) of cleaned vectors, in the coefficients a.
///
/// A step goes along b, the coefficients of the gradient in the basis of the task vectors, and not
/// along the gradient with respect to a: so it is the step that the whole vectors would take.
struct Descent {
  let order: Int
  /// 1/(k(k−1)R): what one cosine weighs in the loss.
  let pairWeight: Double
  let squared: Bool
  /// What is added to every norm that divides.
  let epsilon: Double
  let penalty: Double
  let rate: Double
  let momentum: Double
  let weightDecay: Double

  init(
    order: Int, squared: Bool, epsilon: Double = 0, rowCount: Int = 1, penalty: Double = 0,
    rate: Double, momentum: Double = 0, weightDecay: Double = 0
  ) {
    self.order = order
    pairWeight = 1 / Double(order * (order - 1) * rowCount)
    self.squared = squared
    self.epsilon = epsilon
    self.penalty = penalty
    self.rate = rate
    self.momentum = momentum
    self.weightDecay = weightDecay
  }

  typealias Path = (previous: [Double], last: [Double])

  /// ‖∇L_O‖ at δ = 0, for one group alone.
  static func slope(_ gram: GramMatrix, squared: Bool, epsilon: Double = 0) -> Double {
    guard gram.order > 1 else { return 0 }
    let probe = Descent(order: gram.order, squared: squared, epsilon: epsilon, rate: -1)
    // One step at rate −1 from a = 0 arrives at the gradient's own coefficients.
    return gram.squaredNorm(of: probe.run(gram, iterations: 1).last).squareRoot()
  }

  /// The coefficients after all steps, and those before the last one.
  func run(_ gram: GramMatrix, iterations: Int) -> Path {
    let null = gram.nullVectors
    var a = Array(repeating: 0.0, count: order)
    var previous = a, u = a, g = a, t = a, r = a, withCosine = a, withScale = a
    for _ in 0..<iterations {
      previous = a
      for j in 0..<order { g[j] = 0 }
      for i in 0..<order { for j in 0..<order { g[j] += gram[i, j] * a[i] } }
      var q = 0.0
      for j in 0..<order { q += a[j] * g[j] }
      q = max(0, q)
      for j in 0..<order {
        let square = gram[j, j] - 2 * g[j] + q
        let isZero = gram[j, j] <= 0 || square <= gram[j, j] * vanishing
        let norm = square.squareRoot()
        t[j] = isZero ? 0 : 1 / norm
        r[j] = isZero ? 0 : 1 / (norm + epsilon)
        withCosine[j] = 0
        withScale[j] = 0
      }
      for i in 0..<order {
        for j in 0..<order where j != i {
          let cosine = (gram[i, j] - g[j] + (q - g[i])) * r[j] * r[i]
          let slope = squared ? 2 * cosine : cosine > 0 ? 1 : cosine < 0 ? -1 : 0
          withCosine[j] += slope * cosine
          withScale[j] += slope * r[i]
        }
      }
      var sum = 0.0
      for j in 0..<order {
        withCosine[j] = (withCosine[j] * t[j] - withScale[j]) * r[j] * (2 * pairWeight)
        sum += withCosine[j]
      }
      let shrink = weightDecay - sum + (q > 0 ? penalty / q.squareRoot() : 0)
      for j in 0..<order {
        u[j] = u[j] * momentum + (withCosine[j] + a[j] * shrink)
        a[j] -= u[j] * rate
      }
      for vector in null { a.project(outOf: vector); u.project(outOf: vector) }
    }
    return (previous, a)
  }
}

extension GramMatrix {
  /// An orthonormal basis of the coefficients that combine the vectors to nothing.
  ///
  /// It is empty unless the vectors depend on each other (equal or opposite experts, say). A
  /// descent must not wander along these directions: there a could grow without moving δ.
  fileprivate var nullVectors: [[Double]] {
    var null: [[Double]] = []
    var basis: [[Double]] = []
    for j in 0..<order where self[j, j] > 0 {
      var vector = Array(repeating: 0.0, count: order)
      vector[j] = 1
      // Gram–Schmidt in the inner product M; the second round removes the first one's rounding.
      for _ in 0..<2 {
        let image = applied(to: vector)
        for other in basis {
          let share = zip(other, image).reduce(0) { $0 + $1.0 * $1.1 }
          for i in 0..<order { vector[i] -= share * other[i] }
        }
      }
      let square = squaredNorm(of: vector)
      if square > self[j, j] * 1e-12 {
        let scale = 1 / square.squareRoot()
        basis.append(vector.map { $0 * scale })
      } else {
        for other in null { vector.project(outOf: other) }
        let scale = 1 / vector.reduce(0) { $0 + $1 * $1 }.squareRoot()
        null.append(vector.map { $0 * scale })
      }
    }
    return null
  }

  private func applied(to vector: [Double]) -> [Double] {
    var result = Array(repeating: 0.0, count: order)
    for i in 0..<order where vector[i] != 0 {
      for j in 0..<order { result[j] += self[i, j] * vector[i] }
    }
    return result
  }
}

extension [Double] {
  /// Removes the part along a unit vector.
  fileprivate mutating func project(outOf unit: [Double]) {
    let share = zip(self, unit).reduce(0) { $0 + $1.0 * $1.1 }
    for i in indices { self[i] -= share * unit[i] }
  }
}
