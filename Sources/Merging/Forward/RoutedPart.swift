/// A part of a Transformer layer, an MLP or an attention, or a task vector of one.
protocol LayerPart: Sendable {
  /// The outputs for the tokens (rows) of a batch, each sample by itself.
  func callAsFunction(_ tokens: Matrix<Float>, samples: [Range<Int>]) -> Matrix<Float>
  /// Adds a task vector, `scale` times.
  mutating func add(_ taskVector: Self, scale: Float)
}

/// What stands where a part of a layer is: one, or a mixture whose weights are put together anew
/// for every sample.
enum RoutedPart<Part: LayerPart>: Sendable {
  case dense(Part)
  case mixture(router: Router, base: Part, taskVectors: [Part])

  func callAsFunction(_ tokens: Matrix<Float>, samples: [Range<Int>]) -> Matrix<Float> {
    switch self {
    case .dense(let part): return part(tokens, samples: samples)
    case .mixture(let router, let base, let taskVectors):
      var outputs = tokens
      for sample in samples {
        let own = tokens.block(sample, columns: 0..<tokens.columnCount)
        var part = base
        for (weight, taskVector) in zip(router.mixture(own), taskVectors) {
          part.add(taskVector, scale: weight)
        }
        outputs.setBlock(
          sample, columns: 0..<tokens.columnCount, to: part(own, samples: [0..<own.rowCount]))
      }
      return outputs
    }
  }
}
