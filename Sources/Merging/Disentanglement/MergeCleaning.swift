import Checkpoints

/// The cleaning of a merge's task vectors, as a part of its plan.
public struct MergeCleaning: Sendable {
  public let cleaning: Cleaning
  /// The models that are cleaned, as the recipe names them.
  let experts: [String]
  /// Tensors that share a redundant vector, by the numbers of their tasks; tensors and rows that
  /// are groups of their own are not listed.
  let groups: [(name: String, tasks: [Int])]
  /// How many tensors are cleaned.
  public let tensorCount: Int

  /// Whether all models are read once for inner products before the merge begins.
  public var needsPass: Bool { !groups.isEmpty }

  /// What is cleaned and how, in one line.
  public var explanation: String {
    let pass =
      needsPass ? "; their inner products take a pass of their own over these tensors" : ""
    return "cleans the task vectors of \(tensorCount) tensors by \(cleaning)\(pass)"
  }
}

extension MergeCleaning {
  /// Solves the groups and tells every task what to take out of its task vectors.
  ///
  /// - Throws: `MergeError` if a group of several tensors has weights that are not finite.
  func prepare(
    _ run: MergeRun, _ findings: CleaningFindings, _ summary: inout DisentanglementSummary
  ) throws -> [TensorTask] {
    var coefficients: [Int: [Double]] = [:]
    let indices = groups.flatMap { $0.tasks }
    let grams = try run.taskVectorGrams(of: indices)
    var position = 0
    for group in groups {
      let own = grams[position..<position + group.tasks.count]
      position += group.tasks.count
      let tensors = group.tasks.map { run.tasks[$0].output }
      let solved = try cleaning.solve(
        Cleaning.Group(name: group.name, tensors: tensors, isCleaned: true), own, into: &summary)
      guard case .group(let found) = solved else { continue }
      for (index, gram) in zip(group.tasks, own) {
        coefficients[index] = found
        summary.add(run.tasks[index].output.name, solved, gram)
      }
    }
    return run.tasks.enumerated().map { index, task in
      task.mapMerge { merge in
        (merge as? any TaskVectorCleaning)?.prepared(findings, coefficients: coefficients[index])
          ?? merge
      }
    }
  }

  /// Adds what the merge itself found out, in row and tensor scope.
  func conclude(
    _ tasks: [TensorTask], _ findings: CleaningFindings, _ summary: inout DisentanglementSummary
  ) throws {
    guard !needsPass else { return }
    for task in tasks {
      guard let found = findings[task.output.name] else { continue }
      if cleaning.method.scope == .tensor {
        let group = Cleaning.Group(
          name: task.output.name, tensors: [task.output], isCleaned: true)
        // Not finite: it was left as it is, which the report says.
        let solution = cleaning.method.solve(found.gram)
        summary.add(group, solution)
        summary.add(task.output.name, .group(coefficients: solution.coefficients), found.gram)
      } else {
        summary.add(task.output.name, cleaning.rowCleaning(task.output), found.rows, found.gram)
      }
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
