public import Checkpoints

/// Writes tensors with their bytes to a new checkpoint; the name's ending says which format.
public func write(
  _ contents: [TensorInfo: [UInt8]], metadata: [String: String] = [:], to path: String
) throws {
  let tensors = contents.keys.sorted { $0.name < $1.name }
  let sink = try Checkpoint.create(path, Manifest(tensors, metadata: metadata))
  for (tensor, bytes) in contents { try sink.write(bytes.span.bytes, of: tensor, at: 0) }
  try sink.finish()
}
