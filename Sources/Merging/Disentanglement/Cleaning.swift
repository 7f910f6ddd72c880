import Checkpoints
import Glibc

/// A cleaning of task vectors as a user asks for it: the method, and the tensors it is let at.
public struct Cleaning: Sendable, Equatable {
  /// The preset that the method began as.
  public let preset: String
  public var method: AdaptiveWeightDisentanglement
  /// Patterns of tensor names, as the shell writes them (`*`, `?`, `[a-z]`). Empty: what the
  /// scope cleans by default.
  public var include: [String] = []
  /// Patterns of tensor names that are left as they are.
  public var exclude: [String] = []

  public static let row = Cleaning(preset: "awd-row", method: .row)
  public static let model = Cleaning(preset: "awd-model", method: .model)

  private init(preset: String, method: AdaptiveWeightDisentanglement) {
    self.preset = preset
    self.method = method
  }
}

// MARK: - From words

extension Cleaning {
  public static let parameterNames = [
    "scope", "objective", "penalty", "optimizer", "rate", "momentum", "weight_decay", "iterations",
    "epsilon",
  ]

  /// A preset and what to change of it: `awd-model,scope=block,penalty=0.01`.
  public init(_ text: String) throws(MergeError) {
    let words = text.split(separator: ",", omittingEmptySubsequences: false).map(String.init)
    var parameters: [(String, String)] = []
    for word in words.dropFirst() {
      guard let sign = word.firstIndex(of: "=") else {
        throw MergeError("\(quoted(word)) is not of the form name=value")
      }
      parameters.append((String(word[..<sign]), String(word[word.index(after: sign)...])))
    }
    try self.init(preset: words[0], parameters: parameters)
  }

  /// A preset and what to change of it, in the words of a recipe.
  public init(preset: String, parameters: [(name: String, value: String)] = [])
    throws(MergeError)
  {
    guard let method = AdaptiveWeightDisentanglement.presets[preset] else {
      let known = AdaptiveWeightDisentanglement.presets.keys.sorted().joined(separator: ", ")
      throw MergeError(
        "there is no cleaning preset \(quoted(preset))", remedy: "known are \(known)")
    }
    self.init(preset: preset, method: method)
    // The optimizer first, whatever the order of the words: what it does not have cannot be set.
    let isOptimizer = { (parameter: (name: String, value: String)) in parameter.name == "optimizer"
    }
    for (name, value) in parameters.filter(isOptimizer) + parameters.filter({ !isOptimizer($0) }) {
      try set(name, value)
    }
  }

  /// Changes one parameter.
  mutating func set(_ name: String, _ value: String) throws(MergeError) {
    func number() throws(MergeError) -> Double {
      guard let number = Double(value), number.isFinite, number >= 0 else {
        throw MergeError("\(name) is a number of at least 0, not \(quoted(value))")
      }
      return number
    }
    func choice<Choice: CaseIterable & RawRepresentable>(_ type: Choice.Type) throws(MergeError)
      -> Choice where Choice.RawValue == String
    {
      guard let choice = Choice(rawValue: value) else {
        let known = Choice.allCases.map { $0.rawValue }.joined(separator: ", ")
        throw MergeError("\(name) is one of \(known), not \(quoted(value))")
      }
      return choice
    }
    switch name {
    case "scope": method.scope = try choice(AdaptiveWeightDisentanglement.Scope.self)
    case "objective":
      let objective = try choice(AdaptiveWeightDisentanglement.Objective.self)
      guard method.optimizer != .converged || objective == .squared else {
        throw MergeError("the converged optimizer makes the squares of the cosines small, not abs")
      }
      method.objective = objective
    case "penalty", "alpha":
      let penalty =
        value == "none" ? AdaptiveWeightDisentanglement.Penalty.none : .norm(try number())
      guard method.optimizer != .converged || penalty.coefficient == 0 else {
        throw MergeError(
          "the converged optimizer has no \(name)",
          remedy:
            "it stops at the nearest redundant vector by itself; a descent (gd, sgd) takes a penalty"
        )
      }
      method.penalty = penalty
    case "epsilon":
      guard method.optimizer != .converged else {
        throw MergeError("the converged optimizer has no epsilon")
      }
      method.epsilon = try number()
    case "iterations":
      guard let count = Int(value), (0...1_000_000).contains(count) else {
        throw MergeError("iterations is a whole number up to 1000000, not \(quoted(value))")
      }
      method.iterations = count
    case "optimizer":
      switch value {
      case "converged":
        method.optimizer = .converged
        method.objective = .squared
        method.penalty = .none
        method.epsilon = 0
        method.iterations = AdaptiveWeightDisentanglement.convergedIterations
      case "gd": method.optimizer = .descent(rate: try rate(name))
      case "sgd":
        method.optimizer = .descent(rate: try rate(name), momentum: 0.9, weightDecay: 1e-4)
      default:
        throw MergeError("optimizer is one of gd, sgd, converged, not \(quoted(value))")
      }
    case "rate", "momentum", "weight_decay":
      guard case .descent(var rate, var momentum, var weightDecay) = method.optimizer else {
        throw MergeError("the converged optimizer has no \(name)")
      }
      switch name {
      case "rate": rate = try number()
      case "momentum": momentum = try number()
      default: weightDecay = try number()
      }
      method.optimizer = .descent(rate: rate, momentum: momentum, weightDecay: weightDecay)
    default:
      throw MergeError(
        "cleaning has no parameter \(quoted(name))",
        remedy: "it has \(Cleaning.parameterNames.joined(separator: ", "))")
    }
  }

