import ArgumentParser
import Checkpoints
import Foundation

struct Convert: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Rewrite a checkpoint in another format, bit for bit.",
    discussion: """
      The input is a file, a model's folder or the index of its shards. safetensors → HDF5 → \
      safetensors gives back the identical file: the HDF5 file keeps the original header.

      Only --dtype changes values: floating-point tensors of 16 bits and more are rounded to \
      nearest even; integers, booleans and smaller floats stay as they are.
      """)

  @Argument(help: "The checkpoint to read.", completion: .file())
  var input: String

  @Argument(
    help: "What to write; its ending names the format: \(Endings.all), or / for a model's folder.")
  var output: String

  @Option(help: "Round floating-point tensors to F32, F16 or BF16.")
  var dtype: TargetType?

  @Flag(help: "Let numbers too large for --dtype become infinite.")
  var allowOverflow = false

  @Option(
    help: ArgumentHelp(
      "Keep only tensors whose names match; * stands for any text. May be given again.",
      valueName: "pattern"))
  var include: [String] = []

  @Option(
    help: ArgumentHelp(
      "Leave out tensors whose names match. May be given again.", valueName: "pattern"))
  var exclude: [String] = []

  @Option(
    help: ArgumentHelp(
      "Replace what a regular expression matches in names; $1 is its first group. May be given again.",
      valueName: "from=to"))
  var rename: [String] = []

  @OptionGroup var writing: OutputArguments
  @OptionGroup var resources: Resources

  func validate() throws {
    try writing.validate(for: output)
    _ = try renamings()
    if allowOverflow && dtype == nil {
      throw ValidationError("--allow-overflow goes with --dtype.")
    }
  }

  func run() throws {
    let source = try Checkpoint.open(input)
    source.warnings.forEach(note)
    noteLoss(of: source)
    let view = try self.view(of: source)
    let output = writing.path(output)
    if let family = (source as? BundleSource)?.family,
      !(view is BundleSource && output.hasSuffix(".zst"))
    {
      note(
        "the \(family.count) models of \(input) become one checkpoint, its tensors named MODEL/TENSOR; \(input)/\(family[0].name) is one model alone"
      )
    }
    try refuse(writing: output, overInputs: [input])
    var options = writing.options(sideFilesOf: input, resources)
    if output.hasSuffix("/") {
      try ModelFolder.sideFileWarnings(of: input).forEach(note)
      options.files = try configuration()
    }
    try Checkpoint.write(view, to: output, options, workers: resources.jobs).forEach(note)
    print("\(output): \(summary(of: view.manifest))")
  }

  /// The input's configuration with the weights' new type, if there is either.
  private func configuration() throws -> [String: [UInt8]] {
    let input = URL(filePath: input)
    let folder = isFolder(input.path) ? input : input.deletingLastPathComponent()
    let path = folder.appending(path: "config.json").path
    guard let dtype, FileManager.default.fileExists(atPath: path) else { return [:] }
    return ["config.json": Array(try readText(path).withConfiguredType(dtype.dtype).utf8)]
  }

  /// The source as the options want to see it.
  private func view(of source: any TensorSource) throws -> any TensorSource {
    var view = source
    if !include.isEmpty || !exclude.isEmpty {
      let (kept, left) = (include.map { NamePattern($0) }, exclude.map { NamePattern($0) })
      view = view.selecting { tensor in
        (kept.isEmpty || kept.contains { $0.matches(tensor.name) })
          && !left.contains { $0.matches(tensor.name) }
      }
      guard !view.manifest.tensors.isEmpty || source.manifest.tensors.isEmpty else {
        throw CheckpointError(
          file: input, "has no tensor that --include and --exclude leave",
          remedy: "list its names with 'smelt inspect'")
      }
    }
    for renaming in try renamings() { view = try view.renaming { renaming($0) } }
    if let dtype { view = try view.casting(to: dtype.dtype, allowsOverflow: allowOverflow) }
    return view
  }

  private func renamings() throws -> [Renaming] {
    try rename.map { text in
      guard let sign = text.firstIndex(of: "=") else {
        throw ValidationError("--rename '\(text)' is not of the form FROM=TO.")
      }
      do {
        return try Renaming(
          String(text[..<sign]), to: String(text[text.index(after: sign)...]))
      } catch {
        throw ValidationError("--rename: '\(text[..<sign])' is not a regular expression: \(error)")
      }
    }
  }
}

/// The types that `--dtype` rounds to.
enum TargetType: String, ExpressibleByArgument, CaseIterable {
  case f32 = "F32"
  case f16 = "F16"
  case bf16 = "BF16"

  init?(argument: String) { self.init(rawValue: argument.uppercased()) }

  var dtype: DType {
    switch self {
    case .f32: .f32
    case .f16: .f16
    case .bf16: .bf16
    }
  }
}

/// What a checkpoint holds, in a few words.
func summary(of manifest: Manifest) -> String {
  "\(manifest.tensors.count) tensors, \(ByteSize(bytes: manifest.byteCount))"
}
