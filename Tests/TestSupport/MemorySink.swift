public import Checkpoints
import Synchronization

/// Tensors written to memory, from which they can be read again.
public final class MemorySink: TensorSink, TensorSource {
  public let path = "memory"
  public let manifest: Manifest
  public var warnings: [String] { [] }
  private let bytes: Mutex<[[UInt8]]>

  public init(_ tensors: [TensorInfo]) {
    manifest = Manifest(tensors)
    bytes = Mutex(tensors.map { Array(repeating: 0, count: $0.byteCount) })
  }

  public func write(_ span: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError)
  {
    let new = span.withUnsafeBytes { Array($0) }
    let index = manifest.position(of: tensor.name)!
    bytes.withLock { $0[index].replaceSubrange(offset..<offset + new.count, with: new) }
  }

  public func complete() throws(CheckpointError) {}
  public func finish() throws(CheckpointError) {}

  public func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    let own = bytes(of: tensor)
    for i in 0..<buffer.byteCount {
      buffer.storeBytes(of: own[offset + i], toByteOffset: i, as: UInt8.self)
    }
  }

  public func bytes(of tensor: TensorInfo) -> [UInt8] {
    bytes.withLock { $0[manifest.position(of: tensor.name)!] }
  }

  public func floats(of tensor: TensorInfo) -> [Float] {
    var values = [Float](repeating: 0, count: tensor.elementCount)
    var span = values.mutableSpan
    tensor.dtype.decode(bytes(of: tensor).span.bytes, into: &span)
    return values
  }
}

/// Counts from several threads.
public final class Counter: Sendable {
  private let count = Mutex(0)

  public init() {}
  public var value: Int { count.withLock { $0 } }

  /// The number of this call, from 1.
  public func next() -> Int {
    count.withLock {
      $0 += 1
      return $0
    }
  }
}
