import Checkpoints

/// What streamed by in one pass over a tensor cannot be what streamed by in the pass before:
/// a file was written to in between.
public struct PassesDiffer: Error, Equatable {
  public init() {}
}

extension Collection<any TensorSource> {
  /// Tells the user which of the files a tensor was read from was written to, as far as the
  /// files themselves show it.
  func errorOfChange(of tensor: String) -> CheckpointError {
    for source in self {
      do { try source.checkUnchanged() } catch { return error }
    }
    return CheckpointError(
      file: map { $0.path }.joined(separator: ", "), tensor: tensor,
      "was not the same each time it was read", remedy: "try again when nothing writes to it")
  }
}
