import ArgumentParser
import Checkpoints

struct Pack: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Pack a checkpoint into a zstd bundle, without loss.",
    discussion: """
      A bundle is a seekable zstd file; what 'zstd -d' makes of it is a valid safetensors file.
      """)

  @Argument(help: "The checkpoint to pack.", completion: .file())
  var input: String

  @Argument(help: "The bundle to write: NAME.safetensors.zst.")
  var output: String

  @OptionGroup var resources: Resources

  func validate() throws {
    guard output.hasSuffix(".safetensors.zst") else {
      throw ValidationError("A bundle's name ends in .safetensors.zst.")
    }
  }

  func run() throws {
    let source = try Checkpoint.open(input)
    source.warnings.forEach(note)
    try refuse(writing: output, overInputs: [input])
    try Checkpoint.write(source, to: output, workers: resources.jobs)
    let packed = try fileSize(output)
    print(
      "\(output): \(ByteSize(bytes: packed)), \(decimal(100 * Double(packed) / Double(max(1, source.manifest.byteCount)), 1)) % of \(ByteSize(bytes: source.manifest.byteCount))"
    )
  }
}

struct Unpack: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Give back what a bundle holds, bit for bit.")

  @Argument(help: "The bundle to unpack.", completion: .file())
  var input: String

  @Option(
    name: .shortAndLong, help: "The file to write; its ending names the format: \(Endings.all).")
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
