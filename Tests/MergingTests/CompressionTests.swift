import Merging
import TestSupport
import Testing

private func random(_ rows: Int, _ columns: Int, seed: UInt64) -> Matrix<Float> {
  var generator = SeededGenerator(seed: seed)
  return Matrix(
    rowCount: rows, columnCount: columns,
    elements: (0..<rows * columns).map { _ in Float.random(in: -1...1, using: &generator) })
}

private func distance(_ a: Matrix<Float>, _ b: Matrix<Float>) -> Double {
  var error = RoundingError()
  error.add(a.elements.span, b.elements.span)
  return error.relative
}

@Suite struct `low-rank factors` {
  @Test(arguments: [(20, 7), (7, 20), (9, 9), (1, 5), (5, 1)], [0, 1, 3, 9])
  func `the product is as far from the matrix as the singular values say`(
    shape: (Int, Int), rank: Int
  ) throws {
    let matrix = random(shape.0, shape.1, seed: 3)
    let factors = try #require(LowRank(matrix, rank: rank))
    #expect(factors.left.columnCount == min(rank, shape.0, shape.1))
    #expect(factors.right.rowCount == factors.left.columnCount)
    #expect(abs(distance(matrix, factors.product) - factors.relativeError) < 1e-5)
    #expect(factors.singularValues == factors.singularValues.sorted(by: >))
  }

  @Test func `a matrix of rank two needs two`() throws {
    let (a, b) = (random(30, 2, seed: 1), random(2, 12, seed: 2))
    var matrix = Matrix(rowCount: 30, columnCount: 12, repeating: Float(0))
    for row in 0..<30 {
      for column in 0..<12 {
        matrix[row, column] = a[row, 0] * b[0, column] + a[row, 1] * b[1, column]
      }
    }
    let factors = try #require(LowRank(matrix, tolerance: 1e-5))
    #expect(factors.left.columnCount == 2)
    #expect(distance(matrix, factors.product) < 1e-5)
    // The square roots are shared: both factors have the same scale.
    let norms = [factors.left, factors.right].map { factor in
      factor.elements.reduce(0) { $0 + $1 * $1 }
    }
    #expect(abs(norms[0] / norms[1] - 1) < 1e-4)
  }

  @Test func `no rank-two matrix known to us is nearer`() throws {
    let matrix = random(8, 6, seed: 5)
    let best = try #require(LowRank(matrix, rank: 2))
    for seed in UInt64(0)..<20 {
      let change = random(8, 2, seed: seed)
      var left = best.left
      for index in left.elements.indices { left.elements[index] += 0.1 * change.elements[index] }
      var product = Matrix(rowCount: 8, columnCount: 6, repeating: Float(0))
      for row in 0..<8 {
        for column in 0..<6 {
          product[row, column] =
            left[row, 0] * best.right[0, column]
            + left[row, 1] * best.right[1, column]
        }
      }
      #expect(distance(matrix, product) > best.relativeError)
    }
  }

  @Test func `zero and not-finite matrices`() throws {
    let zero = try #require(
      LowRank(Matrix(rowCount: 3, columnCount: 4, repeating: 0), tolerance: 0.1))
    #expect(zero.left.columnCount == 0)
    #expect(zero.relativeError == 0)
    #expect(LowRank(Matrix(rowCount: 1, columnCount: 2, elements: [1, .nan]), rank: 1) == nil)
  }
}

@Suite struct `rounding to few bits` {
  private func roundTrip(_ quantizer: Quantizer, _ row: [Float]) -> (
    values: [Float], codes: [UInt8], scales: [Float], isFinite: Bool
  ) {
    var codes = Array(repeating: UInt8(0xAA), count: quantizer.byteCount(rowLength: row.count))
    var scales = Array(
      repeating: Float.nan, count: quantizer.scaleCount(rowLength: row.count))
    var values = row
    var codeSpan = codes.mutableSpan
    var scaleSpan = scales.mutableSpan
    let isFinite = quantizer.encode(row.span, into: &codeSpan, scales: &scaleSpan)
    var span = values.mutableSpan
    quantizer.decode(codes.span, scales: scales.span, into: &span)
    return (values, codes, scales, isFinite)
  }

  @Test(arguments: [Quantizer.int8, .int4], [0, 1, 2, 127, 128, 129, 1000])
  func `no value is off by more than half a step`(quantizer: Quantizer, length: Int) {
    let row = random(1, length, seed: UInt64(length)).elements
    let (values, _, scales, isFinite) = roundTrip(quantizer, row)
    #expect(isFinite)
    for (index, value) in row.enumerated() {
      let scale = scales[quantizer.groupLength == .max ? 0 : index / 128]
      #expect(abs(values[index] - value) <= 0.50001 * scale)
    }
    var error = RoundingError()
    error.add(row.span, values.span)
    // Uniform values: half a step is ±1/254 or ±1/14 of the range, its root mean square 0.58 of it.
    if length == 1000 { #expect(error.relative < (quantizer.bits == 8 ? 0.005 : 0.08)) }
  }

  @Test func `bytes are as documented`() {
    let eight = roundTrip(.int8, [-127, 0.5, 1.5, 127, 64])
    #expect(eight.scales == [1])
    #expect(eight.codes.map { Int8(bitPattern: $0) } == [-127, 0, 2, 127, 64])
    let four = roundTrip(.int4, [-7, 1, 7, 2.5, 3])
    #expect(four.scales == [1])
    #expect(four.codes == [0x19, 0x27, 0x03])
    #expect(four.values == [-7, 1, 7, 2, 3])
  }

  @Test(arguments: [Quantizer.int8, .int4])
  func `zero, tiny and not-finite rows`(quantizer: Quantizer) {
    #expect(roundTrip(quantizer, [0, -0, 0]).values == [0, 0, 0])
    let tiny = Float.leastNonzeroMagnitude
    #expect(roundTrip(quantizer, [tiny, 3 * tiny, -5 * tiny]).values.allSatisfy { $0.isFinite })
    let huge = Float.greatestFiniteMagnitude
    #expect(roundTrip(quantizer, [huge, -huge, 1]).values.allSatisfy { $0.isFinite })
    #expect(!roundTrip(quantizer, [1, .nan]).isFinite)
    #expect(!roundTrip(quantizer, [1, .infinity]).isFinite)
  }
}
