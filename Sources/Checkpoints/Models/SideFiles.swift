import Glibc

/// The files that belong to a model without being its weights: configuration, tokenizer and
/// the like.
struct SideFiles {
  let folder: String
  /// Their paths in the folder.
  private(set) var paths: [String] = []
  /// The paths of files of weights, which are not copied: the model's own, and others in other
  /// formats or of other parts.
  private var weights: [String] = []
  private var seenCount = 0

  /// Far more than any model has.
  private static let mostFiles = 10_000
  private static let deepest = 8

  /// - Parameter original: a model's folder, whose files all come along, or a file, beside which
  ///   only a model's usual files do: it may lie among a user's own.
  init(of original: String) throws(CheckpointError) {
    if isFolder(original) {
      folder = original
      try find(in: "", depth: 0)
    } else {
      folder = split(original).folder
      guard isFile("\(folder)/config.json") else { return }
      paths = try listFolder(folder).filter {
        Self.isUsual($0) && Self.isSideFile($0) && isFile("\(folder)/\($0)")
      }
    }
  }

  /// Finds the files of a subfolder, whose path is empty or ends in a slash.
  private mutating func find(in subfolder: String, depth: Int) throws(CheckpointError) {
    for name in try listFolder("\(folder)/\(subfolder)") where !name.hasPrefix(".") {
      let path = "\(subfolder)\(name)"
      guard Self.isSideFile(name) else {
        if Self.isWeights(name) { weights.append(path) }
        continue
      }
      seenCount += 1
      guard seenCount <= Self.mostFiles, depth <= Self.deepest else {
        throw CheckpointError(
          file: folder,
          seenCount > Self.mostFiles
            ? "has more than \(Self.mostFiles) files beside the weights"
            : "has folders in folders more than \(Self.deepest) deep",
          remedy: "name the file of the weights, or move them to a folder of their own")
      }
      if isFile("\(folder)/\(path)") {
        paths.append(path)
      } else if isFolder("\(folder)/\(path)"), !isLink("\(folder)/\(path)") {
        try find(in: "\(path)/", depth: depth + 1)
      }
    }
  }

  /// What comes from elsewhere, through symbolic links, and which weights do not come along, a
  /// sentence each.
  func warnings() throws(CheckpointError) -> [String] {
    guard !weights.isEmpty else { return linksLeaving(folder, paths) }
    let own = Set(try Checkpoint.files(of: folder).map { split($0).name })
    let others = weights.filter { !own.contains($0) }.map { (split("\(folder)/\($0)").folder, $0) }
    let byFolder = Dictionary(grouping: others) { $0.0 }.sorted { $0.key < $1.key }
    return linksLeaving(folder, paths)
      + byFolder.map {
        let more = $1.count > 1 ? " and \($1.count - 1) others" : ""
        return "\(folder)/\($1[0].1)\(more): not copied: weights beside the model's own"
      }
  }

  func copy(to target: String, synced isSynced: Bool) throws(CheckpointError) {
    var subfolders: Set<String> = []
    for path in paths {
      for slash in path.indices where path[slash] == "/" {
        let subfolder = "\(target)/\(path[..<slash])"
        guard subfolders.insert(subfolder).inserted else { continue }
        guard mkdir(subfolder, 0o755) == 0 else { throw .system(subfolder, "cannot be created") }
      }
      try copyFile("\(folder)/\(path)", to: "\(target)/\(path)", synced: isSynced)
    }
    guard isSynced else { return }
    for subfolder in subfolders { try syncFolder(subfolder) }
    try syncFolder(target)
  }

  /// Whether a file is no weights, by its name.
  private static func isSideFile(_ name: String) -> Bool {
    !isWeights(name) && !name.hasPrefix(".") && !name.hasSuffix(".index.json")
  }

  private static func isWeights(_ name: String) -> Bool {
    let endings = [
      "safetensors", "bin", "pt", "pth", "ckpt", "h5", "hdf5", "msgpack", "gguf", "onnx",
      "onnx_data", "npz", "zst", "ot", "tflite",
    ]
    return endings.contains { name.lowercased().hasSuffix("." + $0) }
  }

  /// Whether a file is one that transformers writes beside a model's weights.
  private static func isUsual(_ name: String) -> Bool {
    let names = [
      "config.json", "generation_config.json", "preprocessor_config.json",
      "processor_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    ]
    return names.contains(name) || name.hasSuffix(".model")
      || ["tokenizer", "vocab", "chat_template"].contains { name.hasPrefix($0) }
  }
}

extension ModelFolder {
  /// What is odd about the files that a new folder would get from this model, a sentence each.
  public static func sideFileWarnings(of original: String) throws(CheckpointError) -> [String] {
    try SideFiles(of: original).warnings()
  }
}
