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

/// One output tensor on its way to a task.
private struct PlannedTensor {
  var output: TensorInfo
  var inputs: [TensorTask.Place]
  /// What the method is told; `nil` if the bytes are copied.
  var setting: TensorSetting?
}

private struct Planner {
  let recipe: Recipe
  let models: [any TensorSource]
  let randomness: Randomness
  var planned: [PlannedTensor] = []
  var notes: [String] = []
  var layerCount: Int?
  private var copied: [String: [String]] = [:]

  init(_ recipe: Recipe, _ models: [any TensorSource], _ randomness: Randomness) {
    self.recipe = recipe
    self.models = models
    self.randomness = randomness
  }

  private var method: MergeMethod { recipe.method }

  private func number(of model: String) -> Int { recipe.models.firstIndex(of: model)! }

  // MARK: Models and slices

  mutating func plan(models sources: [Recipe.Source]) throws {
    let slice = Recipe.Slice(
      sources: sources, baseModel: nil, parameters: Parameters(), line: sources[0].line)
    let rows = try rows(of: slice, addingBase: true)
    let reference = rows.first { $0.isBase } ?? rows[0]
    let stacks = LayerStacks(models[reference.model].manifest)
    for tensor in models[reference.model].manifest.tensors {
      try plan(
        tensor.name, from: rows.map { ($0, tensor.name) }, reference: tensor, slice: slice,
        t: stacks.position(of: tensor.name))
    }
    try planExtras(rows, reference)
    summariseCopies()
  }

  mutating func plan(slices: [Recipe.Slice]) throws {
    var offset = 0
    var stack: String?
    let allRows = try slices.map { try rows(of: $0, addingBase: false) }
    // Embeddings come from the first slice's sources, heads and final norms from the last's.
    try planOutsideLayers(allRows[0], slices[0], isBefore: true)
    for (slice, rows) in zip(slices, allRows) {
      let reference = rows.first { $0.isBase } ?? rows[0]
      let source = models[reference.model]
      let name = try soleStack(of: source, slice)
      guard stack == nil || stack == name else {
        throw MergeError(
          "the slices have layers of different names: \(quoted(stack!)) and \(quoted(name))")
      }
      stack = name
      for row in rows {
        let count = LayerStacks(models[row.model].manifest).counts[name] ?? 0
        guard row.layers!.upperBound <= count else {
          throw RecipeError(
            file: recipe.file, line: row.line,
            problem:
              "layer_range ends at \(row.layers!.upperBound) but \(models[row.model].path) has \(count) layers",
            remedy: nil)
        }
      }
      let count = reference.layers!.count
      for layer in 0..<count {
        for tensor in source.manifest.tensors {
          guard let place = LayerName(tensor.name), place.stack == name,
            place.index == reference.layers!.lowerBound + layer
          else { continue }
          func renamed(_ index: Int) -> String {
            LayerName(stack: name, index: index, rest: place.rest).name
          }
          try plan(
            renamed(offset + layer),
            from: rows.map { ($0, renamed($0.layers!.lowerBound + layer)) },
            reference: tensor, slice: slice,
            t: count > 1 ? Double(layer) / Double(count - 1) : 1)
        }
      }
      offset += count
    }
    try planOutsideLayers(allRows.last!, slices.last!, isBefore: false)
    layerCount = offset
    summariseCopies()
  }

  private func soleStack(of source: any TensorSource, _ slice: Recipe.Slice) throws -> String {
    let stacks = LayerStacks(source.manifest).counts.keys.sorted()
    guard stacks.count == 1 else {
      throw RecipeError(
        file: recipe.file, line: slice.line,
        problem: stacks.isEmpty
          ? "\(source.path) has no layers that are known by their tensors' names"
          : "\(source.path) has several stacks of layers (\(stacks.joined(separator: ", "))), which slices cannot tell apart",
        remedy: nil)
    }
    return stacks[0]
  }

  private mutating func planOutsideLayers(
    _ rows: [Row], _ slice: Recipe.Slice, isBefore: Bool
  ) throws {
    let reference = rows.first { $0.isBase } ?? rows[0]
    for tensor in models[reference.model].manifest.tensors
    where LayerName(tensor.name) == nil && tensor.isEmbedding == isBefore {
      try plan(
        tensor.name, from: rows.map { ($0, tensor.name) }, reference: tensor, slice: slice, t: 0)
    }
  }

  // MARK: Rows

  /// A model among the inputs of a tensor.
  private struct Row {
    var model: Int
    var isBase: Bool
    var layers: Range<Int>?
    var parameters: Parameters
    var line: Int
  }

