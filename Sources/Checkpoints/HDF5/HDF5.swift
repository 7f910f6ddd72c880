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

  public static func recognises(_ beginning: [UInt8]) -> Bool {
    beginning.starts(with: [0x89, 0x48, 0x44, 0x46, 0x0D, 0x0A, 0x1A, 0x0A])
  }

  /// Whether HDF5 begins behind something else: at byte 512 or a doubling of it.
  static func hasUserBlock(_ path: String) throws(CheckpointError) -> Bool {
    let file = try File(reading: path)
    let size = try file.size()
    var offset = 512
    while offset <= min(size - 8, 1 << 20) {
      if recognises(try file.bytes(at: offset, count: 8)) { return true }
      offset *= 2
    }
    return false
  }

  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    let before = try FileStamp(File(reading: path))
    let source = try source(inventory(path), path)
    // The library read it under its own handle.
    try File(reading: path).checkUnchanged(since: before)
    return source
  }

  /// Opens a file that this process has just written: it will not crash the library.
  static func openOwn(_ path: String) throws(CheckpointError) -> any TensorSource {
    try source(Inventory(reading: path), path)
  }

  /// The tensors that an inventory names, once it has been proven right.
  static func source(_ inventory: Inventory, _ path: String) throws(CheckpointError)
    -> any TensorSource
  {
    let file = try MappedFile(path)
    let contents = try Contents(proving: inventory, of: file)
    if let offsets = contents.offsets {
      return FlatSource(
        file, contents.manifest, offsets: offsets, checksums: contents.checksums,
        hasForeignChecksums: contents.hasForeignChecksums, warnings: contents.warnings)
    }
    return try HDF5Source(path, contents)
  }

  public static func create(_ path: String, _ manifest: Manifest, _ options: WritingOptions)
    throws(CheckpointError) -> any TensorSink
  {
    let pending = try PendingFile(for: path, synced: options.isSynced)
    let paths = paths(for: manifest.tensors.map { $0.name }, layout: options.layout)
    do {
      let (offsets, rows) = try layOut(manifest, at: paths, in: pending, options)
      if let compression = options.compression {
        return try HDF5ChunkedSink(pending, manifest, compression, paths, offsets: offsets, rows)
      }
      let file = try pending.open()
      try file.preallocate(file.size())
      return try FlatSink(
        pending, manifest, offsets: offsets.map { $0! }, checksums: options.checksums ?? .xxh3,
        open: { (path) throws(CheckpointError) in try openOwn(path) }
      ) { (file, checksums) throws(CheckpointError) in
        try rows?.write(checksums, of: manifest, to: file)
      }
    } catch {
      throw CheckpointError(
        file: path, tensor: error.tensor, error.problem, remedy: error.remedy)
    }
  }

  /// Makes a file that lacks only the tensors' bytes.
  /// - Returns: where in the file the bytes of each tensor belong, nil for those in chunks;
  ///   and where the checksums do.
  private static func layOut(
    _ manifest: Manifest, at paths: [String], in pending: PendingFile, _ options: WritingOptions
  ) throws(CheckpointError) -> ([Int?], ChecksumRows?) {
    do throws(HDF5Failure) {
      return try HDF5Library.withLock { () throws(HDF5Failure) in
        var writer = try HDF5Writer(pending.temporaryPath)
        let rows = try writer.writeMetadata(of: manifest, options.checksums ?? .xxh3)
        var offsets: [Int?] = []
        for (tensor, path) in zip(manifest.tensors, paths) {
          do throws(HDF5Failure) {
            offsets.append(try writer.add(tensor, at: path, options.compression))
          } catch { throw error.of(tensor.name) }
        }
        try writer.close()
        return (offsets, rows)
      }
    } catch { throw error.error(file: pending.destination) }
  }
}
