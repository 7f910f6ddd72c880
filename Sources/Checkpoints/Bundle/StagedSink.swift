import Glibc
import Synchronization

/// A sink for a bundle when its tensors arrive in any order: they wait in a plain safetensors
/// file beside the destination, which is packed when all are there.
final class StagedSink: TensorSink {
  let manifest: Manifest
  private let pending: PendingFile
  private let stage: any TensorSink
  private let stagePath: String
  /// For the packing.
  private let (memory, workers): (Int, Int)
  private let isComplete = Atomic(false)

  init(
    _ path: String, _ manifest: Manifest, _ options: WritingOptions
  ) throws(CheckpointError) {
    self.manifest = manifest
    (memory, workers) = (options.memory, options.workers)
    pending = try PendingFile(for: path, synced: options.isSynced)
    stagePath = pending.temporaryPath + ".staged"
    var plain = WritingOptions()
    plain.isSynced = options.isSynced
    do { stage = try Safetensors.create(stagePath, manifest, plain) } catch {
      throw error.moved(to: path)
    }
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    do { try stage.write(bytes, of: tensor, at: offset) } catch {
      throw error.moved(to: pending.destination)
    }
  }

  func complete() throws(CheckpointError) {
    guard !isComplete.load(ordering: .relaxed) else { return }
    defer { unlink(stagePath) }
    do {
      try stage.finish()
      try Bundle.pack(
        try Safetensors.open(stagePath), to: pending.temporaryPath, workers: workers,
        memory: memory, synced: pending.isSynced)
    } catch let error as CheckpointError {
      throw error.moved(to: pending.destination)
    } catch {
      throw CheckpointError(file: pending.destination, "cannot be packed: \(error)")
    }
    isComplete.store(true, ordering: .relaxed)
  }

  func finish() throws(CheckpointError) {
    try complete()
    try pending.commit()
  }
}