  private func rows(of slice: Recipe.Slice, addingBase: Bool) throws -> [Row] {
    let base = slice.baseModel ?? recipe.baseModel
    var rows = slice.sources.map {
      Row(
        model: number(of: $0.model), isBase: $0.model == base, layers: $0.layers,
        parameters: $0.parameters, line: $0.line)
    }
    if let base, !rows.contains(where: { $0.isBase }), method.name != "passthrough" {
      guard addingBase else {
        throw RecipeError(
          file: recipe.file, line: slice.line,
          problem:
            "the slice does not say which layers of the base \(quoted(base)) it is compared with",
          remedy: "add the base to its sources with a layer_range")
      }
      rows.append(
        Row(
          model: number(of: base), isBase: true, layers: nil, parameters: Parameters(),
          line: slice.line))
    }
    guard rows.filter({ $0.isBase }).count <= 1 else {
      throw RecipeError(
        file: recipe.file, line: slice.line, problem: "the base model is named twice", remedy: nil)
    }
    guard method.models.contains(rows.count) else {
      let wanted =
        method.models.lowerBound == method.models.upperBound
        ? "\(method.models.lowerBound)"
        : method.models.upperBound == .max
          ? "at least \(method.models.lowerBound)"
          : "\(method.models.lowerBound) to \(method.models.upperBound)"
      throw RecipeError(
        file: recipe.file, line: slice.line,
        problem:
          "\(method.name) merges \(wanted) models, the base included, and \(rows.count) are given",
        remedy: nil)
    }
    return rows
  }

  // MARK: One tensor

  private mutating func plan(
    _ name: String, from sources: [(row: Row, tensor: String)], reference: TensorInfo,
    slice: Recipe.Slice, t: Double
  ) throws {
    let base = sources.first { $0.row.isBase }
    let others = sources.filter { !$0.row.isBase }
    let missing = others.filter { models[$0.row.model].manifest[$0.tensor] == nil }
    if let base, !others.isEmpty, missing.count == others.count {
      // Only the base has it: there is nothing to merge it with.
      let tensor = try models[base.row.model].tensor(base.tensor)
      copied["only the base has", default: []].append(name)
      return try planCopy(tensor, named: name, from: base.row.model)
    }
    var places: [(row: Row, tensor: TensorInfo)] = []
    for (row, tensor) in sources {
      places.append((row, try find(tensor, in: models[row.model], like: reference)))
    }
    guard reference.dtype.isArithmetic else {
      return try planWithoutArithmetic(name, places, reference)
    }
    for place in places where !place.tensor.dtype.isArithmetic {
      throw CheckpointError(
        file: models[place.row.model].path, tensor: place.tensor.name,
        "is \(place.tensor.dtype.rawValue) but \(reference.dtype.rawValue) elsewhere")
    }
    let output = try! TensorInfo(  // The shape is an input's; a type of 64 bits may not fit it.
      name: name, dtype: recipe.outputType ?? recipe.dtype ?? reference.dtype,
      shape: reference.shape)
    try planMerge(output, places, slice, t)
  }

  private mutating func planMerge(
    _ output: TensorInfo, _ places: [(row: Row, tensor: TensorInfo)], _ slice: Recipe.Slice,
    _ t: Double
  ) throws {
    let hasBase = places.contains { $0.row.isBase }
    let differences =
      switch method.operand {
      case .weights: false
      case .differences: true
      case .differencesIfBased: hasBase
      }
    let base = places.filter { $0.row.isBase }
    let others = places.filter { !$0.row.isBase }
    let ordered = differences ? base + others : places
    guard !(differences && others.isEmpty) else {
      return try planCopyOrCast(base[0].tensor, output, from: base[0].row.model)
    }
    let own = differences ? others : ordered
    var setting = TensorSetting(
      name: output.name, shape: output.shape, elementCount: output.elementCount,
      models: own.count, hasDifferences: differences,
      baseRow: ordered.firstIndex { $0.row.isBase })
    setting.randomness = randomness
    for parameter in method.parameters {
      try set(parameter, &setting, own, slice, t)
    }
    if method.name == "passthrough", setting.perModel["scale"] == nil {
      return try planCopyOrCast(ordered[0].tensor, output, from: ordered[0].row.model)
    }
    planned.append(
      PlannedTensor(
        output: output, inputs: ordered.map { ($0.row.model, $0.tensor) }, setting: setting))
  }

