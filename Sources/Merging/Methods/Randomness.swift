/// Where the random choices of a merge come from.
public enum Randomness: Sendable {
  /// A function of seed, tensor, model and element: neither order nor tiling shows in it.
  case counter(seed: UInt64)
  /// The draws that mergekit makes: one stream for the whole merge, of which this tensor's part
  /// begins at `start`.
  case mersenne(MersenneStream, start: Int)

  /// Keeps each element with probability `p` and sets the others to zero.
  ///
  /// - Parameters:
  ///   - draw: the number of the row's first element among all draws of the tensor's row.
  func thin(
    _ values: inout MutableSpan<Float>, keeping p: Double, tensor: String, model: Int,
    position: Int, rowStart: Int
  ) {
    switch self {
    case .counter(let seed):
      let random = CounterRandom(seed: seed, tensor: tensor, stream: UInt64(model))
      // word · 2⁻³² < p, in whole numbers.
      let threshold = UInt64(max(0, min(1, p)) * 0x1p32)
      var i = 0
      while i < values.count {
        let element = position + i
        let words = random.words(at: UInt64(element / 4))
        for lane in element % 4..<min(4, element % 4 + values.count - i) {
          if UInt64(words[lane]) >= threshold { values[i] = 0 }
          i += 1
        }
      }
    case .mersenne(let stream, let start):
      let threshold = Float(p)
      stream.withDraws(from: start + rowStart + position, count: values.count) { draws in
        for i in values.indices where !(Float(draws[i] & 0xFF_FFFF) * 0x1p-24 < threshold) {
          values[i] = 0
        }
      }
    }
  }

  /// A number of [0, 1) for one element, for choices with a probability of their own.
  func uniforms(
    _ count: Int, tensor: String, model: Int, position: Int, rowStart: Int,
    _ body: (_ index: Int, _ uniform: Float) -> Void
  ) {
    switch self {
    case .counter(let seed):
      let random = CounterRandom(seed: seed, tensor: tensor, stream: UInt64(model))
      for i in 0..<count {
        let element = position + i
        let word = random.words(at: UInt64(element / 4))[element % 4]
        body(i, Float(word >> 8) * 0x1p-24)
      }
    case .mersenne(let stream, let start):
      stream.withDraws(from: start + rowStart + position, count: count) { draws in
        for i in 0..<count { body(i, Float(draws[i] & 0xFF_FFFF) * 0x1p-24) }
      }
    }
  }
}
