import Checkpoints

/// Recorded inputs of a mixture's modules.
///
/// The checkpoint holds, for every module, a tensor named by its prefix — `[samples, width]`
/// averaged over tokens, or `[samples, tokens, width]` — and, to calibrate, `task`, `[samples]`,
/// the number of each sample's expert. Where texts are padded, `attention_mask`, `[samples, tokens]`,
/// is 0. It may be larger than memory: it is read sample by sample.
struct Activations: Sendable {
  let source: any TensorSource
  /// The places of the tokens that are not padding, of so many.
  private let places: (tokens: Int, ofSamples: [[Int]])?

  /// - Throws: `CheckpointError` if a module has no inputs of its width.
  init(_ source: any TensorSource, of modules: [MixtureDescription.Module]) throws {
    self.source = source
    places = try Activations.places(in: source)
    let isOfTwoTowers = ["vision_model.", "text_model."].allSatisfy { tower in
      modules.contains { $0.prefix.contains(tower) }
    }
    for module in modules {
      if module.isAttention, source.manifest[module.prefix] == nil {
        throw CheckpointError(
          file: source.path, tensor: module.prefix, "is missing",
          remedy: "record the inputs of attention too, with 'smelt activations --attention'")
      }
      if isOfTwoTowers, source.manifest[module.prefix] == nil {
        throw CheckpointError(
          file: source.path, tensor: module.prefix, "is missing",
          remedy:
            "of a model with two towers upscale the one that you run: --mlp 'vision_model.encoder.layers.{i}.mlp:fc1,fc2'"
        )
      }
      let tensor = try source.tensor(module.prefix)
      guard (2...3).contains(tensor.shape.count), tensor.rowLength == module.width,
        !tensor.shape.contains(0)
      else {
        throw CheckpointError(
          file: source.path, tensor: tensor.name,
          "has the shape \(tensor.shapeDescription) instead of [samples, \(module.width)] or [samples, tokens, \(module.width)]"
        )
      }
      guard tensor.dtype.isArithmetic else {
        throw CheckpointError(
          file: source.path, tensor: tensor.name, "is \(tensor.dtype.rawValue), not floating-point")
      }
    }
  }

  private static func places(
    in source: any TensorSource
  ) throws -> (tokens: Int, ofSamples: [[Int]])? {
    guard let tensor = source.manifest["attention_mask"], tensor.shape.count == 2,
      !tensor.shape.contains(0)
    else { return nil }
    let mask = try source.integers(of: tensor)
    let tokens = tensor.shape[1]
    return (
      tokens,
      try (0..<tensor.shape[0]).map { sample in
        let places = (0..<tokens).filter { mask[sample * tokens + $0] != 0 }
        guard !places.isEmpty else {
          throw CheckpointError(
            file: source.path, tensor: tensor.name, "masks every token of sample \(sample)")
        }
        return places
      }
    )
  }

  func sampleCount(of module: String) -> Int { source.manifest[module]!.shape[0] }

  func tokenCount(of module: String) -> Int {
    let shape = source.manifest[module]!.shape
    return shape.count == 3 ? shape[1] : 1
  }

  /// The tokens of a sample as rows, its padding left out.
  func tokens(of module: String, sample: Int) throws -> Matrix<Float> {
    let tensor = source.manifest[module]!
    let (tokens, width) = (tokenCount(of: module), tensor.rowLength)
    let all = Matrix(
      rowCount: tokens, columnCount: width,
      elements: try source.floats(
        of: tensor, sample * tokens * width..<(sample + 1) * tokens * width))
    guard tensor.shape.count == 3, let places, places.tokens == tokens,
      places.ofSamples.indices.contains(sample)
    else { return all }
    return all.rows(places.ofSamples[sample])
  }

  /// The same number of tokens of each of these samples, spread evenly, so that there are about
  /// so many rows but at least one a sample.
  func tokens(
    of module: String, spreadOver samples: [Int], about rowCount: Int
  ) throws -> Matrix<Float> {
    let all = tokenCount(of: module)
    let count = min(all, max(1, rowCount / samples.count))
    var rows: [Float] = []
    for sample in samples {
      let tokens = try tokens(of: module, sample: sample)
      for token in 0..<count { rows += tokens[row: token * tokens.rowCount / count] }
    }
    return Matrix(
      rowCount: samples.count * count, columnCount: source.manifest[module]!.rowLength,
      elements: rows)
  }

  /// The mean of each of these samples over its tokens, and the largest |h| of any of them.
  func means(
    of module: String, _ samples: [Int]
  ) throws -> (features: Matrix<Float>, largest: Float) {
    let width = source.manifest[module]!.rowLength
    var features = Matrix<Float>(rowCount: samples.count, columnCount: width, repeating: 0)
    var largest: Float = 0
    for (row, sample) in samples.enumerated() {
      let tokens = try tokens(of: module, sample: sample)
      for token in 0..<tokens.rowCount {
        for column in 0..<width {
          let value = tokens[token, column]
          features[row, column] += value / Float(tokens.rowCount)
          largest = max(largest, abs(value))
        }
      }
    }
    return (features, largest)
  }

  /// The number of each sample's expert.
  func tasks(experts: Int) throws -> [Int] {
    let tensor = try source.tensor("task")
    let tasks = try source.integers(of: tensor)
    func refused(_ problem: String, remedy: String? = nil) -> CheckpointError {
      CheckpointError(file: source.path, tensor: "task", problem, remedy: remedy)
    }
    guard tensor.shape.count == 1, !tasks.isEmpty else {
      throw refused("has the shape \(tensor.shapeDescription) instead of [samples]")
    }
    for task in 0..<experts where !tasks.contains(task) {
      throw refused(
        "has no sample of expert \(task)", remedy: "record some for each of the \(experts) experts")
    }
    for task in tasks where !(0..<experts).contains(task) {
      throw refused("names expert \(task), but the mixture has experts 0 to \(experts - 1)")
    }
    return tasks
  }
}
