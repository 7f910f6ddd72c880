/// Adaptive Weight Disentanglement (Xiong et al., arXiv 2411.18729): one redundant vector δ is
/// taken out of all task vectors of a group, so that what remains is as orthogonal as it gets.
///
/// δ minimises the mean |cos(τᵢ − δ, τⱼ − δ)| plus a penalty on its norm, from δ = 0 downhill.
/// Every gradient is a combination of the task vectors and δ, so δ = Σ aᵢτᵢ all the way, and
/// the Gram matrix of the group is all that a descent needs to know.
public struct AdaptiveWeightDisentanglement: Sendable, Equatable {
  /// What shares one redundant vector. A block is a Transformer layer.
  public enum Scope: String, Sendable, CaseIterable { case row, tensor, block, model }

  /// What is made small: the mean of |cos|, or of cos², which is smooth.
  public enum Objective: String, Sendable, CaseIterable { case absolute = "abs", squared }

  public enum Penalty: Sendable, Equatable {
    case none
    /// `coefficient · ‖δ‖`, not squared.
    case norm(Double)

    var coefficient: Double { if case .norm(let coefficient) = self { coefficient } else { 0 } }
  }

  public enum Optimizer: Sendable, Equatable {
    case descent(rate: Double, momentum: Double = 0, weightDecay: Double = 0)
    /// Levenberg–Marquardt on Σ cos², which has neither rate nor penalty: of the vectors that
    /// make all cosines 0 it finds one near 0.
    case converged
  }

  public var scope: Scope
  public var objective: Objective
  public var penalty: Penalty
  public var optimizer: Optimizer
  public var iterations: Int
  /// What is added to every norm before it divides: cosines are ⟨u, v⟩ / ((‖u‖ + ε)(‖v‖ + ε)).
  public var epsilon: Double

  public init(
    scope: Scope, objective: Objective = .absolute, penalty: Penalty = .none,
    optimizer: Optimizer, iterations: Int = 300, epsilon: Double = 0
  ) {
    self.scope = scope
    self.objective = objective
    self.penalty = penalty
    self.optimizer = optimizer
    self.iterations = iterations
    self.epsilon = epsilon
  }

  /// Every row of a weight matrix is a group.
  public static let row = AdaptiveWeightDisentanglement(
    scope: .row, penalty: .norm(1e-6),
    optimizer: .descent(rate: 1e-4, momentum: 0.9, weightDecay: 1e-4), epsilon: 1e-8)

  /// The whole model is one group.
  public static let model = AdaptiveWeightDisentanglement(
    scope: .model, penalty: .norm(0.1), optimizer: .descent(rate: 0.01))

  /// Levenberg–Marquardt is there after five steps.
  static let convergedIterations = 5

  /// The presets by the names that recipes and metadata use.
  public static let presets = ["awd-row": row, "awd-model": model]

  /// What was found for one group.
  public struct Solution: Sendable, Equatable {
    /// a, with δ = Σ aᵢτᵢ.
    public let coefficients: [Double]
    /// The mean |cos| (or cos²) before the last step.
    public let loss: Double
    public let report: DisentanglementReport

    /// ‖δ‖.
    public var redundantNorm: Double { report.squaredRedundantNorm.squareRoot() }
  }

  /// Solves one group.
  ///
  /// - Parameters:
  ///   - gram: The inner products of the group's task vectors.
  ///   - rowCount: Over how many groups the loss is an average: the rows of the tensor for
  ///     row scope, 1 for any other.
  public func solve(_ gram: GramMatrix, rowCount: Int = 1) -> Solution {
    let order = gram.order
    // A model with NaN or infinite weights cannot be cleaned; it is left as it is.
    guard order > 1, gram.isFinite else {
      return solution(Array(repeating: 0, count: order), loss: 0, of: gram, rowCount: rowCount)
    }
    switch optimizer {
    case .converged:
      let coefficients = orthogonalize(gram)
      let cleaned = CleanedProducts(gram, coefficients)
      return solution(
        coefficients, loss: cleaned.loss(objective, epsilon: epsilon), of: gram, rowCount: rowCount)
    case .descent(let rate, let momentum, let weightDecay):
      let descent = Descent(
        order: order, squared: objective == .squared, epsilon: epsilon, rowCount: rowCount,
        penalty: penalty.coefficient, rate: rate, momentum: momentum, weightDecay: weightDecay)
      let path = descent.run(gram, iterations: iterations)
      let loss = CleanedProducts(gram, path.previous).loss(objective, epsilon: epsilon)
      return solution(path.last, loss: loss, of: gram, rowCount: rowCount)
    }
  }

