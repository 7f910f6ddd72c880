/// The MLP of a Transformer layer, or a task vector of one: two linear maps with an activation
/// between them, or three where a gate is multiplied to the first.
struct FeedForward: LayerPart {
  var gate: Dense?
  var up: Dense
  var down: Dense
  let activation: Activation

  /// The outputs for tokens (rows), each by itself.
  func callAsFunction(_ tokens: Matrix<Float>, samples _: [Range<Int>]) -> Matrix<Float> {
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
