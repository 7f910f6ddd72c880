/// What decides, from a sample's tokens, how much of each task vector to add.
public enum Router: Sendable, Equatable {
  /// Depth 0: the same mixture for every input.
  case constant([Float])
  /// Depth 1: W h + b.
  case linear(Dense)
  /// Depth 2: W₂·ReLU(W₁ h + b₁) + b₂.
  case hidden(Dense, Dense)

  public var depth: Int {
    switch self {
    case .constant: 0
    case .linear: 1
    case .hidden: 2
    }
  }

  public var expertCount: Int {
    switch self {
    case .constant(let mixture): mixture.count
    case .linear(let layer), .hidden(_, let layer): layer.bias.count
    }
  }

  /// w, the mean over the tokens (rows) of one sample of what the router says to each.
  public func mixture(_ tokens: Matrix<Float>) -> [Float] {
    if case .constant(let mixture) = self { return mixture }
    let answers = answers(tokens)
    return (0..<answers.columnCount).map { column in
      let sum = (0..<answers.rowCount).reduce(0.0) { $0 + Double(answers[$1, column]) }
      return Float(sum / Double(max(1, answers.rowCount)))
    }
  }

  /// What the router says to each token: [tokens, experts].
  func answers(_ tokens: Matrix<Float>) -> Matrix<Float> {
    switch self {
    case .constant(let mixture):
      return Matrix(
        rowCount: tokens.rowCount, columnCount: mixture.count,
        elements: (0..<tokens.rowCount).flatMap { _ in mixture })
    case .linear(let layer):
      return layer(tokens)
    case .hidden(let first, let second):
      return second(first(tokens).map { max(0, $0) })
    }
  }

  /// A router before calibration: near `mixture` whatever the input, as task arithmetic is.
  ///
  /// - Parameter name: The name of the gate, which with the seed determines its weights.
  public static func initial(
    depth: Int, width: Int, experts: Int, name: String, seed: UInt64, mixture: Float = 0.3
  ) -> Router {
    func layer(_ suffix: String, _ outputs: Int, bias: Float) -> Dense {
      let random = CounterRandom(seed: seed, tensor: "\(name).\(suffix).weight")
      var weight = Matrix(rowCount: outputs, columnCount: width, repeating: Float(0))
      var values = weight.elements.mutableSpan
      random.fill(&values, from: 0, deviation: initialDeviation)
      return Dense(weight: weight, bias: Array(repeating: bias, count: outputs))
    }
    switch depth {
    case 0: return .constant(Array(repeating: mixture, count: experts))
    case 1: return .linear(layer("fc", experts, bias: mixture))
    case 2: return .hidden(layer("fc1", width, bias: 0), layer("fc2", experts, bias: mixture))
    default: preconditionFailure("a router has depth 0, 1 or 2, not \(depth)")
    }
  }

  /// The standard deviation of the weights before calibration.
  static let initialDeviation: Float = 0.01

  /// The router's tensors as they are stored below the name of the gate.
  public var tensors: [(name: String, shape: [Int], values: [Float])] {
    func tensors(_ prefix: String, _ layer: Dense) -> [(String, [Int], [Float])] {
      let weight = layer.weight
      return [
        ("\(prefix).weight", [weight.rowCount, weight.columnCount], weight.elements),
        ("\(prefix).bias", [layer.bias.count], layer.bias),
      ]
    }
    switch self {
    case .constant(let mixture): return [("weight", [mixture.count], mixture)]
    case .linear(let layer): return tensors("fc", layer)
    case .hidden(let first, let second): return tensors("fc1", first) + tensors("fc2", second)
    }
  }
}
