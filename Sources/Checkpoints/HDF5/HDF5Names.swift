extension HDF5 {
  /// Where Smelt keeps what is not a tensor.
  static let metadataGroup = "__metadata__"
  /// A path of more names than this would take long chains of groups; its slashes are escaped.
  static let deepestPath = 100

  /// A path in the file for every tensor, in order.
  ///
  /// A path is the name itself unless HDF5 cannot hold it there; then the offending characters
  /// are percent-escaped. It is for people: the true name is kept in an attribute.
  static func paths(for names: [String], layout: Layout) -> [String] {
    var paths = names.map { escaped(layout == .tree ? dotsAsSlashes($0) : $0) }
    // A dataset cannot also be a group: what would lie below another is kept beside it.
    let datasets = Set((paths + [metadataGroup]).map(ExactName.init))
    paths = paths.map { path in
      groups(above: path).contains { datasets.contains(ExactName($0)) }
        ? replacing(slash, in: path, with: "%2F") : path
    }
    var taken: Set = [ExactName(metadataGroup)]
    for path in paths { taken.formUnion(groups(above: path).map(ExactName.init)) }
    return paths.map { path in
      var path = path
      while !taken.insert(ExactName(path)).inserted { path += "%" }
      return path
    }
  }

  /// Whether HDF5 can call an attribute so.
  static func canName(_ name: String) -> Bool { !name.isEmpty && !name.utf8.contains(0) }

  /// The groups on the way to a path, outermost first.
  static func groups(above path: String) -> [String] {
    path.utf8.indices.filter { path.utf8[$0] == slash }.map { String(path[..<$0]) }
  }

  // Bytes, not characters: to Swift a slash before a combining accent is no slash.
  private static let slash = UInt8(ascii: "/")

  /// `model.layers.0` as `model/layers/0`, unless it has an empty part.
  private static func dotsAsSlashes(_ name: String) -> String {
    let dot = UInt8(ascii: ".")
    let parts = name.utf8.split(separator: dot, omittingEmptySubsequences: false)
    return parts.contains { $0.isEmpty } ? name : replacing(dot, in: name, with: "/")
  }

  private static func escaped(_ name: String) -> String {
    guard !name.isEmpty else { return "%" }
    let parts = name.utf8.split(separator: slash, omittingEmptySubsequences: false)
    let isPath = parts.count <= deepestPath && !parts.contains { $0.isEmpty }
    return parts.map { part in
      // HDF5 reads a lone dot as the group itself, and ends a name at NUL.
      part.elementsEqual(".".utf8)
        ? "%2E" : replacing(0, in: String(Substring(part)), with: "%00")
    }.joined(separator: isPath ? "/" : "%2F")
  }

  private static func replacing(_ byte: UInt8, in text: String, with replacement: String) -> String
  {
    guard text.utf8.contains(byte) else { return text }
    let parts = text.utf8.split(separator: byte, omittingEmptySubsequences: false)
    return parts.map { String(Substring($0)) }.joined(separator: replacement)
  }
}
