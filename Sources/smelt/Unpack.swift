import ArgumentParser
import Checkpoints

struct Unpack: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Give back what a bundle holds, bit for bit.",
    discussion: """
      Every frame's and every tensor's checksum is compared on the way. Of a family, --model \
      (or BUNDLE/NAME) gives one model; without it all come, as NAME/tensor. A bundle of differences \
      needs its base: --against, or BUNDLE@BASE as every other command takes it.
      """)

  @Argument(help: "The bundle to unpack.", completion: .file())
  var input: String

  @Option(
    name: .shortAndLong,
    help: "What to write; its ending names the format: \(Endings.all), or / for a model's folder.")
  var output: String

  @Option(help: "Only this model of a family.")
  var model: String?

  @Option(
    help: ArgumentHelp(
      "Only tensors whose names match; * stands for any text. May be given again.",
      valueName: "pattern"))
  var tensors: [String] = []

  @Option(help: "The base that the bundle holds differences from.")
  var against: String?

  @OptionGroup var writing: OutputArguments
  @OptionGroup var resources: Resources

  func validate() throws { try writing.validate(for: output) }

  func run() throws {
    let output = writing.path(output)
    try refuse(writing: output, overInputs: [input] + (against.map { [$0] } ?? []))
    var source = try self.source()
    if !tensors.isEmpty {
      let patterns = tensors.map { NamePattern($0) }
      source = source.selecting { tensor in patterns.contains { $0.matches(tensor.name) } }
      guard !source.manifest.tensors.isEmpty else {
        throw CheckpointError(
          file: input, "has no tensor that --tensors names",
          remedy: "list its names with 'smelt inspect'")
      }
    }
    try source.proveBase(workers: resources.jobs)
    let affordable = max(1, min(resources.jobs, resources.memory.bytes / source.memoryPerWorker))
    try Checkpoint.write(
      source, to: output, writing.options(sideFilesOf: nil, resources), workers: affordable
    ).forEach(note)
    print("\(output): \(summary(of: source.manifest))")
  }

  private func source() throws -> BundleSource {
    let bundle = try Bundle.source(at: input, against: against.map { try Checkpoint.open($0) })
    return try model.map { try bundle.model($0) } ?? bundle
  }
}
