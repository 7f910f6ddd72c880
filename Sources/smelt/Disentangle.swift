import ArgumentParser
import Checkpoints
import Foundation
import Merging

struct Disentangle: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Take out of task vectors what they have in common, so that they merge better.",
    discussion: """
      Adaptive weight disentanglement (arXiv 2411.18729) subtracts one redundant vector from the \
      task vectors (expert − base) of a group, chosen to make them as orthogonal as they get. \
      Everything is exact: only inner products of the task vectors are needed, found in one pass \
      over the files.

      Beside the output are written a page with pictures (report.html) and the inner products \
      (gram.safetensors): give those back with --gram to clean otherwise without measuring again.
      """)

  @OptionGroup var family: FamilyArguments

  @Option(
    name: .shortAndLong,
    help:
      "A folder for a safetensors file an expert; or one file for all, NAME/tensor, whose ending names the format: \(Endings.all)."
  )
  var output: String

  @Option(name: .customLong("as"), help: "Write task vectors, or models: base + cleaned vector.")
  var form = WrittenForm.vectors

  @Option(
    help: "Write all tensors as F32, F64, BF16 or F16. Default: as the expert's.",
    transform: { text in
      guard let dtype = DType(rawValue: text.uppercased()), dtype.isArithmetic else {
        throw ValidationError("--dtype is one of F32, F64, BF16, F16.")
      }
      return dtype
    })
  var dtype: DType?

  @Option(help: "Also write the redundant vector to this file.")
  var redundant: String?

  @Option(
    help: "Inner products that were found before; spares wider scopes than rows a reading.",
    completion: .file())
  var gram: String?

  @OptionGroup var cleaning: CleaningArguments

  @Flag(help: "Print the report as JSON for programs.")
  var json = false

  @Flag(help: "Say what would be written and what it would take, and write nothing.")
  var dryRun = false

  @OptionGroup var resources: Resources

  func run() throws {
    var options = Disentangling.Options()
    options.cleaning = try cleaning.cleaning(or: .row)!
    options.form = form == .models ? .models : .vectors
    options.dtype = dtype
    let disentangling = try family.open { try Disentangling($0, options) }
    let grams = try gram.map { try TaskVectorGrams(contentsOf: $0) }
    let places = try DisentanglementPlaces(output, disentangling, redundant: redundant)
    try places.refuse(overInputs: family.paths + (gram.map { [$0] } ?? []))
    if dryRun { return sayPlan(of: disentangling) }
    if gram != nil, options.cleaning.method.scope == .row {
      note("--gram is not needed: rows are solved on the way, in one reading")
    }
    let isNewFolder = try places.makeFolder()
    var isFinished = false
    defer { if isNewFolder, !isFinished { places.removeFolderIfEmpty() } }

    let outputs = try places.create(for: disentangling, resources.options)
    let summary = try disentangling.run(
      into: outputs.experts, redundant: outputs.redundant, grams: grams,
      memory: resources.memory.bytes, workers: resources.jobs)
    try disentangling.family.checkUnchanged()
    try Checkpoint.finish(outputs.all)
    try summary.grams.write(to: places.grams)
    try DisentanglementPage(summary).write(to: places.page)
    isFinished = true
    try say(summary, disentangling, places)
  }

  private func sayPlan(of disentangling: Disentangling) {
    let cost = disentangling.cost(
      memory: resources.memory.bytes, workers: resources.jobs, hasGrams: gram != nil,
      hasRedundant: redundant != nil)
    print(
      "cleans \(disentangling.family.experts.count) task vectors by \(disentangling.options.cleaning)"
    )
    print(
      "reads \(ByteSize(bytes: cost.bytesRead))\(cost.reads.groupsReadTwice > 0 ? "" : ", each byte once"), writes \(ByteSize(bytes: cost.bytesWritten)) to \(output)"
    )
    if let sentence = cost.reads.sentence { print(sentence) }
  }

  private func say(
    _ summary: DisentanglementSummary, _ disentangling: Disentangling,
    _ places: DisentanglementPlaces
  ) throws {
    let report = DisentanglementText(summary)
    if json {
      try print(json: report)
    } else {
      print(report)
      let bytes = disentangling.manifests.reduce(0) { $0 + $1.byteCount }
      print(
        "\(output): \(summary.experts.count) \(form == .models ? "models" : "task vectors"), \(ByteSize(bytes: bytes)); report: \(places.page)"
      )
    }
    for warning in summary.warnings { note(warning) }
  }
}

enum WrittenForm: String, ExpressibleByArgument, CaseIterable { case vectors, models }

/// Where each output of a disentanglement goes.
struct DisentanglementPlaces {
  /// One file for all experts, or one for each.
  let experts: [String]
  let folder: String?
  let redundant: String?
  let grams: String
  let page: String

  init(_ output: String, _ disentangling: Disentangling, redundant: String?) throws {
    self.redundant = redundant
    let ending = Checkpoint.formats.flatMap { $0.fileExtensions }.first {
      output.lowercased().hasSuffix("." + $0)
    }
    if let ending {
      let stem = output.dropLast(ending.count + 1)
      folder = nil
      experts = [output]
      grams = "\(stem).gram.safetensors"
      page = "\(stem).report.html"
    } else {
      let folder = output.count > 1 && output.hasSuffix("/") ? String(output.dropLast()) : output
      self.folder = folder
      experts = disentangling.family.experts.map { "\(folder)/\($0.name).safetensors" }
      grams = "\(folder)/gram.safetensors"
      page = "\(folder)/report.html"
    }
    for (index, path) in all.enumerated() where all[..<index].contains(path) {
      throw CheckpointError(file: path, "would be written twice", remedy: "rename the expert")
    }
  }

  private var all: [String] { experts + (redundant.map { [$0] } ?? []) + [grams, page] }

  func refuse(overInputs inputs: [String]) throws {
    for path in all { try smelt.refuse(writing: path, overInputs: inputs) }
  }

  /// - Returns: whether there was none.
  func makeFolder() throws -> Bool {
    guard let folder else { return false }
    let isNew = !FileManager.default.fileExists(atPath: folder)
    do {
      try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
    } catch {
      throw CheckpointError(file: folder, "cannot be made a folder: \(error.localizedDescription)")
    }
    return isNew
  }

  /// What was made for a run that failed should not stay.
  func removeFolderIfEmpty() { if let folder { rmdir(folder) } }

  typealias Outputs = (
    experts: [any TensorSink], redundant: (any TensorSink)?, all: [any TensorSink]
  )

  func create(for disentangling: Disentangling, _ options: WritingOptions) throws -> Outputs {
    let redundant = try redundant.map {
      try Checkpoint.create($0, disentangling.redundantManifest, options)
    }
    let extra = redundant.map { [$0] } ?? []
    guard folder == nil else {
      let sinks = try zip(experts, disentangling.manifests).map {
        try Checkpoint.create($0, $1, options)
      }
      return (sinks, redundant, sinks + extra)
    }
    let joint = try Checkpoint.create(experts[0], disentangling.jointManifest, options)
    return (disentangling.parts(of: joint), redundant, [joint] + extra)
  }
}
