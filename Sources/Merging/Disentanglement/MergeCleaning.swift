import Checkpoints

/// The cleaning of a merge's task vectors, as a part of its plan.
public struct MergeCleaning: Sendable {
  public let cleaning: Cleaning
  /// The models that are cleaned, as the recipe names them.
  let experts: [String]
  /// Tensors that share a redundant vector, by the numbers of their tasks; empty in row scope.
  let groups: [(name: String, tasks: [Int])]
  /// How many tensors are cleaned.
  public let tensorCount: Int

  /// What is cleaned and how, in one line.
  public var explanation: String {
    "cleans the task vectors of \(tensorCount) tensors by \(cleaning)"
  }
}

extension MergeCleaning {
  /// Makes all tensors of a merge: first group after group those that share a redundant vector,
  /// which is solved before they are merged, then the others.
  ///
  /// - Throws: `MergeError` if a group of several tensors has weights that are not finite.
  func run(_ merge: MergeRun) throws -> DisentanglementSummary {
    let findings = CleaningFindings()
    var summary = DisentanglementSummary(cleaning, experts: experts)
    var merge = merge
    merge.tasks = merge.tasks.map { $0.prepared(findings) }
    try runGroups(merge, findings, &summary)
    let done = Set(groups.flatMap { $0.tasks })
    try merge.run(merge.tasks.indices.filter { !done.contains($0) })
    conclude(merge.tasks, findings, &summary)
    return summary
  }

  private func runGroups(
    _ merge: MergeRun, _ findings: CleaningFindings, _ summary: inout DisentanglementSummary
  ) throws {
    let waves = waves(of: merge.tasks, memory: merge.memory, workers: merge.workers)
    let held = HeldTensors(byteCount: reads(waves, merge.tasks, workers: merge.workers).held)
    for wave in waves {
      let groups = groups[wave.groups]
      let tasks = groups.flatMap { $0.tasks }
      var part = merge
      part.memory -= held.byteCount
      if wave.isHeld {
        try held.fill(
          with: tasks.flatMap { merge.tasks[$0].inputs }, from: merge.sources,
          workers: merge.workers, forgettable: merge.forgettable)
        part.sources = held.sources(over: merge.sources)
        // What was read once is counted when it has been merged.
        part.didObserve = { _, _ in }
      }
      var grams = try part.taskVectorGrams(of: tasks)[...]
      for group in groups {
        let solved = try solve(group, grams.prefix(group.tasks.count), part.tasks, &summary)
        grams = grams.dropFirst(group.tasks.count)
        for task in group.tasks {
          part.tasks[task] = part.tasks[task].prepared(findings, coefficients: solved)
        }
      }
      try part.run(tasks)
    }
  }

  private func solve(
    _ group: (name: String, tasks: [Int]), _ grams: ArraySlice<GramMatrix>, _ tasks: [TensorTask],
    _ summary: inout DisentanglementSummary
  ) throws -> [Double]? {
    let tensors = group.tasks.map { tasks[$0].output }
    let solved = try cleaning.solve(
      Cleaning.Group(name: group.name, tensors: tensors, isCleaned: true), grams, into: &summary)
    for (tensor, gram) in zip(tensors, grams) { summary.add(tensor.name, solved, gram) }
    guard case .group(let coefficients) = solved else { return nil }
    return coefficients
  }

  /// Adds what the merge itself found out about rows.
  private func conclude(
    _ tasks: [TensorTask], _ findings: CleaningFindings, _ summary: inout DisentanglementSummary
  ) {
    for task in tasks {
      guard let found = findings[task.output.name] else { continue }
      summary.add(task.output.name, cleaning.rowCleaning(task.output), found.rows, found.gram)
    }
  }

  // MARK: What it takes

  /// How often the groups' tensors are read.
  func reads(of tasks: [TensorTask], memory: Int, workers: Int) -> CleaningReads {
    reads(waves(of: tasks, memory: memory, workers: workers), tasks, workers: workers)
  }

