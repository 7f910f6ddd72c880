import Foundation

/// The path of something in the repository's `Fixtures` folder.
public func fixtures(_ name: String) -> String {
  let repository = URL(filePath: #filePath).deletingLastPathComponent()
    .deletingLastPathComponent().deletingLastPathComponent()
  return repository.appending(path: "Fixtures").appending(path: name).path(percentEncoded: false)
}
