import ArgumentParser
import Checkpoints
import Merging

struct Upscale: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Upscale fine-tuned models into a weight-ensembling mixture of experts.",
    discussion: """
      Every Transformer MLP becomes a module of a router, the pre-trained MLP and a task vector \
      for each expert (WEMoE, arXiv 2402.00433); everything else is merged by task arithmetic, \
      base + λ·Σ(expert − base). Until its routers are calibrated the mixture equals task \
      arithmetic: see 'smelt calibrate'.
      """)

  @OptionGroup var family: FamilyArguments

  @Option(
    name: .shortAndLong, help: "The mixture to write; its ending names the format: \(Endings.all).")
  var output: String

  @OptionGroup var cleaning: CleaningArguments

  @Option(help: "Also write the task vectors, cleaned if so asked: NAME/tensor for each expert.")
  var taskVectors: String?

  @Option(name: .customLong("lambda"), help: "λ of the static part and of the untrained routers.")
  var scaling: Float = 0.3

  @Option(help: "Depth of the routers: 0 (a constant), 1 (linear) or 2 (one hidden layer).")
  var routerDepth = 2

  @Option(help: "Seed of the routers' random initialisation.")
  var seed: UInt64 = 0

  @OptionGroup var resources: Resources

  func validate() throws {
    guard (0...2).contains(routerDepth) else {
      throw ValidationError("--router-depth is 0, 1 or 2.")
    }
    guard scaling.isFinite else { throw ValidationError("--lambda must be a finite number.") }
  }

  func run() throws {
    var options = Upscaling.Options()
    options.scaling = scaling
    options.routerDepth = routerDepth
    options.seed = seed
    options.cleaning = try cleaning.cleaning(or: nil)
    let upscaling = try Upscaling(family.open(), options)
    for output in [output] + (taskVectors.map { [$0] } ?? []) {
      try refuse(writing: output, overInputs: family.paths)
    }
    let mixture = try Checkpoint.create(output, upscaling.manifest)
    let vectors = try taskVectors.map { try Checkpoint.create($0, upscaling.taskVectorManifest) }
    let report = try upscaling.run(
      into: mixture, taskVectors: vectors, memory: resources.memory.bytes, workers: resources.jobs)
    try Checkpoint.finish([mixture] + (vectors.map { [$0] } ?? []))
    say(upscaling, report)
  }

  private func say(_ upscaling: Upscaling, _ report: DisentanglementSummary?) {
    print(
      "\(output): \(upscaling.family.experts.count) experts in \(upscaling.modules.count) MLP modules, \(summary(of: upscaling.manifest))"
    )
    if let taskVectors { print("\(taskVectors): \(summary(of: upscaling.taskVectorManifest))") }
    if let report {
      let whole = report.whole
      print(
        "mean |cos| of the task vectors: \(decimal(whole.before.meanAbsoluteCosine)) before cleaning, \(decimal(whole.after.meanAbsoluteCosine)) after"
      )
      for warning in report.warnings { note(warning) }
    }
    note(
      "the routers are not calibrated yet: until 'smelt calibrate' this mixture equals task arithmetic"
    )
  }
}
