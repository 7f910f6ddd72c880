/// What a disentanglement did to a group of task vectors, or to many groups together.
public struct DisentanglementReport: Sendable, Equatable {
  public private(set) var groups = 0
  /// The inner products of the task vectors, all groups together, before cleaning.
  public private(set) var before: GramMatrix
  /// The same after cleaning.
  public private(set) var after: GramMatrix
  private var cosineBefore = 0.0
  private var cosineAfter = 0.0
  /// ‖δ‖² of all groups.
  public private(set) var squaredRedundantNorm = 0.0
  private var lowestThreshold = Double.infinity
  private var highestThreshold = 0.0
  /// How many groups have a penalty at or above their threshold: nothing is cleaned there.
  public private(set) var idleGroups = 0
  /// How many groups are less orthogonal after cleaning than before: a descent overshot there.
  public private(set) var overshotGroups = 0
  /// In how many groups each task keeps less than 0.7 of its norm.
  public private(set) var depletedGroups: [Int]
  /// Groups that were left as they are because their weights are not all numbers.
  public internal(set) var unsolvableGroups = 0

  /// A report of no group yet.
  public init(taskCount: Int) {
    before = GramMatrix(order: taskCount)
    after = before
    depletedGroups = Array(repeating: 0, count: taskCount)
  }

  init(_ gram: GramMatrix, _ coefficients: [Double], penalty: Double, threshold: Double) {
    self.init(taskCount: gram.order)
    let cleaned = CleanedProducts(gram, coefficients)
    add(
      gram, cleaned: cleaned.products, squaredRedundantNorm: cleaned.q, penalty: penalty,
      threshold: threshold)
  }

  /// Adds a group.
  mutating func add(
    _ gram: GramMatrix, cleaned: GramMatrix, squaredRedundantNorm: Double, penalty: Double,
    threshold: Double
  ) {
    groups += 1
    before += gram
    after += cleaned
    cosineBefore += gram.meanAbsoluteCosine
    cosineAfter += cleaned.meanAbsoluteCosine
    if cleaned.meanAbsoluteCosine > gram.meanAbsoluteCosine { overshotGroups += 1 }
    self.squaredRedundantNorm += squaredRedundantNorm
    // Groups that have nothing in common, or nothing at all, have no slope to stay idle on.
    if threshold > 0 {
      lowestThreshold = min(lowestThreshold, threshold)
      highestThreshold = max(highestThreshold, threshold)
      if penalty >= threshold { idleGroups += 1 }
    }
    for task in depletedGroups.indices
    where cleaned[task, task] < gram[task, task] * (Self.healthyNorm * Self.healthyNorm) {
      depletedGroups[task] += 1
    }
  }

  /// The share of its norm below which a task has lost more than redundancy.
  public static let healthyNorm = 0.7

  /// The mean |cos| between task vectors, over all groups.
  public var meanCosineBefore: Double { cosineBefore / Double(max(1, groups)) }
  public var meanCosineAfter: Double { cosineAfter / Double(max(1, groups)) }

  /// The smallest and largest penalty at which a group's δ stays 0: ‖∇L_O‖ at δ = 0.
  public var thresholds: ClosedRange<Double> {
    min(lowestThreshold, highestThreshold)...highestThreshold
  }

  /// ‖δ‖ over the mean ‖τ‖.
  public var relativeRedundancy: Double {
    let norms = (0..<before.order).map { before[$0, $0].squareRoot() }
    let mean = norms.reduce(0, +) / Double(max(1, norms.count))
    return mean > 0 ? squaredRedundantNorm.squareRoot() / mean : 0
  }

  /// ‖τᵢ − δ‖ over ‖τᵢ‖ for every task; below 0.7 a user should be warned.
  public var retainedNorms: [Double] {
    (0..<before.order).map {
      before[$0, $0] > 0 ? (after[$0, $0] / before[$0, $0]).squareRoot() : 1
    }
  }

  /// Adds what was done to other groups of the same tasks.
  public static func += (sum: inout Self, other: Self) {
    precondition(sum.before.order == other.before.order)
    sum.groups += other.groups
    sum.before += other.before
    sum.after += other.after
    sum.cosineBefore += other.cosineBefore
    sum.cosineAfter += other.cosineAfter
    sum.squaredRedundantNorm += other.squaredRedundantNorm
    sum.lowestThreshold = min(sum.lowestThreshold, other.lowestThreshold)
    sum.highestThreshold = max(sum.highestThreshold, other.highestThreshold)
    sum.idleGroups += other.idleGroups
    sum.overshotGroups += other.overshotGroups
    for task in sum.depletedGroups.indices {
      sum.depletedGroups[task] += other.depletedGroups[task]
    }
    sum.unsolvableGroups += other.unsolvableGroups
  }
}
