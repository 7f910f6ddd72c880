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

  @Flag(help: "Replace the output folder if it is there, with all its files.")
  var force = false

  @Flag(help: "Go on with a merge into this output that was killed.")
  var resume = false

  @Flag(help: "Make a NaN or an infinity in the result an error.")
  var strict = false

  @Flag(help: "Print no progress and no summary.")
  var quiet = false

  @Option(help: "Seed of the methods that choose at random.")
  var seed: UInt64 = 0

  @Option(help: "Where random choices come from: smelt, or mergekit for its own masks.")
  var rng = RandomSource.smelt

  @Option(help: "Bytes of tensors in one file of a folder.")
  var shardSize = ByteSize(bytes: ModelFolder.defaultShardSize)

  @OptionGroup var resources: Resources

  enum RandomSource: String, ExpressibleByArgument, CaseIterable { case smelt, mergekit }

  func validate() throws {
    guard shardSize.bytes > 0 else { throw ValidationError("--shard-size must be positive.") }
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
    if dryRun { return describe(plan, cost) }
    try refuseFullDisk(cost)
    try refuse(writing: output, overInputs: parsed.models + [recipe])
    let interrupted = try Interrupted(output, identity: identity(text, parsed))
    let pieces = try interrupted.pieces(of: plan, isResuming: resume)
    let sink = try makeSink(plan, recipeText: text)
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
    try merge(plan, cost, into: sink, journal: journal, finished: finished)
  }

  /// All that the result's bytes depend on.
  private func identity(_ recipeText: String, _ recipe: Recipe) throws -> String {
    var parts = [
      recipeText, "\(seed)", rng.rawValue, "\(shardSize.bytes)", Smelt.configuration.version,
    ]
    for model in recipe.models { parts += [model] + fileStates(model) }
    let bytes = Array(parts.joined(separator: "\0").utf8)
    return String(xxh3(bytes.span.bytes), radix: 16)
  }

  private func merge(
    _ plan: MergePlan, _ cost: MergePlan.Cost, into sink: any TensorSink, journal: MergeJournal,
    finished: Set<Chunk>
  ) throws {
    let progress = Progress(total: cost.bytesRead + cost.bytesWritten, isQuiet: quiet)
    let notFinite = Mutex<[String: Int]>([:])
    try plan.run(
      into: sink, memory: resources.memory.bytes, workers: resources.jobs, journal: journal,
      finished: finished
    ) { chunk in
      progress.advance(chunk.bytesRead + chunk.bytesWritten, chunk.tensor.name)
      if chunk.notFinite > 0 {
        notFinite.withLock { $0[chunk.tensor.name, default: 0] += chunk.notFinite }
      }
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
    for source in plan.sources { try source.checkUnchanged() }
    try sink.finish()
    guard !quiet else { return }
    let seconds = progress.seconds
    let rate = ByteSize(bytes: Int(Double(cost.bytesRead + cost.bytesWritten) / max(seconds, 1e-3)))
    print(
      "\(output): \(summary(of: plan.manifest)) in \(decimal(seconds, 1)) s, \(rate)/s read and written, peak memory \(peakMemory)"
    )
  }

  // MARK: The plan

  private func describe(_ plan: MergePlan, _ cost: MergePlan.Cost) {
    let rows = plan.tasks.map {
      [
        $0.output.dtype.rawValue, $0.output.shapeDescription,
        ByteSize(bytes: $0.output.byteCount).description, $0.explanation,
        quoted($0.output.name),
      ]
    }
    print(
      Table(columns: ["type", "shape", "size", "made by", "tensor"], rows: rows, rightAligned: [2]))
    print("\(plan.recipe.method.name): \(plan.recipe.method.formula)")
    for model in plan.sources { print("reads \(model.path): \(summary(of: model.manifest))") }
    print(
      "reads \(ByteSize(bytes: cost.bytesRead)) in up to \(cost.passes) passes\(cost.tensorsReadAgain > 0 ? ", \(cost.tensorsReadAgain) tensors from disk in each" : ", each byte once from disk"), writes \(ByteSize(bytes: cost.bytesWritten))"
    )
    print(
      "takes up to \(ByteSize(bytes: cost.memory)) of memory for tiles, \(resources.jobs) workers; the budget is \(resources.memory)"
    )
    if let free = freeSpace(for: output) {
      print(
        "needs \(ByteSize(bytes: cost.bytesWritten)) of disk; \(ByteSize(bytes: free)) are free")
    }
  }

  private func refuseFullDisk(_ cost: MergePlan.Cost) throws {
    guard let free = freeSpace(for: output), free < cost.bytesWritten else { return }
    throw CheckpointError(
      file: output,
      "needs \(ByteSize(bytes: cost.bytesWritten)) of disk and \(ByteSize(bytes: free)) are free",
      remedy: "free some space or write to another disk")
  }

  // MARK: The output

  private func makeSink(_ plan: MergePlan, recipeText: String) throws -> any TensorSink {
    let isFile = Checkpoint.formats.contains { format in
      format.fileExtensions.contains { output.lowercased().hasSuffix("." + $0) }
    }
    guard !isFile else { return try Checkpoint.create(output, plan.manifest) }
    let folder = OutputFolder(plan: plan, recipe: recipeText)
    return try ModelFolder.create(
      output, plan.manifest, shardSize: shardSize.bytes, sideFilesOf: folder.original,
      files: try folder.files(), replacing: force)
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
