// Element by element, through pointers: a checked index keeps the compiler from vectorising. Every
// function checks once that the matrices are of one size.

extension Matrix where Scalar == Float {
  /// self += scale · other
  mutating func add(_ other: Matrix, times scale: Float = 1) {
    precondition(rowCount == other.rowCount && columnCount == other.columnCount)
    combine(with: other) { $0 += scale * $1 }
  }

  /// Adds to every row as many times the other's row as `scales` says.
  mutating func add(_ other: Matrix, rowsTimes scales: [Float]) {
    precondition(rowCount == other.rowCount && columnCount == other.columnCount)
    precondition(rowCount == scales.count)
    elements.withUnsafeMutableBufferPointer { own in
      other.elements.withUnsafeBufferPointer { other in
        for (row, scale) in scales.enumerated() {
          for index in row * columnCount..<(row + 1) * columnCount {
            own[index] += scale * other[index]
          }
        }
      }
    }
  }

  /// Adds some of another's rows to the same rows.
  mutating func add(_ other: Matrix, rows: Range<Int>) {
    precondition(rowCount == other.rowCount && columnCount == other.columnCount)
    precondition(0 <= rows.lowerBound && rows.upperBound <= rowCount)
    elements.withUnsafeMutableBufferPointer { own in
      other.elements.withUnsafeBufferPointer { other in
        for index in rows.lowerBound * columnCount..<rows.upperBound * columnCount {
          own[index] += other[index]
        }
      }
    }
  }

  /// Adds a vector to every row.
  mutating func add(toEachRow vector: [Float]) {
    precondition(vector.count == columnCount)
    elements.withUnsafeMutableBufferPointer { own in
      vector.withUnsafeBufferPointer { vector in
        for row in 0..<rowCount {
          for column in 0..<columnCount { own[row &* columnCount &+ column] += vector[column] }
        }
      }
    }
  }

  /// self ·= other
  mutating func multiply(_ other: Matrix) {
    precondition(rowCount == other.rowCount && columnCount == other.columnCount)
    combine(with: other) { $0 *= $1 }
  }
}

extension Matrix where Scalar: AdditiveArithmetic {
  /// self −= other
  mutating func subtract(_ other: Matrix) {
    precondition(rowCount == other.rowCount && columnCount == other.columnCount)
    combine(with: other) { $0 -= $1 }
  }
}

extension Matrix {
  @inline(__always)
  fileprivate mutating func combine(
    with other: Matrix, _ operation: (inout Scalar, Scalar) -> Void
  ) {
    elements.withUnsafeMutableBufferPointer { own in
      other.elements.withUnsafeBufferPointer { other in
        for index in 0..<own.count { operation(&own[index], other[index]) }
      }
    }
  }
}
