import ArgumentParser
import Checkpoints

struct Convert: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Rewrite a checkpoint in another format, bit for bit.",
    discussion: """
      safetensors → HDF5 → safetensors gives back the identical file: the HDF5 file keeps the \
      original header.
      """)

  @Argument(help: "The checkpoint to read.", completion: .file())
  var input: String

  @Argument(help: "The file to write; its ending names the format: \(Endings.all).")
  var output: String

  @Option(
    help: ArgumentHelp(
      "Compress an HDF5 output: zstd or deflate, or either with a level.",
      discussion: "Python reads zstd with hdf5plugin, deflate as it is.",
      valueName: "method[:level]"),
    transform: compression(_:))
  var compress: HDF5.Compression?

  @Option(
    help: ArgumentHelp(
      "Put an HDF5 output's datasets side by side (flat) or in groups, split at dots (tree).",
      valueName: "flat|tree"),
    transform: layout(_:))
  var layout: HDF5.Layout?

  @OptionGroup var resources: Resources

  func validate() throws {
    guard compress != nil || layout != nil else { return }
    guard HDF5.fileExtensions.contains(where: { output.lowercased().hasSuffix("." + $0) }) else {
      throw ValidationError("--compress and --layout are for HDF5 outputs (.h5, .hdf5).")
    }
  }

  func run() throws {
    let source = try Checkpoint.open(input)
    source.warnings.forEach(note)
    try refuse(writing: output, overInputs: [input])
    if compress != nil || layout != nil {
      let options = HDF5.Options(layout: layout ?? .flat, compression: compress)
      try HDF5.write(source, to: output, options, workers: resources.jobs)
    } else {
      try Checkpoint.write(source, to: output, workers: resources.jobs)
    }
    print("\(output): \(summary(of: source.manifest))")
  }
}

/// What a checkpoint holds, in a few words.
func summary(of manifest: Manifest) -> String {
  "\(manifest.tensors.count) tensors, \(ByteSize(bytes: manifest.byteCount))"
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
