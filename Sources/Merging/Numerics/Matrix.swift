import COpenBLAS

/// A matrix in memory, row after row.
public struct Matrix<Scalar: Sendable & Equatable>: Sendable, Equatable {
  public let rowCount: Int
  public let columnCount: Int
  public var elements: [Scalar]

  public init(rowCount: Int, columnCount: Int, elements: [Scalar]) {
    precondition(elements.count == rowCount * columnCount)
    self.rowCount = rowCount
    self.columnCount = columnCount
    self.elements = elements
  }

  public init(rowCount: Int, columnCount: Int, repeating value: Scalar) {
    self.init(
      rowCount: rowCount, columnCount: columnCount,
      elements: Array(repeating: value, count: rowCount * columnCount))
  }

  public subscript(row: Int, column: Int) -> Scalar {
    get { elements[row * columnCount + column] }
    set { elements[row * columnCount + column] = newValue }
  }

  public subscript(row row: Int) -> ArraySlice<Scalar> {
    elements[row * columnCount..<(row + 1) * columnCount]
  }
}

/// OpenBLAS starts a thread a core; we are parallel above it.
let singleThreadedBLAS: Void = smelt_keep_blas_to_one_thread()

/// Ends the threads that OpenBLAS has started on being loaded. They spin, so a command does this first.
public func keepBLASToOneThread() { _ = singleThreadedBLAS }

/// A factor of a product, as it is or transposed.
enum Factor<Scalar: Sendable & Equatable> {
  case plain(Matrix<Scalar>)
  case transposed(Matrix<Scalar>)

  fileprivate var matrix: Matrix<Scalar> {
    switch self {
    case .plain(let matrix), .transposed(let matrix): matrix
    }
  }

  fileprivate var size: (rows: Int, columns: Int) {
    switch self {
    case .plain(let matrix): (matrix.rowCount, matrix.columnCount)
    case .transposed(let matrix): (matrix.columnCount, matrix.rowCount)
    }
  }

  fileprivate var flag: CBLAS_TRANSPOSE {
    switch self {
    case .plain: CblasNoTrans
    case .transposed: CblasTrans
    }
  }

  // A row is never shorter than one element, says the BLAS manual.
  fileprivate var stride: CInt { CInt(max(1, matrix.columnCount)) }
}

extension Matrix where Scalar == Float {
  /// Adds a product to `keeping` times the matrix.
  mutating func add(_ left: Factor<Float>, _ right: Factor<Float>, keeping: Float = 1) {
    precondition(left.size.columns == right.size.rows)
    precondition(left.size.rows == rowCount && right.size.columns == columnCount)
    guard !elements.isEmpty else { return }
    _ = singleThreadedBLAS
    cblas_sgemm(
      CblasRowMajor, left.flag, right.flag,
      CInt(rowCount), CInt(columnCount), CInt(left.size.columns),
      1, left.matrix.elements, left.stride, right.matrix.elements, right.stride,
      keeping, &elements, CInt(columnCount))
  }

  /// The product of two matrices.
  init(_ left: Factor<Float>, _ right: Factor<Float>) {
    self.init(rowCount: left.size.rows, columnCount: right.size.columns, repeating: 0)
    add(left, right, keeping: 0)
  }
}

extension Matrix where Scalar == Double {
  /// The product of two matrices.
  init(_ left: Factor<Double>, _ right: Factor<Double>) {
    precondition(left.size.columns == right.size.rows)
    self.init(rowCount: left.size.rows, columnCount: right.size.columns, repeating: 0)
    guard !elements.isEmpty else { return }
    _ = singleThreadedBLAS
    cblas_dgemm(
      CblasRowMajor, left.flag, right.flag,
      CInt(rowCount), CInt(columnCount), CInt(left.size.columns),
      1, left.matrix.elements, left.stride, right.matrix.elements, right.stride,
      0, &elements, CInt(columnCount))
  }
}

extension Matrix where Scalar: AdditiveArithmetic {
  /// Subtracts a matrix of the same size.
  mutating func subtract(_ other: Matrix) {
    precondition(other.rowCount == rowCount && other.columnCount == columnCount)
    for index in elements.indices { elements[index] -= other.elements[index] }
  }
}

extension Matrix {
  func map<Result>(_ transform: (Scalar) -> Result) -> Matrix<Result> {
    Matrix<Result>(
      rowCount: rowCount, columnCount: columnCount, elements: elements.map(transform))
  }

  /// Some of the rows, in the given order.
  func rows(_ rows: some Sequence<Int>) -> Matrix {
    let rows = Array(rows)
    return Matrix(
      rowCount: rows.count, columnCount: columnCount, elements: rows.flatMap { self[row: $0] })
  }
}

/// Solves a small positive definite system by Cholesky's method; nil if it is not definite.
func solveDefinite(_ matrix: [Double], _ right: [Double]) -> [Double]? {
  let order = right.count
  var factor = matrix
  var solution = right
  for i in 0..<order {
    for j in 0...i {
      var sum = factor[i * order + j]
      for m in 0..<j { sum -= factor[i * order + m] * factor[j * order + m] }
      if i == j {
        guard sum > 0 else { return nil }
        factor[i * order + i] = sum.squareRoot()
      } else {
        factor[i * order + j] = sum / factor[j * order + j]
      }
    }
    for m in 0..<i { solution[i] -= factor[i * order + m] * solution[m] }
    solution[i] /= factor[i * order + i]
  }
  for i in (0..<order).reversed() {
    for m in (i + 1)..<order { solution[i] -= factor[m * order + i] * solution[m] }
    solution[i] /= factor[i * order + i]
  }
  return solution
}
