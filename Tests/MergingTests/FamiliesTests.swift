import Checkpoints
import Foundation
import TestSupport
import Testing

@testable import Merging

/// A model with the names of a real one, small.
struct NamedModel: Sendable, CustomTestStringConvertible {
  let name: String
  /// The MLP's tensors of layer 1, with their shapes; width 4, inside 6.
  let mlp: [(name: String, shape: [Int])]
  let others: [(name: String, shape: [Int])]
  let module: String
  let maps: [String]
  var transposed = false
  let activation: String

  var testDescription: String { name }
}

private func linear(_ prefix: String, _ inputs: Int, _ outputs: Int, bias: Bool = true) -> [(
  name: String, shape: [Int]
)] {
  [("\(prefix).weight", [outputs, inputs])] + (bias ? [("\(prefix).bias", [outputs])] : [])
}

private let models: [NamedModel] = [
  NamedModel(
    name: "CLIP vision",
    mlp: linear("vision_model.encoder.layers.1.mlp.fc1", 4, 6)
      + linear("vision_model.encoder.layers.1.mlp.fc2", 6, 4),
    others: linear("vision_model.encoder.layers.1.self_attn.out_proj", 4, 4),
    module: "vision_model.encoder.layers.1.mlp", maps: ["fc1", "fc2"], activation: "quick_gelu"),
  NamedModel(
    name: "CLIP text, newer prefix",
    mlp: linear("encoder.layers.1.mlp.fc1", 4, 6) + linear("encoder.layers.1.mlp.fc2", 6, 4),
    others: [("embeddings.token_embedding.weight", [9, 4])], module: "encoder.layers.1.mlp",
    maps: ["fc1", "fc2"], activation: "quick_gelu"),
  NamedModel(
    name: "ViT",
    mlp: linear("vit.encoder.layer.1.intermediate.dense", 4, 6)
      + linear("vit.encoder.layer.1.output.dense", 6, 4),
    others: linear("vit.encoder.layer.1.attention.output.dense", 4, 4),
    module: "vit.encoder.layer.1.mlp", maps: ["intermediate.dense", "output.dense"],
    activation: "gelu"),
  NamedModel(
    name: "BERT",
    mlp: linear("bert.encoder.layer.1.intermediate.dense", 4, 6)
      + linear("bert.encoder.layer.1.output.dense", 6, 4),
    others: [
      ("bert.encoder.layer.1.output.LayerNorm.weight", [4]),
      ("bert.encoder.layer.1.attention.output.dense.weight", [4, 4]),
    ], module: "bert.encoder.layer.1.mlp", maps: ["intermediate.dense", "output.dense"],
    activation: "gelu"),
  NamedModel(
    name: "RoBERTa",
    mlp: linear("roberta.encoder.layer.1.intermediate.dense", 4, 6)
      + linear("roberta.encoder.layer.1.output.dense", 6, 4),
    others: [("roberta.embeddings.position_embeddings.weight", [9, 4])],
    module: "roberta.encoder.layer.1.mlp", maps: ["intermediate.dense", "output.dense"],
    activation: "gelu"),
  NamedModel(
    name: "MiniLM",
    mlp: linear("encoder.layer.1.intermediate.dense", 4, 6)
      + linear("encoder.layer.1.output.dense", 6, 4), others: linear("pooler.dense", 4, 4),
    module: "encoder.layer.1.mlp", maps: ["intermediate.dense", "output.dense"],
    activation: "gelu"),
  NamedModel(
    name: "T5 encoder",
    mlp: linear("encoder.block.1.layer.1.DenseReluDense.wi", 4, 6, bias: false)
      + linear("encoder.block.1.layer.1.DenseReluDense.wo", 6, 4, bias: false),
    others: [("encoder.block.1.layer.1.layer_norm.weight", [4]), ("shared.weight", [9, 4])],
    module: "encoder.block.1.layer.1.DenseReluDense", maps: ["wi", "wo"], activation: "relu"),
  NamedModel(
    name: "T5 1.1 decoder",
    mlp: linear("decoder.block.1.layer.2.DenseReluDense.wi_0", 4, 6, bias: false)
      + linear("decoder.block.1.layer.2.DenseReluDense.wi_1", 4, 6, bias: false)
      + linear("decoder.block.1.layer.2.DenseReluDense.wo", 6, 4, bias: false),
    others: linear("decoder.block.1.layer.1.EncDecAttention.k", 4, 4, bias: false),
    module: "decoder.block.1.layer.2.DenseReluDense", maps: ["wi_0", "wi_1", "wo"],
    activation: "gelu_pytorch_tanh"),
  NamedModel(
    name: "GPT-2, whose weights are [in, out]",
    mlp: [
      ("transformer.h.1.mlp.c_fc.weight", [4, 6]), ("transformer.h.1.mlp.c_fc.bias", [6]),
      ("transformer.h.1.mlp.c_proj.weight", [6, 4]), ("transformer.h.1.mlp.c_proj.bias", [4]),
    ],
    others: [("transformer.h.1.attn.c_proj.weight", [4, 4]), ("transformer.wte.weight", [9, 4])],
    module: "transformer.h.1.mlp", maps: ["c_fc", "c_proj"], transposed: true,
    activation: "gelu_pytorch_tanh"),
  NamedModel(
    name: "Llama, Mistral, Qwen, Gemma",
    mlp: linear("model.layers.1.mlp.down_proj", 6, 4, bias: false)
      + linear("model.layers.1.mlp.gate_proj", 4, 6, bias: false)
      + linear("model.layers.1.mlp.up_proj", 4, 6, bias: false),
    others: linear("model.layers.1.self_attn.q_proj", 4, 4, bias: false)
      + [("lm_head.weight", [9, 4])],
    module: "model.layers.1.mlp", maps: ["gate_proj", "up_proj", "down_proj"],
    activation: "silu"),
  NamedModel(
    name: "Phi-3, gate and up in one",
    mlp: linear("model.layers.1.mlp.gate_up_proj", 4, 12, bias: false)
      + linear("model.layers.1.mlp.down_proj", 6, 4, bias: false),
    others: linear("model.layers.1.self_attn.qkv_proj", 4, 12, bias: false),
    module: "model.layers.1.mlp", maps: ["gate_up_proj", "down_proj"], activation: "silu"),
  NamedModel(
    name: "Phi-3, in the order of names",
    mlp: linear("model.layers.1.mlp.down_proj", 6, 4, bias: false)
      + linear("model.layers.1.mlp.gate_up_proj", 4, 12, bias: false),
    others: linear("model.layers.1.self_attn.qkv_proj", 4, 12, bias: false),
    module: "model.layers.1.mlp", maps: ["gate_up_proj", "down_proj"], activation: "silu"),
]

