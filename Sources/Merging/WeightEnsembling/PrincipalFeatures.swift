import COpenBLAS

/// Features in the coordinates of their principal directions, where a ridge fit is a division.
struct PrincipalFeatures: Sendable {
  let mean: [Double]
  /// The directions, one a row: [rank, width].
  let directions: Matrix<Double>
  /// The features less their mean, along the directions: [samples, rank].
  let scores: Matrix<Double>
  /// The sum of squares of every column of scores.
  let values: [Double]

  init(_ features: Matrix<Float>) {
    let (count, width) = (features.rowCount, features.columnCount)
    let (centred, mean) = centred(
      Matrix(rowCount: count, columnCount: width, elements: features.elements.map { Double($0) }))
    self.mean = mean

    // The eigenvectors of the smaller of the two Gram matrices give both sides of the SVD.
    let isWide = count < width
    let (eigenvalues, eigenvectors) = eigen(
      Matrix(gramOf: isWide ? .plain(centred) : .transposed(centred)))
    // What is below this share of the largest is rounding.
    let first = eigenvalues.firstIndex { $0 > 1e-12 * eigenvalues.last! } ?? eigenvalues.count
    let order = eigenvectors.columnCount
    var kept = Matrix(
      rowCount: order - first, columnCount: order,
      elements: Array(eigenvectors.elements[(first * order)...]))
    if isWide {
      for row in 0..<kept.rowCount {
        let scale = 1 / eigenvalues[first + row].squareRoot()
        for column in 0..<order { kept[row, column] *= scale }
      }
      kept = Matrix(.plain(kept), .plain(centred))
    }
    values = Array(eigenvalues[first...])
    directions = kept
    scores = Matrix(.plain(centred), .transposed(directions))
  }

  /// The gate W h + b of which W·(features − mean) is `coefficients` of the scores: [rank, tasks].
  func gate(_ coefficients: Matrix<Double>, bias: [Double]) -> Dense {
    let weight = Matrix(.transposed(coefficients), .plain(directions))
    let shifted = bias.indices.map { task in
      bias[task] - zip(weight[row: task], mean).reduce(0) { $0 + $1.0 * $1.1 }
    }
    return Dense(
      weight: Matrix(
        rowCount: weight.rowCount, columnCount: weight.columnCount,
        elements: weight.elements.map { Float($0) }),
      bias: shifted.map { Float($0) })
  }
}

/// A matrix less the mean of its rows, and that mean.
func centred(_ matrix: Matrix<Double>) -> (Matrix<Double>, mean: [Double]) {
  var mean = Array(repeating: 0.0, count: matrix.columnCount)
  for row in 0..<matrix.rowCount {
    for column in mean.indices { mean[column] += matrix[row, column] }
  }
  for column in mean.indices { mean[column] /= Double(matrix.rowCount) }
  var centred = matrix
  for row in 0..<matrix.rowCount {
    for column in mean.indices { centred[row, column] -= mean[column] }
  }
  return (centred, mean)
}

/// The eigenvalues of a symmetric matrix, ascending, and its eigenvectors as rows.
func eigen(_ matrix: Matrix<Double>) -> (values: [Double], vectors: Matrix<Double>) {
  _ = singleThreadedBLAS
  var vectors = matrix
  var order = CInt(matrix.rowCount)
  var values = Array(repeating: 0.0, count: matrix.rowCount)
  var status: CInt = 0
  var size = 0.0
  var integerSize: CInt = 0
  var query: CInt = -1
  // The first call asks how much scratch memory the second needs.
  dsyevd_(
    "V", "U", &order, &vectors.elements, &order, &values, &size, &query, &integerSize, &query,
    &status)
  query = CInt(size)
  var scratch = Array(repeating: 0.0, count: Int(size))
  var integers = Array(repeating: CInt(0), count: Int(integerSize))
  dsyevd_(
    "V", "U", &order, &vectors.elements, &order, &values, &scratch, &query, &integers,
    &integerSize, &status)
  precondition(status == 0, "dsyevd does not converge")
  // Fortran's columns, the eigenvectors, are our rows.
  return (values, vectors)
}
