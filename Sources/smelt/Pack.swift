import ArgumentParser
import Checkpoints

struct Pack: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Pack a checkpoint, or a family of models, into a zstd bundle.",
    usage: """
      smelt pack IN OUT.safetensors.zst [--against BASE]
      smelt pack --base BASE NAME=PATH … OUT.safetensors.zst
      """,
    discussion: """
      A bundle is a seekable zstd file; what 'zstd -d' makes of it is a valid safetensors file. \
      Without --lossy nothing is lost: 'smelt unpack' gives every bit back.

      With --base, the bundle holds the base and all the models by their names, each as \
      differences from those before it where that is smaller. With --against, it holds only \
      differences from a model that stays outside, which unpacking then needs.
      """)

  @Argument(
    help: "The checkpoint to pack, or NAME=PATH for each model of a family; then the bundle.")
  var paths: [String]

  @Option(help: "The model that a family was fine-tuned from; it goes into the bundle.")
  var base: String?

  @Option(help: "A model that stays outside: the bundle holds differences from it.")
  var against: String?

  @Option(
    help: ArgumentHelp(
      "Store matrices of floating-point numbers inexactly: int8 (a scale a row), int4 (a scale "
        + "for 128) or sign1 (a sign and a scale). The error is recorded.",
      valueName: "int8|int4|sign1"),
    transform: lossyCoding(_:))
  var lossy: Bundle.Lossy?

  @OptionGroup var resources: Resources

  private var output: String { paths.last ?? "" }
  private var inputs: ArraySlice<String> { paths.dropLast() }

  func validate() throws {
    guard output.hasSuffix(".safetensors.zst") else {
      throw ValidationError("The bundle comes last and its name ends in .safetensors.zst.")
    }
    if base == nil && inputs.count != 1 {
      throw ValidationError("Without --base, one checkpoint is packed.")
    }
    if base != nil && (inputs.isEmpty || inputs.contains { NamedPath(argument: $0) == nil }) {
      throw ValidationError("With --base, give each model as NAME=PATH.")
    }
    if base != nil && against != nil {
      throw ValidationError("--base puts the base into the bundle, --against leaves it outside.")
    }
  }

  func run() throws {
    let models = self.models
    let read = models.map { $0.path } + (against.map { [$0] } ?? [])
    try refuse(writing: output, overInputs: read)
    let sources = try models.map { (name: $0.name, source: try open($0.path)) }
    let outside = try against.map { try open($0) }
    if base == nil {
      try Bundle.pack(
        sources[0].source, against: outside, to: output, lossy: lossy, workers: resources.jobs,
        memory: resources.memory.bytes)
    } else {
      try Bundle.pack(
        models: sources, to: output, lossy: lossy, workers: resources.jobs,
        memory: resources.memory.bytes)
    }
    try say(sources.map { $0.source })
  }

  /// What goes into the bundle; a checkpoint alone has no name.
  private var models: [(name: String, path: String)] {
    guard let base else { return [("", inputs[0])] }
    let experts = inputs.map { NamedPath(argument: $0)! }
    return [("base", base)] + experts.map { ($0.name, $0.path) }
  }

  private func open(_ path: String) throws -> any TensorSource {
    let source = try Checkpoint.open(path)
    source.warnings.forEach(note)
    return source
  }

  private func say(_ sources: [any TensorSource]) throws {
    let packed = try fileSize(output)
    let size = sources.reduce(0) { $0 + $1.manifest.byteCount }
    let share = decimal(100 * Double(packed) / Double(max(1, size)), 1)
    let many = sources.count == 1 ? "" : " in \(sources.count) models"
    print("\(output): \(ByteSize(bytes: packed)), \(share) % of \(ByteSize(bytes: size))\(many)")
  }
}

private func lossyCoding(_ text: String) throws -> Bundle.Lossy {
  guard let coding = Bundle.Lossy(rawValue: text) else {
    throw ValidationError("'\(text)' is not int8, int4 or sign1.")
  }
  return coding
}

struct Unpack: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Give back what a bundle holds, bit for bit.",
    discussion: """
      Every frame's and every tensor's checksum is compared on the way. Of a family, --model \
      gives one model; without it all come, as NAME/tensor.
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
    try Checkpoint.write(
      source, to: output, writing.options(sideFilesOf: nil), workers: resources.jobs)
    print("\(output): \(summary(of: source.manifest))")
  }

  private func source() throws -> any TensorSource {
    guard model != nil || against != nil else { return try Checkpoint.open(input) }
    let bundle = try BundleSource(input, base: against.map { try Checkpoint.open($0) })
    return try model.map { try bundle.model($0) } ?? bundle
  }
}
