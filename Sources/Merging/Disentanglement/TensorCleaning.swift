import CKernels

/// How the task vectors of one tensor are cleaned.
///
/// A merge asks it for the redundant vectors of a tile, and either takes them out of the tile's
/// rows or, if it only adds task vectors up, changes its weights and leaves the rows alone.
enum TensorCleaning: Sendable {
  case none
  /// Each of the tensor's rows is a group, solved while its elements are at hand.
  case rows(AdaptiveWeightDisentanglement, length: Int, count: Int)
  /// The tensor belongs to a group with these coefficients.
  case group(coefficients: [Double])

  /// Elements that must stay together in a tile.
  var grain: Int { if case .rows(_, let length, _) = self { length } else { 1 } }

  var isNone: Bool { if case .none = self { true } else { false } }
  var isByRow: Bool { if case .rows = self { true } else { false } }
}

/// What one tensor's cleaning found out.
struct TensorFindings: Sendable {
  /// The inner products of the whole tensor's task vectors.
  var gram: GramMatrix
  /// What became of the rows, where each row is a group.
  var rows: DisentanglementReport

  init(experts: Int) {
    self.init(gram: GramMatrix(order: experts), experts: experts)
  }

  init(gram: GramMatrix, experts: Int) {
    self.gram = gram
    rows = DisentanglementReport(taskCount: experts)
  }

  static func += (sum: inout Self, other: Self) {
    sum.gram += other.gram
    sum.rows += other.rows
  }
}

/// The redundant vectors of the groups in a tile, as coefficients of the task vectors.
struct RedundantVectors: Sendable {
  let order: Int
  /// The columns of one group.
  let length: Int
  /// aᵢ for every task, group after group.
  fileprivate(set) var coefficients: [Double]

  var groupCount: Int { coefficients.count / max(1, order) }

  func columns(of group: Int) -> Range<Int> { group * length..<(group + 1) * length }

  func coefficients(of group: Int) -> ArraySlice<Double> {
    coefficients[group * order..<(group + 1) * order]
  }

  /// The weights with which the task vectors as they are sum to the same as the cleaned ones
  /// with the given weights: wᵢ − aᵢ·Σw; with one weight λ for all, λ(1 − k·aᵢ).
  func weights(_ weights: [Float], of group: Int) -> [Float] {
    let sum = weights.reduce(0.0) { $0 + Double($1) }
    return zip(weights, coefficients(of: group)).map { Float(Double($0) - $1 * sum) }
  }
}

extension TensorCleaning {
  /// Finds the redundant vectors of a tile whose rows from `first` to the last hold the task
  /// vectors of `experts` experts, and adds what became of rows to the findings.
  func redundantVectors(
    in tile: borrowing Tile, from first: Int, experts: Int, findings: inout TensorFindings
  ) -> RedundantVectors {
    switch self {
    case .none:
      return RedundantVectors(order: experts, length: 0, coefficients: [])
    case .group(let coefficients):
      return RedundantVectors(order: experts, length: tile.columns, coefficients: coefficients)
    case .rows(let method, let length, let count):
      guard length > 0 else {
        return RedundantVectors(order: experts, length: 0, coefficients: [])
      }
      let rows = tile.rows(from: first)
      var solver = RowSolver(method, experts: experts, rowCount: count)
      for begin in stride(from: 0, to: tile.columns, by: length) {
        solver.add(rows.extracting(droppingFirst: begin), stride: tile.capacity, columns: length)
      }
      return RedundantVectors(
        order: experts, length: length, coefficients: solver.finish(&findings))
    }
  }
}

extension Tile {
  /// Takes the redundant vectors out of the rows from `first` on.
  ///
  /// - Parameter keeping: a row of another tile that becomes the redundant vector.
  mutating func takeOut(
    _ vectors: RedundantVectors, from first: Int, keeping other: inout Tile, row: Int
  ) {
    other.clear(row: row)
    for group in 0..<vectors.groupCount {
      let columns = vectors.columns(of: group)
      // Nothing is taken out, also of what is no number: 0 · NaN would spread.
      guard vectors.coefficients(of: group).contains(where: { $0 != 0 }) else { continue }
      for (expert, coefficient) in vectors.coefficients(of: group).enumerated() {
        other.add(
          self, row: first + expert, to: row, times: Float(coefficient), columns: columns)
      }
      for expert in 0..<vectors.order {
        subtract(other, row: row, from: first + expert, columns: columns)
      }
    }
  }
}

