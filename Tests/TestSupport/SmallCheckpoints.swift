public import Checkpoints

/// A tensor and its values, for tests that make small checkpoints.
public struct SmallTensor {
  public let info: TensorInfo
  public let values: [Float]

  public init(_ name: String, _ shape: [Int], dtype: DType = .f32, _ values: [Float]) throws {
    info = try TensorInfo(name: name, dtype: dtype, shape: shape)
    precondition(values.count == info.elementCount)
    self.values = values
  }
}

extension Checkpoint {
  /// Writes a small checkpoint; the path's ending says in which format.
  @discardableResult
  public static func write(
    _ tensors: [SmallTensor], to path: String, metadata: [String: String] = [:]
  ) throws -> String {
    let sink = try create(path, Manifest(tensors.map { $0.info }, metadata: metadata))
    for tensor in tensors {
      var bytes = [UInt8](repeating: 0, count: tensor.info.byteCount)
      var span = bytes.mutableSpan
      var raw = span.mutableBytes
      tensor.info.dtype.encode(tensor.values.span, into: &raw)
      try sink.write(bytes.span.bytes, of: tensor.info, at: 0)
    }
    try sink.finish()
    return path
  }
}
