import Checkpoints
import Yams

extension Recipe {
  /// Reads a recipe in YAML, or in JSON, which is YAML too.
  ///
  /// - Parameter file: how errors name it.
  public init(parsing text: String, file: String) throws {
    func refuse(_ line: Int, _ problem: String, remedy: String? = nil) -> RecipeError {
      RecipeError(file: file, line: line, problem: problem, remedy: remedy)
    }
    guard text.utf8.count <= 1 << 20 else {
      throw refuse(1, "is \(text.utf8.count) bytes long", remedy: "a recipe has at most 1 MiB")
    }
    if let line = text.lineNestedTooDeeply {
      throw refuse(line, "is nested more than 100 levels deep")
    }
    // YAML refuses the tabs that JSON may be indented with; inside strings JSON has none.
    let isJSON = text.first { !$0.isWhitespace } == "{"
    let node: Node?
    do {
      node = try compose(yaml: isJSON ? text.replacing("\t", with: " ") : text)
    } catch let error as YamlError {
      let (line, problem) = error.placeAndProblem
      throw refuse(line, "is not valid YAML: \(problem)")
    }
    guard let node else { throw refuse(1, "is empty") }
    try self.init(RecipeNode(node), file: file)
  }
}

extension RecipeNode {
  fileprivate init(_ node: Node) {
    let line = node.mark?.line ?? 1
    switch node {
    case .scalar(let scalar):
      let isQuoted = scalar.style != .plain && scalar.style != .any
      let isNull = !isQuoted && ["", "~", "null", "Null", "NULL"].contains(scalar.string)
      self.init(isNull ? .null : .scalar(scalar.string, isQuoted: isQuoted), line: line)
    case .sequence(let nodes):
      self.init(.sequence(nodes.map { RecipeNode($0) }), line: line)
    case .mapping(let pairs):
      self.init(
        .mapping(
          pairs.map { key, value in
            (key: key.string ?? "", line: key.mark?.line ?? line, value: RecipeNode(value))
          }), line: line)
    case .alias: self.init(.null, line: line)
    }
  }
}

extension YamlError {
  fileprivate var placeAndProblem: (line: Int, problem: String) {
    switch self {
    case .scanner(_, let problem, let mark, _), .parser(_, let problem, let mark, _),
      .composer(_, let problem, let mark, _):
      (mark.line, problem)
    case .duplicatedKeysInMapping(let duplicates, let context):
      (
        context.mark.line,
        "a key occurs twice: \(duplicates.map { quoted($0) }.joined(separator: ", "))"
      )
    default: (1, "\(self)")
    }
  }
}

extension String {
  /// The line on which brackets or dashes go deeper than any recipe does: the parser recurses.
  fileprivate var lineNestedTooDeeply: Int? {
    var (line, depth, dashes) = (1, 0, 0)
    for byte in utf8 {
      switch byte {
      case UInt8(ascii: "\n"): (line, dashes) = (line + 1, 0)
      case UInt8(ascii: "["), UInt8(ascii: "{"): depth += 1
      case UInt8(ascii: "]"), UInt8(ascii: "}"): depth -= 1
      case UInt8(ascii: "-"), UInt8(ascii: "?"): dashes += 1
      default: break
      }
      if depth > 100 || dashes > 1000 { return line }
    }
    return nil
  }
}
