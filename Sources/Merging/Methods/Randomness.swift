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
      // word · 2⁻³² < p, in whole numbers; p = 1 is never asked for.
      let threshold = UInt32(min(max(0, p), 1 - 0x1p-32) * 0x1p32)
      withWords(random, from: position, count: values.count) { words in
        for i in values.indices { values[i] = words[i] < threshold ? values[i] : 0 }
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
      withWords(random, from: position, count: count) { words in
        for i in 0..<count { body(i, Float(words[i] >> 8) * 0x1p-24) }
      }
    case .mersenne(let stream, let start):
      stream.withDraws(from: start + rowStart + position, count: count) { draws in
        for i in 0..<count { body(i, Float(draws[i] & 0xFF_FFFF) * 0x1p-24) }
      }
    }
  }

  /// The words of consecutive elements: element e has word e mod 4 of block e / 4.
  private func withWords(
    _ random: CounterRandom, from position: Int, count: Int, _ body: (Span<UInt32>) -> Void
  ) {
    let skipped = position % 4
    var words = [UInt32](repeating: 0, count: (skipped + count + 3) / 4 * 4)
    var span = words.mutableSpan
    random.fill(&span, from: UInt64(position / 4))
    body(words.span.extracting(skipped..<skipped + count))
  }
}
