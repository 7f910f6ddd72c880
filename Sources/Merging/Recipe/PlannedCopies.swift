import Checkpoints

// Tensors that are no arithmetic on several inputs, which the notes tell of.

extension Planner {
  mutating func planWithoutArithmetic(
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

  mutating func planCopyOrCast(_ tensor: TensorInfo, _ output: TensorInfo, from model: Int)
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

  mutating func planCopy(_ tensor: TensorInfo, named name: String, from model: Int) throws {
    planned.append(
      PlannedTensor(output: tensor.renamed(name), inputs: [(model, tensor)], setting: nil))
  }

  /// Tensors that the reference has not: kept from the first model that has them.
  mutating func planExtras(_ rows: [Row], _ reference: Row) throws {
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

  mutating func summariseCopies() {
    for (reason, names) in copied.sorted(by: { $0.key < $1.key }) {
      let shown = names.prefix(4).map(quoted).joined(separator: ", ")
      notes.append(
        "copied as they are, \(reason) \(names.count) tensors: \(shown)\(names.count > 4 ? ", …" : "")"
      )
    }
  }
}
