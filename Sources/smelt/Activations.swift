import ArgumentParser
import Checkpoints
import Foundation
import Merging

struct RecordActivations: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "activations",
    abstract: "Run a model over samples and record what its MLPs see, for 'smelt calibrate'.",
    discussion: """
      The forward pass of CLIP, ViT, BERT, RoBERTa, Llama, Mistral, Qwen and Gemma models and of \
      mixtures made of them, one layer in memory at a time. The inputs file holds 'pixel_values' \
      [samples, channels, height, width], or 'input_ids' [samples, tokens] with 'attention_mask' \
      and 'token_type_ids' if there are any, and 'task' [samples], the number of each sample's \
      expert. What the tensors do not tell is read from the model's config.json: --config, or \
      the one beside the model. For other models there is Scripts/capture-activations.
      """)

  @Argument(help: "The model.", completion: .file())
  var model: String

  @Argument(help: "The samples.", completion: .file())
  var inputs: String

  @Option(name: .shortAndLong, help: "The activations to write.")
  var output: String

  @Flag(help: "Record every token, not their mean.")
  var tokens = false

  @Flag(help: "Record what attention sees as well, for mixtures made with --attention.")
  var attention = false

  @Flag(name: .customLong("final"), help: "Record 'last_hidden_state' as well.")
  var finalStates = false

  @OptionGroup var transformer: TransformerArguments

  @OptionGroup var resources: Resources

  func validate() throws { try refuseUnknownEnding(of: output) }

  func run() throws {
    let samples = try ModelInputs(Checkpoint.open(inputs))
    let pass = try transformer.pass(of: Checkpoint.open(model), for: samples)
    var options = ActivationRecording.Options()
    options.everyToken = tokens
    options.attention = attention
    options.finalStates = finalStates
    let recording = try ActivationRecording(of: pass, over: samples, options)
    try refuse(writing: output, overInputs: [model, inputs])
    let sink = try Checkpoint.create(output, recording.manifest, resources.options)
    try recording.run(into: sink, memory: resources.memory.bytes, workers: resources.jobs)
    try sink.finish()
    print(
      "\(output): \(samples.sampleCount) samples through \(pass.layerCount) layers, \(summary(of: recording.manifest))"
    )
  }
}

/// What a command that runs a model must know of it beyond its tensors.
struct TransformerArguments: ParsableArguments {
  @Option(help: "The model's config.json, if it is not beside the model.", completion: .file())
  var config: String?

  @Option(help: "Attention heads.")
  var heads: Int?

  @Option(help: "Heads of keys and values.")
  var keyValueHeads: Int?

  @Option(
    help: ArgumentHelp("The MLPs' activation, as a config.json names it.", valueName: "name"),
    transform: { name in
      guard let activation = Activation(configurationName: name) else {
        throw ValidationError("there is no activation of this name")
      }
      return activation
    })
  var activation: Activation?

  @Option(help: "What the norms add to a variance.")
  var normEpsilon: Float?

  @Option(help: "The base of the rotary embeddings' wavelengths.")
  var ropeTheta: Double?

  func validate() throws {
    if let heads, heads < 1 { throw ValidationError("--heads must be at least 1.") }
    if let keyValueHeads, keyValueHeads < 1 {
      throw ValidationError("--key-value-heads must be at least 1.")
    }
    if let normEpsilon, !(normEpsilon >= 0 && normEpsilon.isFinite) {
      throw ValidationError("--norm-epsilon must not be negative.")
    }
    if let ropeTheta, !(ropeTheta > 0 && ropeTheta.isFinite) {
      throw ValidationError("--rope-theta must be a positive number.")
    }
  }

  func pass(of model: any TensorSource, for inputs: ModelInputs) throws -> ForwardPass {
    try ForwardPass(
      of: model, for: inputs, configurationPath: config ?? beside(model.path), flags: flags)
  }

  private var flags: TransformerConfiguration {
    var flags = TransformerConfiguration()
    flags.heads = heads
    flags.keyValueHeads = keyValueHeads
    flags.activation = activation
    flags.normEpsilon = normEpsilon
    flags.ropeTheta = ropeTheta
    return flags
  }

  /// The `config.json` in the model's folder, or beside its file.
  private func beside(_ model: String) -> String? {
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: model, isDirectory: &isFolder) else { return nil }
    let url = URL(filePath: model)
    let folder = isFolder.boolValue ? url : url.deletingLastPathComponent()
    let path = folder.appending(path: "config.json").path(percentEncoded: false)
    return FileManager.default.fileExists(atPath: path) ? path : nil
  }
}
