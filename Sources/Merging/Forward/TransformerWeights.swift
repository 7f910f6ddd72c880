import Checkpoints

/// A checkpoint's tensors as the parts of a Transformer, checked for the shapes they must have.
struct TransformerWeights: Sendable {
  let source: any TensorSource

  /// A vector; its length is checked if it is known.
  func vector(_ name: String, count: Int? = nil) throws -> [Float] {
    let tensor = try source.tensor(name)
    try check(tensor, hasShape: [count])
    return try source.floats(of: name)
  }

  /// A matrix; its sides are checked where they are known.
  func matrix(_ name: String, rows: Int? = nil, columns: Int? = nil) throws -> Matrix<Float> {
    let tensor = try source.tensor(name)
    try check(tensor, hasShape: [rows, columns])
    return Matrix(
      rowCount: tensor.shape[0], columnCount: tensor.shape[1],
      elements: try source.floats(of: name))
  }

  /// A linear map, whose bias may be missing.
  func dense(_ name: String, outputs: Int? = nil, inputs: Int) throws -> Dense {
    let weight = try matrix("\(name).weight", rows: outputs, columns: inputs)
    let bias = "\(name).bias"
    return Dense(
      weight: weight,
      bias: source.manifest[bias] == nil
        ? Array(repeating: 0, count: weight.rowCount)
        : try vector(bias, count: weight.rowCount))
  }

  /// Shape and type of a tensor that floats are read from; `nil` is any length but none.
  func check(_ tensor: TensorInfo, hasShape shape: [Int?]) throws {
    let fits =
      tensor.shape.count == shape.count
      && zip(tensor.shape, shape).allSatisfy { $0 == $1 ?? max($0, 1) }
    guard fits else {
      let wanted = shape.map { $0.map(String.init) ?? "any" }.joined(separator: ", ")
      throw CheckpointError(
        file: source.path, tensor: tensor.name,
        "has the shape \(tensor.shapeDescription) where the model needs [\(wanted)]")
    }
    guard tensor.dtype.isArithmetic else {
      throw CheckpointError(
        file: source.path, tensor: tensor.name,
        "is \(tensor.dtype.rawValue), not a floating-point type")
    }
  }

  /// One row of a matrix, read alone: an embedding table can be larger than a layer.
  func row(_ row: Int, of tensor: TensorInfo) throws -> [Float] {
    let byteCount = tensor.rowLength * tensor.dtype.bitWidth / 8
    var buffer = Buffer(byteCount: byteCount)
    var bytes = buffer.first(byteCount)
    try source.read(tensor, at: row * byteCount, into: &bytes)
    var values = [Float](repeating: 0, count: tensor.rowLength)
    var span = values.mutableSpan
    tensor.dtype.decode(bytes.bytes, into: &span)
    return values
  }
}
