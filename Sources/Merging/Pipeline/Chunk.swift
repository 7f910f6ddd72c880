public import Checkpoints

/// A part of an output tensor that is finished at once.
public struct Chunk: Sendable, Hashable {
  /// The number of the task.
  public let task: Int
  public let elements: Range<Int>
}

/// What is known of a chunk when it has been written.
public struct FinishedChunk: Sendable {
  public let chunk: Chunk
  public let tensor: TensorInfo
  public let bytesRead: Int
  public let bytesWritten: Int
  /// Elements that are NaN or infinite.
  public let notFinite: Int
}

/// A tensor of the source with this number.
struct InputTensor: Hashable {
  let source: Int
  let name: String
}
