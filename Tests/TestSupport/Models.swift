public import Checkpoints
import Synchronization

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

/// A source that counts what is read of it.
public final class CountingSource: TensorSource {
  private let source: any TensorSource
  private let count = Atomic<Int>(0)

  public init(_ source: any TensorSource) { self.source = source }

  public var path: String { source.path }
  public var manifest: Manifest { source.manifest }
  public var bytesRead: Int { count.load(ordering: .relaxed) }

  public func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    count.wrappingAdd(buffer.byteCount, ordering: .relaxed)
    try source.read(tensor, at: offset, into: &buffer)
  }
}