@Suite struct `families of models` {
  @Test(arguments: models)
  func `an MLP is upscaled and comes back from a collapse`(model: NamedModel) throws {
    let small = try SmallFamily(model.mlp + model.others)
    let family = try small.family(experts: 3, base: .bf16)
    let mixture = try small.upscale(family, .init())
    let description = try MixtureDescription(of: mixture)
    let module = try #require(description.modules.first)
    #expect(description.modules.count == 1)
    #expect(module.prefix == model.module)
    #expect(module.width == 4)
    #expect(module.maps == model.maps)
    #expect(module.transposed == model.transposed)
    #expect(description.activation == model.activation)
    #expect(mixture.manifest["\(model.module).gate.fc1.weight"]?.shape == [4, 4])
    for (name, _) in model.others { #expect(mixture.manifest[name] != nil) }

    for (number, expert) in family.experts.enumerated() {
      let plain = try small.collapse(mixture, .expert("expert\(number + 1)"))
      #expect(
        Set(plain.manifest.tensors.map { $0.name })
          == Set((model.mlp + model.others).map { $0.name }))
      for (name, _) in model.mlp {
        #expect(try plain.floats(of: name) == expert.source.floats(of: name), "\(name)")
      }
    }
  }

  @Test func `the parameters of CLIP ViT-B/32 are those that the papers count`() throws {
    // Layers of the vision tower at their real size, all else (with the task head) as one tensor.
    let (width, inside, layers) = (768, 3072, 12)
    var tensors: [TensorInfo] = []
    for layer in 0..<layers {
      let prefix = "vision_model.encoder.layers.\(layer).mlp"
      for (name, shape) in linear("\(prefix).fc1", width, inside)
        + linear("\(prefix).fc2", inside, width)
      {
        tensors.append(try TensorInfo(name: name, dtype: .f32, shape: shape))
      }
    }
    let mlps = tensors.reduce(0) { $0 + $1.elementCount }
    #expect(mlps == 56_669_184)
    tensors.append(try TensorInfo(name: "rest", dtype: .f32, shape: [113_448_705 - mlps]))
    let base = Headers(tensors)
    let counts = try (1...8).map { count in
      let family = try ModelFamily(
        base: base, experts: (1...count).map { .init(name: "\($0)", source: base) })
      return try Upscaling(family, .init()).cost(memory: 0, workers: 1, withTaskVectors: false)
        .parameters
    }
    let millions = counts.map { (Double($0) / 1e4).rounded() / 100 }
    #expect(millions == [177.21, 233.89, 290.57, 347.25, 403.93, 460.61, 517.28, 573.96])
  }

