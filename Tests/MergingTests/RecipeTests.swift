import Checkpoints
import Synchronization
import TestSupport
import Testing

@testable import Merging

/// The recipe language: what is understood, and what is refused on which line.
struct RecipeTests {
  private func parse(_ text: String) throws -> Recipe { try Recipe(parsing: text, file: "r.yml") }

  @Test func `a recipe of models is read with all its scopes`() throws {
    let recipe = try parse(
      """
      merge_method: ties
      base_model: base
      models:
        - model: a
          parameters:
            density: [0.1, 0.9]
            weight:
              - filter: mlp
                value: 0.5
              - value: 1e-1
        - model: {model: {path: b}}
      parameters:
        weight: "2"
        normalize: false
        int8_mask: true
      dtype: bfloat16
      out_dtype: float32
      """)
    #expect(recipe.method.name == "ties")
    #expect(recipe.models == ["a", "b", "base"])
    #expect(recipe.dtype == .bf16)
    #expect(recipe.outputType == .f32)
    guard case .models(let sources) = recipe.inputs else { return #expect(Bool(false)) }
    let own = sources[0].parameters
    #expect(own.value("density", for: "x", t: 0.25) == .number(0.75 * 0.1 + 0.25 * 0.9))
    #expect(own.value("weight", for: "layers.0.mlp.up", t: 0) == .number(0.5))
    #expect(own.value("weight", for: "layers.0.attn", t: 0) == .number(0.1))
    #expect(recipe.parameters.value("weight", for: "x", t: 0) == .number(2))
    #expect(recipe.parameters.value("normalize", for: "x", t: 0) == .flag(false))
  }

  @Test func `JSON is read as well, tabs and all`() throws {
    let recipe = try parse(
      """
      {
      \t"merge_method": "linear",
      \t"models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}],
      \t"parameters": {"weight": 0.5}
      }
      """)
    #expect(recipe.models == ["a", "b"])
  }

  @Test(arguments: MergeMethod.all.map { $0.name })
  func `int8_mask is accepted for every method, wherever it stands`(method: String) throws {
    let recipe = try parse(
      """
      merge_method: \(method)
      base_model: a
      models: [{model: b, parameters: {int8_mask: true}}]
      parameters: {int8_mask: true}
      """)
    #expect(recipe.parameters.value("int8_mask", for: "x", t: 0) == .flag(true))
  }

  @Test(arguments: [
    (0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0), (0.125, 0.125),
  ])
  func `a gradient is linear between its values`(t: Double, expected: Double) throws {
    let recipe = try parse(
      """
      merge_method: slerp
      base_model: a
      models: [{model: a}, {model: b}]
      parameters: {t: [0, 0.25, 0.5, 0.75, 1]}
      """)
    #expect(recipe.parameters.value("t", for: "x", t: t) == .number(expected))
  }

  static let mistakes: [(text: String, error: String)] = [
    ("", "r.yml, line 1: is empty"),
    ("models: [{model: a}]", "r.yml, line 1: the recipe has no merge_method"),
    (
      "merge_method: tise\nmodels: [{model: a}]",
      "r.yml, line 1: there is no method \"tise\"; did you mean ties?"
    ),
    (
      "merge_method: linear\nmodles: [{model: a}]",
      "r.yml, line 2: a recipe has no key \"modles\"; did you mean models?"
    ),
    (
      "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      wieght: 1",
      "r.yml, line 5: linear has no parameter \"wieght\"; did you mean weight?"
    ),
    (
      "merge_method: ties\nbase_model: a\nmodels:\n  - model: b\n    parameters:\n      normalize: false",
      "r.yml, line 6: normalize is one for all models and stands under a single one; move it to the parameters of the recipe or of the slice"
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: heavy}",
      "r.yml, line 3: weight must be a number, not \"heavy\""
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\nparameters: {normalize: maybe}",
      "r.yml, line 3: normalize must be true or false, not \"maybe\""
    ),
    (
      "merge_method: ties\nmodels: [{model: a}]",
      "r.yml, line 1: ties needs a base_model; name the model the others were fine-tuned from"
    ),
    (
      "merge_method: linear",
      "r.yml, line 1: the recipe has neither models nor slices"
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\nslices: []",
      "r.yml, line 3: the recipe has models and slices; keep one of them"
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: union",
      "r.yml, line 3: a tokenizer of the union of all vocabularies is not supported; use base or the path of a model"
    ),
    (
      "{\n\t\"merge_method\": \"linear\",\n\t\"models\": [\n\t\t{\"model\": \"a\",\n\t\t \"parameters\": {\n\t\t\t\"wieght\": 1}}]}",
      "r.yml, line 6: linear has no parameter \"wieght\"; did you mean weight?"
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\nchat_template: llama3",
      "r.yml, line 3: chat_template \"llama3\" is not known; write the template itself, auto, or chatml, or leave it out to keep the model's own"
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\ntokenizer:\n  source: base\n  tokens: {x: {source: a}}",
      "r.yml, line 5: tokenizer.tokens is not supported; change the models' vocabularies before they are merged"
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\ntokenizer:\n  source: a\n  pad_to_multiple_of: 8",
      "r.yml, line 5: tokenizer.pad_to_multiple_of is not supported; change the models' vocabularies before they are merged"
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: base\ntokenizer: {source: a}",
      "r.yml, line 4: the recipe has tokenizer and tokenizer_source; keep one of them"
    ),
    (
      "merge_method: linear\nmodels:\n  - model:\n      model: a\n      lora: b",
      "r.yml, line 5: lora is not supported; merge it into its base first"
    ),
    (
      "merge_method: linear\nmodels:\n  - model:\n      model: {path: a, revision: main}",
      "r.yml, line 4: a revision is not supported; name the folder it is in"
    ),
    (
      "merge_method: linear\nslices:\n  - sources: [{model: a, layer_range: [0, 1]}]\n    residual_weight: 1",
      "r.yml, line 4: residual_weight is not supported; mergekit ignores it as well"
    ),
    (
      "merge_method: linear\nmodels: [{model: a}]\ndtype: int8",
      "r.yml, line 3: \"int8\" is not a type that can be computed with; known are bfloat16, float16, float32, float64"
    ),
    (
      "merge_method: linear\nmodels: [{model: a+b}]",
      "r.yml, line 2: \"a+b\" names a LoRA, which is not supported; merge it into its base first"
    ),
    (
      "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [3, 1]}]",
      "r.yml, line 3: layer_range must be two rising layer numbers; [0, 16] takes layers 0 to 15"
    ),
    (
      "merge_method: linear\nmodules: {}",
      "r.yml, line 2: models of several parts (modules) are not supported; merge each part by a recipe of its own"
    ),
    (
      "merge_method: linear\nmodels:\n  - model: a\n    model: b",
      "r.yml, line 3: is not valid YAML: a key occurs twice: \"model\""
    ),
    ("merge_method: [", "r.yml, line 2: is not valid YAML"),
    (
      String(repeating: "[", count: 200000), "r.yml, line 1: is nested more than 100 levels deep"
    ),
  ]

