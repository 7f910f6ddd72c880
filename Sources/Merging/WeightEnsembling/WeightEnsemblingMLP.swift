/// A linear layer, `W h + b`.
public struct Dense: Sendable, Equatable {
  /// [outputs, inputs].
  public var weight: Matrix<Float>
  public var bias: [Float]

  public init(weight: Matrix<Float>, bias: [Float]) {
    precondition(weight.rowCount == bias.count)
    self.weight = weight
    self.bias = bias
  }

  /// The outputs for rows of inputs.
  func callAsFunction(_ inputs: Matrix<Float>) -> Matrix<Float> {
    var outputs = Matrix(.plain(inputs), .transposed(weight))
    outputs.add(toEachRow: bias)
    return outputs
  }

  /// Adds another layer's weights, `scale` times.
  mutating func add(_ other: Dense, scale: Float) {
    for index in bias.indices { bias[index] += scale * other.bias[index] }
    weight.add(other.weight, times: scale)
  }
}

/// The weights of a Transformer layer's MLP, or a task vector of them.
public struct MLPWeights: Sendable, Equatable {
  public var fc1: Dense
  public var fc2: Dense
  /// Of a gated MLP, fc2(act(gate(h))·fc1(h)): Llama's `gate_proj`, T5's `wi_0`.
  public var gate: Dense?

  public init(fc1: Dense, fc2: Dense) {
    self.fc1 = fc1
    self.fc2 = fc2
  }

  /// The outputs for rows of inputs.
  public func callAsFunction(_ inputs: Matrix<Float>, _ activation: Activation) -> Matrix<Float> {
    var hidden = (gate ?? fc1)(inputs)
    for index in hidden.elements.indices {
      hidden.elements[index] = activation(hidden.elements[index])
    }
    if gate != nil { hidden.multiply(fc1(inputs)) }
    return fc2(hidden)
  }

  /// Adds other weights, `scale` times.
  public mutating func add(_ other: MLPWeights, scale: Float) {
    fc1.add(other.fc1, scale: scale)
    fc2.add(other.fc2, scale: scale)
    if let other = other.gate { gate?.add(other, scale: scale) }
  }
}

/// An MLP whose weights are put together anew for every sample (Tang et al., arXiv 2402.00433).
public struct WeightEnsemblingMLP: Sendable, Equatable {
  public var router: Router
  public var base: MLPWeights
  public var taskVectors: [MLPWeights]
  public var activation: Activation

  public init(
    router: Router, base: MLPWeights, taskVectors: [MLPWeights], activation: Activation
  ) {
    precondition(router.expertCount == taskVectors.count)
    self.router = router
    self.base = base
    self.taskVectors = taskVectors
    self.activation = activation
  }

  /// The outputs for samples of tokens (rows).
  ///
  /// - Parameter batchAveraged: Mixes the weights once for the whole batch, as the reference
  ///   implementation can.
  public func callAsFunction(
    _ samples: [Matrix<Float>], batchAveraged: Bool = false
  ) -> [Matrix<Float>] {
    var mixtures = samples.map { router.mixture($0) }
    if batchAveraged { mixtures = Array(repeating: mean(of: mixtures), count: samples.count) }
    return zip(samples, mixtures).map { tokens, mixture in weights(mixture)(tokens, activation) }
  }

  /// θ = θ₀ + Σ wⱼτⱼ.
  public func weights(_ mixture: [Float]) -> MLPWeights {
    var weights = base
    for (weight, taskVector) in zip(mixture, taskVectors) {
      weights.add(taskVector, scale: weight)
    }
    return weights
  }
}

/// The mean of vectors of equal length.
private func mean(of vectors: [[Float]]) -> [Float] {
  guard var sum = vectors.first else { return [] }
  for vector in vectors.dropFirst() { for index in sum.indices { sum[index] += vector[index] } }
  return sum.map { $0 / Float(vectors.count) }
}
