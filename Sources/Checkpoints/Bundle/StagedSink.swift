import Glibc

/// A sink for a bundle when its tensors arrive in any order: they wait in a plain safetensors
/// file beside the destination, which is packed when all are there.
final class StagedSink: TensorSink {
  let manifest: Manifest
  private let path: String
  private let stage: any TensorSink
  private let stagePath: String

  init(_ path: String, _ manifest: Manifest) throws(CheckpointError) {
    self.path = path
    self.manifest = manifest
    let (folder, name) = split(path)
    stagePath = "\(folder)/.\(name).\(getpid()).staged"
    stage = try Safetensors.create(stagePath, manifest)
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    try stage.write(bytes, of: tensor, at: offset)
  }

  func finish() throws(CheckpointError) {
    try stage.finish()
    defer { unlink(stagePath) }
    do {
      try Bundle.pack(try Safetensors.open(stagePath), to: path)
    } catch let error as CheckpointError {
      throw error
    } catch {
      throw CheckpointError(file: path, "cannot be packed: \(error)")
    }
  }
}
