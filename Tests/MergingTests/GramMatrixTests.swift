import Merging
import TestSupport
import Testing

@Suite struct `Gram matrices` {
  private func rows(_ order: Int, _ columns: Int, seed: UInt64) -> [Float] {
    var generator = SeededGenerator(seed: seed)
    return (0..<order * columns).map { _ in Float.random(in: -1...1, using: &generator) }
  }

  @Test(arguments: [1, 2, 5, 9], [0, 1, 15, 16, 17, 1000, 1024, 5000])
  func `the sums are those of Double arithmetic`(order: Int, columns: Int) {
    let values = rows(order, columns, seed: UInt64(columns))
    var gram = GramMatrix(order: order)
    gram.add(values.span, stride: columns, columns: columns)
    for i in 0..<order {
      for j in 0..<order {
        let exact = (0..<columns).reduce(0.0) {
          $0 + Double(values[i * columns + $1]) * Double(values[j * columns + $1])
        }
        #expect(abs(gram[i, j] - exact) <= 1e-7 * Double(columns))
        #expect(
          gram[i, j]
            == dotProduct(
              values.span.extracting(i * columns..<(i + 1) * columns),
              values.span.extracting(j * columns..<(j + 1) * columns)))
      }
    }
  }

  @Test(arguments: [1024, 2048, 8192])
  func `tiles do not change a bit`(tile: Int) {
    let columns = 10_000
    let values = rows(3, columns, seed: 1)
    var whole = GramMatrix(order: 3)
    whole.add(values.span, stride: columns, columns: columns)
    var tiled = GramMatrix(order: 3)
    for start in stride(from: 0, to: columns, by: tile) {
      let count = min(tile, columns - start)
      let rest = values.span.extracting(start..<values.count)
      tiled.add(rest, stride: columns, columns: count)
    }
    #expect(tiled == whole)
  }

  @Test func `a zero vector has no direction`() {
    let gram = GramMatrix(order: 3, elements: [4, 0, 1, 0, 0, 0, 1, 0, 1])
    #expect(gram.cosines.elements == [1, 0, 0.5, 0, 0, 0, 0.5, 0, 1])
    #expect(abs(gram.meanAbsoluteCosine - 0.5 / 3) < 1e-15)
  }

  @Test func `matrices of parts add up to the whole`() {
    var sum = GramMatrix(order: 2, elements: [1, 2, 2, 5])
    sum += GramMatrix(order: 2, elements: [1, 0, 0, 1])
    #expect(sum == GramMatrix(order: 2, elements: [2, 2, 2, 6]))
  }
}
