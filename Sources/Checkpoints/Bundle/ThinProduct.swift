/// A matrix as the product of two thin ones, in F32: `left` [rows, rank] and `right`
/// [rank, columns].
///
/// An element is the sum of its products from the first on, each product and each sum rounded to
/// F32: the same bits everywhere.
enum ThinProduct {
  /// What bounds the work that a bundle can ask for.
  static let largestRank = 1 << 10
  static let largestRowLength = Codec.blockCount
  /// Elements of `right`, which is decoded for each block again.
  static let largestRight = 1 << 24

  /// Whether a matrix can be kept so at all, and takes less.
  static func suits(_ tensor: TensorInfo, rank: Int) -> Bool {
    let (rows, columns) = shape(of: tensor)
    return tensor.shape.count > 1 && isAllowed(rank, of: tensor)
      && 4 * rank * (rows + columns) < tensor.byteCount
  }

  static func isAllowed(_ rank: Int, of tensor: TensorInfo) -> Bool {
    let (rows, columns) = shape(of: tensor)
    return columns <= largestRowLength && (1...largestRank).contains(rank)
      && rank <= min(rows, columns) && rank * columns <= largestRight
  }

  /// The tensor as a matrix, whose columns are its last dimension.
  static func shape(of tensor: TensorInfo) -> (rows: Int, columns: Int) {
    let columns = tensor.rowLength
    return (columns == 0 ? 0 : tensor.elementCount / columns, columns)
  }

  /// The rows of the block `elements` that have elements in it.
  static func rows(_ elements: Range<Int>, columns: Int) -> Range<Int> {
    elements.lowerBound / columns..<(elements.upperBound - 1) / columns + 1
  }

  /// Adds a row of `right`, times a column of `left`, to some elements of the product.
  /// - Parameters:
  ///   - left: the factors for the rows that `elements` touch, `stride` elements apart.
  ///   - values: the product's elements in `elements`.
  static func add(
    _ right: UnsafePointer<Float>, times left: UnsafePointer<Float>, stride: Int,
    to values: UnsafeMutablePointer<Float>, _ elements: Range<Int>, columns: Int
  ) {
    let rows = rows(elements, columns: columns)
    for row in rows {
      let factor = left[(row - rows.lowerBound) * stride]
      let wanted = elements.clamped(to: row * columns..<(row + 1) * columns)
      let target = values + (wanted.lowerBound - elements.lowerBound)
      let source = right + (wanted.lowerBound - row * columns)
      for i in 0..<wanted.count { target[i] += factor * source[i] }
    }
  }
}
