import Checkpoints
import Synchronization
import TestSupport
import Testing

@testable import Merging

/// `task_vectors: {clean: …}` in a recipe, against cleaning first and merging then.
struct CleanedMergeTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  /// Writes a base and three experts, named by their paths.
  private func models(dtype: DType = .f32) throws -> [String] {
    try (0...3).map { number in
      let path = folder("model\(number).safetensors")
      try Checkpoint.write(DisentanglingTests.model(number, dtype: dtype, seed: 3), to: path)
      return path
    }
  }

  private func recipe(_ method: String, _ models: [String], extra: String = "") throws -> Recipe {
    let experts = models.dropFirst().map { "  - model: \($0)\n" }.joined()
    return try Recipe(
      parsing: """
        merge_method: \(method)
        base_model: \(models[0])
        models:
        \(experts)
        \(extra)
        """, file: "r.yml")
  }

  private func merge(
    _ recipe: Recipe, memory: Int = 1 << 24, workers: Int = 2
  ) throws -> (result: [String: [Float]], summary: DisentanglementSummary?) {
    let plan = try MergePlan(recipe, models: recipe.models.map { try Checkpoint.open($0) })
    let sink = MemorySink(plan.manifest.tensors)
    let summary = try plan.run(into: sink, memory: memory, workers: workers)
    let result = plan.manifest.tensors.map { ($0.name, sink.floats(of: $0)) }
    return (Dictionary(uniqueKeysWithValues: result), summary)
  }

  /// Cleans into models of Float, whose paths stand for the experts'.
  private func cleaned(_ models: [String], _ cleaning: Cleaning) throws -> (
    models: [String], summary: DisentanglementSummary
  ) {
    var options = Disentangling.Options()
    options.cleaning = cleaning
    options.form = .models
    options.dtype = .f32
    let family = try ModelFamily(
      base: Checkpoint.open(models[0]),
      experts: models.dropFirst().enumerated().map {
        .init(name: "e\($0)", source: try Checkpoint.open($1))
      })
    let plan = try Disentangling(family, options)
    let paths = plan.manifests.indices.map { folder("cleaned\($0).safetensors") }
    let sinks = try zip(paths, plan.manifests).map { try Checkpoint.create($0, $1) }
    let summary = try plan.run(into: sinks, memory: 1 << 24, workers: 2)
    for sink in sinks { try sink.finish() }
    return ([models[0]] + paths, summary)
  }

  static let methods = [
    ("task_arithmetic", "parameters: {weight: 0.4}"),
    ("task_arithmetic", "parameters: {weight: 0.4, lambda: 0.5, normalize: true}"),
    ("ties", "parameters: {weight: 1, density: 0.6}"),
    ("dare_linear", "parameters: {weight: 0.5, density: 0.7}"),
    ("della", "parameters: {weight: 0.5, density: 0.5, epsilon: 0.2}"),
    ("model_stock", ""),
    ("sce", "parameters: {select_topk: 0.7}"),
  ]
  static let cleanings = [
    "awd-row,rate=1e-2", "awd-row,optimizer=converged", "awd-model,scope=tensor,penalty=0.01",
    "awd-model,scope=block,optimizer=converged", "awd-model,penalty=0.01",
  ]

  @Test(arguments: methods, cleanings)
  func `it is the same as cleaning first and merging then`(
    method: (name: String, parameters: String), text: String
  ) throws {
    let models = try models()
    let own = try merge(
      recipe(
        method.name, models, extra: "task_vectors: {clean: \"\(text)\"}\n\(method.parameters)"))
    let (paths, summary) = try cleaned(models, Cleaning(text))
    let plain = try merge(recipe(method.name, models, extra: method.parameters)).result
    let expected = try merge(recipe(method.name, paths, extra: method.parameters)).result
    var changed = 0
    for (name, values) in own.result {
      // A threshold may fall between two magnitudes that rounding exchanges.
      let different = zip(values, expected[name]!).count { abs($0 - $1) > 2e-6 }
      #expect(different <= (method.name == "ties" || method.name == "sce" ? 4 : 0), "\(name)")
      changed += zip(values, plain[name]!).count { abs($0 - $1) > 1e-4 }
    }
    #expect(changed > 100)
    let whole = try #require(own.summary).whole
    #expect(abs(whole.meanCosineAfter - summary.whole.meanCosineAfter) < 1e-5)
    #expect(whole.groups == summary.whole.groups)
  }

  @Test(arguments: ["task_arithmetic", "ties", "della", "sce"], cleanings)
  func `the budget and the number of workers do not change the result`(
    method: String, text: String
  ) throws {
    let models = try models(dtype: .bf16)
    var parameters = "parameters: {weight: 0.5, density: 0.5}"
    if method == "sce" { parameters = "parameters: {select_topk: 0.5}" }
    if method == "della" { parameters = "parameters: {weight: 0.5, density: 0.5, epsilon: 0.2}" }
    let recipe = try recipe(
      method, models, extra: "task_vectors: {clean: \"\(text)\"}\n\(parameters)")
    let one = try merge(recipe).result
    for (memory, workers) in [(1 << 12, 1), (1 << 14, 3), (1 << 22, 2)] {
      #expect(try merge(recipe, memory: memory, workers: workers).result == one)
    }
  }

  @Test func `task arithmetic of cleaned vectors has the coefficients of the identity`() throws {
    let models = try models()
    let clean = "task_vectors: {clean: {scope: model, optimizer: converged}}\n"
    let own = try merge(
      recipe("task_arithmetic", models, extra: clean + "parameters: {weight: 0.4}"))
    let a = try #require(own.summary?.groups.first?.coefficients)
    let weights = a.map { 0.4 * (1 - 3 * $0) }
    let parameters = zip(models.dropFirst(), weights).map {
      "  - {model: \($0), parameters: {weight: \($1)}}\n"
    }
    let expected = try merge(
      Recipe(
        parsing:
          "merge_method: task_arithmetic\nbase_model: \(models[0])\nmodels:\n\(parameters.joined())",
        file: "r.yml"))
    for (name, values) in own.result {
      for (value, wanted) in zip(values, expected.result[name]!) {
        #expect(abs(value - wanted) < 1e-6)
      }
    }
  }

  @Test func `a plan says what is cleaned and what it takes`() throws {
    let models = try models()
    let sources = try models.map { try Checkpoint.open($0) }
    func plan(_ clean: String) throws -> MergePlan {
      let recipe = try recipe(
        "task_arithmetic", models,
        extra: "task_vectors: {clean: \(clean)}\nparameters: {weight: 0.4}")
      return try MergePlan(recipe, models: sources.dropFirst() + [sources[0]])
    }
    let (rows, model) = (try plan("awd-row"), try plan("awd-model"))
    #expect(rows.cleaning!.explanation.hasPrefix("cleans the task vectors of 3 tensors by awd-row"))
    #expect(rows.manifest.metadata["cleaning"]!.hasPrefix("awd-row scope=row"))
    let costs = [rows, model].map { $0.cost(memory: 1 << 24, workers: 2) }
    #expect(costs.map { $0.passes } == [1, 2])
    #expect(costs[1].bytesRead == costs[0].bytesRead)
    let little = model.cost(memory: 1 << 14, workers: 2)
    #expect(little.bytesRead == 2 * costs[0].bytesRead)
    #expect(little.cleaning.groupsReadTwice == 1)
    let enough = little.cleaning.sufficientMemory
    #expect(model.cost(memory: enough, workers: 2).cleaning.groupsReadTwice == 0)
    #expect(model.cost(memory: enough - 16, workers: 2).cleaning.groupsReadTwice == 1)
    #expect(rows.tasks.map { $0.explanation }.contains("4 inputs, cleaned, 1 pass"))
    #expect(model.tasks.map { $0.explanation }.contains("4 inputs, cleaned, 2 passes"))
  }

  @Test(arguments: ["tensor", "block", "model"], ["task_arithmetic", "ties"])
  func `what fits is read once, and what does not as often as the plan says`(
    scope: String, method: String
  ) throws {
    let recipe = try recipe(
      method, models(dtype: .bf16),
      extra: "task_vectors: {clean: {scope: \(scope)}}\nparameters: {weight: 0.4}")
    let sources = try recipe.models.map { CountingSource(try Checkpoint.open($0)) }
    let plan = try MergePlan(recipe, models: sources)
    for memory in [1 << 20, 1 << 13] {
      let cost = plan.cost(memory: memory, workers: 2)
      #expect((cost.bytesRead == cost.bytesMerged) == (memory == 1 << 20))
      let before = sources.reduce(0) { $0 + $1.bytesRead }
      let sink = MemorySink(plan.manifest.tensors)
      let told = Mutex(0)
      try plan.run(into: sink, memory: memory, workers: 2) { chunk in
        told.withLock { $0 += chunk.bytesRead }
      } didObserve: { _, bytes in
        told.withLock { $0 += bytes }
      }
      let read = sources.reduce(0) { $0 + $1.bytesRead } - before
      // A threshold may be found in fewer passes than planned for.
      #expect(
        method == "ties" && memory < 1 << 20 ? read <= cost.bytesRead : read == cost.bytesRead)
      #expect(told.withLock { $0 } == cost.bytesRead)
    }
  }

  @Test func `a recipe says all that can be set`() throws {
    let recipe = try recipe(
      "ties", ["b", "x", "y"],
      extra: """
        task_vectors:
          clean: {scope: block, objective: squared, alpha: 0.5, optimizer: sgd, rate: 0.2,
                  iterations: 9, include: "*.weight", exclude: [a, "b*"]}
        parameters: {weight: 1}
        """)
    var expected = try Cleaning(
      "awd-model,scope=block,objective=squared,penalty=0.5,optimizer=sgd,rate=0.2,iterations=9")
    expected.include = ["*.weight"]
    expected.exclude = ["a", "b*"]
    #expect(recipe.cleaning == expected)
  }

  @Test(arguments: [
    (
      "ties", "{}", "task_vectors has no clean"
    ),
    (
      "ties", "{clean: awd-column}",
      "there is no cleaning preset \"awd-column\"; known are awd-model, awd-row"
    ),
    ("ties", "{clean: {rates: 1}}", "clean has no key \"rates\"; did you mean rate?"),
    ("ties", "{clean: {rate: fast}}", "rate is a number of at least 0, not \"fast\""),
    (
      "ties", "{clean: {optimizer: converged, rate: 1}}", "the converged optimizer has no rate"
    ),
    (
      "ties", "{clean: {alpha: 0.1, optimizer: converged}}",
      "the converged optimizer has no alpha; it stops at the nearest redundant vector by itself; a descent (gd, sgd) takes a penalty"
    ),
    (
      "linear", "{clean: awd-row}",
      "linear works on whole weights and has no task vectors to clean; methods that have them are task_arithmetic, ties, dare_ties, dare_linear, della, della_linear, breadcrumbs, breadcrumbs_ties, nuslerp, multislerp, model_stock, nearswap, sce, ram, ramplus_tl"
    ),
  ])
  func `what cannot be cleaned is refused with its line`(
    method: String, clean: String, problem: String
  ) throws {
    let error = #expect(throws: RecipeError.self) {
      try recipe(method, ["b", "x", "y"], extra: "task_vectors: \(clean)\nparameters: {weight: 1}")
    }
    #expect(error?.description == "r.yml, line 7: \(problem)")
  }

  @Test func `one expert alone and a missing base are one sentence`() throws {
    let models = try models()
    let clean = "task_vectors: {clean: awd-row}\nparameters: {weight: 1}\n"
    func error(_ text: String) -> RecipeError? {
      #expect(throws: RecipeError.self) {
        let recipe = try Recipe(parsing: text, file: "r.yml")
        _ = try MergePlan(recipe, models: recipe.models.map { try Checkpoint.open($0) })
      }
    }
    let alone = error(
      "merge_method: ties\nbase_model: \(models[0])\nmodels: [{model: \(models[1])}]\n\(clean)")
    #expect(
      alone?.description
        == "r.yml, line 4: one expert alone has nothing redundant; cleaning takes at least two beside the base"
    )
    let baseless = error(
      "merge_method: multislerp\nmodels: [{model: \(models[1])}, {model: \(models[2])}]\n\(clean)")
    #expect(
      baseless?.description
        == "r.yml, line 3: without a base_model there are no task vectors to clean; name the model the others were fine-tuned from"
    )
  }
}