  private func set(
    _ parameter: MethodParameter, _ setting: inout TensorSetting,
    _ rows: [(row: Row, tensor: TensorInfo)],
    _ slice: Recipe.Slice, _ t: Double
  ) throws {
    let tensor = setting.name
    func value(_ scopes: [Parameters], for name: String) -> ParameterValue? {
      scopes.lazy.compactMap { $0.value(parameter.name, for: name, t: t) }.first
    }
    func fallback(_ row: Row?) throws -> ParameterValue? {
      switch parameter.fallback {
      case .value(let value): return value
      case .absent: return nil
      case .required:
        throw RecipeError(
          file: recipe.file, line: row?.line ?? slice.line,
          problem:
            "\(method.name) needs \(parameter.name), which is not set for tensor \(quoted(tensor))"
            + (row.map { " of \(models[$0.model].path)" } ?? ""),
          remedy: "set it under parameters")
      }
    }
    let common = [slice.parameters, recipe.parameters]
    switch parameter.scope {
    case .shared:
      setting.shared[parameter.name] = try value(common, for: tensor) ?? fallback(nil)
    case .perModel, .perModelButBase:
      var values: [ParameterValue] = []
      for (row, input) in rows {
        // Filters look at the layer's number in the model, which slices change; a head that an
        // embedding stands in for keeps its name.
        let name = LayerName(input.name) == nil ? tensor : input.name
        if let value = try value([row.parameters] + common, for: name) ?? fallback(row) {
          values.append(value)
        }
      }
      if values.count == rows.count { setting.perModel[parameter.name] = values }
    }
  }

  /// The tensor of a source, or what stands in for it: a model with tied embeddings has its
  /// embedding as its head.
  private func find(_ name: String, in source: any TensorSource, like reference: TensorInfo) throws
    -> TensorInfo
  {
    var found = source.manifest[name]
    if found == nil, name.hasSuffix("lm_head.weight") {
      found = source.manifest.tensors.first {
        $0.name.hasSuffix("embed_tokens.weight") && $0.shape == reference.shape
      }
    }
    guard let found else {
      throw CheckpointError(
        file: source.path, tensor: name, "is missing, but other models of the recipe have it",
        remedy: "merge models of the same architecture")
    }
    guard found.shape == reference.shape else {
      let isVocabulary = found.shape.dropFirst() == reference.shape.dropFirst()
      throw CheckpointError(
        file: source.path, tensor: name,
        "has the shape \(found.shapeDescription) where another model has \(reference.shapeDescription)",
        remedy: isVocabulary && reference.isEmbedding
          ? "the vocabularies differ; bring the models to one tokenizer first" : nil)
    }
    return found
  }

  // MARK: Copies

  private mutating func planWithoutArithmetic(
    _ name: String, _ places: [(row: Row, tensor: TensorInfo)], _ reference: TensorInfo
  ) throws {
    let from = places.first { $0.row.isBase } ?? places[0]
    let source = models[from.row.model]
    let isCopy = method.name == "passthrough" || places.count == 1
    guard isCopy || !reference.isQuantized(in: source.manifest) else {
      throw CheckpointError(
        file: source.path, tensor: reference.name,
        "is quantised (\(reference.dtype.rawValue)), and its numbers mean nothing without their scales",
        remedy: "merge models in BF16, F16 or F32")
    }
    if !isCopy {
      copied["no floating-point numbers, taken from \(source.path):", default: []].append(name)
    }
    try planCopy(from.tensor, named: name, from: from.row.model)
  }

  private mutating func planCopyOrCast(_ tensor: TensorInfo, _ output: TensorInfo, from model: Int)
    throws
  {
    guard recipe.dtype == nil, recipe.outputType == nil || output.dtype == tensor.dtype else {
      var setting = TensorSetting(
        name: output.name, shape: output.shape, elementCount: output.elementCount, models: 1,
        hasDifferences: false)
      setting.randomness = randomness
      guard output.dtype != tensor.dtype || recipe.dtype != output.dtype else {
        return try planCopy(tensor, named: output.name, from: model)
      }
      planned.append(
        PlannedTensor(output: output, inputs: [(model, tensor)], setting: setting))
      return
    }
    try planCopy(tensor, named: output.name, from: model)
  }

  private mutating func planCopy(_ tensor: TensorInfo, named name: String, from model: Int) throws {
    planned.append(
      PlannedTensor(output: tensor.renamed(name), inputs: [(model, tensor)], setting: nil))
  }

  /// Tensors that the reference has not: kept from the first model that has them.
  private mutating func planExtras(_ rows: [Row], _ reference: Row) throws {
    let own = models[reference.model].manifest
    for row in rows where row.model != reference.model {
      for tensor in models[row.model].manifest.tensors where own[tensor.name] == nil {
        guard !planned.contains(where: { $0.output.name == tensor.name }) else { continue }
        if tensor.name.hasSuffix("lm_head.weight") {
          notes.append(
            "\(models[row.model].path) has \(quoted(tensor.name)), which is left out: \(models[reference.model].path) has its embeddings tied"
          )
          continue
        }
        copied["only \(models[row.model].path) has", default: []].append(tensor.name)
        try planCopy(tensor, named: tensor.name, from: row.model)
      }
    }
  }

