import Checkpoints

/// What turns an image or a text into the states that a Transformer's first layer sees, one row
/// a token.
struct InputEmbedding: Sendable {
  let family: TransformerFamily
  let weights: TransformerWeights
  let stem: String
  let width: Int
  let configuration: TransformerConfiguration
  private let norm: Norm?
  private let patches: Patches?

  /// Everything of it that is small is read at once; tables of tokens stay where they are.
  init(
    _ family: TransformerFamily, _ weights: TransformerWeights, stem: String,
    _ configuration: TransformerConfiguration
  ) throws {
    self.family = family
    self.weights = weights
    self.stem = stem
    self.configuration = configuration
    let landmark = try weights.source.tensor(stem + family.landmark)
    guard landmark.elementCount > 0 else {
      throw CheckpointError(
        file: weights.source.path, tensor: landmark.name,
        "has the shape \(landmark.shapeDescription): it is empty")
    }
    let width = landmark.rowLength
    self.width = width
    let epsilon = configuration.normEpsilon ?? family.normEpsilon
    let normName: String? =
      switch family.embedding {
      case .clipImage: "pre_layrnorm"  // The misspelling is CLIP's own.
      case .bertText: "embeddings.LayerNorm"
      default: nil
      }
    norm = try normName.map {
      .layer(
        weight: try weights.vector("\(stem)\($0).weight", count: width),
        bias: try weights.vector("\(stem)\($0).bias", count: width), epsilon: epsilon)
    }
    patches =
      switch family.embedding {
      case .clipImage:
        try Patches(
          weights, kernel: "\(stem)embeddings.patch_embedding",
          token: "\(stem)embeddings.class_embedding",
          positions: "\(stem)embeddings.position_embedding.weight", width: width)
      case .image:
        try Patches(
          weights, kernel: "\(stem)embeddings.patch_embeddings.projection",
          token: "\(stem)embeddings.cls_token",
          positions: "\(stem)embeddings.position_embeddings", width: width)
      default: nil
      }
  }

  /// - Throws: `CheckpointError` naming the inputs' file if the sample does not fit the model.
  func callAsFunction(_ sample: Int, of inputs: ModelInputs) throws -> Matrix<Float> {
    var states: Matrix<Float>
    if let patches {
      let (image, shape) = try inputs.image(sample)
      states = try patches(image, shape: shape, file: inputs.source.path)
    } else {
      states = try text(inputs.texts[sample], file: inputs.source.path)
    }
    return norm?(states) ?? states
  }

  /// How many tokens a sample of these inputs has at most.
  func longestSample(of inputs: ModelInputs) -> Int {
    patches?.tokenCount ?? inputs.texts.map { $0.ids.count }.max() ?? 0
  }

  private func text(_ text: ModelInputs.Text, file: String) throws -> Matrix<Float> {
    var states = Matrix(rowCount: text.ids.count, columnCount: width, repeating: Float(0))
    func add(_ table: String, _ rows: [Int], called what: String, times scale: Float = 1) throws {
      let tensor = try weights.source.tensor(stem + table)
      try weights.check(tensor, hasShape: [nil, width])
      for (token, row) in rows.enumerated() {
        guard (0..<tensor.shape[0]).contains(row) else {
          throw CheckpointError(
            file: file,
            "has the \(what) \(row), but \(weights.source.path) knows 0 to \(tensor.shape[0] - 1)")
        }
        for (column, value) in try weights.row(row, of: tensor).enumerated() {
          states[token, column] += scale * value
        }
      }
    }
    switch family.embedding {
    case .clipText:
      try add("embeddings.token_embedding.weight", text.ids, called: "token")
      try add("embeddings.position_embedding.weight", text.places, called: "position")
    case .bertText:
      try add("embeddings.word_embeddings.weight", text.ids, called: "token")
      try add("embeddings.position_embeddings.weight", positions(of: text), called: "position")
      try add("embeddings.token_type_embeddings.weight", text.types, called: "token type")
    default:
      // Gemma rounds the factor to the type of its weights; in Float there is nothing to round.
      let scale = configuration.isGemma ? Float(width).squareRoot() : 1
      try add("embed_tokens.weight", text.ids, called: "token", times: scale)
    }
    return states
  }

  /// BERT counts places; RoBERTa counts tokens that are not padding, from behind its number.
  private func positions(of text: ModelInputs.Text) -> [Int] {
    guard let padding = configuration.paddingPosition else { return text.places }
    var count = 0
    return text.ids.map { id in
      guard id != padding else { return padding }
      count += 1
      return padding + count
    }
  }
}

/// An image cut into squares, each a token, behind one token for the whole.
private struct Patches: Sendable {
  let kernel: Dense
  /// Channels, and the side of a square.
  let channels: Int
  let side: Int
  let token: [Float]
  let positions: Matrix<Float>

  init(
    _ weights: TransformerWeights, kernel name: String, token: String, positions: String, width: Int
  ) throws {
    let source = weights.source
    let kernel = try source.tensor("\(name).weight")
    try weights.check(kernel, hasShape: [width, nil, nil, nil])
    guard kernel.shape[2] == kernel.shape[3] else {
      throw CheckpointError(
        file: source.path, tensor: kernel.name,
        "has the shape \(kernel.shapeDescription): its patches are not squares")
    }
    channels = kernel.shape[1]
    side = kernel.shape[2]
    let bias = "\(name).bias"
    self.kernel = Dense(
      weight: Matrix(
        rowCount: width, columnCount: kernel.elementCount / width,
        elements: try source.floats(of: kernel.name)),
      bias: source.manifest[bias] == nil
        ? Array(repeating: 0, count: width) : try weights.vector(bias, count: width))
    // [width], or [1, 1, width] with one position table a batch.
    let tokenTensor = try source.tensor(token)
    let table = try source.tensor(positions)
    guard tokenTensor.elementCount == width, table.rowLength == width, table.elementCount > 0 else {
      throw CheckpointError(
        file: source.path, tensor: positions,
        "has the shape \(table.shapeDescription) where rows of \(width) were expected")
    }
    self.token = try source.floats(of: token)
    self.positions = Matrix(
      rowCount: table.elementCount / width, columnCount: width,
      elements: try source.floats(of: positions))
  }

  var tokenCount: Int { positions.rowCount }

  func callAsFunction(_ image: [Float], shape: [Int], file: String) throws -> Matrix<Float> {
    let (height, width) = (shape[1], shape[2])
    let (rows, columns) = (height / side, width / side)
    guard shape[0] == channels, height % side == 0, width % side == 0,
      rows * columns + 1 == positions.rowCount
    else {
      throw CheckpointError(
        file: file, tensor: "pixel_values",
        "has images of [\(shape.map(String.init).joined(separator: ", "))], which do not make \(positions.rowCount - 1) patches of [\(channels), \(side), \(side)]",
        remedy: "resize them to what the model was trained with")
    }
    var squares = Matrix(
      rowCount: rows * columns, columnCount: channels * side * side, repeating: Float(0))
    for channel in 0..<channels {
      for y in 0..<height {
        for x in 0..<width {
          let square = y / side * columns + x / side
          let element = (channel * side + y % side) * side + x % side
          squares[square, element] = image[(channel * height + y) * width + x]
        }
      }
    }
    let embedded = kernel(squares)
    var states = Matrix(
      rowCount: positions.rowCount, columnCount: token.count,
      elements: token + embedded.elements)
    states.add(positions)
    return states
  }
}
