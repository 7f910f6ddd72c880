import Glibc

/// The nonlinearity of an MLP, by the names that model configurations use.
public enum Activation: String, Sendable, CaseIterable {
  case quickGELU = "quick_gelu"
  case gelu
  /// GELU by a tanh: `gelu_new` and `gelu_fast` compute the same function.
  case geluTanh = "gelu_pytorch_tanh"
  case relu
  case silu

  public func callAsFunction(_ x: Float) -> Float {
    switch self {
    case .quickGELU: x * sigmoid(1.702 * x)
    case .gelu: 0.5 * x * (1 + erff(x * Float(0.5).squareRoot()))
    case .geluTanh: 0.5 * x * (1 + tanhf(Self.slope * (x + 0.044715 * x * x * x)))
    case .relu: max(0, x)
    case .silu: x * sigmoid(x)
    }
  }

  /// The derivative at `x`.
  public func derivative(_ x: Float) -> Float { valueAndDerivative(x).derivative }

  /// Both at once, for little more than one of them.
  func valueAndDerivative(_ x: Float) -> (value: Float, derivative: Float) {
    switch self {
    case .quickGELU:
      let s = sigmoid(1.702 * x)
      return (x * s, s + 1.702 * x * s * (1 - s))
    case .gelu:
      let share = 0.5 * (1 + erff(x * Float(0.5).squareRoot()))
      let density = expf(-0.5 * x * x) * Float(0.5 / Double.pi).squareRoot()
      return (x * share, share + x * density)
    case .geluTanh:
      let t = tanhf(Self.slope * (x + 0.044715 * x * x * x))
      let steepness = Self.slope * (1 + 3 * 0.044715 * x * x)
      return (0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * steepness)
    case .relu:
      return x > 0 ? (x, 1) : (0, 0)
    case .silu:
      let s = sigmoid(x)
      return (x * s, s + x * s * (1 - s))
    }
  }

  private static let slope = Float((2 / Double.pi).squareRoot())
}

private func sigmoid(_ x: Float) -> Float { 1 / (1 + expf(-x)) }
