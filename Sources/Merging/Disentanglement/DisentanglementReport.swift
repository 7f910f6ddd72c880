/// What a disentanglement did to a group of task vectors, or to many groups together.
public struct DisentanglementReport: Sendable, Equatable {
  public private(set) var groups = 1
  private var cosineBefore: Double
  private var cosineAfter: Double
  /// ‖δ‖² of all groups.
  public private(set) var squaredRedundantNorm: Double
  private var squaredNorms: [Double]
  private var squaredCleanedNorms: [Double]
  /// The smallest and largest penalty at which a group's δ stays 0: ‖∇L_O‖ at δ = 0.
  public private(set) var thresholds: ClosedRange<Double>
  /// How many groups have a penalty at or above their threshold: nothing is cleaned there.
  public private(set) var idleGroups: Int

  init(_ gram: GramMatrix, _ coefficients: [Double], penalty: Double, threshold: Double) {
    let cleaned = CleanedProducts(gram, coefficients)
    cosineBefore = gram.meanAbsoluteCosine
    cosineAfter = cleaned.products.meanAbsoluteCosine
    squaredRedundantNorm = cleaned.q
    squaredNorms = (0..<gram.order).map { gram[$0, $0] }
    squaredCleanedNorms = (0..<gram.order).map { cleaned.products[$0, $0] }
    thresholds = threshold...threshold
    idleGroups = penalty > 0 && penalty >= threshold ? 1 : 0
  }

  /// The mean |cos| between task vectors, over all groups.
  public var meanCosineBefore: Double { cosineBefore / Double(groups) }
  public var meanCosineAfter: Double { cosineAfter / Double(groups) }

  /// ‖δ‖ over the mean ‖τ‖.
  public var relativeRedundancy: Double {
    let mean = squaredNorms.reduce(0) { $0 + $1.squareRoot() } / Double(max(1, squaredNorms.count))
    return mean > 0 ? squaredRedundantNorm.squareRoot() / mean : 0
  }

  /// ‖τᵢ − δ‖ over ‖τᵢ‖ for every task; below 0.7 a user should be warned.
  public var retainedNorms: [Double] {
    zip(squaredNorms, squaredCleanedNorms).map { $0 > 0 ? ($1 / $0).squareRoot() : 1 }
  }

  /// Adds what was done to other groups of the same tasks.
  public static func += (sum: inout Self, other: Self) {
    precondition(sum.squaredNorms.count == other.squaredNorms.count)
    sum.groups += other.groups
    sum.cosineBefore += other.cosineBefore
    sum.cosineAfter += other.cosineAfter
    sum.squaredRedundantNorm += other.squaredRedundantNorm
    for task in sum.squaredNorms.indices {
      sum.squaredNorms[task] += other.squaredNorms[task]
      sum.squaredCleanedNorms[task] += other.squaredCleanedNorms[task]
    }
    sum.thresholds =
      min(
        sum.thresholds.lowerBound, other.thresholds.lowerBound)...max(
        sum.thresholds.upperBound, other.thresholds.upperBound)
    sum.idleGroups += other.idleGroups
  }
}
