import Checkpoints
import TestSupport
import Testing

@testable import Merging

/// Upscaling against its formulas, computed plainly.
struct UpscalingTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  static let shapes: [(name: String, shape: [Int])] = [
    ("embed.weight", [5, 4]),
    ("model.encoder.layers.0.self_attn.q_proj.weight", [4, 4]),
    ("model.encoder.layers.0.mlp.fc1.weight", [6, 4]),
    ("model.encoder.layers.0.mlp.fc1.bias", [6]),
    ("model.encoder.layers.0.mlp.fc2.weight", [4, 6]),
    ("model.encoder.layers.0.mlp.fc2.bias", [4]),
    ("model.final_norm.bias", [4]),
  ]
  static let mlp = "model.encoder.layers.0.mlp"

  /// The base (number 0) or an expert: the specification's filler, experts 0.1 away from the base.
  private func model(_ number: Int, dtype: DType = .f32) throws -> [SmallTensor] {
    try Self.shapes.enumerated().map { index, tensor in
      let count = tensor.shape.reduce(1, *)
      let base = filler(10 + index, count: count)
      let own = filler(20 + 7 * number + index, count: count)
      return try SmallTensor(
        tensor.name, tensor.shape, dtype: dtype,
        zip(base, own).map { Float(0.5 * $0 + (number == 0 ? 0 : 0.1 * $1)) })
    }
  }

  private func family(experts: Int = 2, dtype: DType = .f32) throws -> ModelFamily {
    func open(_ number: Int) throws -> any TensorSource {
      try Checkpoint.open(
        Checkpoint.write(model(number, dtype: dtype), to: folder("model\(number).safetensors")))
    }
    return try ModelFamily(
      base: open(0),
      experts: (1...experts).map { try .init(name: "expert\($0)", source: open($0)) })
  }

  private func upscale(
    _ family: ModelFamily, _ options: Upscaling.Options, name: String = "moe",
    memory: Int = 1 << 20, workers: Int = 2
  ) throws -> (mixture: any TensorSource, vectors: any TensorSource) {
    let upscaling = try Upscaling(family, options)
    let paths = [folder("\(name).safetensors"), folder("\(name)-vectors.safetensors")]
    let mixture = try Checkpoint.create(paths[0], upscaling.manifest)
    let vectors = try Checkpoint.create(paths[1], upscaling.taskVectorManifest)
    try upscaling.run(into: mixture, taskVectors: vectors, memory: memory, workers: workers)
    try mixture.finish()
    try vectors.finish()
    return (try Checkpoint.open(paths[0]), try Checkpoint.open(paths[1]))
  }

  @Test func `everything but the MLPs is task arithmetic in the reference's order`() throws {
    let family = try family()
    let (mixture, _) = try upscale(family, .init())
    for name in ["embed.weight", "model.encoder.layers.0.self_attn.q_proj.weight"] {
      let base = try family.base.floats(of: name)
      let experts = try family.experts.map { try $0.source.floats(of: name) }
      let expected = base.indices.map { i in
        base[i] + Float(0.3) * ((experts[0][i] - base[i]) + (experts[1][i] - base[i]))
      }
      #expect(try mixture.floats(of: name) == expected)
    }
  }

  @Test func `an MLP becomes a gate, the pre-trained MLP and the task vectors`() throws {
    let family = try family()
    let (mixture, _) = try upscale(family, .init())
    #expect(
      mixture.manifest.tensors.map { $0.name }.filter { $0.hasPrefix(Self.mlp) }.sorted()
        == [
          "base_model.fc1.bias", "base_model.fc1.weight", "base_model.fc2.bias",
          "base_model.fc2.weight", "gate.fc1.bias", "gate.fc1.weight", "gate.fc2.bias",
          "gate.fc2.weight", "task_vectors.0.fc1.bias", "task_vectors.0.fc1.weight",
          "task_vectors.0.fc2.bias", "task_vectors.0.fc2.weight", "task_vectors.1.fc1.bias",
          "task_vectors.1.fc1.weight", "task_vectors.1.fc2.bias", "task_vectors.1.fc2.weight",
        ].map { "\(Self.mlp).\($0)" })
    let base = try family.base.floats(of: "\(Self.mlp).fc1.weight")
    let expert = try family.experts[1].source.floats(of: "\(Self.mlp).fc1.weight")
    #expect(try mixture.floats(of: "\(Self.mlp).base_model.fc1.weight") == base)
    #expect(
      try mixture.floats(of: "\(Self.mlp).task_vectors.1.fc1.weight")
        == zip(expert, base).map { $0 - $1 })
    #expect(try mixture.floats(of: "\(Self.mlp).gate.fc2.bias") == [0.3, 0.3])
  }

  @Test func `cleaning leaves biases and embeddings alone and subtracts one vector a row`() throws {
    let family = try family(experts: 3)
    var options = Upscaling.Options()
    options.cleaning = .row
    let (_, cleaned) = try upscale(family, options, name: "cleaned")
    let (_, plain) = try upscale(family, .init(), name: "plain")
    for (name, shape) in Self.shapes {
      let redundant = try (1...3).map { number in
        zip(
          try plain.floats(of: "expert\(number)/\(name)"),
          try cleaned.floats(of: "expert\(number)/\(name)")
        ).map { $0 - $1 }
      }
      let isMatrix = shape.count == 2 && !name.contains("embed")
      #expect(redundant[0].contains { $0 != 0 } == isMatrix, "\(name)")
      for i in redundant[0].indices {
        #expect(abs(redundant[0][i] - redundant[1][i]) < 1e-7)
        #expect(abs(redundant[0][i] - redundant[2][i]) < 1e-7)
      }
    }
  }

  /// Up to one rounding of the stored task vector and one of the sum.
  @Test(arguments: [(DType.f32, Float(0x1p-24)), (.bf16, 0x1p-8)])
  func `in the shared form one-hot routing gives every expert's MLP back`(
    dtype: DType, unit: Float
  ) throws {
    let family = try family(experts: 3, dtype: dtype)
    var options = Upscaling.Options()
    options.cleaning = .row
    let (mixture, _) = try upscale(family, options)
    for key in ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"] {
      let base = try mixture.floats(of: "\(Self.mlp).base_model.\(key)")
      for (number, expert) in family.experts.enumerated() {
        let vector = try mixture.floats(of: "\(Self.mlp).task_vectors.\(number).\(key)")
        var sum = zip(base, vector).map { $0 + $1 }
        var span = sum.mutableSpan
        dtype.round(&span)
        let own = try expert.source.floats(of: "\(Self.mlp).\(key)")
        for i in own.indices {
          #expect(abs(sum[i] - own[i]) <= unit * (abs(vector[i]) + abs(own[i])))
        }
      }
    }
  }

  @Test(arguments: [1, 2, 3], [1 << 20, 4000])
  func `workers and memory do not change a byte`(workers: Int, memory: Int) throws {
    let family = try family(experts: 3, dtype: .bf16)
    var options = Upscaling.Options()
    options.cleaning = .row
    let reference = try upscale(family, options, name: "reference", memory: 1 << 24, workers: 1)
    let other = try upscale(family, options, name: "other", memory: memory, workers: workers)
    for (one, two) in [(reference.mixture, other.mixture), (reference.vectors, other.vectors)] {
      #expect(one.manifest.tensors == two.manifest.tensors)
      for tensor in one.manifest.tensors {
        #expect(try one.bytes(of: tensor) == two.bytes(of: tensor), "\(tensor.name)")
      }
    }
  }

  @Test func `a row that does not fit the memory is refused with both numbers`() throws {
    let family = try family(experts: 3)
    var options = Upscaling.Options()
    options.cleaning = .row
    #expect(
      throws: MergeError(
        "tensor \"model.encoder.layers.0.mlp.base_model.fc2.weight\" needs 312 bytes for a row of 6 elements of every model; a worker's share of the budget is 300",
        remedy: "give it more with --memory or use fewer --jobs")
    ) { try upscale(family, options, memory: 300, workers: 1) }
  }

  @Test func `an expert of another shape is refused by file and tensor`() throws {
    let base = try Checkpoint.open(Checkpoint.write(model(0), to: folder("base.safetensors")))
    var tensors = try model(1)
    tensors[3] = try SmallTensor("\(Self.mlp).fc1.bias", [3, 2], tensors[3].values)
    let expert = try Checkpoint.open(Checkpoint.write(tensors, to: folder("odd.safetensors")))
    #expect(
      throws: CheckpointError(
        file: folder("odd.safetensors"), tensor: "\(Self.mlp).fc1.bias",
        "has the shape [3, 2] but [6] in \(folder("base.safetensors"))",
        remedy: "an expert must be fine-tuned from the base it is merged with")
    ) { try ModelFamily(base: base, experts: [.init(name: "odd", source: expert)]) }
  }

  @Test func `a model without a known MLP is refused`() throws {
    let path = folder("plain.safetensors")
    let source = try Checkpoint.open(
      Checkpoint.write([SmallTensor("weight", [2, 2], [1, 2, 3, 4])], to: path))
    let family = try ModelFamily(base: source, experts: [.init(name: "same", source: source)])
    #expect(throws: MergeError.self) { try Upscaling(family, .init()) }
  }

  @Test func `a base with names that the mixture needs is refused`() throws {
    let own = try SmallTensor("\(Self.mlp).gate.fc1.weight", [1], [1])
    let path = try Checkpoint.write(model(0) + [own], to: folder("mixture.safetensors"))
    let source = try Checkpoint.open(path)
    let family = try ModelFamily(base: source, experts: [.init(name: "same", source: source)])
    #expect(
      throws: CheckpointError(
        file: path, tensor: "\(Self.mlp).gate.fc1.weight",
        "has a name that the mixture needs for its own tensors",
        remedy: "is the base a mixture already?")
    ) { try Upscaling(family, .init()) }
  }

  @Test func `experts equal to the base give zero task vectors and no NaN`() throws {
    let base = try Checkpoint.open(Checkpoint.write(model(0), to: folder("base.safetensors")))
    let family = try ModelFamily(
      base: base, experts: ["a", "b"].map { .init(name: $0, source: base) })
    var options = Upscaling.Options()
    options.cleaning = .row
    let (mixture, vectors) = try upscale(family, options)
    for tensor in vectors.manifest.tensors {
      #expect(try vectors.floats(of: tensor.name).allSatisfy { $0 == 0 })
    }
    #expect(
      try mixture.floats(of: "\(Self.mlp).base_model.fc1.weight")
        == base.floats(of: "\(Self.mlp).fc1.weight"))
  }
}

