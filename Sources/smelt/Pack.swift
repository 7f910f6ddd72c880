import ArgumentParser
import Checkpoints
import Merging

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
      differences from those before it where that is smaller; OUT.safetensors.zst/NAME is then \
      one of them wherever a checkpoint is read. A bundle of a family is packed as a family again. \
      With --against, it holds only differences from a model that stays outside, which reading it \
      then needs: OUT.safetensors.zst@BASE is the model wherever a checkpoint is read.
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
        + "for 128), sign1 (a sign and a scale) or lowrank:RANK (the product of two thin matrices "
        + "of singular vectors). Each tensor's error is recorded.",
      valueName: "int8|int4|sign1|lowrank:RANK"),
    transform: Bundle.Lossy.init(argument:))
  var lossy: Bundle.Lossy?

  @OptionGroup var durability: Durability
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
        memory: resources.memory.bytes, synced: durability.isSynced)
    } else {
      try Bundle.pack(
        models: sources, to: output, lossy: lossy, workers: resources.jobs,
        memory: resources.memory.bytes, synced: durability.isSynced)
    }
    try say(sources.map { $0.source })
    if lossy != nil { try sayLoss() }
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
    noteLoss(of: source)
    return source
  }

  private func say(_ sources: [any TensorSource]) throws {
    let packed = try fileSize(output)
    // A safetensors file comes back with its header.
    let sources = sources.flatMap { source in
      (source as? BundleSource)?.family?.map { $0.source as any TensorSource } ?? [source]
    }
    let size = sources.reduce(0) {
      $0 + $1.manifest.byteCount + ($1.manifest.safetensorsHeader.map { 8 + $0.count } ?? 0)
    }
    let share = decimal(100 * Double(packed) / Double(max(1, size)), 1)
    let many = sources.count == 1 ? "" : " in \(sources.count) models"
    print("\(output): \(ByteSize(bytes: packed)), \(share) % of \(ByteSize(bytes: size))\(many)")
  }
}

// MARK: - Loss

extension Pack {
  /// Says what became of the wish to store tensors inexactly.
  private func sayLoss() throws {
    let bundle = try Bundle.source(at: output, against: against.map { try Checkpoint.open($0) })
    let tensors = bundle.manifest.tensors
    let errors = tensors.compactMap { bundle.error(of: $0) }
    guard let largest = errors.max() else {
      return note(
        "no tensor could be stored so: all are exact; --lossy is for floating-point matrices, and lowrank for ranks at which the thin matrices take less"
      )
    }
    print(
      "\(errors.count) of \(tensors.count) tensors are inexact, by at most \(decimal(largest, 5)) of their norm"
    )
  }
}

/// Says that a bundle's tensors are not what was packed, where what is written from them cannot.
func noteLoss(of source: any TensorSource) {
  guard let bundle = source as? BundleSource else { return }
  let errors = source.manifest.tensors.compactMap { bundle.error(of: $0) }
  guard let largest = errors.max() else { return }
  note(
    "\(source.path) holds \(errors.count) tensors that were packed inexactly, by at most \(decimal(largest, 5)) of their norm; what is written has these values and does not say so"
  )
}

extension Bundle.Lossy {
  /// As `--lossy` has it.
  fileprivate init(argument: String) throws {
    switch argument.split(separator: ":", omittingEmptySubsequences: false) {
    case ["int8"]: self = .int8
    case ["int4"]: self = .int4
    case ["sign1"]: self = .sign1
    case let words where words.count == 2 && words[0] == "lowrank" && Int(words[1]) ?? 0 > 0:
      self = .lowRank(Int(words[1])!, by: .singularValues)
    default: throw ValidationError("'\(argument)' is not int8, int4, sign1 or lowrank:RANK.")
    }
  }
}

extension Bundle.Factorisation {
  /// The nearest product of its rank.
  fileprivate static let singularValues = Self { rows, columns in
    // The matrix, LAPACK's copy, the vectors on both sides, its scratch memory and the factors.
    let side = min(rows, columns)
    return 4 * (5 * rows * columns + 8 * side * side)
  } factors: { elements, columns, rank in
    let matrix = Matrix(
      rowCount: elements.count / columns, columnCount: columns, elements: elements)
    return LowRank(matrix, rank: rank).map { ($0.left.elements, $0.right.elements) }
  }
}
