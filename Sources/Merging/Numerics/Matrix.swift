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

/// A factor of a product: a matrix as it is, transposed, or some of its rows.
enum Factor<Scalar: Sendable & Equatable> {
  case plain(Matrix<Scalar>)
  case transposed(Matrix<Scalar>)
  case rows(Matrix<Scalar>, Range<Int>)

  fileprivate var matrix: Matrix<Scalar> {
    switch self {
    case .plain(let matrix), .transposed(let matrix), .rows(let matrix, _): matrix
    }
  }

  fileprivate var size: (rows: Int, columns: Int) {
    switch self {
    case .plain(let matrix): (matrix.rowCount, matrix.columnCount)
    case .transposed(let matrix): (matrix.columnCount, matrix.rowCount)
    case .rows(let matrix, let rows): (rows.count, matrix.columnCount)
    }
  }

  fileprivate var flag: CBLAS_TRANSPOSE {
    switch self {
    case .plain, .rows: CblasNoTrans
    case .transposed: CblasTrans
    }
  }

  // A row is never shorter than one element, says the BLAS manual.
  fileprivate var stride: CInt { CInt(max(1, matrix.columnCount)) }

  /// Where the factor's elements begin among the matrix's.
  fileprivate var start: Int {
    guard case .rows(let matrix, let rows) = self else { return 0 }
    precondition(0 <= rows.lowerBound && rows.upperBound <= matrix.rowCount)
    return rows.lowerBound * matrix.columnCount
  }
}

extension Matrix where Scalar == Float {
  /// Adds a product to `keeping` times the matrix, or to some of its rows.
  mutating func add(
    _ left: Factor<Float>, _ right: Factor<Float>, keeping: Float = 1,
    toRows rows: Range<Int>? = nil
  ) {
    let rows = rows ?? 0..<rowCount
    precondition(0 <= rows.lowerBound && rows.upperBound <= rowCount)
    precondition(left.size.rows == rows.count && right.size.columns == columnCount)
    guard !rows.isEmpty, columnCount > 0 else { return }
    let start = rows.lowerBound * columnCount
    elements.withUnsafeMutableBufferPointer {
      storeProduct(left, right, keeping: keeping, into: $0.baseAddress! + start)
    }
  }

  /// The product of two matrices.
  init(_ left: Factor<Float>, _ right: Factor<Float>) {
    let (rows, columns) = (left.size.rows, right.size.columns)
    self.init(
      rowCount: rows, columnCount: columns,
      elements: Array(unsafeUninitializedCapacity: rows * columns) { elements, count in
        // With a factor of 0 BLAS sets the result, whatever was there.
        storeProduct(left, right, keeping: 0, into: elements.baseAddress)
        count = rows * columns
      })
  }
}

/// result = left · right + keeping · result
//
// Sound: the caller's result has the product's rows and columns, and BLAS reads only what the
// factors' sizes say.
private func storeProduct(
  _ left: Factor<Float>, _ right: Factor<Float>, keeping: Float,
  into result: UnsafeMutablePointer<Float>?
) {
  precondition(left.size.columns == right.size.rows)
  guard let result, left.size.rows > 0, right.size.columns > 0 else { return }
  _ = singleThreadedBLAS
  left.matrix.elements.withUnsafeBufferPointer { leftElements in
    right.matrix.elements.withUnsafeBufferPointer { rightElements in
      guard let leftElements = leftElements.baseAddress,
        let rightElements = rightElements.baseAddress
      else {
        // A product over nothing is 0.
        for index in 0..<left.size.rows * right.size.columns {
          result[index] = keeping == 0 ? 0 : keeping * result[index]
        }
        return
      }
      cblas_sgemm(
        CblasRowMajor, left.flag, right.flag,
        CInt(left.size.rows), CInt(right.size.columns), CInt(left.size.columns),
        1, leftElements + left.start, left.stride, rightElements + right.start, right.stride,
        keeping, result, CInt(right.size.columns))
    }
  }
}

extension Matrix where Scalar == Double {
  /// The product of two matrices.
  init(_ left: Factor<Double>, _ right: Factor<Double>) {
    precondition(left.size.columns == right.size.rows && left.start == 0 && right.start == 0)
    self.init(rowCount: left.size.rows, columnCount: right.size.columns, repeating: 0)
    guard !elements.isEmpty else { return }
    _ = singleThreadedBLAS
    cblas_dgemm(
      CblasRowMajor, left.flag, right.flag,
      CInt(rowCount), CInt(columnCount), CInt(left.size.columns),
      1, left.matrix.elements, left.stride, right.matrix.elements, right.stride,
      0, &elements, CInt(columnCount))
  }

  /// The inner products of a factor's rows: factor · factorᵀ, at half the cost.
  init(gramOf factor: Factor<Double>) {
    let order = factor.size.rows
    precondition(factor.start == 0)
    self.init(rowCount: order, columnCount: order, repeating: 0)
    guard !elements.isEmpty else { return }
    _ = singleThreadedBLAS
    cblas_dsyrk(
      CblasRowMajor, CblasLower, factor.flag, CInt(order), CInt(factor.size.columns),
      1, factor.matrix.elements, factor.stride, 0, &elements, CInt(order))
    for row in 0..<order { for column in 0..<row { self[column, row] = self[row, column] } }
  }
}

extension Matrix {
  func map<Result>(_ transform: (Scalar) -> Result) -> Matrix<Result> {
    Matrix<Result>(
      rowCount: rowCount, columnCount: columnCount, elements: elements.map(transform))
  }

  func column(_ column: Int) -> [Scalar] { (0..<rowCount).map { self[$0, column] } }

  /// Some of the rows, in the given order.
  func rows(_ rows: some Collection<Int>) -> Matrix {
    var elements: [Scalar] = []
    elements.reserveCapacity(rows.count * columnCount)
    for row in rows { elements += self[row: row] }
    return Matrix(rowCount: rows.count, columnCount: columnCount, elements: elements)
  }

  /// Matrices below each other; there is at least one.
  init(stacking matrices: [Matrix]) {
    self.init(
      rowCount: matrices.reduce(0) { $0 + $1.rowCount }, columnCount: matrices[0].columnCount,
      elements: matrices.count == 1 ? matrices[0].elements : matrices.flatMap(\.elements))
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
