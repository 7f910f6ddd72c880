import Glibc

/// Multi-head self-attention; several query heads may share a head of keys and values.
struct Attention: LayerPart {
  var query: Dense
  var key: Dense
  var value: Dense
  var output: Dense
  let headWidth: Int
  /// What a head's queries and keys go through before they meet, in some models.
  let queryNorm: Norm?
  let keyNorm: Norm?
  let rotary: RotaryEmbedding?
  /// Whether a token sees only itself and those before it.
  let isCausal: Bool
  /// How many tokens, itself included, a token sees; `nil` for all.
  let window: Int?

  /// The outputs for the tokens (rows) of a batch, each sample by itself.
  func callAsFunction(_ tokens: Matrix<Float>, samples: [Range<Int>]) -> Matrix<Float> {
    let (queries, keys, values) = (query(tokens), key(tokens), value(tokens))
    let heads = queries.columnCount / headWidth
    let queriesPerKey = heads / (keys.columnCount / headWidth)
    var mixed = Matrix(
      rowCount: tokens.rowCount, columnCount: queries.columnCount, repeating: Float(0))
    for sample in samples {
      for head in 0..<heads {
        let shared = head / queriesPerKey
        var query = queries.block(sample, columns: columns(of: head))
        var key = keys.block(sample, columns: columns(of: shared))
        if let queryNorm, let keyNorm { (query, key) = (queryNorm(query), keyNorm(key)) }
        rotary?.rotate(&query)
        rotary?.rotate(&key)
        var shares = Matrix(.plain(query), .transposed(key))
        turnIntoShares(&shares)
        let value = values.block(sample, columns: columns(of: shared))
        mixed.setBlock(
          sample, columns: columns(of: head), to: Matrix(.plain(shares), .plain(value)))
      }
    }
    return output(mixed)
  }

  /// Adds a task vector of the projections, `scale` times.
  mutating func add(_ taskVector: Attention, scale: Float) {
    query.add(taskVector.query, scale: scale)
    key.add(taskVector.key, scale: scale)
    value.add(taskVector.value, scale: scale)
    output.add(taskVector.output, scale: scale)
  }

  private func columns(of head: Int) -> Range<Int> { head * headWidth..<(head + 1) * headWidth }

  /// Softmax of every row's scores over the tokens that it sees.
  private func turnIntoShares(_ scores: inout Matrix<Float>) {
    let count = scores.columnCount
    let scale = 1 / Float(headWidth).squareRoot()
    var elements = scores.elements.mutableSpan
    for row in 0..<count {
      let first = window.map { max(0, row - $0 + 1) } ?? 0
      let last = isCausal ? row : count - 1
      let start = row * count
      var largest = -Float.infinity
      for column in first...last { largest = max(largest, elements[start + column]) }
      var sum: Float = 0
      for column in 0..<count {
        let isSeen = column >= first && column <= last
        let share = isSeen ? expf((elements[start + column] - largest) * scale) : 0
        elements[start + column] = share
        sum += share
      }
      for column in first...last { elements[start + column] /= sum }
    }
  }
}

extension Matrix {
  /// A copy of some rows' columns.
  func block(_ rows: Range<Int>, columns: Range<Int>) -> Matrix {
    var elements: [Scalar] = []
    elements.reserveCapacity(rows.count * columns.count)
    for row in rows {
      let start = row * columnCount
      elements += self.elements[start + columns.lowerBound..<start + columns.upperBound]
    }
    return Matrix(rowCount: rows.count, columnCount: columns.count, elements: elements)
  }

  mutating func setBlock(_ rows: Range<Int>, columns: Range<Int>, to block: Matrix) {
    precondition(block.rowCount == rows.count && block.columnCount == columns.count)
    for (index, row) in rows.enumerated() {
      let start = row * columnCount
      for (offset, column) in columns.enumerated() {
        elements[start + column] = block.elements[index * columns.count + offset]
      }
    }
  }

  mutating func add(_ other: Matrix<Float>) where Scalar == Float {
    precondition(elements.count == other.elements.count)
    for index in elements.indices { elements[index] += other.elements[index] }
  }
}
