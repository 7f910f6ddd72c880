/// The bundle: tensors compressed losslessly, one readable at a time, in a file that any zstd
/// decompresses to a valid safetensors file.
///
/// FORMAT.md beside this file says what is in it, so that another could write it.
public enum Bundle: CheckpointFormat {
  public static let name = "bundle"
  public static let fileExtensions = ["safetensors.zst"]

  /// The versions of the format that this code reads. It writes the first that will do.
  static let versions = 1...2

  /// How many tensors of a bundle may have to be decoded before another, each for the next: what
  /// reading one of them may cost more.
  static func largestDepth(inVersion version: Int) -> Int { version == 1 ? 1 : 3 }

  public static func recognises(_ beginning: [UInt8]) -> Bool {
    beginning.starts(with: [0x28, 0xB5, 0x2F, 0xFD])
  }

  /// The bundle and the model's name in `BUNDLE/NAME`; nil if the path is that of a file or folder.
  static func member(_ path: String) -> (bundle: String, model: String)? {
    let (folder, name) = split(path)
    guard folder.hasSuffix(".safetensors.zst"), !name.isEmpty, !isFolder(folder) else { return nil }
    return (folder, name)
  }

  /// The bundle and the base in `BUNDLE@BASE`, and the model's name too in `BUNDLE/NAME@BASE`; nil
  /// if the path is that of a file or folder.
  static func difference(_ path: String) -> (bundle: String, model: String?, base: String)? {
    guard let ending = path.firstRange(of: ".safetensors.zst") else { return nil }
    let bundle = String(path[..<ending.upperBound])
    let rest = path[ending.upperBound...]
    guard let sign = rest.firstIndex(of: "@"), !isFile(path), !isFolder(path), !isFolder(bundle)
    else { return nil }
    let (name, base) = (rest[..<sign], rest[rest.index(after: sign)...])
    guard !base.isEmpty, name.isEmpty || name.first == "/" && !name.dropFirst().contains("/") else {
      return nil
    }
    return (bundle, name.isEmpty ? nil : String(name.dropFirst()), String(base))
  }

  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    try BundleSource(path)
  }

  /// A bundle, or of one what `BUNDLE/NAME`, `BUNDLE@BASE` and `BUNDLE/NAME@BASE` name.
  /// - Parameter base: what it was packed against, if the path does not say so.
  public static func source(
    at path: String, against base: (any TensorSource)? = nil
  ) throws(CheckpointError) -> BundleSource {
    if let part = try part(path, against: base) { return part }
    return try BundleSource(path, base: base)
  }

  /// The same; nil if the path is that of a file or folder.
  static func part(
    _ path: String, against base: (any TensorSource)? = nil
  ) throws(CheckpointError) -> BundleSource? {
    if base == nil, let (bundle, model, base) = difference(path) {
      let source = try BundleSource(bundle, base: Checkpoint.open(base))
      guard let model else { return source }
      return try source.model(model)
    }
    guard let (bundle, model) = member(path) else { return nil }
    return try BundleSource(bundle, base: base).model(model)
  }

  public static func create(_ path: String, _ manifest: Manifest, _ options: WritingOptions)
    throws(CheckpointError) -> any TensorSink
  {
    try options.refuseSHA256(in: path, whichRecords: "XXH3")
    return try StagedSink(path, manifest, options)
  }

  @discardableResult
  public static func write(
    _ source: any TensorSource, to path: String, _ options: WritingOptions, workers: Int
  ) throws -> [String] {
    try options.refuseSHA256(in: path, whichRecords: "XXH3")
    try pack(
      source, to: path, workers: workers, memory: options.memory, synced: options.isSynced)
    return []
  }
}
