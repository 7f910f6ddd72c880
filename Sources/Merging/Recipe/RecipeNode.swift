import Checkpoints

/// A value of a recipe with the line it stands on, whatever the syntax it was written in.
public struct RecipeNode: Sendable {
  public indirect enum Content: Sendable {
    case scalar(String, isQuoted: Bool)
    case sequence([RecipeNode])
    case mapping([(key: String, line: Int, value: RecipeNode)])
    case null
  }

  public let content: Content
  public let line: Int

  public init(_ content: Content, line: Int) {
    self.content = content
    self.line = line
  }
}

/// What is wrong with a recipe and on which line.
public struct RecipeError: Error, Equatable, CustomStringConvertible {
  public let file: String
  public let line: Int
  public let problem: String
  public let remedy: String?

  public var description: String {
    "\(file), line \(line): \(problem)" + (remedy.map { "; \($0)" } ?? "")
  }
}

/// Reads nodes as what a recipe expects in their place.
struct RecipeReader {
  let file: String

  func error(_ node: RecipeNode, _ problem: String, remedy: String? = nil) -> RecipeError {
    RecipeError(file: file, line: node.line, problem: problem, remedy: remedy)
  }

  /// The pairs of a mapping, all of whose keys are known.
  func mapping(_ node: RecipeNode, _ what: String, keys known: [String]) throws(RecipeError)
    -> [String: RecipeNode]
  {
    var result: [String: RecipeNode] = [:]
    for (key, line, value) in try pairs(node, what) {
      guard known.contains(key) else {
        throw RecipeError(
          file: file, line: line, problem: "\(what) has no key \(quoted(key))",
          remedy: nearest(key, among: known).map { "did you mean \($0)?" }
            ?? "known are \(known.joined(separator: ", "))")
      }
      result[key] = value
    }
    return result.filter { if case .null = $0.value.content { false } else { true } }
  }

  /// The pairs of a mapping in their order, no key twice.
  func pairs(_ node: RecipeNode, _ what: String) throws(RecipeError)
    -> [(key: String, line: Int, value: RecipeNode)]
  {
    guard case .mapping(let pairs) = node.content else {
      throw error(node, "\(what) must be a mapping of keys to values")
    }
    var seen: Set<String> = []
    for pair in pairs where !seen.insert(pair.key).inserted {
      throw RecipeError(
        file: file, line: pair.line, problem: "\(what) has the key \(quoted(pair.key)) twice",
        remedy: "remove one of them")
    }
    return pairs
  }

  func sequence(_ node: RecipeNode, _ what: String) throws(RecipeError) -> [RecipeNode] {
    guard case .sequence(let nodes) = node.content else {
      throw error(node, "\(what) must be a list")
    }
    return nodes
  }

  func text(_ node: RecipeNode, _ what: String) throws(RecipeError) -> String {
    guard case .scalar(let text, _) = node.content else {
      throw error(node, "\(what) must be a single value")
    }
    return text
  }

  func integer(_ node: RecipeNode, _ what: String) throws(RecipeError) -> Int {
    guard let value = Int(try text(node, what)) else {
      throw error(node, "\(what) must be a whole number")
    }
    return value
  }
}

/// The known word that a mistyped one was probably meant to be.
func nearest(_ word: String, among known: [String]) -> String? {
  let scored = known.map { (word: $0, distance: editDistance(word, $0)) }
  guard let best = scored.min(by: { $0.distance < $1.distance }) else { return nil }
  return best.distance <= max(2, best.word.count / 3) ? best.word : nil
}

/// How many letters must be added, removed, exchanged or swapped with their neighbour (the
/// optimal string alignment).
private func editDistance(_ one: String, _ other: String) -> Int {
  let (one, other) = (Array(one.prefix(64)), Array(other.prefix(64)))
  var rows = [Array(0...other.count)]
  for i in one.indices {
    var row = [i + 1]
    for j in other.indices {
      var best = min(rows[i][j] + (one[i] == other[j] ? 0 : 1), row[j] + 1, rows[i][j + 1] + 1)
      if i > 0, j > 0, one[i] == other[j - 1], one[i - 1] == other[j] {
        best = min(best, rows[i - 1][j - 1] + 1)
      }
      row.append(best)
    }
    rows.append(row)
  }
  return rows[one.count][other.count]
}