/// Solves row after row, eight side by side.
private struct RowSolver {
  private let method: AdaptiveWeightDisentanglement
  private let rowCount: Int
  private let experts: Int
  private let descent: smelt_descent?
  private var waiting = 0
  private var grams: [GramMatrix]
  private var coefficients: [Double] = []
  private var report: DisentanglementReport
  private var total: GramMatrix
  /// The kernel's arrays: eight numbers, one a row, for each number of one group.
  private var lanes: Lanes
  private var cleaned: GramMatrix

  private struct Lanes {
    var grams, last, slope, products, redundancy: [Double]
    var independent: [Bool]
  }

  private static let width = smelt_descent_lanes

  init(_ method: AdaptiveWeightDisentanglement, experts: Int, rowCount: Int) {
    self.method = method
    self.rowCount = rowCount
    self.experts = experts
    descent = method.kernel(experts: experts, rowCount: rowCount)
    grams = Array(repeating: GramMatrix(order: experts), count: Self.width)
    report = DisentanglementReport(taskCount: experts)
    total = GramMatrix(order: experts)
    cleaned = total
    func array(_ count: Int) -> [Double] { Array(repeating: 0, count: count * Self.width) }
    let square = experts * experts
    lanes = Lanes(
      grams: array(square), last: array(experts), slope: array(experts), products: array(square),
      redundancy: array(1), independent: Array(repeating: false, count: Self.width))
  }

  mutating func add(_ rows: Span<Float>, stride: Int, columns: Int) {
    grams[waiting].clear()
    grams[waiting].add(rows, stride: stride, columns: columns)
    waiting += 1
    if waiting == Self.width { solve() }
  }

  /// The coefficients of all rows, in their order.
  mutating func finish(_ findings: inout TensorFindings) -> [Double] {
    solve()
    findings.rows += report
    findings.gram += total
    return coefficients
  }

  private mutating func solve() {
    if descent != nil { descend() }
    for lane in 0..<waiting {
      let gram = grams[lane]
      total += gram
      if descent != nil, gram.isFinite, lanes.independent[lane] {
        take(lane)
      } else {
        let solution = method.solve(gram, rowCount: rowCount)
        coefficients += solution.coefficients
        report += solution.report
      }
    }
    waiting = 0
  }

  private mutating func descend() {
    guard var descent else { return }
    for lane in 0..<Self.width {
      let isUsed = lane < waiting && grams[lane].isFinite
      for index in 0..<experts * experts {
        lanes.grams[index * Self.width + lane] = isUsed ? grams[lane].elements[index] : 0
      }
    }
    smelt_descend(
      &descent, lanes.grams, &lanes.last, &lanes.slope, &lanes.products, &lanes.redundancy,
      &lanes.independent)
  }

  /// Reads one lane's solution.
  private mutating func take(_ lane: Int) {
    let gram = grams[lane]
    var threshold = 0.0
    for i in 0..<experts {
      coefficients.append(lanes.last[i * Self.width + lane])
      for j in 0..<experts {
        cleaned[i, j] = lanes.products[(i * experts + j) * Self.width + lane]
        threshold +=
          lanes.slope[i * Self.width + lane] * gram[i, j] * lanes.slope[j * Self.width + lane]
      }
    }
    report.add(
      gram, cleaned: cleaned, squaredRedundantNorm: lanes.redundancy[lane],
      penalty: method.penalty.coefficient, threshold: max(0, threshold).squareRoot())
  }
}

extension AdaptiveWeightDisentanglement {
  /// The descent as the kernel takes it; nil where it cannot help.
  fileprivate func kernel(experts: Int, rowCount: Int) -> smelt_descent? {
    guard case .descent(let rate, let momentum, let weightDecay) = optimizer, iterations > 0,
      (2...smelt_descent_max_order).contains(experts)
    else { return nil }
    return smelt_descent(
      order: experts, iterations: iterations, squared: objective == .squared, epsilon: epsilon,
      pair_weight: 1 / Double(experts * (experts - 1) * rowCount),
      penalty: penalty.coefficient, rate: rate, momentum: momentum, weight_decay: weightDecay,
      vanishing: vanishing)
  }
}
