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

  @OptionGroup var resources: Resources

  func run() throws {
    let source = try Checkpoint.open(input)
    source.warnings.forEach(note)
    try refuse(writing: output, overInputs: [input])
    try Checkpoint.write(source, to: output, workers: resources.jobs)
    print("\(output): \(summary(of: source.manifest))")
  }
}

/// What a checkpoint holds, in a few words.
func summary(of manifest: Manifest) -> String {
  "\(manifest.tensors.count) tensors, \(ByteSize(bytes: manifest.byteCount))"
}
