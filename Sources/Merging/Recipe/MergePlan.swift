public import Checkpoints

/// A merge before it is run: every tensor that comes out and what it is made of.
///
/// Whatever can be wrong with recipe and models is found when the plan is made, from the files'
/// headers alone.
public struct MergePlan: Sendable {
  public let recipe: Recipe
  /// The models, in the order of `recipe.models`.
  public let sources: [any TensorSource]
  public let manifest: Manifest
  public let tasks: [TensorTask]
  /// What the user should know: tensors that are copied or left out.
  public let notes: [String]
  /// How many layers the output has, if the recipe changes that.
  public let layerCount: Int?
  /// What becomes of the task vectors before the method sees them.
  public let cleaning: MergeCleaning?

  /// - Throws: `RecipeError`, `MergeError`, or `CheckpointError` naming file and tensor.
  public init(
    _ recipe: Recipe, models: [any TensorSource], seed: UInt64 = 0,
    imitatingDrawsOfMergekit: Bool = false
  ) throws {
    precondition(models.count == recipe.models.count)
    var planner = Planner(recipe, models, .counter(seed: seed))
    switch recipe.inputs {
    case .models(let sources): try planner.plan(models: sources)
    case .slices(let slices): try planner.plan(slices: slices)
    }
    if imitatingDrawsOfMergekit { try planner.imitateDraws(seed: seed) }
    self.recipe = recipe
    sources = models
    tasks = try planner.tasks()
    cleaning = try planner.mergeCleaning(tasks)
    var metadata = ["format": "pt"]
    metadata["cleaning"] = cleaning.map { "\($0.cleaning)" }
    manifest = Manifest(tasks.map { $0.output }, metadata: metadata)
    let isIdle = cleaning.map { $0.tensorCount == 0 } ?? false
    notes = planner.notes + (isIdle ? ["nothing is cleaned: no tensor is selected"] : [])
    layerCount = planner.layerCount
  }
}

extension MergePlan {
  /// Makes all tensors. The sink has `manifest`'s tensors and is finished by the caller.
  /// - Parameters:
  ///   - finished: chunks that are in the sink already.
  ///   - keepsCache: whether the page cache shall keep what is read of files that were not in it.
  ///   - didObserve: told of bytes that were read and will be again; with those that `didFinish` is
  ///     told of they come to the cost's.
  /// - Returns: what the cleaning of task vectors came to.
  /// - Throws: what a file refuses, and if one was written to meanwhile.
  @discardableResult
  public func run(
    into sink: any TensorSink, memory: Int, workers: Int, journal: MergeJournal? = nil,
    finished: Set<Chunk> = [], keepsCache: Bool = false,
    didFinish: @escaping @Sendable (FinishedChunk) throws -> Void = { _ in },
    didObserve: @escaping @Sendable (TensorInfo, _ bytes: Int) -> Void = { _, _ in }
  ) throws -> DisentanglementSummary? {
    try check(memory: memory, workers: workers)
    let run = MergeRun(
      sources: sources, sink: journal.map { JournaledSink(sink: sink, journal: $0) } ?? sink,
      tasks: tasks, memory: memory, workers: workers, finished: finished,
      forgettable: keepsCache ? [] : tensorsReadForOneOutput,
      didObserve: didObserve, didFinish: didFinish)
    guard let cleaning, cleaning.tensorCount > 0 else {
      try run.run()
      try checkUnchanged()
      return nil
    }
    let summary = try cleaning.run(run)
    try checkUnchanged()
    return summary
  }

  private func checkUnchanged() throws(CheckpointError) {
    for source in sources { try source.checkUnchanged() }
  }

  private var tensorsReadForOneOutput: Set<InputTensor> {
    let uses = tasks.flatMap { task in
      task.inputs.map { InputTensor(source: $0.source, name: $0.tensor.name) }
    }
    return Set(Dictionary(uses.map { ($0, 1) }, uniquingKeysWith: +).filter { $1 == 1 }.keys)
  }
}
