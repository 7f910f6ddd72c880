import Glibc
import Synchronization

/// A model's folder as Hugging Face has it: the weights in one file or several, and beside
/// them the configuration, the tokenizer and other small files.
public enum ModelFolder {
  /// Hugging Face's own: decimal, and about what one file should have for a download.
  public static let defaultShardSize = 5_000_000_000

  /// The names under which the weights are looked for; the first that is there is taken, as
  /// transformers does.
  private static let weightFiles = [
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
  ]

  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    let weights = try weights(in: path)
    guard weights.hasSuffix(".index.json") else { return try Checkpoint.openFile(weights) }
    return try openShards(weights, as: path)
  }

  /// The path of the file that has a folder's model, or of the index of its shards.
  static func weights(in path: String) throws(CheckpointError) -> String {
    let names = try listFolder(path)
    if let known = weightFiles.first(where: names.contains) { return "\(path)/\(known)" }
    // Other models have other names (adapter_model.safetensors): one must be meant.
    for ending in [".safetensors.index.json", ".safetensors"] {
      let candidates = names.filter { $0.hasSuffix(ending) && !$0.hasPrefix(".") }
      guard candidates.count <= 1 else {
        throw CheckpointError(
          file: path,
          "has \(candidates.count) files that may be the model: \(candidates.prefix(5).joined(separator: ", "))",
          remedy: "name the one that is meant")
      }
      if let only = candidates.first { return "\(path)/\(only)" }
    }
    throw CheckpointError(
      file: path, "has no model in it: none of \(weightFiles.joined(separator: ", "))")
  }

  /// Opens the model that an index of shards describes.
  static func openShards(_ index: String, as path: String) throws(CheckpointError)
    -> any TensorSource
  {
    try ShardedSource(index: ShardIndex(reading: index), as: path) {
      (shard) throws(CheckpointError) in
      // A shard that were an index in its turn could name itself.
      guard !isFolder(shard), !shard.hasSuffix(".index.json") else {
        throw CheckpointError(
          file: shard,
          "is not a file of tensors but \(isFolder(shard) ? "a folder" : "an index of shards")",
          remedy: "mend \(index), which names it")
      }
      return try Checkpoint.openFile(shard)
    }
  }
}

// MARK: - Writing

extension ModelFolder {
  /// Begins a folder as the options have it.
  static func create(_ path: String, _ manifest: Manifest, _ options: WritingOptions)
    throws(CheckpointError) -> any TensorSink
  {
    try create(
      path, manifest, shardSize: options.shardSize, sideFilesOf: options.sideFilesOf,
      files: options.files, replacing: options.isReplacing,
      checksums: options.checksums ?? .xxh3, keepsHeader: options.checksums == nil,
      synced: options.isSynced)
  }

  /// Begins a folder of safetensors files of at most `shardSize` bytes of tensors each.
  ///
  /// Tensors fill the files in order; one that is larger has its own. What fits one file is
  /// written as `model.safetensors`, without an index.
  /// - Parameters:
  ///   - original: a model's folder, whose other files are copied, or a file, of which only a
  ///     model's usual files beside it are.
  ///   - files: small files to write beside the weights, by name; they take the place of copies.
  ///   - isReplacing: whether a folder that is there goes, with all its files.
  ///   - isSynced: as in `WritingOptions`.
  public static func create(
    _ path: String, _ manifest: Manifest, shardSize: Int = defaultShardSize,
    sideFilesOf original: String? = nil, files smallFiles: [String: [UInt8]] = [:],
    replacing isReplacing: Bool = false,
    checksums: TensorChecksum.Algorithm? = .xxh3, keepsHeader: Bool = true,
    synced isSynced: Bool = true
  ) throws(CheckpointError) -> any TensorSink {
    precondition(shardSize > 0)
    var shards: [[TensorInfo]] = [[]]
    var size = 0
    for tensor in manifest.tensors {
      if size > 0, tensor.byteCount > shardSize - size {
        shards.append([])
        size = 0
      }
      shards[shards.count - 1].append(tensor)
      size += tensor.byteCount
    }
    let sideFiles = try original.map { (path) throws(CheckpointError) in try SideFiles(of: path) }
    let folder = try PendingFolder(for: path, replacing: isReplacing, synced: isSynced)
    var places: [Int] = []
    var files: [(file: String, tensors: [TensorInfo])] = []
    var sinks: [any TensorSink] = []
    for (number, tensors) in shards.enumerated() {
      let file =
        shards.count == 1
        ? "model.safetensors"
        : "model-\(fiveDigits(number + 1))-of-\(fiveDigits(shards.count)).safetensors"
      files.append((file, tensors))
      places += tensors.map { _ in number }
      let part = Manifest(
        tensors, metadata: manifest.metadata,
        safetensorsHeader: shards.count == 1 ? manifest.safetensorsHeader : nil)
      do {
        sinks.append(
          try Safetensors.create(
            "\(folder.temporaryPath)/\(file)", part, checksums: checksums,
            keepsHeader: keepsHeader, synced: isSynced))
      } catch { throw error.moved(to: "\(folder.destination)/\(file)") }
    }
    return FolderSink(
      folder, manifest, sinks: sinks, places: places, files: files, sideFiles: sideFiles,
      smallFiles: smallFiles)
  }

