/// A weighted sum of the rows whose weights follow from their inner products alone.
///
/// One pass sums the Gram matrix, in Double and in fixed blocks; what the methods of this family
/// differ in is a function from that matrix to the weights.
struct GramWeighted: TensorMerge {
  /// Which elements share their weights.
  enum Group: Sendable {
    case tensor
    /// The elements of a row (the last dimension).
    case row(length: Int)
    /// The elements of a column (the first dimension).
    case column(length: Int)
  }

  private let rows: Range<Int>
  private let group: Group
  private let solve: @Sendable (GramMatrix) -> [Double]
  private var weights: [Float]?
  /// Of each model the weights of all columns.
  private var columnWeights: [[Float]] = []

  init(
    rows: Range<Int>, group: Group = .tensor,
    weights solve: @escaping @Sendable (GramMatrix) -> [Double]
  ) {
    self.rows = rows
    self.group = group
    self.solve = solve
  }

  struct Observation: Sendable {
    fileprivate var gram: GramMatrix
    /// The upper triangle of each column's matrix, column after column.
    fileprivate var columns: [Double] = []
  }

  private var order: Int { rows.count }
  private var triangle: Int { order * (order + 1) / 2 }

  var grain: Int { if case .row(let length) = group { max(1, length) } else { 1 } }

  var isReady: Bool {
    switch group {
    case .tensor: weights != nil
    case .row: true
    case .column: !columnWeights.isEmpty
    }
  }

  var observationBytes: Int {
    if case .column(let length) = group { 8 * length * triangle } else { 0 }
  }

  func makeObservation() -> Observation {
    var observation = Observation(gram: GramMatrix(order: order))
    if case .column(let length) = group {
      observation.columns = Array(repeating: 0, count: length * triangle)
    }
    return observation
  }

  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout Observation
  ) {
    guard case .column(let length) = group else {
      observation.gram.add(
        tile.rows(from: rows.lowerBound), stride: tile.capacity, columns: tile.columns)
      return
    }
    for i in 0..<tile.columns {
      var place = (position + i) % length * triangle
      for one in rows {
        for other in one..<rows.upperBound {
          observation.columns[place] += Double(tile[one][i]) * Double(tile[other][i])
          place += 1
        }
      }
    }
  }

  func combine(_ next: Observation, into total: inout Observation) {
    total.gram += next.gram
    for i in next.columns.indices { total.columns[i] += next.columns[i] }
  }

  mutating func learn(_ total: Observation) {
    guard case .column(let length) = group else {
      weights = floats(total.gram)
      return
    }
    columnWeights = Array(repeating: [], count: order)
    for column in 0..<length {
      var matrix = Array(repeating: 0.0, count: order * order)
      var place = column * triangle
      for i in 0..<order {
        for j in i..<order {
          matrix[i * order + j] = total.columns[place]
          matrix[j * order + i] = total.columns[place]
          place += 1
        }
      }
      let weights = floats(GramMatrix(order: order, elements: matrix))
      for model in 0..<order { columnWeights[model].append(weights[model]) }
    }
  }

  private func floats(_ gram: GramMatrix) -> [Float] {
    // Inputs that are not finite have no angles; they stay visible in the result.
    guard gram.isFinite else {
      return Array(repeating: .nan, count: order)
    }
    return solve(gram).map { Float($0) }
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    switch group {
    case .tensor: output.weigh(tile, from: rows.lowerBound, weights: weights!)
    case .row(let length):
      output.clear(row: 0)
      for start in stride(from: 0, to: tile.columns, by: length) {
        var gram = GramMatrix(order: order)
        gram.add(
          tile.rows(from: rows.lowerBound).extracting(droppingFirst: start),
          stride: tile.capacity, columns: length)
        for (weight, row) in zip(floats(gram), rows) {
          output.add(
            tile, row: row, to: 0, times: weight, columns: start..<start + length)
        }
      }
    case .column(let length):
      output.clear(row: 0)
      var result = output.mutableRow(0)
      for (model, row) in rows.enumerated() {
        let values = tile[row]
        for i in values.indices {
          result[i] += columnWeights[model][(position + i) % length] * values[i]
        }
      }
    }
  }
}
