import Checkpoints

/// One output tensor on its way to a task.
struct PlannedTensor {
  var output: TensorInfo
  var inputs: [TensorTask.Place]
  /// What the method is told; `nil` if the bytes are copied.
  var setting: TensorSetting?
}

/// Makes a plan of a recipe and its models: finds the inputs of every output tensor by name.
struct Planner {
  let recipe: Recipe
  let models: [any TensorSource]
  let randomness: Randomness
  var planned: [PlannedTensor] = []
  var notes: [String] = []
  var layerCount: Int?
  var copied: [String: [String]] = [:]

  init(_ recipe: Recipe, _ models: [any TensorSource], _ randomness: Randomness) {
    self.recipe = recipe
    self.models = models
    self.randomness = randomness
  }

  var method: MergeMethod { recipe.method }

  private func number(of model: String) -> Int { recipe.models.firstIndex(of: model)! }

  /// A model among the inputs of a tensor.
  struct Row {
    var model: Int
    var isBase: Bool
    var layers: Range<Int>?
    var parameters: Parameters
    var line: Int
  }

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
}
