/// The MLP of a Transformer layer, or a task vector of one: two linear maps with an activation
/// between them, or three where a gate is multiplied to the first.
struct FeedForward: Sendable {
  var gate: Dense?
  var up: Dense
  var down: Dense
  let activation: Activation

  func callAsFunction(_ tokens: Matrix<Float>) -> Matrix<Float> {
    var hidden = (gate ?? up)(tokens)
    var elements = hidden.elements.mutableSpan
    for index in elements.indices { elements[index] = activation(elements[index]) }
    if gate != nil {
      let raised = up(tokens)
      for index in elements.indices { elements[index] *= raised.elements[index] }
    }
    return down(hidden)
  }

  /// Adds a task vector, `scale` times.
  mutating func add(_ taskVector: FeedForward, scale: Float) {
    if let other = taskVector.gate { gate?.add(other, scale: scale) }
    up.add(taskVector.up, scale: scale)
    down.add(taskVector.down, scale: scale)
  }
}

/// What stands where a layer's MLP is: one MLP, or a mixture whose weights are put together anew
/// for every sample.
enum LayerMLP: Sendable {
  case dense(FeedForward)
  case mixture(router: Router, base: FeedForward, taskVectors: [FeedForward])

  func callAsFunction(_ tokens: Matrix<Float>, samples: [Range<Int>]) -> Matrix<Float> {
    switch self {
    case .dense(let mlp): return mlp(tokens)
    case .mixture(let router, let base, let taskVectors):
      var outputs = tokens
      for sample in samples {
        let own = tokens.block(sample, columns: 0..<tokens.columnCount)
        var mlp = base
        for (weight, taskVector) in zip(router.mixture(own), taskVectors) {
          mlp.add(taskVector, scale: weight)
        }
        outputs.setBlock(sample, columns: 0..<tokens.columnCount, to: mlp(own))
      }
      return outputs
    }
  }
}
