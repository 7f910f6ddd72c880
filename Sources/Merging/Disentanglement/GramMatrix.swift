import CKernels

/// The inner products of k vectors: all that most merge methods need to know of them.
///
/// Sums are taken in sixteen Float lanes over blocks of 1024 elements and folded into Double
/// after each block. A row may therefore arrive in pieces: as long as every piece but the last is
/// a multiple of 1024 long, the result is the same bits.
public struct GramMatrix: Equatable, Sendable {
  /// The number k of vectors.
  public let order: Int
  /// The matrix, row after row.
  public private(set) var elements: [Double]

  public init(order: Int) {
    self.order = order
    elements = Array(repeating: 0, count: order * order)
  }

  /// The matrix of `order` given rows.
  public init(order: Int, elements: [Double]) {
    precondition(elements.count == order * order)
    self.order = order
    self.elements = elements
  }

  public internal(set) subscript(row: Int, column: Int) -> Double {
    get { elements[row * order + column] }
    set { elements[row * order + column] = newValue }
  }

  /// Adds the inner products of `order` rows of `columns` elements; row r begins at `r * stride`.
  public mutating func add(_ rows: Span<Float>, stride: Int, columns: Int) {
    guard order > 0, columns > 0 else { return }
    precondition(stride >= 0 && (order - 1) * stride + columns <= rows.count)
    // Sound: the kernel reads the rows that were just checked and writes order² numbers.
    rows.withUnsafeBufferPointer { rows in
      elements.withUnsafeMutableBufferPointer { elements in
        smelt_gram_add(rows.baseAddress, stride, columns, order, elements.baseAddress)
      }
    }
  }

  mutating func clear() {
    for index in elements.indices { elements[index] = 0 }
  }

  /// Adds the matrix of other elements of the same vectors.
  public static func += (sum: inout GramMatrix, other: GramMatrix) {
    precondition(sum.order == other.order)
    for index in sum.elements.indices { sum.elements[index] += other.elements[index] }
  }

  /// The cosines between the vectors; a zero vector has cosine 0 with all.
  public var cosines: GramMatrix {
    let scales = (0..<order).map { self[$0, $0] > 0 ? 1 / self[$0, $0].squareRoot() : 0 }
    var result = self
    for i in 0..<order {
      for j in 0..<order {
        result[i, j] = i == j && scales[i] > 0 ? 1 : result[i, j] * scales[i] * scales[j]
      }
    }
    return result
  }

  /// The mean of |cos| over all pairs of different vectors.
  public var meanAbsoluteCosine: Double {
    guard order > 1 else { return 0 }
    var sum = 0.0
    for i in 0..<order where self[i, i] > 0 {
      for j in 0..<i where self[j, j] > 0 {
        sum += abs(self[i, j]) / (self[i, i].squareRoot() * self[j, j].squareRoot())
      }
    }
    return sum * 2 / Double(order * (order - 1))
  }

  /// Whether every product is a number, which it is not after a NaN or an infinity.
  public var isFinite: Bool { elements.allSatisfy(\.isFinite) }

  /// The squared norm of `Σ coefficientᵢ · vectorᵢ`.
  public func squaredNorm(of coefficients: [Double]) -> Double {
    var sum = 0.0
    for i in 0..<order {
      for j in 0..<order { sum += coefficients[i] * self[i, j] * coefficients[j] }
    }
    return max(0, sum)
  }
}

/// The inner product of two rows, in blocks as a `GramMatrix` takes it.
public func dotProduct(_ left: Span<Float>, _ right: Span<Float>) -> Double {
  precondition(left.count == right.count)
  var sum = 0.0
  var start = 0
  while start < left.count {
    let count = min(1024, left.count - start)
    sum += shortDotProduct(left, start, right, start, count)
    start += count
  }
  return sum
}

/// The inner product of at most 1024 elements of each span.
@inline(__always)
private func shortDotProduct(
  _ left: Span<Float>, _ leftStart: Int, _ right: Span<Float>, _ rightStart: Int, _ count: Int
) -> Double {
  let a = left.extracting(leftStart..<leftStart + count)
  let b = right.extracting(rightStart..<rightStart + count)
  var lanes = SIMD16<Float>()
  var index = 0
  while index + 16 <= count {
    let offset = index * MemoryLayout<Float>.stride
    // Sound: every bit pattern is a Float, and the sixteen lie within the extracted span.
    let x = unsafe a.bytes.unsafeLoadUnaligned(fromByteOffset: offset, as: SIMD16<Float>.self)
    let y = unsafe b.bytes.unsafeLoadUnaligned(fromByteOffset: offset, as: SIMD16<Float>.self)
    lanes += x * y
    index += 16
  }
  for lane in 0..<(count - index) { lanes[lane] += a[index + lane] * b[index + lane] }

  let eight = SIMD8<Double>(lanes.lowHalf) + SIMD8<Double>(lanes.highHalf)
  let four = eight.lowHalf + eight.highHalf
  let two = four.lowHalf + four.highHalf
  return two.x + two.y
}
