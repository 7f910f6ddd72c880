import Checkpoints

// From planned tensors to tasks: the method's arithmetic, cleaned or not, and its draws.

extension Planner {
  func tasks() throws -> [TensorTask] {
    try planned.map { planned in
      guard let setting = planned.setting else {
        return TensorTask(output: planned.output, work: .copy(planned.inputs[0]))
      }
      let isCast =
        setting.models == 1 && planned.inputs.count == 1 && setting.shared.isEmpty
        && setting.perModel.isEmpty
      let merge: any TensorMerge =
        isCast ? Passthrough(setting) : try makeMerge(setting, planned.output)
      return TensorTask(
        output: planned.output,
        work: .merge(
          merge, inputs: planned.inputs, differences: setting.hasDifferences,
          rounding: recipe.dtype))
    }
  }

  /// The method's arithmetic, on cleaned task vectors where the recipe wants that.
  private func makeMerge(_ setting: TensorSetting, _ output: TensorInfo) throws -> any TensorMerge {
    guard let cleaning = recipe.cleaning, setting.hasDifferences, cleaning.cleans(output) else {
      return try method.make(setting)
    }
    func cleaned(_ merge: some TensorMerge) -> any TensorMerge {
      CleanedMerge(merge, of: output, experts: setting.models, by: cleaning)
    }
    var setting = setting
    if cleaning.method.scope == .row { setting.grain = max(1, output.rowLength) }
    return cleaned(try method.make(setting))
  }

  /// - Throws: `RecipeError` where a recipe wants something cleaned that cannot be.
  func mergeCleaning(_ tasks: [TensorTask]) throws -> MergeCleaning? {
    guard let cleaning = recipe.cleaning else { return nil }
    func refusal(_ problem: String, _ remedy: String) -> RecipeError {
      RecipeError(
        file: recipe.file, line: recipe.cleaningLine, problem: problem, remedy: remedy)
    }
    let settings = planned.compactMap { $0.setting }.filter {
      !$0.perModel.isEmpty || $0.models > 1
    }
    guard settings.allSatisfy({ $0.hasDifferences }) else {
      throw refusal(
        "without a base_model there are no task vectors to clean",
        "name the model the others were fine-tuned from")
    }
    guard settings.allSatisfy({ $0.models > 1 }) else {
      throw refusal(
        "one expert alone has nothing redundant", "cleaning takes at least two beside the base")
    }
    let cleaned = tasks.indices.filter { tasks[$0].isCleaned }
    var groups: [(name: String, tasks: [Int])] = []
    var places: [String: Int] = [:]
    for index in cleaned where tasks[index].isReadForItsGroup {
      let name = cleaning.sharedGroup(of: tasks[index].output.name) ?? tasks[index].output.name
      if let place = places[name] {
        groups[place].tasks.append(index)
      } else {
        places[name] = groups.count
        groups.append((name, [index]))
      }
    }
    func models(_ index: Int) -> [Int] { planned[index].inputs.map { $0.source } }
    for group in groups
    where group.tasks.contains(where: { models($0) != models(group.tasks[0]) }) {
      throw refusal(
        "the tensors of \(quoted(group.name)) are merged of different models, so their task vectors have nothing in common",
        "use scope=row or scope=tensor")
    }
    let experts = cleaned.first.map { models($0).dropFirst().map { recipe.models[$0] } } ?? []
    return MergeCleaning(
      cleaning: cleaning, experts: experts, groups: groups, tensorCount: cleaned.count)
  }

  /// Gives every tensor its part of mergekit's one stream of random numbers, which goes through
  /// the tensors in the order of their names.
  mutating func imitateDraws(seed: UInt64) throws {
    guard let seed = UInt32(exactly: seed) else {
      throw MergeError("mergekit's generator takes a seed below 2³², not \(seed)")
    }
    let stream = MersenneStream(seed: seed)
    var places: [Int] = []
    var start = 0
    let order = planned.indices.sorted {
      planned[$0].output.name.utf8.lexicographicallyPrecedes(planned[$1].output.name.utf8)
    }
    for index in order {
      guard var setting = planned[index].setting else { continue }
      setting.randomness = .mersenne(stream, start: start)
      planned[index].setting = setting
      let grain = try makeMerge(setting, planned[index].output).grain
      guard let merge = try method.make(setting) as? SignConsensus else { continue }
      let tile = Tile.width(grain: grain)
      let stride = max(1, MergeRun.standardChunkSize / tile) * tile
      for row in 0..<merge.drawingRows {
        let begin = start + row * setting.elementCount
        places += Swift.stride(from: begin, to: begin + setting.elementCount, by: stride)
      }
      start += merge.drawingRows * setting.elementCount
    }
    stream.prepare(places)
  }
}