  @Test func `a pattern finds an unknown MLP, and its biases tell how weights are stored`() throws {
    let small = try SmallFamily([
      ("blocks.2.ffn.a.weight", [4, 6]), ("blocks.2.ffn.a.bias", [6]),
      ("blocks.2.ffn.b.weight", [6, 4]), ("blocks.2.ffn.b.bias", [4]),
    ])
    let family = try small.family()
    #expect(throws: MergeError.self) { try Upscaling(family, .init()) }
    var options = Upscaling.Options()
    options.mlps = [try TransformerMLP(pattern: "blocks.{i}.ffn:a,b")]
    let modules = try Upscaling(family, options).description.modules
    #expect(modules.map { $0.prefix } == ["blocks.2.ffn"])
    #expect(modules[0].width == 4 && modules[0].transposed && modules[0].maps == ["a", "b"])
    options.mlps = [try TransformerMLP(pattern: "blocks.{i}.ffn")]
    #expect(try Upscaling(family, options).modules[0].width == 4)
  }

  @Test(arguments: [
    (
      ["blocks.{i}.ffn:a,c,b"],
      "tensor \"blocks.2.ffn.c.weight\": is missing, which --mlp \"blocks.{i}.ffn:a,c,b\" names"
    ),
    (["blocks.{i}.mlp:a,b"], "has no tensors where --mlp \"blocks.{i}.mlp:a,b\" says"),
    (
      ["blocks.{i}.ffn:a,b", "blocks.{i}.mlp:a,b"],
      "has no tensors where --mlp \"blocks.{i}.mlp:a,b\" says"
    ),
  ])
  func `what a pattern names must be there`(patterns: [String], reason: String) throws {
    let small = try SmallFamily([
      ("blocks.2.ffn.a.weight", [6, 4]), ("blocks.2.ffn.b.weight", [4, 6]),
    ])
    var options = Upscaling.Options()
    options.mlps = try patterns.map { try TransformerMLP(pattern: $0) }
    let family = try small.family()
    let error = #expect(throws: (any Error).self) { try Upscaling(family, options) }
    #expect("\(error!)".contains(reason), "\(error!)")
  }

