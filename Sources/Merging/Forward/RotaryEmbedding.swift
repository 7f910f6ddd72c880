import Glibc

/// Positions as rotations of pairs of a head's elements (Su et al., *RoFormer*, arXiv 2104.09864),
/// paired as Llama's Hugging Face checkpoints are: element i with element i + width/2.
struct RotaryEmbedding: Sendable, Equatable {
  /// How frequencies change so that a model sees further than it was trained for.
  enum Scaling: Sendable, Equatable {
    case none
    case linear(factor: Double)
    /// Low frequencies are divided by the factor, high ones are not, between them it fades.
    case llama3(factor: Double, low: Double, high: Double, originalLength: Double)
  }

  /// The angle by which each pair turns from one token to the next.
  private let frequencies: [Double]

  init(headWidth: Int, theta: Double, scaling: Scaling) {
    frequencies = (0..<headWidth / 2).map { pair in
      let frequency = pow(theta, -2 * Double(pair) / Double(headWidth))
      switch scaling {
      case .none: return frequency
      case .linear(let factor): return frequency / factor
      case .llama3(let factor, let low, let high, let length):
        let turns = length * frequency / (2 * .pi)
        let share = min(1, max(0, (turns - low) / (high - low)))
        return frequency * (share + (1 - share) / factor)
      }
    }
  }

  /// Turns the rows of one head, one a token, by their positions.
  func rotate(_ rows: inout Matrix<Float>) {
    let half = frequencies.count
    for row in 0..<rows.rowCount {
      for pair in 0..<half {
        let angle = Double(row) * frequencies[pair]
        let (sine, cosine) = (Float(sin(angle)), Float(cos(angle)))
        let (one, other) = (rows[row, pair], rows[row, pair + half])
        rows[row, pair] = one * cosine - other * sine
        rows[row, pair + half] = other * cosine + one * sine
      }
    }
  }
}
