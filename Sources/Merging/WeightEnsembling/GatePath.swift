/// The gates between a start and the least loss, one for every strength of the ridge.
///
/// A gate is start + offset; an offset is [rank + 1, tasks] in principal coordinates, the last
/// row the bias. The system is solved by conjugate gradients, preconditioned with what the
/// matrix would be if all samples had the same curvature: that one is diagonal in the principal
/// coordinates of features and curvature.
struct GatePath {
  private let principal: PrincipalFeatures
  private let forms: QuadraticForms
  private let start: Matrix<Double>
  /// The scores with a column of ones for the bias.
  private let scores: Matrix<Double>
  private let curvatureValues: [Double]
  private let curvatureVectors: Matrix<Double>
  private let scale: Double

  /// - Parameter start: The mixtures that the start gives to the samples.
  init(_ principal: PrincipalFeatures, _ forms: QuadraticForms, start: Matrix<Float>) {
    self.principal = principal
    self.forms = forms
    self.start = start.map { Double($0) }
    let (count, rank) = (principal.scores.rowCount, principal.scores.columnCount)
    var scores = Matrix(rowCount: count, columnCount: rank + 1, repeating: 1.0)
    for row in 0..<count {
      for column in 0..<rank { scores[row, column] = principal.scores[row, column] }
    }
    self.scores = scores
    var mean = Matrix(rowCount: forms.order, columnCount: forms.order, repeating: 0.0)
    for sample in 0..<count {
      for index in mean.elements.indices {
        mean.elements[index] += forms.curvatures[sample, index] / Double(count)
      }
    }
    let (values, vectors) = eigen(mean)
    // Where no task vector changes the output, nothing pulls; a floor keeps the division finite.
    let floor = max(1e-9 * (values.last ?? 0), 1e-300)
    curvatureValues = values.map { max($0, floor) }
    curvatureVectors = vectors
    scale =
      curvatureValues.reduce(0, +) / Double(forms.order)
      * (principal.values.reduce(0, +) / Double(max(1, rank)))
  }

  /// A ridge in the units of the loss.
  func ridge(_ relative: Double) -> Double { max(relative * scale, .leastNormalMagnitude) }

  func startLoss(of rows: [Int]) -> Double {
    rows.reduce(0) { $0 + forms.loss($1, start[row: $1]) }
  }

  func loss(of rows: [Int], _ offset: Matrix<Double>) -> Double {
    let held = scores.rows(rows)
    let changes = Matrix(.plain(held), .plain(offset))
    return rows.enumerated().reduce(0) { sum, entry in
      let mixture = zip(start[row: entry.element], changes[row: entry.offset]).map { $0 + $1 }
      return sum + forms.loss(entry.element, mixture[...])
    }
  }

  func gate(_ offset: Matrix<Double>) -> Dense {
    let rank = offset.rowCount - 1
    return principal.gate(offset.rows(0..<rank), bias: Array(offset[row: rank]))
  }

  /// The offset of least loss plus ridge·‖W‖² over some of the samples (or all).
  func solve(
    _ rows: [Int]?, relativeRidge: Double, from first: Matrix<Double>?
  ) -> Matrix<Double> {
    let rows = rows ?? Array(0..<scores.rowCount)
    let used = rows.count == scores.rowCount ? scores : scores.rows(rows)
    let rank = scores.columnCount - 1
    let ridge = ridge(relativeRidge)
    let share = Double(rows.count) / Double(scores.rowCount)

    /// Σ H(offset·x)xᵀ + ridge·offset.
    func applied(_ offset: Matrix<Double>) -> Matrix<Double> {
      var changes = Matrix(.plain(used), .plain(offset))
      for (row, sample) in rows.enumerated() { forms.curve(sample, &changes, row: row) }
      var result = Matrix(.transposed(used), .plain(changes))
      for row in 0..<rank {
        for column in 0..<offset.columnCount { result[row, column] += ridge * offset[row, column] }
      }
      return result
    }

    func preconditioned(_ residual: Matrix<Double>) -> Matrix<Double> {
      var rotated = Matrix(.plain(residual), .transposed(curvatureVectors))
      for row in 0...rank {
        for column in 0..<rotated.columnCount {
          let curvature = curvatureValues[column] * share
          rotated[row, column] /=
            row == rank
            ? curvature * Double(scores.rowCount) : curvature * principal.values[row] + ridge
        }
      }
      return Matrix(.plain(rotated), .plain(curvatureVectors))
    }

    // The right side: how far the start is from where each sample's slope vanishes.
    var pulls = Matrix(rowCount: rows.count, columnCount: forms.order, repeating: 0.0)
    for (row, sample) in rows.enumerated() {
      for task in 0..<forms.order {
        pulls[row, task] = forms.points[sample, task] - start[sample, task]
      }
      forms.curve(sample, &pulls, row: row)
      for task in 0..<forms.order { pulls[row, task] -= forms.slopes[sample, task] }
    }
    let right = Matrix(.transposed(used), .plain(pulls))

    var offset =
      first ?? Matrix(rowCount: rank + 1, columnCount: forms.order, repeating: 0.0)
    var residual = right
    residual.subtract(applied(offset))
    var improved = preconditioned(residual)
    var direction = improved
    var progress = dot(residual, improved)
    let enough = 1e-8 * dot(right, preconditioned(right))
    for _ in 0..<100 where progress > enough {
      let image = applied(direction)
      let step = progress / dot(direction, image)
      offset.add(direction, scale: step)
      residual.add(image, scale: -step)
      improved = preconditioned(residual)
      let next = dot(residual, improved)
      var turned = improved
      turned.add(direction, scale: next / progress)
      direction = turned
      progress = next
    }
    return offset
  }
}

private func dot(_ left: Matrix<Double>, _ right: Matrix<Double>) -> Double {
  var sum = 0.0
  for index in left.elements.indices { sum += left.elements[index] * right.elements[index] }
  return sum
}

extension Matrix where Scalar == Double {
  /// Adds another matrix, `scale` times.
  fileprivate mutating func add(_ other: Matrix, scale: Double) {
    for index in elements.indices { elements[index] += scale * other.elements[index] }
  }
}

/// The loss of every sample as a function of its mixture w near a point e:
/// (w − e)ᵀH(w − e) + 2cᵀ(w − e) + constant.
struct QuadraticForms: Sendable {
  let order: Int
  /// H of every sample, row after row.
  var curvatures: Matrix<Double>
  var slopes: Matrix<Double>
  var constants: [Double]
  var points: Matrix<Double>

  init(order: Int, count: Int) {
    self.order = order
    curvatures = Matrix(rowCount: count, columnCount: order * order, repeating: 0)
    slopes = Matrix(rowCount: count, columnCount: order, repeating: 0)
    constants = Array(repeating: 0, count: count)
    points = slopes
  }

  /// H·vector of a sample, into `result`.
  @inline(__always)
  func curve(_ sample: Int, _ vectors: inout Matrix<Double>, row: Int) {
    var result = 0.0
    let old = Array(vectors[row: row])
    for i in 0..<order {
      result = 0
      for j in 0..<order { result += curvatures[sample, i * order + j] * old[j] }
      vectors[row, i] = result
    }
  }

  func loss(_ sample: Int, _ mixture: ArraySlice<Double>) -> Double {
    let offset = zip(mixture, points[row: sample]).map { $0 - $1 }
    var sum = constants[sample]
    for i in 0..<order {
      sum += 2 * slopes[sample, i] * offset[i]
      for j in 0..<order { sum += offset[i] * curvatures[sample, i * order + j] * offset[j] }
    }
    return sum
  }
}
