import Checkpoints

/// What a recipe sets for a method in one scope: each value a number, a flag, a gradient over the
/// layers, or a list of conditions on the tensor's name.
public struct Parameters: Sendable {
  /// Values over the layers; a single one is the same for all.
  struct Setting: Sendable {
    enum Value: Sendable {
      case numbers([Double])
      case flags([Bool])
    }
    /// Part of the names of the tensors it is for; `nil` for all.
    var filter: String?
    var value: Value
  }

  var settings: [String: [Setting]] = [:]
  var isEmpty: Bool { settings.isEmpty }

  public init() {}

  /// The value for a tensor, if this scope sets one for it.
  /// - Parameter t: where its layer stands among the layers, from 0 to 1.
  func value(_ name: String, for tensor: String, t: Double) -> ParameterValue? {
    guard let settings = settings[name] else { return nil }
    let matching = settings.first { setting in
      guard let filter = setting.filter else { return true }
      return tensor.utf8.contains(Array(filter.utf8))
    }
    switch matching?.value {
    case nil: return nil
    case .numbers(let values):
      let place = t * Double(values.count - 1)
      let lower = min(Int(place), values.count - 1)
      let upper = min(lower + 1, values.count - 1)
      let fraction = place - Double(lower)
      return .number((1 - fraction) * values[lower] + fraction * values[upper])
    case .flags(let values): return .flag(values[Int(t * Double(values.count - 1))])
    }
  }
}

extension Sequence<UInt8> {
  /// Whether the bytes occur in a row.
  fileprivate func contains(_ part: [UInt8]) -> Bool {
    let bytes = Array(self)
    guard !part.isEmpty else { return true }
    guard bytes.count >= part.count else { return false }
    return (0...bytes.count - part.count).contains { start in
      bytes[start..<start + part.count].elementsEqual(part)
    }
  }
}

extension RecipeReader {
  /// - Parameter isOfModel: whether they stand under one model.
  func parameters(_ node: RecipeNode, of method: MergeMethod, isOfModel: Bool = false)
    throws(RecipeError) -> Parameters
  {
    var result = Parameters()
    for (key, line, value) in try pairs(node, "parameters") {
      let known = method.parameters.map { $0.name }
      guard let parameter = RecipeReader.parameter(key, of: method) else {
        throw RecipeError(
          file: file, line: line, problem: "\(method.name) has no parameter \(quoted(key))",
          remedy: nearest(key, among: known).map { "did you mean \($0)?" }
            ?? (known.isEmpty ? "it takes none" : "it takes \(known.joined(separator: ", "))"))
      }
      if case .null = value.content { continue }
      guard !isOfModel || parameter.scope != .shared || parameter == .int8Mask else {
        throw RecipeError(
          file: file, line: line,
          problem: "\(key) is one for all models and stands under a single one",
          remedy: "move it to the parameters of the recipe or of the slice")
      }
      result.settings[key] = try settings(value, parameter)
    }
    return result
  }

  /// Recipes set `int8_mask` for any method; it has no effect on a result.
  private static func parameter(_ name: String, of method: MergeMethod) -> MethodParameter? {
    (method.parameters + [.int8Mask]).first { $0.name == name }
  }

  private func settings(_ node: RecipeNode, _ parameter: MethodParameter) throws(RecipeError)
    -> [Parameters.Setting]
  {
    switch node.content {
    case .sequence(let nodes):
      let conditions = nodes.filter { if case .mapping = $0.content { true } else { false } }
      guard conditions.isEmpty else {
        guard conditions.count == nodes.count else {
          throw error(node, "\(parameter.name) mixes values and filters")
        }
        var settings: [Parameters.Setting] = []
        for condition in conditions { settings.append(try self.condition(condition, parameter)) }
        return settings
      }
      return [Parameters.Setting(filter: nil, value: try values(node, nodes, parameter))]
    case .mapping: return [try condition(node, parameter)]
    case .scalar:
      return [Parameters.Setting(filter: nil, value: try values(node, [node], parameter))]
    case .null: return []
    }
  }

  private func condition(_ node: RecipeNode, _ parameter: MethodParameter) throws(RecipeError)
    -> Parameters.Setting
  {
    let keys = try mapping(node, "a condition", keys: ["filter", "value"])
    guard let value = keys["value"] else { throw error(node, "value is missing") }
    var filter: String?
    if let filterNode = keys["filter"] { filter = try text(filterNode, "filter") }
    var nodes = [value]
    if case .sequence(let list) = value.content { nodes = list }
    return Parameters.Setting(
      filter: filter == "*" ? nil : filter, value: try values(value, nodes, parameter))
  }

  private func values(_ node: RecipeNode, _ nodes: [RecipeNode], _ parameter: MethodParameter)
    throws(RecipeError) -> Parameters.Setting.Value
  {
    guard !nodes.isEmpty else { throw error(node, "\(parameter.name) is an empty list") }
    switch parameter.kind {
    case .number:
      var numbers: [Double] = []
      for node in nodes {
        let text = try text(node, parameter.name)
        // Not every number that Double reads is one: no "nan", no "0x1p3".
        guard text.utf8.allSatisfy({ "+-.eE0123456789_".utf8.contains($0) }),
          let number = Double(text.replacing("_", with: "")), number.isFinite
        else { throw error(node, "\(parameter.name) must be a number, not \(quoted(text))") }
        numbers.append(number)
      }
      return .numbers(numbers)
    case .flag:
      var flags: [Bool] = []
      for node in nodes {
        let text = try text(node, parameter.name)
        switch text.lowercased() {
        case "true", "yes", "on", "1", "1.0": flags.append(true)
        case "false", "no", "off", "0", "0.0": flags.append(false)
        default:
          throw error(node, "\(parameter.name) must be true or false, not \(quoted(text))")
        }
      }
      return .flags(flags)
    }
  }
}
