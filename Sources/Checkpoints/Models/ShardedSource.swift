import Glibc

/// A model whose tensors are spread over several files, read as one.
final class ShardedSource: TensorSource {
  let path: String
  let manifest: Manifest
  let warnings: [String]
  var foreignChecksums: [String] { shards.flatMap { $0.foreignChecksums } }
  private let shards: [any TensorSource]
  /// The shard of each tensor of the manifest.
  private let places: [Int]

  /// Opens every file that the index names and checks that each holds its tensors.
  init(
    index: ShardIndex, as path: String,
    opening open: (String) throws(CheckpointError) -> any TensorSource
  ) throws(CheckpointError) {
    let folder = split(index.path).folder
    var shards: [any TensorSource] = []
    var tensors: [TensorInfo] = []
    var places: [Int] = []
    var warnings: [String] = []
    for (number, file) in index.files.enumerated() {
      guard access("\(folder)/\(file)", F_OK) == 0 else {
        throw Self.missing("\(folder)/\(file)", code: errno, index)
      }
      let shard = try open("\(folder)/\(file)")
      let expected = Set(index.tensors[file]!.map { ExactName($0) })
      for tensor in shard.manifest.tensors where expected.contains(ExactName(tensor.name)) {
        tensors.append(tensor)
        places.append(number)
      }
      for name in index.tensors[file]! where shard.manifest[name] == nil {
        throw CheckpointError(
          file: shard.path, tensor: name, "is missing, but \(index.path) says that it is here")
      }
      shards.append(shard)
      warnings += shard.warnings
    }
    try Self.refuseDoubles(shards, index, &warnings)

    let metadata = shards.first?.manifest.metadata ?? [:]
    self.path = path
    self.manifest = Manifest(
      tensors,
      metadata: metadata.filter { key, value in
        shards.allSatisfy { $0.manifest.metadata[key] == value }
      })
    self.shards = shards
    self.places = places
    if let size = index.totalSize, size != manifest.byteCount {
      warnings.append(
        "\(index.path): says total_size \(size), but its tensors have \(manifest.byteCount) bytes")
    }
    warnings += try strayFiles(beside: index)
    warnings += linksLeaving(folder, index.files)
    self.warnings = warnings
  }

  /// Why there is no file, by the system's error.
  private static func missing(_ path: String, code: Int32, _ index: ShardIndex) -> CheckpointError {
    switch code {
    case ENOENT, ENOTDIR:
      CheckpointError(file: path, "is missing, but \(index.path) names it", remedy: "download it")
    case ELOOP:
      CheckpointError(
        file: path, "is a loop of symbolic links, but \(index.path) names it",
        remedy: "put the file itself there: download it")
    default: .system(path, "cannot be opened", code: code)
    }
  }

  /// Refuses a tensor that is in two files; warns of one that is in a file but not in the index.
  private static func refuseDoubles(
    _ shards: [any TensorSource], _ index: ShardIndex, _ warnings: inout [String]
  ) throws(CheckpointError) {
    var homes: [ExactName: String] = [:]
    let listed = Set(index.tensors.values.joined().map { ExactName($0) })
    for shard in shards {
      var strays: [String] = []
      for tensor in shard.manifest.tensors {
        if let other = homes.updateValue(shard.path, forKey: ExactName(tensor.name)) {
          throw CheckpointError(file: shard.path, tensor: tensor.name, "is also in \(other)")
        }
        if !listed.contains(ExactName(tensor.name)) { strays.append(tensor.name) }
      }
      if let first = strays.first {
        let others = strays.count > 1 ? " and \(strays.count - 1) others" : ""
        warnings.append(
          "\(shard.path): tensor \(quoted(first))\(others) left out: not in \(index.path)")
      }
    }
  }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    try shards[places[manifest.position(of: tensor.name)!]].read(tensor, at: offset, into: &buffer)
  }

  func forget(_ bytes: Range<Int>, of tensor: TensorInfo) {
    shards[places[manifest.position(of: tensor.name)!]].forget(bytes, of: tensor)
  }

  /// Each file knows best how to verify itself.
  func verifyData(workers: Int) throws -> Verification {
    var results: [Verification] = []
    for shard in shards { results.append(try shard.verifyData(workers: workers)) }
    // A file may hold tensors that the index leaves out.
    func own(_ found: (Verification) -> [TensorInfo]) -> [TensorInfo] {
      results.flatMap(found).filter { manifest[$0.name] != nil }
    }
    return Verification(
      manifest.tensors, damaged: own { $0.damaged },
      unreadable: results.flatMap { $0.unreadable }.filter { manifest[$0.tensor.name] != nil },
      unrecorded: own { $0.unrecorded }, foreignChecksums: foreignChecksums)
  }

  func refuseDamage(of tensors: [TensorInfo], workers: Int) throws {
    let homes = Dictionary(grouping: tensors) { places[manifest.position(of: $0.name)!] }
    for (place, tensors) in homes.sorted(by: { $0.key < $1.key }) {
      try shards[place].refuseDamage(of: tensors, workers: workers)
    }
  }

  func checkUnchanged() throws(CheckpointError) {
    for shard in shards { try shard.checkUnchanged() }
  }

  func recordedChecksum(of tensor: TensorInfo) -> TensorChecksum? {
    shards[places[manifest.position(of: tensor.name)!]].recordedChecksum(of: tensor)
  }
}

/// Files that look like shards but that the index does not name.
private func strayFiles(beside index: ShardIndex) throws(CheckpointError) -> [String] {
  let (folder, name) = split(index.path)
  let shards = index.files
  // "model-00001-of-00003.safetensors" for "model.safetensors.index.json".
  let parts = name.split(separator: ".")
  guard parts.count >= 4 else { return [] }
  return try listFolder(folder).filter {
    $0.hasPrefix("\(parts[0])-") && $0.hasSuffix(".\(parts[1])") && !shards.contains($0)
  }.map { "\(folder)/\($0): left out: not in \(index.path)" }
}

/// Symbolic links that lead out of a folder, one sentence for each folder that they lead to.
func linksLeaving(_ folder: String, _ files: [String]) -> [String] {
  guard let home = resolved(folder) else { return [] }
  let leaving = files.compactMap { file -> (file: String, target: String)? in
    guard let target = resolved("\(folder)/\(file)") else { return nil }
    let targetFolder = split(target).folder
    return (targetFolder + "/").hasPrefix(home + "/") ? nil : (file, targetFolder)
  }
  return Dictionary(grouping: leaving) { $0.target }.sorted { $0.key < $1.key }.map {
    let others = $1.count > 1 ? " and \($1.count - 1) others" : ""
    return "\(folder)/\($1[0].file)\(others): symbolic link to \($0)"
  }
}