  @Test(arguments: ["", "blocks.ffn", "a.{i}.b.{i}", "blocks.{i}.ffn:", "blocks.{i}.ffn:a,,b"])
  func `a pattern that is none is refused`(pattern: String) {
    #expect(throws: MergeError.self) { try TransformerMLP(pattern: pattern) }
  }

  @Test func `only the layers asked for become modules; the others are merged`() throws {
    let small = try SmallFamily(
      (0..<3).flatMap {
        linear("encoder.layers.\($0).mlp.fc1", 4, 6) + linear("encoder.layers.\($0).mlp.fc2", 6, 4)
      })
    var options = Upscaling.Options()
    options.layers = [1]
    let mixture = try small.upscale(small.family(), options)
    #expect(
      try MixtureDescription(of: mixture).modules.map { $0.prefix } == ["encoder.layers.1.mlp"])
    #expect(mixture.manifest["encoder.layers.0.mlp.fc1.weight"] != nil)
    options.layers = [1, 7]
    #expect(throws: MergeError.self) { try Upscaling(small.family(), options) }
  }

  @Test(arguments: ["{", "[4]", ""])
  func `a configuration beside the base that is none is refused by name`(text: String) throws {
    let small = try SmallFamily(SmallFamily.clip)
    let path = small.folder("config.json")
    try Data(text.utf8).write(to: URL(filePath: path))
    #expect(
      throws: CheckpointError(
        file: path, "is not a model's configuration: it is not a JSON object",
        remedy: "mend it or take it away")
    ) { try Upscaling(small.family(), .init()) }
    var options = Upscaling.Options()
    options.activation = .relu
    #expect(throws: Never.self) { try Upscaling(small.family(), options) }
  }

  @Test func `a gate and a first map that are stored as one are both`() throws {
    let small = try SmallFamily([
      ("mlp.gate_up_proj.weight", [12, 4]), ("mlp.gate_proj.weight", [6, 4]),
      ("mlp.up_proj.weight", [6, 4]), ("mlp.down_proj.weight", [4, 6]),
    ])
    let model = try small.open(0) { tensors in
      let both = tensors[1].values + tensors[2].values
      return try [SmallTensor("mlp.gate_up_proj.weight", [12, 4], both)] + tensors[1...]
    }
    let fused = try MLPWeights(
      of: model, prefix: "mlp", maps: ["gate_up_proj", "down_proj"], isTransposed: false)
    let apart = try MLPWeights(
      of: model, prefix: "mlp", maps: ["gate_proj", "up_proj", "down_proj"], isTransposed: false)
    #expect(fused != nil && fused?.gate != nil)
    #expect(fused == apart)
  }

  @Test func `experts of other types than the base's are merged in its type`() throws {
    let small = try SmallFamily(SmallFamily.clip)
    let mixture = try small.upscale(small.family(base: .bf16, expert: .f32), .init())
    let name = "\(SmallFamily.mlp).task_vectors.0.fc1.weight"
    #expect(mixture.manifest[name]?.dtype == .bf16)
    let (base, expert) = (
      try small.open(0, dtype: .bf16).floats(of: "\(SmallFamily.mlp).fc1.weight"),
      try small.open(1).floats(of: "\(SmallFamily.mlp).fc1.weight")
    )
    var expected = zip(expert, base).map { $0 - $1 }
    var span = expected.mutableSpan
    DType.bf16.round(&span)
    #expect(try mixture.floats(of: name) == expected)
  }
}

@Suite struct `families with gaps` {
  let small: SmallFamily

  init() throws {
    small = try SmallFamily([
      ("bert.embeddings.word_embeddings.weight", [9, 4]),
      ("bert.encoder.layer.0.intermediate.dense.weight", [6, 4]),
      ("bert.encoder.layer.0.output.dense.weight", [4, 6]),
      ("cls.predictions.decoder.weight", [9, 4]),
      ("classifier.weight", [2, 4]),
    ])
  }

