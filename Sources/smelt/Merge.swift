import ArgumentParser
import Checkpoints
import Foundation
import Merging
import Synchronization

struct Merge: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Merge models as a recipe says: mergekit's YAML, or the same as JSON.",
    discussion: """
      The output is a model's folder, or a single file if its name ends in one of \
      \(Endings.all). 'smelt methods' lists the merge methods. The result is the same, bit for \
      bit, for every --jobs and --memory.
      """)

  @Argument(help: "The recipe.", completion: .file())
  var recipe: String

  @Argument(help: "The folder or file to write.")
  var output: String

  @Flag(help: "Print what would be done and stop.")
  var dryRun = false

  @Flag(help: "With --dry-run, list every tensor, however many there are.")
  var verbose = false

  @Flag(help: "Replace the output folder if it is there, with all its files.")
  var force = false

  @Flag(help: "Go on with a killed merge into this folder or .safetensors file.")
  var resume = false

  @Flag(help: "Make a NaN or an infinity in the result an error.")
  var strict = false

  @Flag(help: "Print no progress and no summary.")
  var quiet = false

  @Flag(
    help: ArgumentHelp(
      "Leave in the page cache what is read of inputs that were not in it.",
      discussion: "Without it the cache is dropped behind, which is faster."))
  var keepCache = false

  @Option(help: "Seed of the methods that choose at random.")
  var seed: UInt64 = 0

  @Option(help: "Where random choices come from: smelt, or mergekit for its own masks.")
  var rng = RandomSource.smelt

  @Option(
    name: [.long, .customLong("shard-size")],
    help: "The most bytes of tensors that one file of an output folder has.")
  var maxShardSize = ByteSize(bytes: ModelFolder.defaultShardSize)

  @OptionGroup var resources: Resources

  enum RandomSource: String, ExpressibleByArgument, CaseIterable { case smelt, mergekit }

  func validate() throws {
    guard maxShardSize.bytes > 0 else {
      throw ValidationError("--max-shard-size must be at least 1.")
    }
  }

  func run() throws {
    let text = try readText(recipe)
    let parsed = try Recipe(parsing: text, file: recipe)
    let models = try parsed.models.map { try Checkpoint.open($0) }
    let plan = try MergePlan(
      parsed, models: models, seed: seed, imitatingDrawsOfMergekit: rng == .mergekit)
    try plan.check(memory: resources.memory.bytes, workers: resources.jobs)
    for source in models { source.warnings.forEach(note) }
    plan.notes.forEach(note)
    let cost = plan.cost(memory: resources.memory.bytes, workers: resources.jobs)
    let sideFiles = try sideFiles(plan, recipeText: text)
    if dryRun { return describe(plan, cost) }
    try refuseFullDisk(cost)
    try refuse(
      writing: output, overInputs: parsed.models + parsed.tokenizerPaths + [recipe], isMerge: true)
    if resume, !isResumable {
      throw CheckpointError(
        file: output, "cannot be resumed: only folders and .safetensors files can",
        remedy: "merge without --resume")
    }
    let interrupted = try Interrupted(output, identity: identity(text, parsed))
    let pieces = try interrupted.pieces(of: plan, isResuming: resume)
    let sink = try makeSink(plan, sideFiles, recipeText: text)
    let journal = try interrupted.begin()
    // Whatever ends here has removed its unfinished files; only a kill leaves something behind.
    defer { interrupted.end() }
    var finished: Set<Chunk> = []
    if !pieces.isEmpty {
      let salvaged = try plan.salvage(
        pieces, from: interrupted.leftovers(), into: sink, journal: journal)
      finished = salvaged.chunks
      note("took over \(ByteSize(bytes: salvaged.bytes)) that the interrupted merge had finished")
    }
    // Also of a merge that was killed before it had finished a piece.
    if resume { interrupted.removeLeftovers() }
    try merge(plan, into: sink, journal: journal, finished: finished)
  }

  /// All that the result's bytes depend on.
  private func identity(_ recipeText: String, _ recipe: Recipe) throws -> String {
    var parts = [
      recipeText, "\(seed)", rng.rawValue, "\(maxShardSize.bytes)", Smelt.configuration.version,
    ]
    for model in recipe.models + recipe.tokenizerPaths { parts += [model] + fileStates(model) }
    let bytes = Array(parts.joined(separator: "\0").utf8)
    return String(xxh3(bytes.span.bytes), radix: 16)
  }

  private func merge(
    _ plan: MergePlan, into sink: any TensorSink, journal: MergeJournal, finished: Set<Chunk>
  ) throws {
    let cost = plan.cost(
      memory: resources.memory.bytes, workers: resources.jobs, finished: finished)
    let progress = Progress(total: cost.bytesRead + cost.bytesWritten, isQuiet: quiet)
    defer { progress.finish() }
    let notFinite = Mutex<[String: Int]>([:])
    let cleaning = try plan.run(
      into: sink, memory: resources.memory.bytes, workers: resources.jobs, journal: journal,
      finished: finished, keepsCache: keepCache
    ) { chunk in
      progress.advance(chunk.bytesRead + chunk.bytesWritten, chunk.tensor.name)
      if chunk.notFinite > 0 {
        notFinite.withLock { $0[chunk.tensor.name, default: 0] += chunk.notFinite }
      }
    } didObserve: { tensor, bytes in
      progress.advance(bytes, tensor.name)
    }
    progress.finish()
    let damaged = notFinite.withLock { $0 }.sorted { $0.key < $1.key }
    for (tensor, count) in damaged {
      note("tensor \(quoted(tensor)) has \(count) elements that are NaN or infinite")
    }
    guard !strict || damaged.isEmpty else {
      throw MergeError(
        "\(damaged.count) tensors have elements that are NaN or infinite",
        remedy: "look for them in the inputs, or leave out --strict")
    }
    try sink.finish()
    sink.warnings.forEach(note)
    cleaning?.warnings.forEach(note)
    guard !quiet else { return }
    if let cleaning {
      let whole = cleaning.whole
      print(
        "mean |cos| of the task vectors: \(decimal(whole.before.meanAbsoluteCosine)) before cleaning, \(decimal(whole.after.meanAbsoluteCosine)) after"
      )
    }
    let seconds = progress.seconds
    let bytes = Double(cost.bytesMerged + cost.bytesWritten)
    let rate = ByteSize(bytes: Int(bytes / max(seconds, 1e-3)))
    print(
      "\(output): \(summary(of: plan.manifest)) in \(decimal(seconds, 1)) s, \(rate)/s read and written, peak memory \(peakMemory)"
    )
  }

  // MARK: The plan

  /// A table of more tensors than this hides the rest of the plan.
  private static let shortTable = 20

  private func describe(_ plan: MergePlan, _ cost: MergePlan.Cost) {
    if verbose || plan.tasks.count <= Merge.shortTable { printTensors(of: plan) }
    print("\(plan.recipe.method.name): \(plan.recipe.method.formula)")
    if let cleaning = plan.cleaning { print(cleaning.explanation) }
    for model in plan.sources { print("reads \(model.path): \(summary(of: model.manifest))") }
    print("makes \(output): \(summary(of: plan.manifest))")
    for (explanation, count) in plan.waysOfMaking {
      print("  \(count) of the tensors: \(explanation)")
    }
    print(
      "reads \(ByteSize(bytes: cost.bytesRead)) in up to \(cost.passes) passes\(cost.tensorsReadAgain > 0 ? ", \(cost.tensorsReadAgain) tensors from disk in each" : cost.cleaning.groupsReadTwice > 0 ? "" : ", each byte once from disk"), writes \(ByteSize(bytes: cost.bytesWritten))"
    )
    print(
      "takes up to \(ByteSize(bytes: cost.memory)) of memory for tiles, \(resources.jobs) workers; the budget is \(resources.memory)"
    )
    if let sentence = cost.cleaning.sentence { print(sentence) }
    if let free = freeSpace(for: output) {
      print(
        "needs \(ByteSize(bytes: cost.bytesWritten)) of disk; \(ByteSize(bytes: free)) are free")
    }
    print(
      isResumable
        ? "if it is killed, --resume goes on with it"
        : "if it is killed, it begins anew: only folders and .safetensors files can be resumed")
  }

  private func printTensors(of plan: MergePlan) {
    let rows = plan.tasks.map {
      [
        $0.output.dtype.rawValue, $0.output.shapeDescription,
        ByteSize(bytes: $0.output.byteCount).description, $0.explanation,
        quoted($0.output.name),
      ]
    }
    print(
      Table(columns: ["type", "shape", "size", "made by", "tensor"], rows: rows, rightAligned: [2]))
  }

  private func refuseFullDisk(_ cost: MergePlan.Cost) throws {
    guard let free = freeSpace(for: output), free < cost.bytesWritten else { return }
    throw CheckpointError(
      file: output,
      "needs \(ByteSize(bytes: cost.bytesWritten)) of disk and \(ByteSize(bytes: free)) are free",
      remedy: "free some space or write to another disk")
  }

  // MARK: The output

  private var isFile: Bool {
    Checkpoint.formats.contains { format in
      format.fileExtensions.contains { output.lowercased().hasSuffix("." + $0) }
    }
  }

  private var isResumable: Bool {
    !isFile || Safetensors.fileExtensions.contains { output.lowercased().hasSuffix("." + $0) }
  }

  /// What a folder gets beside the weights; nothing if the output is a file.
  private func sideFiles(_ plan: MergePlan, recipeText: String) throws -> OutputFolder.Files {
    guard isFile else { return try OutputFolder(plan: plan, recipe: recipeText).files() }
    if plan.recipe.tokenizer != nil || plan.recipe.chatTemplate != nil {
      note("\(output) is a file of tensors: the recipe's tokenizer and chat_template are left out")
    }
    return OutputFolder.Files()
  }

  private func makeSink(_ plan: MergePlan, _ files: OutputFolder.Files, recipeText: String) throws
    -> any TensorSink
  {
    guard !isFile else {
      // A file alone says where it comes from in its metadata.
      let metadata = plan.manifest.metadata.merging(["recipe": recipeText]) { own, _ in own }
      return try Checkpoint.create(
        output, Manifest(plan.manifest.tensors, metadata: metadata), resources.options)
    }
    return try ModelFolder.create(
      output, plan.manifest, shardSize: maxShardSize.bytes, sideFilesOf: files.original,
      files: files.contents, replacing: force)
  }
}

extension MergePlan {
  /// How many tensors are made in which way, in the order of their first tensors.
  fileprivate var waysOfMaking: [(explanation: String, count: Int)] {
    var counts: [String: Int] = [:]
    var order: [String] = []
    for task in tasks {
      if counts.updateValue(counts[task.explanation, default: 0] + 1, forKey: task.explanation)
        == nil
      {
        order.append(task.explanation)
      }
    }
    return order.map { ($0, counts[$0]!) }
  }
}

extension Recipe {
  /// The folder whose tokenizer the output gets, if it is named by its path.
  fileprivate var tokenizerPaths: [String] {
    if case .model(let path)? = tokenizer { [path] } else { [] }
  }
}

/// A whole text file; recipes and configurations are small.
func readText(_ path: String) throws -> String {
  let file = try File(reading: path)
  let size = try file.size()
  guard size <= 1 << 26 else {
    throw CheckpointError(file: path, "has \(size) bytes, too many for a text of this kind")
  }
  guard let text = String(validating: try file.bytes(at: 0, count: size), as: UTF8.self) else {
    throw CheckpointError(file: path, "is not UTF-8 text")
  }
  return text
}
