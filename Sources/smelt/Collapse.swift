import ArgumentParser
import Checkpoints
import Merging

struct CollapseCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "collapse",
    abstract: "Turn a mixture of experts back into a plain model.",
    discussion: """
      Every module becomes an ordinary MLP again, base + Σ weight·task vector, with weights that \
      no longer depend on the input: one expert's, given ones, or those that the routers choose \
      on average for recorded activations. Everything else stays as it is.
      """)

  @Argument(help: "The mixture, made by 'smelt upscale'.", completion: .file())
  var mixture: String

  @Option(help: "The expert whose MLPs come out.")
  var expert: String?

  @Option(
    parsing: .unconditional,  // The first may be negative.
    help: ArgumentHelp(
      "A weight for each expert, in their order, such as 0.3,0.7.", valueName: "w,w,…"))
  var weights: WeightList?

  @Option(
    name: .customLong("for"),
    help: ArgumentHelp(
      "Recorded activations; the routers' mean weights on them are used.",
      valueName: "activations"),
    completion: .file())
  var activations: String?

  @Option(
    name: .shortAndLong, help: "The model to write; its ending names the format: \(Endings.all).")
  var output: String

  @OptionGroup var resources: Resources

  func validate() throws {
    try refuseUnknownEnding(of: output)
    let given = [expert != nil, weights != nil, activations != nil].count { $0 }
    guard given == 1 else {
      throw ValidationError("Give one of --expert, --weights and --for.")
    }
  }

  func run() throws {
    let inputs = [mixture] + (activations.map { [$0] } ?? [])
    let opened = try Mixture(Checkpoint.open(mixture))
    let collapse = try Collapse(opened, source())
    try refuse(writing: output, overInputs: inputs)
    if activations != nil {
      let rows = try collapse.moduleWeights().map {
        [$0.module] + $0.weights.map { decimal(Double($0), 3) }
      }
      print(
        Table(
          columns: ["module"] + opened.description.experts, rows: rows,
          rightAligned: Set(1...opened.description.experts.count)))
    }
    let sink = try Checkpoint.create(output, collapse.manifest, resources.options)
    try collapse.run(into: sink, memory: resources.memory.bytes, workers: resources.jobs)
    try opened.source.checkUnchanged()
    try sink.finish()
    print("\(output): a plain model, \(summary(of: collapse.manifest))")
    if expert == nil, activations != nil, let warning = opened.description.warning {
      note(warning)
    }
  }

  private func source() throws -> Collapse.Weights {
    if let expert { return .expert(expert) }
    if let weights { return .given(weights.values) }
    return .activations(try Checkpoint.open(activations!))
  }
}

/// Numbers as people write them in a row: `0.3,0.7`.
struct WeightList: ExpressibleByArgument {
  let values: [Float]

  init?(argument: String) {
    let words = argument.split(separator: ",", omittingEmptySubsequences: false)
    values = words.compactMap { Float($0) }.filter { $0.isFinite }
    guard values.count == words.count else { return nil }
  }
}
