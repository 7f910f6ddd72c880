public import Checkpoints

/// A checkpoint in memory, for tests of what happens between reading and writing.
public struct MemorySource: TensorSource {
  public let path: String
  public let manifest: Manifest
  private let bytes: [[UInt8]]

  public init(_ tensors: [SmallTensor], path: String = "memory") {
    self.path = path
    manifest = Manifest(tensors.map { $0.info })
    bytes = tensors.map { tensor in
      var bytes = [UInt8](repeating: 0, count: tensor.info.byteCount)
      var span = bytes.mutableSpan
      var raw = span.mutableBytes
      if tensor.info.dtype.isArithmetic {
        tensor.info.dtype.encode(tensor.values.span, into: &raw)
      } else {
        for i in tensor.values.indices { bytes[i] = UInt8(tensor.values[i]) }
      }
      return bytes
    }
  }

  public func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    let own = bytes[manifest.position(of: tensor.name)!]
    for i in 0..<buffer.byteCount {
      buffer.storeBytes(of: own[offset + i], toByteOffset: i, as: UInt8.self)
    }
  }
}