  private static func fiveDigits(_ number: Int) -> String {
    String(repeating: "0", count: max(0, 5 - String(number).count)) + String(number)
  }
}

/// Tensors on their way into the files of a model's folder.
private final class FolderSink: TensorSink {
  let manifest: Manifest
  private let folder: PendingFolder
  private let sinks: [any TensorSink]
  /// The sink of each tensor of the manifest.
  private let places: [Int]
  private let files: [(file: String, tensors: [TensorInfo])]
  private let isComplete = Atomic(false)
  private let sideFiles: SideFiles?
  private let smallFiles: [String: [UInt8]]

  init(
    _ folder: PendingFolder, _ manifest: Manifest, sinks: [any TensorSink], places: [Int],
    files: [(file: String, tensors: [TensorInfo])], sideFiles: SideFiles?,
    smallFiles: [String: [UInt8]]
  ) {
    self.folder = folder
    self.manifest = manifest
    self.sinks = sinks
    self.places = places
    self.files = files
    self.sideFiles = sideFiles
    self.smallFiles = smallFiles
  }

  var warnings: [String] {
    sinks.flatMap { $0.warnings }.map {
      $0.replacing(folder.temporaryPath, with: folder.destination)
    }
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    let place = places[manifest.position(of: tensor.name)!]
    do { try sinks[place].write(bytes, of: tensor, at: offset) } catch {
      throw error.moved(to: "\(folder.destination)/\(files[place].file)")
    }
  }

  func complete() throws(CheckpointError) {
    guard !isComplete.load(ordering: .relaxed) else { return }
    do {
      for sink in sinks { try sink.finish() }
      try sideFiles?.copy(to: folder.temporaryPath, synced: folder.isSynced)
      for (name, bytes) in smallFiles.sorted(by: { $0.key < $1.key }) {
        unlink("\(folder.temporaryPath)/\(name)")
        let file = try File(creating: "\(folder.temporaryPath)/\(name)")
        try file.write(bytes.span.bytes, at: 0)
        if folder.isSynced { try file.sync() }
      }
      // Last, so that whoever sees an index sees all that it names.
      if files.count > 1 {
        let index = try File(
          creating: "\(folder.temporaryPath)/model.safetensors.index.json")
        try index.write(ShardIndex.describe(files).span.bytes, at: 0)
        if folder.isSynced { try index.sync() }
      }
    } catch {
      throw error.file.hasPrefix(folder.temporaryPath)
        ? error.moved(to: folder.destination) : error
    }
    isComplete.store(true, ordering: .relaxed)
  }

  func finish() throws(CheckpointError) {
    try complete()
    try folder.commit()
  }
}

extension CheckpointError {
  /// The same, of another file: the one that the user knows.
  func moved(to file: String) -> CheckpointError {
    CheckpointError(file: file, tensor: tensor, problem, remedy: remedy)
  }
}