/// Names of real models, and where their MLPs are.
struct TransformerMLPTests {
  @Test(arguments: [
    (
      "vision_model.encoder.layers.3.mlp.fc1.weight", "vision_model.encoder.layers.3.mlp",
      "fc1.weight"
    ),
    ("encoder.layers.11.mlp.fc2.bias", "encoder.layers.11.mlp", "fc2.bias"),
    (
      "bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.0.mlp",
      "intermediate.dense.weight"
    ),
    ("encoder.layer.2.output.dense.bias", "encoder.layer.2.mlp", "output.dense.bias"),
    (
      "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
      "encoder.block.1.layer.1.DenseReluDense", "wi_0.weight"
    ),
    (
      "decoder.block.1.layer.2.DenseReluDense.wo.weight", "decoder.block.1.layer.2.DenseReluDense",
      "wo.weight"
    ),
    ("model.layers.31.mlp.gate_proj.weight", "model.layers.31.mlp", "gate_proj.weight"),
    ("transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp", "c_fc.weight"),
  ])
  func `an MLP is found by its tensors' names`(name: String, module: String, key: String) {
    let member = TransformerMLP.member(name)
    #expect(member?.module == module)
    #expect(member?.key == key)
  }

  @Test(arguments: [
    "encoder.layer.0.attention.output.dense.weight", "encoder.layer.0.output.LayerNorm.weight",
    "model.layers.0.self_attn.q_proj.weight", "model.layers.x.mlp.up_proj.weight",
    "decoder.block.1.layer.1.DenseReluDense.wi", "mlp.fc1.weight", "",
  ])
  func `what is no MLP is not taken for one`(name: String) {
    #expect(TransformerMLP.member(name) == nil)
  }
}