  @Test(arguments: mistakes)
  func `a mistake is refused with its line`(text: String, error: String) throws {
    do {
      _ = try parse(text)
      Issue.record("nothing was refused in \(text)")
    } catch {
      #expect("\(error)".hasPrefix(self.expected(text)))
    }
  }

  private func expected(_ text: String) -> String {
    Self.mistakes.first { $0.text == text }!.error
  }
}

/// Plans: what comes out, from what, and what is refused before any data is read.
struct MergePlanTests {
  private func model(
    _ layers: Int, path: String = "m", _ change: (inout [(String, [Int], DType)]) -> Void = { _ in }
  ) throws -> MemorySource {
    var tensors: [(String, [Int], DType)] = [("model.embed_tokens.weight", [3, 2], .f32)]
    for layer in 0..<layers {
      tensors.append(("model.layers.\(layer).mlp.up_proj.weight", [2, 2], .f32))
    }
    tensors.append(("model.norm.weight", [2], .f32))
    tensors.append(("lm_head.weight", [3, 2], .f32))
    change(&tensors)
    var number: Float = 0
    return MemorySource(
      try tensors.map { name, shape, dtype in
        let values = (0..<shape.reduce(1, *)).map { _ in
          number += 1
          return number
        }
        return try SmallTensor(name, shape, dtype: dtype, values)
      }, path: path)
  }

  private func plan(_ text: String, _ models: [MemorySource]) throws -> MergePlan {
    try MergePlan(Recipe(parsing: text, file: "r.yml"), models: models)
  }

