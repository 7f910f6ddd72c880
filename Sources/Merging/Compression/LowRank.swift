import COpenBLAS

/// A matrix as the product of two thin ones: the nearest of its rank, by the singular values.
///
/// The whole matrix and a copy must fit in memory.
public struct LowRank: Sendable {
  /// [rows, rank]; each factor carries the square roots of the singular values.
  public let left: Matrix<Float>
  /// [rank, columns].
  public let right: Matrix<Float>
  /// All singular values of the matrix, in descending order.
  public let singularValues: [Float]
  /// ‖matrix − left·right‖ / ‖matrix‖ (Eckart, Young), 0 for a zero matrix.
  public let relativeError: Double

  /// - Returns: `nil` if the matrix holds values that are not finite.
  public init?(_ matrix: Matrix<Float>, rank: Int) {
    self.init(matrix) { _ in rank }
  }

  /// The factors of least rank whose relative error is not above the tolerance.
  public init?(_ matrix: Matrix<Float>, tolerance: Double) {
    self.init(matrix) { values in
      let errors = relativeErrors(values)
      return errors.firstIndex { $0 <= tolerance } ?? values.count
    }
  }

  private init?(_ matrix: Matrix<Float>, rank chooseRank: ([Float]) -> Int) {
    guard matrix.elements.allSatisfy(\.isFinite),
      let (leftVectors, values, rightVectors) = singularVectors(matrix)
    else { return nil }
    let rank = min(max(0, chooseRank(values)), values.count)
    var left = Matrix(rowCount: matrix.rowCount, columnCount: rank, repeating: Float(0))
    var right = Matrix(rowCount: rank, columnCount: matrix.columnCount, repeating: Float(0))
    for index in 0..<rank {
      let root = values[index].squareRoot()
      for row in 0..<matrix.rowCount { left[row, index] = leftVectors[row, index] * root }
      for column in 0..<matrix.columnCount {
        right[index, column] = rightVectors[index, column] * root
      }
    }
    self.left = left
    self.right = right
    singularValues = values
    relativeError = relativeErrors(values)[rank]
  }

  /// left · right.
  public var product: Matrix<Float> { Matrix(.plain(left), .plain(right)) }
}

/// The relative error of keeping the first 0, 1, 2 … singular values.
private func relativeErrors(_ values: [Float]) -> [Double] {
  var squares = [0.0]
  // From the smallest, so that little is not lost beside much.
  for value in values.reversed() { squares.append(squares.last! + Double(value) * Double(value)) }
  let total = squares.last!
  return squares.reversed().map { total > 0 ? ($0 / total).squareRoot() : 0 }
}

/// U [rows, rank], the singular values and Vᵀ [rank, columns], rank being the smaller side.
private func singularVectors(
  _ matrix: Matrix<Float>
) -> (Matrix<Float>, [Float], Matrix<Float>)? {
  let (rows, columns) = (matrix.rowCount, matrix.columnCount)
  let rank = min(rows, columns)
  var left = Matrix(rowCount: rows, columnCount: rank, repeating: Float(0))
  var right = Matrix(rowCount: rank, columnCount: columns, repeating: Float(0))
  var values = Array(repeating: Float(0), count: rank)
  guard rank > 0 else { return (left, values, right) }
  _ = singleThreadedBLAS
  // Fortran reads our rows as columns: it sees the transposed matrix, and its U is our V.
  var elements = matrix.elements
  var (height, width, side) = (CInt(columns), CInt(rows), CInt(rank))
  var integers = Array(repeating: CInt(0), count: 8 * rank)
  var size: Float = 0
  var query: CInt = -1
  var status: CInt = 0
  sgesdd_(
    "S", &height, &width, &elements, &height, &values, &right.elements, &height, &left.elements,
    &side, &size, &query, &integers, &status)
  // The size comes as a Float, which may have been rounded down.
  query = CInt(size.nextUp.rounded(.up))
  var scratch = Array(repeating: Float(0), count: Int(query))
  sgesdd_(
    "S", &height, &width, &elements, &height, &values, &right.elements, &height, &left.elements,
    &side, &scratch, &query, &integers, &status)
  return status == 0 ? (left, values, right) : nil
}