  /// Solves every row of a tensor; the loss is the rows' average.
  public func solve(rows grams: [GramMatrix]) -> (solutions: [Solution], loss: Double, norm: Double)
  {
    let solutions = grams.map { solve($0, rowCount: grams.count) }
    let loss = solutions.reduce(0) { $0 + $1.loss } / Double(max(1, grams.count))
    let squares = solutions.reduce(0) { $0 + $1.report.squaredRedundantNorm }
    return (solutions, loss, squares.squareRoot())
  }

  private func solution(
    _ coefficients: [Double], loss: Double, of gram: GramMatrix, rowCount: Int
  ) -> Solution {
    let penalty = optimizer == .converged ? 0 : penalty.coefficient
    let isSolvable = gram.isFinite
    let gram = isSolvable ? gram : GramMatrix(order: gram.order)
    let isSquared = objective == .squared
    let slope = Descent.slope(gram, squared: isSquared, epsilon: epsilon) / Double(rowCount)
    var report = DisentanglementReport(gram, coefficients, penalty: penalty, threshold: slope)
    report.unsolvableGroups = isSolvable ? 0 : 1
    return Solution(coefficients: coefficients, loss: loss, report: report)
  }
}

extension AdaptiveWeightDisentanglement: CustomStringConvertible {
  /// All parameters on one line, for a file's metadata.
  public var description: String {
    let steps =
      switch optimizer {
      case .converged: "optimizer=converged iterations=\(iterations)"
      case .descent(let rate, let momentum, let weightDecay):
        "optimizer=descent rate=\(rate) momentum=\(momentum) weight_decay=\(weightDecay) "
          + "penalty=\(penalty.coefficient) iterations=\(iterations) epsilon=\(epsilon)"
      }
    return "scope=\(scope.rawValue) objective=\(objective.rawValue) \(steps)"
  }
}

/// The inner products of the cleaned vectors vᵢ = τᵢ − δ.
struct CleanedProducts {
  /// S = M − g·1ᵀ − 1·gᵀ + q·1·1ᵀ.
  let products: GramMatrix
  /// g = M a.
  let g: [Double]
  /// q = aᵀM a = ‖δ‖².
  let q: Double

  init(_ gram: GramMatrix, _ coefficients: [Double]) {
    let order = gram.order
    let g = (0..<order).map { i in
      (0..<order).reduce(0.0) { $0 + gram[i, $1] * coefficients[$1] }
    }
    let q = max(0, zip(coefficients, g).reduce(0) { $0 + $1.0 * $1.1 })
    var elements = gram.elements
    for i in 0..<order {
      for j in 0..<order {
        // An expert equal to the base has nothing to clean: its cosines are 0 throughout.
        let isZero = gram[i, i] <= 0 || gram[j, j] <= 0
        elements[i * order + j] = isZero ? 0 : gram[i, j] - g[i] - g[j] + q
      }
      if elements[i * order + i] <= gram[i, i] * vanishing { elements[i * order + i] = 0 }
    }
    products = GramMatrix(order: order, elements: elements)
    self.g = g
    self.q = q
  }

  /// The mean |cos| (or cos²) over all pairs of different vectors.
  func loss(
    _ objective: AdaptiveWeightDisentanglement.Objective, epsilon: Double = 0
  ) -> Double {
    let order = products.order
    let scales = (0..<order).map { i in
      products[i, i] > 0 ? 1 / (products[i, i].squareRoot() + epsilon) : 0
    }
    var sum = 0.0
    for i in 0..<order {
      for j in 0..<i {
        let cosine = products[i, j] * scales[i] * scales[j]
        sum += objective == .squared ? cosine * cosine : abs(cosine)
      }
    }
    return order > 1 ? sum * 2 / Double(order * (order - 1)) : 0
  }
}

/// Below this share of ‖τ‖² a cleaned vector is rounding noise and counts as zero.
let vanishing = 1e-14
