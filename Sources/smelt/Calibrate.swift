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
      16 to 256 unlabelled samples a task are enough. Each router is fitted in closed form \
      (ridge regression, strength by leave-one-out), one layer in memory at a time.
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

  @OptionGroup var resources: Resources

  func validate() throws {
    guard (activations == nil) != (progressive == nil) else {
      throw ValidationError("Give either --activations or --progressive.")
    }
  }

  func run() throws {
    let reports = try progressive.map(fitProgressively) ?? fitToRecorded(activations!)
    let rows = reports.map {
      [$0.module, decimal($0.ridge), "\(decimal(100 * $0.routingAccuracy, 1)) %"]
    }
    print(
      Table(columns: ["module", "ridge", "held-out routing"], rows: rows, rightAligned: [1, 2]))
    print("\(output): \(reports.count) routers calibrated")
  }

  private func fitToRecorded(_ activations: String) throws -> [MixtureCalibration.LayerReport] {
    let calibration = try MixtureCalibration(
      of: Checkpoint.open(mixture), with: Checkpoint.open(activations))
    try refuse(writing: output, overInputs: [mixture, activations])
    let sink = try Checkpoint.create(output, calibration.manifest)
    let reports = try calibration.run(into: sink, workers: resources.jobs)
    try sink.finish()
    return reports
  }

  private func fitProgressively(_ inputs: String) throws -> [MixtureCalibration.LayerReport] {
    let opened = try Checkpoint.open(mixture)
    let samples = try ModelInputs(Checkpoint.open(inputs))
    let activations = try ProgressiveActivations(
      of: opened, over: samples, memory: resources.memory.bytes, workers: resources.jobs
    ) { try transformer.pass(of: $0, for: samples) }
    let calibration = try MixtureCalibration(of: opened, with: activations)
    try refuse(writing: output, overInputs: [mixture, inputs])
    let sink = try Checkpoint.create(output, calibration.manifest)
    // A layer begins when the one before it is done; within it the samples share the workers.
    let reports = try calibration.run(into: activations.observing(sink), workers: 1)
    try sink.finish()
    return reports
  }
}
