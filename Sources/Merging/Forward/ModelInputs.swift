public import Checkpoints

/// Samples for a model: images or texts, as a checkpoint file of arrays.
///
/// `pixel_values` [samples, channels, height, width], or `input_ids` [samples, tokens] with
/// `attention_mask` (0 where padding is) and `token_type_ids` if there are any; `task` [samples],
/// the number of each sample's expert.
public struct ModelInputs: Sendable {
  let source: any TensorSource
  public let sampleCount: Int
  /// Where they are images.
  let pixels: TensorInfo?
  /// Where they are texts: the tokens that are not padding.
  let texts: [Text]
  /// Tokens of a text as it is stored, padding included.
  let paddedLength: Int
  /// The number of each sample's expert, if it is known.
  public let tasks: [Int]?

  struct Text: Sendable {
    let ids: [Int]
    /// The place of each token in the text as it is stored.
    let places: [Int]
    let types: [Int]
  }

  /// - Throws: `CheckpointError` if the arrays do not fit each other.
  public init(_ source: any TensorSource) throws {
    self.source = source
    let manifest = source.manifest
    if let pixels = manifest["pixel_values"] {
      guard (3...4).contains(pixels.shape.count), !pixels.shape.contains(0),
        pixels.dtype.isArithmetic
      else {
        throw CheckpointError(
          file: source.path, tensor: "pixel_values",
          "is \(pixels.dtype.rawValue) \(pixels.shapeDescription)",
          remedy:
            "give floating-point numbers, scaled as the model expects them: [samples, channels, height, width]"
        )
      }
      self.pixels = pixels
      sampleCount = pixels.shape[0]
      texts = []
      paddedLength = 0
    } else if let ids = manifest["input_ids"] {
      guard ids.shape.count == 2, !ids.shape.contains(0) else {
        throw CheckpointError(
          file: source.path, tensor: "input_ids",
          "has the shape \(ids.shapeDescription) instead of [samples, tokens]")
      }
      pixels = nil
      sampleCount = ids.shape[0]
      paddedLength = ids.shape[1]
      texts = try ModelInputs.texts(ids, in: source)
    } else {
      throw CheckpointError(
        file: source.path, "has neither \"pixel_values\" nor \"input_ids\"",
        remedy: "name the model's inputs as transformers does")
    }
    tasks = try manifest["task"].map { task in
      guard task.shape == [manifest["pixel_values"]?.shape[0] ?? manifest["input_ids"]!.shape[0]]
      else {
        throw CheckpointError(
          file: source.path, tensor: "task",
          "has the shape \(task.shapeDescription) instead of [samples]")
      }
      return try source.integers(of: task)
    }
  }

  private static func texts(_ ids: TensorInfo, in source: any TensorSource) throws -> [Text] {
    func values(_ name: String, default value: Int) throws -> [Int] {
      guard let tensor = source.manifest[name] else {
        return Array(repeating: value, count: ids.elementCount)
      }
      guard tensor.shape == ids.shape else {
        throw CheckpointError(
          file: source.path, tensor: name,
          "has the shape \(tensor.shapeDescription) but \"input_ids\" \(ids.shapeDescription)")
      }
      return try source.integers(of: tensor)
    }
    let tokens = try source.integers(of: ids)
    let mask = try values("attention_mask", default: 1)
    let types = try values("token_type_ids", default: 0)
    let length = ids.shape[1]
    return try (0..<ids.shape[0]).map { sample in
      let places = (0..<length).filter { mask[sample * length + $0] != 0 }
      guard !places.isEmpty else {
        throw CheckpointError(
          file: source.path, tensor: "attention_mask", "masks every token of sample \(sample)")
      }
      return Text(
        ids: places.map { tokens[sample * length + $0] }, places: places,
        types: places.map { types[sample * length + $0] })
    }
  }

  /// One image as floats, and its shape: channels, height, width.
  func image(_ sample: Int) throws -> (values: [Float], shape: [Int]) {
    let tensor = pixels!
    let shape = tensor.shape.count == 3 ? [1] + tensor.shape[1...] : Array(tensor.shape[1...])
    let count = tensor.elementCount / sampleCount
    let byteCount = count * tensor.dtype.bitWidth / 8
    var buffer = Buffer(byteCount: byteCount)
    var bytes = buffer.first(byteCount)
    try source.read(tensor, at: sample * byteCount, into: &bytes)
    var values = [Float](repeating: 0, count: count)
    var span = values.mutableSpan
    tensor.dtype.decode(bytes.bytes, into: &span)
    return (values, shape)
  }
}
