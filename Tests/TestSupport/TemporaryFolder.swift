import Foundation

/// An empty folder that goes away with its owner.
public final class TemporaryFolder: Sendable {
  public let path: String

  public init() throws {
    var template = Array("\(NSTemporaryDirectory())/smelt-test-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { throw CocoaError(.fileWriteUnknown) }
    path = template.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }

  /// The path of a file in the folder.
  public func callAsFunction(_ name: String) -> String { "\(path)/\(name)" }
}

extension TemporaryFolder {
  /// The names of everything in the folder, hidden files too, sorted.
  public var names: [String] {
    get throws { try FileManager.default.contentsOfDirectory(atPath: path).sorted() }
  }
}
