public import Checkpoints
import FoundationEssentials

/// The `config.json` that Hugging Face keeps beside a model's weights.
public struct ModelConfiguration: Sendable {
  private var values: JSONValue

  /// The configuration of the model at a path, a folder or a file in one; `nil` if there is none.
  ///
  /// - Throws: `CheckpointError` if there is one that cannot be read or is no JSON object.
  public init?(of path: String) throws(CheckpointError) {
    let folder = path.hasSuffix("/") ? String(path.dropLast()) : path
    let parent = folder.lastIndex(of: "/").map { String(folder[..<$0]) } ?? "."
    let candidates = ["\(folder)/config.json", "\(parent)/config.json"]
    guard let path = candidates.first(where: { FileManager.default.fileExists(atPath: $0) })
    else { return nil }
    let text = try configurationText(path)
    guard let values = try? JSONDecoder().decode(JSONValue.self, from: Data(text)),
      case .object = values
    else {
      throw CheckpointError(
        file: path, "is not a model's configuration: it is not a JSON object",
        remedy: "mend it or take it away")
    }
    self.values = values
  }

  subscript(key: String) -> JSONValue? {
    get { values[key] }
    set { values[key] = newValue }
  }

  public var modelType: String? { self["model_type"]?.string }

  /// What the MLPs compute between their maps.
  var activation: Activation? {
    let keys = [
      "hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation",
    ]
    // Models of several parts (CLIP) keep the parts' configurations inside.
    let parts = [values] + ["vision_config", "text_config"].compactMap { values[$0] }
    for part in parts {
      // T5's gated MLPs name the gate; `gated-gelu` means the approximation by tanh.
      if part["feed_forward_proj"]?.string == "gated-gelu" { return .geluTanh }
      for key in keys {
        if let name = part[key]?.string, let known = Activation(configurationName: name) {
          return known
        }
      }
    }
    return nil
  }

  /// The configuration as a file.
  public var text: String {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
    return String(decoding: try! encoder.encode(values), as: UTF8.self) + "\n"
  }
}

/// Any JSON. Numbers keep their kind: 1 stays 1 and does not become 1.0.
enum JSONValue: Codable, Sendable, Equatable {
  case null
  case bool(Bool)
  case integer(Int)
  case number(Double)
  case string(String)
  case array([JSONValue])
  case object([String: JSONValue])

  init(from decoder: any Decoder) throws {
    let container = try decoder.singleValueContainer()
    if container.decodeNil() {
      self = .null
    } else if let value = try? container.decode(Bool.self) {
      self = .bool(value)
    } else if let value = try? container.decode(Int.self) {
      self = .integer(value)
    } else if let value = try? container.decode(Double.self) {
      self = .number(value)
    } else if let value = try? container.decode(String.self) {
      self = .string(value)
    } else if let value = try? container.decode([JSONValue].self) {
      self = .array(value)
    } else {
      self = .object(try container.decode([String: JSONValue].self))
    }
  }

  func encode(to encoder: any Encoder) throws {
    var container = encoder.singleValueContainer()
    switch self {
    case .null: try container.encodeNil()
    case .bool(let value): try container.encode(value)
    case .integer(let value): try container.encode(value)
    case .number(let value): try container.encode(value)
    case .string(let value): try container.encode(value)
    case .array(let value): try container.encode(value)
    case .object(let value): try container.encode(value)
    }
  }

  var string: String? { if case .string(let value) = self { value } else { nil } }

  subscript(key: String) -> JSONValue? {
    get { if case .object(let values) = self { values[key] } else { nil } }
    set {
      guard case .object(var values) = self else { return }
      values[key] = newValue
      self = .object(values)
    }
  }
}

/// What is in a `config.json`.
func configurationText(_ path: String) throws(CheckpointError) -> [UInt8] {
  let file = try File(reading: path)
  let size = try file.size()
  guard size <= 16 << 20 else {
    throw CheckpointError(file: path, "has \(size) bytes, too many for a configuration")
  }
  return try file.bytes(at: 0, count: size)
}
