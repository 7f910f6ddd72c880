import ArgumentParser
import Checkpoints

/// How commands write a checkpoint, beside the format that the output's ending names.
struct OutputArguments: ParsableArguments {
  @Option(
    help: ArgumentHelp(
      "Compress: zstd or deflate, or either with a level (HDF5); deflate (npz).",
      discussion: "Python reads HDF5 with zstd by means of hdf5plugin, deflate as it is.",
      valueName: "method[:level]"),
    transform: compression(_:))
  var compress: HDF5.Compression?

  @Option(
    help: ArgumentHelp(
      "Put an HDF5 output's datasets side by side (flat) or in groups, split at dots (tree).",
      valueName: "flat|tree"),
    transform: layout(_:))
  var layout: HDF5.Layout?

  @Option(
    help: ArgumentHelp(
      "Write a model's folder whose files have at most this many bytes of tensors.",
      discussion: "Without it, an output that ends in / is a folder with files of up to 5GB."))
  var maxShardSize: ByteSize?

  @Flag(help: "Replace an output folder, with all that is in it.")
  var force = false

  @Flag(help: "Record sha256 checksums instead of the fast ones.")
  var sha256 = false

  @OptionGroup var durability: Durability

  func validate() throws {
    if let maxShardSize, maxShardSize.bytes == 0 {
      throw ValidationError("--max-shard-size must be at least 1.")
    }
  }

  /// Checks that the options suit the output. (The output is an argument of the command.)
  func validate(for output: String) throws {
    func ends(_ endings: [String]) -> Bool {
      endings.contains { output.lowercased().hasSuffix("." + $0) }
    }
    if maxShardSize == nil { try refuseUnknownEnding(of: output) }
    let isNumPy = ends(NumPy.fileExtensions)
    if layout != nil && !ends(HDF5.fileExtensions) {
      throw ValidationError("--layout is for HDF5 outputs (.h5, .hdf5).")
    }
    if let compress, !ends(HDF5.fileExtensions), !(isNumPy && compress.isDeflate) {
      throw ValidationError(
        isNumPy
          ? "An npz output is compressed by deflate alone."
          : "--compress is for HDF5 outputs (.h5, .hdf5), or npz with deflate.")
    }
    if sha256 && (isNumPy || ends(Bundle.fileExtensions)) {
      throw ValidationError("--sha256 is for safetensors and HDF5; npz and bundles have their own.")
    }
    if maxShardSize != nil && Checkpoint.formats.contains(where: { ends($0.fileExtensions) }) {
      throw ValidationError(
        "--max-shard-size writes a model's folder: give the output no file's ending.")
    }
  }

  /// The output's path, with a slash at its end if it is to be a folder.
  func path(_ output: String) -> String {
    maxShardSize != nil && !output.hasSuffix("/") ? output + "/" : output
  }

  /// - Parameter original: the model whose side files a folder gets.
  func options(sideFilesOf original: String?, _ resources: Resources) -> WritingOptions {
    var options = resources.options
    (options.layout, options.compression) = (layout ?? .flat, compress)
    options.checksums = sha256 ? .sha256 : nil
    options.shardSize = maxShardSize?.bytes ?? ModelFolder.defaultShardSize
    options.sideFilesOf = original
    options.isReplacing = force
    options.isSynced = durability.isSynced
    return options
  }
}

/// - Throws: that the usage is wrong, if the name of an output says no format that can be written.
func refuseUnknownEnding(of output: String) throws {
  let endings = Checkpoint.formats.flatMap { $0.fileExtensions }
  let names = endings.contains { output.lowercased().hasSuffix("." + $0) }
  guard !names, !output.hasSuffix("/") else { return }
  throw ValidationError(
    "The output's ending names no format: '\(output)'. End it in one of \(Endings.all), or in / for a model's folder."
  )
}

/// Whether an output has to be on the disk before the command ends.
struct Durability: ParsableArguments {
  @Flag(
    help: ArgumentHelp(
      "Leave it to the system when the output goes to the disk, as cp does.",
      discussion: "Faster; but if the machine stops soon after, the output may lack parts."))
  var noSync = false

  var isSynced: Bool { !noSync }
}

private func compression(_ text: String) throws -> HDF5.Compression {
  guard let compression = HDF5.Compression(text) else {
    throw ValidationError("'\(text)' is not zstd, zstd:1 to 22, deflate or deflate:1 to 9.")
  }
  return compression
}

private func layout(_ text: String) throws -> HDF5.Layout {
  guard let layout = HDF5.Layout(rawValue: text) else {
    throw ValidationError("'\(text)' is not flat or tree.")
  }
  return layout
}

extension HDF5.Compression {
  fileprivate var isDeflate: Bool { if case .deflate = self { true } else { false } }
}
