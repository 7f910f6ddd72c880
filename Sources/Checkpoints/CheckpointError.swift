/// All that can go wrong with a checkpoint, as one sentence for a person:
/// which file, which tensor, what is wrong and, where it is known, what to do.
public struct CheckpointError: Error, Equatable, CustomStringConvertible {
  public let file: String
  public let tensor: String?
  public let problem: String
  public let remedy: String?

  public init(file: String, tensor: String? = nil, _ problem: String, remedy: String? = nil) {
    self.file = file
    self.tensor = tensor
    self.problem = problem
    self.remedy = remedy
  }

  /// The same failure, met while this tensor was read.
  func of(_ tensor: String) -> CheckpointError {
    CheckpointError(file: file, tensor: tensor, problem, remedy: remedy)
  }

  public var description: String {
    let place = tensor.map { ": tensor \(quoted($0))" } ?? ""
    let advice = remedy.map { "; \($0)" } ?? ""
    return "\(file)\(place): \(problem)\(advice)"
  }
}

/// A name from a stranger's file, safe to show on one line of a terminal.
public func quoted(_ name: String) -> String {
  let shown = name.unicodeScalars.prefix(200).map { scalar in
    scalar.properties.generalCategory == .control || scalar.properties.generalCategory == .format
      ? "\\u{\(String(scalar.value, radix: 16))}" : String(scalar)
  }.joined()
  return "\"\(shown)\(name.unicodeScalars.count > 200 ? "…" : "")\""
}
