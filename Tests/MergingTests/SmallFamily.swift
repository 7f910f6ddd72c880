import Checkpoints
import Merging
import TestSupport

/// A base and experts of given shapes, filled with the specification's numbers, in a folder.
struct SmallFamily {
  let folder: TemporaryFolder
  let shapes: [(name: String, shape: [Int])]

  init(_ shapes: [(name: String, shape: [Int])]) throws {
    folder = try TemporaryFolder()
    self.shapes = shapes
  }

  /// The base (number 0) or an expert 0.1 away from it.
  func model(_ number: Int, dtype: DType = .f32) throws -> [SmallTensor] {
    try shapes.enumerated().map { index, tensor in
      let count = tensor.shape.reduce(1, *)
      let base = filler(10 + index, count: count)
      let own = filler(20 + 7 * number + index, count: count)
      return try SmallTensor(
        tensor.name, tensor.shape, dtype: dtype,
        zip(base, own).map { Float(0.5 * $0 + (number == 0 ? 0 : 0.1 * $1)) })
    }
  }

  /// A model, changed, as a file.
  func open(
    _ number: Int, dtype: DType = .f32, _ change: ([SmallTensor]) throws -> [SmallTensor] = { $0 }
  ) throws -> any TensorSource {
    try Checkpoint.open(
      Checkpoint.write(
        change(model(number, dtype: dtype)), to: folder("model\(number).safetensors")))
  }

  func family(
    experts: Int = 2, base: DType = .f32, expert: DType? = nil
  ) throws -> ModelFamily {
    try ModelFamily(
      base: open(0, dtype: base),
      experts: (1...experts).map {
        try .init(name: "expert\($0)", source: open($0, dtype: expert ?? base))
      })
  }

  /// Upscales and opens the result.
  func upscale(
    _ family: ModelFamily, _ options: Upscaling.Options, name: String = "moe",
    memory: Int = 1 << 20, workers: Int = 2
  ) throws -> any TensorSource {
    var upscaling = try Upscaling(family, options)
    try upscaling.survey(memory: memory, workers: workers)
    let sink = try Checkpoint.create(folder("\(name).safetensors"), upscaling.manifest)
    try upscaling.run(into: sink, memory: memory, workers: workers)
    try sink.finish()
    return try Checkpoint.open(folder("\(name).safetensors"))
  }

  /// Collapses and opens the result.
  func collapse(
    _ mixture: any TensorSource, _ weights: Collapse.Weights
  ) throws -> any TensorSource {
    let collapse = try Collapse(Mixture(mixture), weights)
    let sink = try Checkpoint.create(folder("plain.safetensors"), collapse.manifest)
    try collapse.run(into: sink, memory: 1 << 20, workers: 2)
    try sink.finish()
    return try Checkpoint.open(folder("plain.safetensors"))
  }

  /// One layer of CLIP with some tensors around it.
  static let clip: [(name: String, shape: [Int])] = [
    ("embed.weight", [5, 4]),
    ("model.encoder.layers.0.self_attn.q_proj.weight", [4, 4]),
    ("model.encoder.layers.0.mlp.fc1.weight", [6, 4]),
    ("model.encoder.layers.0.mlp.fc1.bias", [6]),
    ("model.encoder.layers.0.mlp.fc2.weight", [4, 6]),
    ("model.encoder.layers.0.mlp.fc2.bias", [4]),
    ("model.final_norm.bias", [4]),
  ]
  static let mlp = "model.encoder.layers.0.mlp"
}
