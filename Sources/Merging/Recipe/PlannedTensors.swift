import Checkpoints

// One output tensor: what its inputs are, and what the method is told of it.

extension Planner {
  mutating func plan(
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
}
