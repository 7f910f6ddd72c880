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
      leave-one-out) and, with --method output, from there to the experts' outputs. A quarter of \
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

  @Option(help: "How many samples of each task are used.")
  var samples = 256

  @OptionGroup var resources: Resources

  enum Method: String, ExpressibleByArgument, CaseIterable {
    case output, ridge
  }

  func validate() throws {
    guard samples > 1 else { throw ValidationError("--samples must be at least 2.") }
    guard (activations == nil) != (progressive == nil) else {
      throw ValidationError("Give either --activations or --progressive.")
    }
  }

  func run() throws {
    let opened = try Mixture(Checkpoint.open(mixture))
    let progress = try progressive.map { try progressiveActivations(of: opened.source, over: $0) }
    let calibration = try MixtureCalibration(
      of: opened, with: try progress ?? Checkpoint.open(activations!),
      options(for: opened.description))
    let inputs = [mixture, activations ?? progressive!] + experts.map { $0.path }
    try refuse(writing: output, overInputs: inputs)
    for remark in calibration.remarks { note(remark) }
    keepFreedMemory()
    let sink = try Checkpoint.create(output, calibration.manifest)
    // Progressively, a layer begins when the one before it is done; its samples share the workers.
    let reports = try calibration.run(
      into: progress?.observing(sink) ?? sink, memory: resources.memory.bytes,
      workers: progress == nil ? resources.jobs : 1)
    try sink.finish()
    say(reports)
    print("\(output): \(reports.count) modules calibrated, \(summary(of: calibration.manifest))")
  }

  private func progressiveActivations(
    of mixture: any TensorSource, over inputs: String
  ) throws -> ProgressiveActivations {
    let samples = try ModelInputs(Checkpoint.open(inputs))
    return try ProgressiveActivations(
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