  private mutating func summariseCopies() {
    for (reason, names) in copied.sorted(by: { $0.key < $1.key }) {
      let shown = names.prefix(4).map(quoted).joined(separator: ", ")
      notes.append(
        "copied as they are, \(reason) \(names.count) tensors: \(shown)\(names.count > 4 ? ", …" : "")"
      )
    }
  }

  // MARK: Tasks

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

extension TensorInfo {
  /// Whether it has a row for each word of a vocabulary, or for each position, at the input.
  var isEmbedding: Bool {
    let words = name.split(separator: ".")
    return words.contains {
      $0.contains("embed") || $0 == "wte" || $0 == "wpe" || $0 == "tok_embeddings"
    }
  }

  /// Whether its numbers are codes whose scales are in other tensors.
  func isQuantized(in manifest: Manifest) -> Bool {
    switch dtype {
    case .f4, .f6E2M3, .f6E3M2, .f8E5M2, .f8E4M3, .f8E8M0, .f8E4M3FNUZ, .f8E5M2FNUZ: return true
    default: break
    }
    let last = name.split(separator: ".").last ?? ""
    if ["qweight", "qzeros", "g_idx", "weight_packed", "SCB"].contains(String(last)) {
      return true
    }
    let companions = ["_scale", "_scale_inv", ".absmax", ".quant_map", "_scales"]
    return companions.contains { manifest[name + $0] != nil }
  }
}

// MARK: - What it takes

extension MergePlan {
  /// What a plan will need of the machine.
  public struct Cost: Sendable {
    /// Bytes of the inputs, as often as they are read.
    public var bytesRead = 0
    /// Bytes of the inputs, once for each tensor that they are used in.
    public var bytesMerged = 0
    public var bytesWritten = 0
    /// How often the data of the most demanding tensor is looked at, the result's pass included.
    public var passes = 1
    /// Tensors that are read again in every pass, because they do not fit a worker's memory.
    public var tensorsReadAgain = 0
    /// How often groups wider than a row are read by the cleaning.
    public var cleaning = CleaningReads()
    /// Bytes that the workers take together.
    public var memory = 0
  }

  public func cost(memory: Int, workers: Int) -> Cost {
    var cost = Cost()
    cost.cleaning = cleaning?.reads(of: tasks, memory: memory, workers: workers) ?? CleaningReads()
    cost.bytesRead = cost.cleaning.bytesReadAgain
    let sizes = MergeWorkspace.Sizes(of: tasks, share: memory / max(1, workers))
    // The workers' share while groups are held, which are read once however often they are seen.
    let besideHeld = MergeWorkspace.Sizes(
      of: tasks, share: (memory - cost.cleaning.held) / max(1, workers))
    let held = cleaning?.heldTasks(tasks, memory: memory, workers: workers) ?? []
    for (index, task) in tasks.enumerated() {
      cost.bytesWritten += task.output.byteCount
      cost.bytesMerged += task.inputByteCount
      switch task.work {
      case .copy(let place): cost.bytesRead += place.tensor.byteCount
      case .merge(let merge, _, _, _):
        let sizes = task.isReadForItsGroup ? besideHeld : sizes
        let isReadAgain =
          !held.contains(index) && !merge.isReady && !sizes.holdsInputs(of: task)
        cost.passes = max(cost.passes, task.passes)
        cost.tensorsReadAgain += isReadAgain ? 1 : 0
        cost.bytesRead += task.inputByteCount * (isReadAgain ? 1 + merge.observingPasses : 1)
      }
    }
    cost.memory = max(
      workers * sizes.byteCount, cost.cleaning.held + workers * besideHeld.byteCount)
    return cost
  }
}

// MARK: - Running

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

  /// - Throws: `MergeError` with both numbers if a tensor's rows do not fit the memory.
  public func check(memory: Int, workers: Int) throws {
    for task in tasks where task.grain > 1 {
      let needed = task.leastMemory * workers
      // What fits the constant part of the memory beside the budget always fits.
      guard needed > max(memory, 16 << 20) else { continue }
      throw MergeError(
        "\(recipe.method.name) needs whole rows, and tensor \(quoted(task.output.name)) needs \(needed) bytes for \(workers) of them at once; the budget is \(memory)",
        remedy: "give it more with --memory or use fewer --jobs")
    }
  }
}
