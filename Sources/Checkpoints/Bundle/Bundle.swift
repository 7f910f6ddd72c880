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

  /// The bundle and the base in `BUNDLE@BASE`; nil if the path is that of a file or folder.
  static func difference(_ path: String) -> (bundle: String, base: String)? {
    guard let sign = path.firstRange(of: ".safetensors.zst@") else { return nil }
    let end = path.index(before: sign.upperBound)
    let base = path[sign.upperBound...]
    guard !base.isEmpty, !isFile(path), !isFolder(path) else { return nil }
    return (String(path[..<end]), String(base))
  }

  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    try BundleSource(path)
  }

  public static func create(_ path: String, _ manifest: Manifest, _ options: WritingOptions)
    throws(CheckpointError) -> any TensorSink
  {
    try options.refuseSHA256(in: path, whichRecords: "XXH3")
    return try StagedSink(path, manifest, synced: options.isSynced)
  }

  @discardableResult
  public static func write(
    _ source: any TensorSource, to path: String, _ options: WritingOptions, workers: Int
  ) throws -> [String] {
    try options.refuseSHA256(in: path, whichRecords: "XXH3")
    try pack(source, to: path, workers: workers, synced: options.isSynced)
    return []
  }
}