  private func rate(_ name: String) throws(MergeError) -> Double {
    guard case .descent(let rate, _, _) = method.optimizer else {
      throw MergeError("optimizer is given twice")
    }
    return rate
  }
}

extension Cleaning: CustomStringConvertible {
  /// The preset and all parameters on one line, for a file's metadata.
  public var description: String {
    func list(_ name: String, _ patterns: [String]) -> String {
      patterns.isEmpty ? "" : " \(name)=\(patterns.joined(separator: ","))"
    }
    return "\(preset) \(method)" + list("include", include) + list("exclude", exclude)
  }
}

// MARK: - Which tensors

extension Cleaning {
  /// Tensors that share one redundant vector; in row scope, whose rows have one each.
  struct Group: Sendable {
    let name: String
    var tensors: [TensorInfo]
    let isCleaned: Bool
  }

  /// Whether the tensor's task vectors are cleaned.
  ///
  /// By default row and tensor scope clean weight matrices, but not embeddings and heads, whose
  /// rows are words and classes; block scope what is in a layer; model scope everything.
  func cleans(_ tensor: TensorInfo) -> Bool {
    guard tensor.dtype.isArithmetic, tensor.elementCount > 0,
      !exclude.contains(where: { matches(tensor.name, $0) })
    else { return false }
    guard include.isEmpty else { return include.contains { matches(tensor.name, $0) } }
    switch method.scope {
    case .row, .tensor:
      let name = tensor.name.lowercased()
      let excluded = ["embed", "wte", "wpe", "head", "classifier"]
      return tensor.shape.count == 2 && !excluded.contains { name.contains($0) }
    case .block: return layerName(of: tensor.name) != nil
    case .model: return true
    }
  }

  private func matches(_ name: String, _ pattern: String) -> Bool {
    fnmatch(pattern, name, 0) == 0
  }

  /// The group of several tensors that a cleaned one belongs to, in block and model scope.
  func sharedGroup(of tensor: String) -> String? {
    switch method.scope {
    case .row, .tensor: nil
    case .block: layerName(of: tensor)
    case .model: "model"
    }
  }

  /// The floating-point tensors, each in one group, in the order in which groups begin.
  func groups(of manifest: Manifest) -> [Group] {
    var groups: [Group] = []
    var positions: [String: Int] = [:]
    for tensor in manifest.tensors where tensor.dtype.isArithmetic {
      let isCleaned = cleans(tensor)
      guard isCleaned, let shared = sharedGroup(of: tensor.name) else {
        groups.append(Group(name: tensor.name, tensors: [tensor], isCleaned: isCleaned))
        continue
      }
      if let position = positions[shared] {
        groups[position].tensors.append(tensor)
      } else {
        positions[shared] = groups.count
        groups.append(Group(name: shared, tensors: [tensor], isCleaned: true))
      }
    }
    return groups
  }
}

/// The Transformer layer that a tensor's name puts it in: everything up to the first number
/// among the name's parts, `model.layers.3` for `model.layers.3.mlp.up_proj.weight`.
func layerName(of tensor: String) -> String? {
  let words = tensor.split(separator: ".", omittingEmptySubsequences: false)
  return words.firstIndex(where: isNumber).map { words[...$0].joined(separator: ".") }
}

/// Whether a layer comes before another: layer 2 before layer 10, whatever the file's order.
func isBefore(_ one: String, _ other: String) -> Bool {
  let words = [one, other].map { $0.split(separator: ".", omittingEmptySubsequences: false) }
  for (left, right) in zip(words[0], words[1]) where left != right {
    guard isNumber(left), isNumber(right), left.count != right.count else { return left < right }
    return left.count < right.count
  }
  return words[0].count < words[1].count
}

private func isNumber(_ word: Substring) -> Bool {
  !word.isEmpty && word.utf8.allSatisfy { (0x30...0x39).contains($0) }
}