  private func family(
    _ change: ([SmallTensor]) throws -> [SmallTensor]
  ) throws -> ModelFamily {
    try ModelFamily(
      base: small.open(0), experts: [.init(name: "odd", source: small.open(1, change))])
  }

  @Test func `names may have a word in front, or lack it`() throws {
    let family = try family {
      try $0.map { try SmallTensor("model.\($0.info.name)", $0.info.shape, $0.values) }
    }
    #expect(family.remarks.map { $0.rule } == [.prefix("model.")])
    let other = try self.family {
      try $0.map {
        let name = $0.info.name
        return try SmallTensor(
          name.hasPrefix("bert.") ? String(name.dropFirst(5)) : name, $0.info.shape, $0.values)
      }
    }
    #expect(other.remarks.map { $0.rule } == [.prefix("bert.")])
    #expect(
      other.counterpart(of: "bert.encoder.layer.0.output.dense.weight", in: 0)?.name
        == "encoder.layer.0.output.dense.weight")
  }

  @Test func `a tied output layer follows the embedding`() throws {
    let family = try family { $0.filter { !$0.info.name.hasPrefix("cls.") } }
    #expect(
      family.remarks == [
        .init(expert: "odd", rule: .tied, tensors: ["cls.predictions.decoder.weight"])
      ])
    let mixture = try small.upscale(family, .init())
    let base = try family.base.floats(of: "cls.predictions.decoder.weight")
    let embedding = try family.experts[0].source.floats(
      of: "bert.embeddings.word_embeddings.weight")
    #expect(
      try mixture.floats(of: "cls.predictions.decoder.weight")
        == zip(base, embedding).map { $0 + Float(0.3) * ($1 - $0) })
  }

  @Test func `a tensor that an expert lacks counts as unchanged`() throws {
    let family = try family {
      $0.filter { $0.info.name != "bert.embeddings.word_embeddings.weight" }
    }
    #expect(family.remarks.map { $0.rule } == [.absent])
    let mixture = try small.upscale(family, .init())
    let name = "bert.embeddings.word_embeddings.weight"
    #expect(try mixture.floats(of: name) == family.base.floats(of: name))
  }

  @Test func `heads of other shapes are kept apart if asked, and come back`() throws {
    let head = filler(3, count: 20).map { Float($0) }
    let family = try family {
      try $0.filter { $0.info.name != "classifier.weight" } + [
        SmallTensor("classifier.weight", [5, 4], head), SmallTensor("extra.bias", [1], [2]),
      ]
    }
    #expect(family.remarks.map { $0.rule } == [.otherHead, .leftOut])
    #expect(try small.upscale(family, .init()).manifest["classifier.weight"]?.shape == [2, 4])
    var options = Upscaling.Options()
    options.keepsHeads = true
    let mixture = try small.upscale(family, options, name: "heads")
    #expect(try mixture.floats(of: "experts.odd.classifier.weight") == head)
    let plain = try small.collapse(mixture, .expert("odd"))
    #expect(try plain.floats(of: "classifier.weight") == head)
    #expect(try plain.floats(of: "extra.bias") == [2])
  }

  @Test func `an expert that lacks most of the base is refused`() throws {
    #expect(throws: CheckpointError.self) { try family { Array($0.prefix(1)) } }
  }

  @Test func `an expert without the MLP is refused by tensor`() throws {
    let family = try family { $0.filter { !$0.info.name.contains("output.dense") } }
    #expect(
      throws: CheckpointError(
        file: small.folder("model1.safetensors"),
        tensor: "bert.encoder.layer.0.output.dense.weight", "is missing")
    ) { try Upscaling(family, .init()) }
  }
}

/// A model of which only the headers matter.
private struct Headers: TensorSource {
  let path = "headers"
  let manifest: Manifest
  init(_ tensors: [TensorInfo]) { manifest = Manifest(tensors) }
  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan) {
    Issue.record("nothing is read to count")
  }
}
