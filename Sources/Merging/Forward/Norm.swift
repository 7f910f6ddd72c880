/// A layer's norm: of every token's vector.
enum Norm: Sendable {
  /// Mean 0 and variance 1, then weight and bias.
  case layer(weight: [Float], bias: [Float], epsilon: Float)
  /// Mean square 1, then weight.
  case rootMeanSquare(weight: [Float], epsilon: Float)

  func callAsFunction(_ tokens: Matrix<Float>) -> Matrix<Float> {
    var result = tokens
    let width = tokens.columnCount
    var elements = result.elements.mutableSpan
    for row in 0..<tokens.rowCount { normalise(&elements, from: row * width) }
    return result
  }

  private func normalise(_ elements: inout MutableSpan<Float>, from start: Int) {
    switch self {
    case .layer(let weight, let bias, let epsilon):
      let count = Double(weight.count)
      var sum = 0.0
      for i in weight.indices { sum += Double(elements[start + i]) }
      let mean = sum / count
      var squares = 0.0
      for i in weight.indices {
        let distance = Double(elements[start + i]) - mean
        squares += distance * distance
      }
      let scale = Float(1 / (squares / count + Double(epsilon)).squareRoot())
      let centre = Float(mean)
      for i in weight.indices {
        elements[start + i] = (elements[start + i] - centre) * scale * weight[i] + bias[i]
      }
    case .rootMeanSquare(let weight, let epsilon):
      var squares = 0.0
      for i in weight.indices {
        squares += Double(elements[start + i]) * Double(elements[start + i])
      }
      let mean = squares / Double(weight.count)
      let scale = Float(1 / (mean + Double(epsilon)).squareRoot())
      for i in weight.indices { elements[start + i] *= scale * weight[i] }
    }
  }
}
