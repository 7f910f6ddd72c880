/// Why models cannot be merged as asked, as one sentence for a person.
public struct MergeError: Error, Equatable, CustomStringConvertible {
  public let problem: String
  public let remedy: String?

  public init(_ problem: String, remedy: String? = nil) {
    self.problem = problem
    self.remedy = remedy
  }

  public var description: String { problem + (remedy.map { "; \($0)" } ?? "") }
}