  @Test func `slices rename layers and take head and embeddings from the ends`() throws {
    let plan = try plan(
      """
      merge_method: passthrough
      slices:
        - sources: [{model: a, layer_range: [0, 2]}]
        - sources: [{model: b, layer_range: [1, 3]}]
      """, [model(3, path: "a"), model(3, path: "b")])
    #expect(plan.layerCount == 4)
    #expect(
      plan.manifest.tensors.map { $0.name } == [
        "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight",
      ])
    let origins = plan.tasks.map { task -> String in
      guard case .copy(let place) = task.work else { return "computed" }
      return "\(place.source) \(place.tensor.name)"
    }
    #expect(
      origins == [
        "0 model.embed_tokens.weight", "0 model.layers.0.mlp.up_proj.weight",
        "0 model.layers.1.mlp.up_proj.weight", "1 model.layers.1.mlp.up_proj.weight",
        "1 model.layers.2.mlp.up_proj.weight", "1 model.norm.weight", "1 lm_head.weight",
      ])
  }

  @Test func `a layer range beyond the model is refused`() throws {
    #expect(
      throws: RecipeError(
        file: "r.yml", line: 3, problem: "layer_range ends at 5 but a has 3 layers", remedy: nil)
    ) {
      try plan(
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 5]}]",
        [model(3, path: "a")])
    }
  }

  @Test func `a filter in a slice looks at the layer's number in the model`() throws {
    let models = try [model(2, path: "a"), model(1, path: "b")]
    let plan = try plan(
      """
      merge_method: linear
      slices:
        - sources:
            - model: a
              layer_range: [1, 2]
              parameters: {weight: [{filter: layers.1., value: 3}, {value: 1}]}
            - model: b
              layer_range: [0, 1]
              parameters: {weight: [{filter: layers.1., value: 3}, {value: 1}]}
      parameters: {normalize: false}
      """, models)
    let sink = MemorySink(plan.manifest.tensors)
    try plan.run(into: sink, memory: 1 << 20, workers: 1)
    let name = "model.layers.0.mlp.up_proj.weight"
    let values = try zip(
      models[0].floats(of: "model.layers.1.mlp.up_proj.weight"), models[1].floats(of: name))
    #expect(sink.floats(of: plan.manifest[name]!) == values.map { 3 * $0 + $1 })
  }

  @Test(arguments: [1, 2, 3], ["ties", "sce", "arcee_fusion", "slerp"])
  func `a plan's memory is within the budget`(workers: Int, method: String) throws {
    let models = try ["a", "b", "c", "d"].map { try Headers(path: $0, count: 1 << 20) }
    let isPair = ["arcee_fusion", "slerp"].contains(method)
    let plan = try MergePlan(
      Recipe(
        parsing: """
          merge_method: \(method)
          base_model: a
          models: [{model: b}\(isPair ? "" : ", {model: c}, {model: d}")]
          \(method == "slerp" ? "parameters: {t: 0.5}" : "")
          \(method == "ties" ? "parameters: {weight: 1, density: 0.5}" : "")
          \(method == "sce" ? "parameters: {select_topk: 0.5}" : "")
          """, file: "r.yml"), models: Array(models.prefix(isPair ? 2 : 4)))
    // What fits the inputs alone does not fit the tiles and counters beside them.
    for budget in [plan.tasks[0].inputByteCount, 16 << 20, 32 << 20] {
      let memory = workers * budget
      #expect(plan.cost(memory: memory, workers: workers).memory <= memory, "\(budget)")
    }
  }

  private final class Sum: Sendable {
    private let total = Mutex(0)

    var value: Int { total.withLock { $0 } }
    func add(_ number: Int) { total.withLock { $0 += number } }
  }

  /// Tensors that are never read.
  private struct Headers: TensorSource {
    let path: String
    let manifest: Manifest

    init(path: String, count: Int) throws {
      self.path = path
      manifest = Manifest([try TensorInfo(name: "weight", dtype: .bf16, shape: [count >> 8, 256])])
    }

    func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
      throws(CheckpointError)
    {
      preconditionFailure("a plan reads no data")
    }
  }

  @Test(arguments: [1 << 20, 1 << 26])
  func `progress tells of every byte that the plan counts`(memory: Int) throws {
    let plan = try plan(
      """
      merge_method: ties
      base_model: a
      models: [{model: b}, {model: c}]
      parameters: {weight: 1, density: 0.5}
      """, ["b", "c", "a"].map { try model(3, path: $0) })
    let done = Sum()
    try plan.run(
      into: MemorySink(plan.manifest.tensors), memory: memory, workers: 2
    ) {
      done.add($0.bytesRead + $0.bytesWritten)
    } didObserve: { _, bytes in
      done.add(bytes)
    }
    let cost = plan.cost(memory: memory, workers: 2)
    #expect((cost.tensorsReadAgain > 0) == (memory == 1 << 20))
    #expect(done.value == cost.bytesRead + cost.bytesWritten)
  }

  @Test(arguments: [1 << 20, 1 << 26])
  func `what a resumed merge has left to do is counted without what is finished`(memory: Int) throws
  {
    let plan = try plan(
      """
      merge_method: ties
      base_model: a
      models: [{model: b}, {model: c}]
      parameters: {weight: 1, density: 0.5}
      """, ["b", "c", "a"].map { try model(3, path: $0) })
    let finished = Set(
      plan.tasks.indices.filter { $0.isMultiple(of: 2) }
        .map { Chunk(task: $0, elements: 0..<plan.tasks[$0].output.elementCount) })
    let done = Sum()
    try plan.run(
      into: MemorySink(plan.manifest.tensors), memory: memory, workers: 2, finished: finished
    ) {
      done.add($0.bytesRead + $0.bytesWritten)
    } didObserve: { _, bytes in
      done.add(bytes)
    }
    let whole = plan.cost(memory: memory, workers: 2)
    let cost = plan.cost(memory: memory, workers: 2, finished: finished)
    #expect(done.value == cost.bytesRead + cost.bytesWritten)
    #expect(cost.bytesWritten > 0 && cost.bytesWritten < whole.bytesWritten)
  }

  static let linear = """
    merge_method: linear
    models: [{model: a}, {model: b}]
    parameters: {weight: 1}
    """

  @Test func `a tensor that a model lacks is refused by file and name`() throws {
    #expect(
      throws: CheckpointError(
        file: "b", tensor: "model.norm.weight",
        "is missing, but other models of the recipe have it",
        remedy: "merge models of the same architecture")
    ) {
      try plan(
        Self.linear,
        [model(1, path: "a"), model(1, path: "b") { $0.removeAll { $0.0 == "model.norm.weight" } }])
    }
  }

  @Test func `another shape is refused by file and name`() throws {
    #expect(
      throws: CheckpointError(
        file: "b", tensor: "model.norm.weight",
        "has the shape [3] where another model has [2]")
    ) {
      try plan(
        Self.linear, [model(1, path: "a"), model(1, path: "b") { $0[2].1 = [3] }])
    }
  }

  @Test func `a missing weight is refused with the tensor and the model`() throws {
    #expect(
      throws: RecipeError(
        file: "r.yml", line: 2,
        problem:
          "linear needs weight, which is not set for tensor \"model.embed_tokens.weight\" of a",
        remedy: "set it under parameters")
    ) {
      try plan(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]",
        [model(1, path: "a"), model(1, path: "b")])
    }
  }

  @Test func `a head tied to the embedding takes part in a merge with one that is not`() throws {
    let plan = try plan(
      Self.linear, [model(1), model(1) { $0.removeAll { $0.0 == "lm_head.weight" } }])
    guard case .merge(_, let inputs, _, _) = plan.tasks.last!.work else {
      return #expect(Bool(false))
    }
    #expect(inputs.map { $0.tensor.name } == ["lm_head.weight", "model.embed_tokens.weight"])
  }

  @Test func `tied models give a tied result, which is said`() throws {
    let plan = try plan(
      Self.linear,
      [model(1, path: "a") { $0.removeAll { $0.0 == "lm_head.weight" } }, model(1, path: "b")])
    #expect(plan.manifest["lm_head.weight"] == nil)
    #expect(
      plan.notes == [
        "b has \"lm_head.weight\", which is left out: a has its embeddings tied"
      ])
  }

  @Test func `a tensor that only another model has is kept, which is said`() throws {
    let plan = try plan(
      Self.linear, [model(1, path: "a"), model(1, path: "b") { $0.append(("extra", [2], .f32)) }])
    #expect(plan.manifest["extra"]?.shape == [2])
    #expect(plan.notes == ["copied as they are, only b has 1 tensors: \"extra\""])
  }

  @Test func `quantised weights are refused for arithmetic`() throws {
    #expect(
      throws: CheckpointError(
        file: "a", tensor: "model.norm.weight",
        "is quantised (F8_E4M3), and its numbers mean nothing without their scales",
        remedy: "merge models in BF16, F16 or F32")
    ) {
      try plan(
        Self.linear, ["a", "b"].map { try model(1, path: $0) { $0[2].2 = .f8E4M3 } })
    }
  }

  @Test func `gradients run over the layers and start at the embeddings`() throws {
    let plan = try plan(
      """
      merge_method: linear
      models: [{model: a}, {model: b}]
      parameters: {weight: [0, 1], normalize: false}
      """, [model(5), model(5)])
    let sink = MemorySink(plan.manifest.tensors)
    try plan.run(into: sink, memory: 1 << 20, workers: 1)
    let ratios = plan.tasks.map { task -> Float in
      guard case .merge(_, let inputs, _, _) = task.work else { return -1 }
      return sink.floats(of: task.output)[0]
        / (2 * MemorySource.first(of: inputs[0].tensor, in: plan.sources[0]))
    }
    #expect(ratios == [0, 0, 0.25, 0.5, 0.75, 1, 0, 0])
  }
}

extension MemorySource {
  /// The first element of a tensor.
  static func first(of tensor: TensorInfo, in source: any TensorSource) -> Float {
    (try? source.floats(of: tensor.name))?[0] ?? .nan
  }
}
