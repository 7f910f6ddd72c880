import CKernels

/// Where the random choices of a merge come from.
public enum Randomness: Sendable {
  /// A function of seed, tensor, model and element: neither order nor tiling shows in it.
  case counter(seed: UInt64)
  /// The draws that mergekit makes: one stream for the whole merge, of which this tensor's part
  /// begins at `start`.
  case mersenne(MersenneStream, start: Int)

  /// Keeps each element with probability `p` and multiplies it by `scale`; sets the others to 0.
  ///
  /// - Parameters:
  ///   - position: the number of the first element in its tensor.
  ///   - rowStart: the number of the row's first draw among those of the tensor.
  func thin(
    _ values: inout MutableSpan<Float>, keeping p: Double, scale: Float, tensor: String,
    model: Int, position: Int, rowStart: Int
  ) {
    switch self {
    case .counter(let seed):
      let random = CounterRandom(seed: seed, tensor: tensor, stream: UInt64(model))
      random.thin(&values, from: position, keeping: p, scale: scale)
    case .mersenne(let stream, let start):
      let threshold = Float(p)
      stream.withDraws(from: start + rowStart + position, count: values.count) { draws in
        for i in values.indices {
          let isKept = Float(draws[i] & 0xFF_FFFF) * 0x1p-24 < threshold
          values[i] = isKept ? values[i] * scale : 0
        }
      }
    }
  }

  /// Σ|values|, and what is left of it when they are thinned.
  func magnitudes(
    _ values: Span<Float>, keeping p: Double, tensor: String, model: Int, position: Int,
    rowStart: Int
  ) -> SIMD2<Double> {
    switch self {
    case .counter(let seed):
      let random = CounterRandom(seed: seed, tensor: tensor, stream: UInt64(model))
      return random.magnitudes(values, from: position, keeping: p)
    case .mersenne:
      var kept = Array(values.indices).map { values[$0] }
      var span = kept.mutableSpan
      thin(
        &span, keeping: p, scale: 1, tensor: tensor, model: model, position: position,
        rowStart: rowStart)
      return SIMD2(sumOfMagnitudes(values), sumOfMagnitudes(kept.span))
    }
  }

  /// A number of [0, 1) for each element, for choices with a probability of their own.
  func uniforms(
    _ values: inout MutableSpan<Float>, tensor: String, model: Int, position: Int, rowStart: Int
  ) {
    switch self {
    case .counter(let seed):
      let random = CounterRandom(seed: seed, tensor: tensor, stream: UInt64(model))
      var words = [UInt32](repeating: 0, count: values.count)
      var span = words.mutableSpan
      random.fill(&span, fromElement: position)
      for i in values.indices { values[i] = Float(span[i] >> 8) * 0x1p-24 }
    case .mersenne(let stream, let start):
      stream.withDraws(from: start + rowStart + position, count: values.count) { draws in
        for i in values.indices { values[i] = Float(draws[i] & 0xFF_FFFF) * 0x1p-24 }
      }
    }
  }
}
