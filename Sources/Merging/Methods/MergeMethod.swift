/// A way to merge models, as recipes name it: what it computes, what can be set, and how the
/// arithmetic of one tensor is made.
public struct MergeMethod: Sendable {
  /// What a tile's rows are.
  public enum Operand: Sendable {
    /// The models, in the recipe's order.
    case weights
    /// The base, then every other model's difference to it; the result is added to the base.
    case differences
    /// Differences where the recipe names a base, weights where it does not.
    case differencesIfBased
  }

  public enum Base: Sendable { case required, optional }

  public let name: String
  /// The formula, in one line.
  public let formula: String
  public let parameters: [MethodParameter]
  public let operand: Operand
  public let base: Base
  /// How many models there may be, the base included.
  public let models: ClosedRange<Int>
  let make: @Sendable (TensorSetting) throws -> any TensorMerge

  init(
    _ name: String, _ formula: String, operand: Operand, base: Base,
    models: ClosedRange<Int> = 1...Int.max, parameters: [MethodParameter] = [],
    make: @escaping @Sendable (TensorSetting) throws -> any TensorMerge
  ) {
    self.name = name
    self.formula = formula
    self.operand = operand
    self.base = base
    self.models = models
    self.parameters = parameters
    self.make = make
  }

  /// Every method. A new one is a file and a line here.
  public static let all: [MergeMethod] =
    SignConsensus.methods + [
      .linear, .passthrough, .slerp, .nuSlerp, .multiSlerp, .karcher, .modelStock, .nearSwap, .sce,
      .arceeFusion, .ram, .ramPlus,
    ]

  public static subscript(name: String) -> MergeMethod? { all.first { $0.name == name } }
}

/// Something that a recipe can set for a method.
public struct MethodParameter: Sendable, Equatable {
  public enum Scope: Sendable {
    /// One value for the tensor.
    case shared
    /// One value for each model.
    case perModel
    /// One value for each model that is not the base.
    case perModelButBase
  }

  public enum Default: Sendable, Equatable {
    case required
    case value(ParameterValue)
    /// Not setting it means something of its own.
    case absent
  }

  public enum Kind: Sendable { case number, flag }

  public let name: String
  public let scope: Scope
  public let kind: Kind
  public let fallback: Default

  /// - Parameter value: its default; without one the recipe must set it.
  static func number(_ name: String, _ scope: Scope = .shared, default value: Double? = nil) -> Self
  {
    Self(
      name: name, scope: scope, kind: .number,
      fallback: value.map { .value(.number($0)) } ?? .required)
  }

  static func optionalNumber(_ name: String, _ scope: Scope) -> Self {
    Self(name: name, scope: scope, kind: .number, fallback: .absent)
  }

  /// In what type mergekit keeps its masks.
  static let int8Mask = MethodParameter.flag("int8_mask", false)

  static func flag(_ name: String, _ value: Bool) -> Self {
    Self(name: name, scope: .shared, kind: .flag, fallback: .value(.flag(value)))
  }
}

/// A parameter's value for one tensor.
public enum ParameterValue: Sendable, Equatable {
  case number(Double)
  case flag(Bool)
}

/// What a method knows when it prepares to merge one tensor.
public struct TensorSetting: Sendable {
  /// The output tensor's name.
  public var name: String
  public var shape: [Int]
  public var elementCount: Int
  /// The number of models, without the base unless it is a row like the others.
  public var models: Int
  /// Whether row 0 is the base and the other rows are differences to it.
  public var hasDifferences: Bool
  /// Where the base stands among the rows of weights.
  public var baseRow: Int?
  public var shared: [String: ParameterValue] = [:]
  /// One value for each of `models`.
  public var perModel: [String: [ParameterValue]] = [:]
  public var randomness: Randomness = .counter(seed: 0)
  /// Elements that stay together in a tile whatever the method needs: 1, or a row.
  var grain = 1

  /// The rows of a tile that hold models (or their differences).
  var rows: Range<Int> { hasDifferences ? 1..<models + 1 : 0..<models }
  var rowLength: Int { shape.last ?? 1 }

  func number(_ name: String) -> Double {
    guard case .number(let value)? = shared[name] else {
      preconditionFailure("\(name) has no number: the plan gives every parameter a value")
    }
    return value
  }

  func flag(_ name: String) -> Bool {
    guard case .flag(let value)? = shared[name] else {
      preconditionFailure("\(name) is no flag: the plan gives every parameter a value")
    }
    return value
  }

  /// A value for each model; `nil` where it is absent and may be.
  func numbers(_ name: String) -> [Double] {
    perModel[name, default: []].map {
      guard case .number(let value) = $0 else { preconditionFailure("\(name) is no number") }
      return value
    }
  }
}
