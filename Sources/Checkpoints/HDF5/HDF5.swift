/// The HDF5 format: a dataset for every tensor, laid out by libhdf5, its bytes read and written
/// by Smelt.
///
/// - A dataset is named like its tensor, `f["model.layers.0.mlp.up_proj.weight"]`; where HDF5
///   cannot hold the name, the attribute `safetensors_name` does.
/// - Types without a counterpart in HDF5 are bytes; the attributes `safetensors_dtype` and, where
///   it differs, `safetensors_shape` say of what. `dtype` is numpy's name of the type.
/// - The group `/__metadata__` has the metadata as attributes and the dataset `header`: the
///   safetensors header the tensors came with, so that the way back is byte-identical.
public enum HDF5: CheckpointFormat {
  public static let name = "HDF5"
  public static let fileExtensions = ["h5", "hdf5"]

  /// Where datasets go: side by side in the root group, or in groups split at the names' dots.
  public enum Layout: String, CaseIterable, Sendable { case flat, tree }

  public struct Options: Sendable {
    public var layout: Layout

    public init(layout: Layout = .flat) { self.layout = layout }
  }

  public static func recognises(_ beginning: [UInt8]) -> Bool {
    beginning.starts(with: [0x89, 0x48, 0x44, 0x46, 0x0D, 0x0A, 0x1A, 0x0A])
  }

  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    let file = try MappedFile(path)
    let contents = try Contents(proving: Inventory(reading: path), of: file)
    if let offsets = contents.offsets {
      return FlatSource(file, contents.manifest, offsets: offsets)
    }
    return try HDF5Source(path, contents)
  }

  public static func create(_ path: String, _ manifest: Manifest) throws(CheckpointError)
    -> any TensorSink
  {
    try create(path, manifest, Options())
  }

  public static func create(_ path: String, _ manifest: Manifest, _ options: Options)
    throws(CheckpointError) -> any TensorSink
  {
    let pending = try PendingFile(for: path)
    let offsets: [Int]
    do {
      offsets = try HDF5Library.withLock { () throws(HDF5Failure) in
        try layOut(manifest, options, at: pending.temporaryPath)
      }
    } catch { throw error.error(file: path) }
    do {
      let file = try pending.open()
      try file.preallocate(file.size())
    } catch { throw CheckpointError(file: path, error.problem, remedy: error.remedy) }
    return try FlatSink(pending, manifest, offsets: offsets)
  }

  /// Makes a file that lacks only the tensors' bytes.
  /// - Returns: where in the file the bytes of each tensor belong.
  private static func layOut(_ manifest: Manifest, _ options: Options, at path: String)
    throws(HDF5Failure) -> [Int]
  {
    var writer = try HDF5Writer(path)
    try writer.writeMetadata(of: manifest)
    let places = paths(for: manifest.tensors.map { $0.name }, layout: options.layout)
    var offsets: [Int] = []
    for (tensor, place) in zip(manifest.tensors, places) {
      do { offsets.append(try writer.add(tensor, at: place)) } catch {
        throw error.of(tensor.name)
      }
    }
    try writer.close()
    return offsets
  }
}
