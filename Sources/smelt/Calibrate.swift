import ArgumentParser
import Checkpoints
import Merging

struct Calibrate: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Fit a mixture's routers to recorded activations.",
    discussion: """
      The activations file holds, for every MLP module, a tensor named by its prefix with the \
      module's inputs, [samples, width] averaged over tokens or [samples, tokens, width], and a \
      tensor 'task' with the number of each sample's expert, from 0 in the order of the experts. \
      16 to 256 unlabelled samples a task are enough.

      Each router is fitted to the tasks in closed form (ridge regression, its strength by \
      leave-one-out) and, with --method output, from there to the experts' outputs; routers of \
      attention, and one that all layers share, in closed form alone. A quarter of \
      the samples is held out to tell what a router does that has not seen them; the routers \
      that are written have seen all.
      """)

  @Argument(help: "The mixture, made by 'smelt upscale'.", completion: .file())
  var mixture: String

  @Option(help: "The recorded activations.", completion: .file())
  var activations: String?

  @Option(
    help: ArgumentHelp(
      "Samples to run the mixture itself over, instead of recorded activations.",
      discussion: """
        Each router is fitted to what the layers before it make of the samples, their routers \
        already fitted. The file is that of 'smelt activations'.
        """, valueName: "inputs"), completion: .file())
  var progressive: String?

  @OptionGroup var transformer: TransformerArguments

  @Option(name: .shortAndLong, help: "The calibrated mixture to write.")
  var output: String

  @Option(help: "What the routers are fitted to: output (the experts' outputs) or ridge (tasks).")
  var method = Method.output

  @Option(
    name: .customLong("expert"),
    help: ArgumentHelp(
      "A fine-tuned model to match, once for each expert; for pruned or coded task vectors.",
      valueName: "name=path"))
  var experts: [NamedPath] = []

  @Flag(
    help: ArgumentHelp(
      "Choose the λ of the static part by the error of the model's last hidden states.",
      discussion: "It needs --progressive, --base and every --expert."))
  var chooseLambda = false

  @Option(help: "The model that the experts were fine-tuned from.", completion: .file())
  var base: String?

  @Option(
    help: "Also write what was found as a page with pictures (.html) or as a picture (.svg).",
    completion: .file())
  var report: String?

  @Option(help: "How many samples of each task are used.")
  var samples = 256

  @OptionGroup var resources: Resources

  enum Method: String, ExpressibleByArgument, CaseIterable {
    case output, ridge
  }

  func validate() throws {
    try refuseUnknownEnding(of: output)
    guard samples > 1 else { throw ValidationError("--samples must be at least 2.") }
    guard (activations == nil) != (progressive == nil) else {
      throw ValidationError("Give either --activations or --progressive.")
    }
    guard chooseLambda == (base != nil) else {
      throw ValidationError("--choose-lambda and --base go together.")
    }
    guard !chooseLambda || progressive != nil && !experts.isEmpty else {
      throw ValidationError("--choose-lambda needs --progressive and every --expert.")
    }
    if let report, !["html", "svg"].contains(report.split(separator: ".").last ?? "") {
      throw ValidationError("--report ends in .html or .svg.")
    }
  }

  func run() throws {
    keepFreedMemory()
    let given = try Checkpoint.open(mixture)
    let options = try options(for: Mixture(given).description)
    let samples = try progressive.map { try ModelInputs(Checkpoint.open($0)) }
    let inputs = [mixture, activations ?? progressive!] + experts.map { $0.path }
    for output in [output] + (report.map { [$0] } ?? []) {
      try refuse(writing: output, overInputs: inputs + (base.map { [$0] } ?? []))
    }
    let choice = try chooseLambda ? choice(of: given, over: samples!, options) : nil
    let source =
      try choice.map {
        try RescaledMixture(given, base: Checkpoint.open(base!), scaling: $0.best.scaling)
      } ?? given
    let progress = try samples.map { try progressiveActivations(of: source, over: $0) }
    let calibration = try MixtureCalibration(
      of: Mixture(source), with: try progress ?? Checkpoint.open(activations!), options)
    for remark in calibration.remarks { note(remark) }
    let sink = try Checkpoint.create(output, calibration.manifest, resources.options)
    // Progressively, a layer begins when the one before it is done; its samples share the workers.
    let reports = try calibration.run(
      into: progress?.observing(sink) ?? sink, memory: resources.memory.bytes,
      workers: progress == nil ? resources.jobs : 1)
    try given.checkUnchanged()
    if let report {
      try CalibrationPage(mixture: output, reports: reports, choice: choice).write(to: report)
    }
    try sink.finish()
    if let choice { say(choice) }
    say(reports)
    print("\(output): \(reports.count) modules calibrated, \(summary(of: calibration.manifest))")
  }

  private func choice(
    of mixture: any TensorSource, over samples: ModelInputs, _ options: MixtureCalibration.Options
  ) throws -> ScalingChoice {
    try ScalingChoice(
      of: mixture, base: Checkpoint.open(base!), over: samples, options,
      memory: resources.memory.bytes, workers: resources.jobs
    ) { try transformer.pass(of: $0, for: samples) }
  }

  private func say(_ choice: ScalingChoice) {
    let rows = choice.trials.map {
      [decimal(Double($0.scaling), 1), decimal($0.outputError, 4), $0 == choice.best ? "←" : ""]
    }
    print(
      Table(
        columns: ["λ of the static part", "output error", ""], rows: rows, rightAligned: [0, 1]))
  }

  private func progressiveActivations(
    of mixture: any TensorSource, over samples: ModelInputs
  ) throws -> ProgressiveActivations {
    try ProgressiveActivations(
      of: mixture, over: samples, memory: resources.memory.bytes, workers: resources.jobs
    ) { try transformer.pass(of: $0, for: samples) }
  }

  private func options(for description: MixtureDescription) throws -> MixtureCalibration.Options {
    var options = MixtureCalibration.Options()
    options.method = method == .ridge ? .ridge : .output
    options.samplesPerTask = samples
    options.activation = transformer.activation
    if !experts.isEmpty {
      options.experts = try description.experts.map { name in
        guard let path = experts.first(where: { $0.name == name })?.path else {
          throw MergeError(
            "\(mixture) has the expert \(quoted(name)), which is not among --expert")
        }
        return try Checkpoint.open(path)
      }
    }
    return options
  }

  /// What the routers do on samples that their fit has not seen.
  private func say(_ reports: [MixtureCalibration.LayerReport]) {
    func percent(_ share: Double) -> String {
      share.isNaN ? "" : "\(decimal(100 * share, 1)) %"
    }
    let rows = reports.map { report in
      [
        report.module, report.isMatched ? "outputs" : "tasks",
        percent(report.routingAccuracy.before), percent(report.routingAccuracy.after),
        report.outputError.map { decimal($0.before, 3) } ?? "",
        report.outputError.map { decimal($0.after, 3) } ?? "",
      ]
    }
    print(
      Table(
        columns: [
          "module", "fitted to", "routing before", "after", "output error before", "after",
        ],
        rows: rows, rightAligned: [2, 3, 4, 5]))
  }
}