  /// The tasks whose inputs are held between two looks at them.
  func heldTasks(_ tasks: [TensorTask], memory: Int, workers: Int) -> Set<Int> {
    let waves = waves(of: tasks, memory: memory, workers: workers)
    return Set(waves.filter { $0.isHeld }.flatMap { groups[$0.groups] }.flatMap { $0.tasks })
  }

  private func waves(of tasks: [TensorTask], memory: Int, workers: Int) -> [CleaningWave] {
    CleaningWave.waves(
      of: sizes(tasks), memory: memory, tiles: leastMemory(of: tasks, workers: workers))
  }

  private func reads(
    _ waves: [CleaningWave], _ tasks: [TensorTask], workers: Int
  ) -> CleaningReads {
    CleaningReads(sizes(tasks), waves, tiles: leastMemory(of: tasks, workers: workers))
  }

  private func sizes(_ tasks: [TensorTask]) -> [Int] {
    groups.map { $0.tasks.reduce(0) { $0 + tasks[$1].inputByteCount } }
  }

  private func leastMemory(of tasks: [TensorTask], workers: Int) -> Int {
    workers * MergeWorkspace.Sizes(of: tasks, share: 0).byteCount
  }
}

extension TensorTask {
  /// Tells a cleaned merge where its findings go and, if it waits for them, its coefficients.
  fileprivate func prepared(
    _ findings: CleaningFindings, coefficients: [Double]? = nil
  ) -> TensorTask {
    mapMerge { merge in
      (merge as? any TaskVectorCleaning)?.prepared(findings, coefficients: coefficients) ?? merge
    }
  }
}

extension DisentanglementSummary {
  /// Adds a tensor that was cleaned with its group.
  fileprivate mutating func add(
    _ tensor: String, _ cleaning: TensorCleaning, _ gram: GramMatrix
  ) {
    add(tensor, cleaning, DisentanglementReport(taskCount: experts.count), gram)
  }
}

// MARK: - As a recipe says it

extension RecipeReader {
  /// `task_vectors: {clean: …}`: a preset with changes as `--clean` takes it, or a mapping.
  func cleaning(_ node: RecipeNode) throws -> Cleaning {
    let keys = try mapping(node, "task_vectors", keys: ["clean"])
    guard let clean = keys["clean"] else { throw error(node, "task_vectors has no clean") }
    guard case .mapping = clean.content else {
      let text = try text(clean, "clean")
      return try located(clean) { () throws(MergeError) in try Cleaning(text) }
    }
    let known = ["preset"] + Cleaning.parameterNames + ["alpha", "include", "exclude"]
    let values = try mapping(clean, "clean", keys: known)
    let scope = try values["scope"].map { try text($0, "scope") } ?? "row"
    let preset = values["preset"]
    let name =
      try preset.map { try text($0, "preset") } ?? (scope == "row" ? "awd-row" : "awd-model")
    var cleaning = try located(preset ?? clean) { () throws(MergeError) in
      try Cleaning(preset: name)
    }
    // The optimizer first: what it does not have cannot be set.
    for name in ["optimizer"] + Cleaning.parameterNames.filter({ $0 != "optimizer" }) + ["alpha"] {
      guard let node = values[name] else { continue }
      let value = try text(node, name)
      try located(node) { () throws(MergeError) in try cleaning.set(name, value) }
    }
    cleaning.include = try patterns(values["include"], "include")
    cleaning.exclude = try patterns(values["exclude"], "exclude")
    return cleaning
  }

  private func patterns(_ node: RecipeNode?, _ name: String) throws -> [String] {
    guard let node else { return [] }
    guard case .sequence(let nodes) = node.content else { return [try text(node, name)] }
    return try nodes.map { try text($0, name) }
  }

  /// Says on which line of the recipe an error is.
  private func located<Value>(
    _ node: RecipeNode, _ body: () throws(MergeError) -> Value
  ) throws -> Value {
    do { return try body() } catch {
      throw self.error(node, error.problem, remedy: error.remedy)
    }
  }
}
