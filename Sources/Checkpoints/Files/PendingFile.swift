import Glibc
import Synchronization

/// A file that does not exist under its own name until it is complete.
///
/// It is written beside its destination under a temporary name; `commit()` flushes it, moves it
/// into place and flushes the folder. Dropped before, it is removed: the destination is absent,
/// what it was, or complete. Not flushed (`isSynced`), it is so unless the machine stops.
final class PendingFile: Sendable {
  private let name: PendingName
  /// Whether it is on the disk before it has its name.
  let isSynced: Bool
  private let isFlushed = Atomic<Bool>(false)
  var destination: String { name.destination }
  var temporaryPath: String { name.temporaryPath }

  /// Begins the file; an existing file at `destination` stays as it is until `commit()`.
  init(for destination: String, synced isSynced: Bool = true) throws(CheckpointError) {
    self.isSynced = isSynced
    guard !split(destination).name.isEmpty else {
      throw CheckpointError(file: destination, "names a folder, not a file to write")
    }
    var status = stat()
    if stat(destination, &status) == 0, status.st_mode & S_IFMT != S_IFREG {
      throw CheckpointError(file: destination, "exists and is not a regular file")
    }
    // Made here so that the name is ours (O_EXCL) before anyone is told of it. What takes another's
    // place gets its permissions at the end, and until then none that it might not have.
    let isPrivate = permissions(of: destination) != nil
    name = try PendingName(for: destination) { (path) throws(CheckpointError) in
      do throws(CheckpointError) {
        _ = try File(creating: path, isPrivate: isPrivate)
      } catch { throw error.moved(to: destination) }
    }
  }

  /// Opens the file for writing, under its temporary name.
  func open() throws(CheckpointError) -> File {
    // What stays in the page cache gets pages as large as the writes, and large ones are hard to
    // find. Where they are used again and again, they are the faster ones.
    try File(updating: temporaryPath, largestWrite: isSynced ? .max : 256 << 10)
  }

  /// Flushes the file to the disk, if that is wanted, where it stays without its name. Nothing is
  /// written after that.
  func complete() throws(CheckpointError) {
    // A second flush finds nothing to write and takes as long as the disk does to say so.
    guard isSynced, !isFlushed.load(ordering: .relaxed) else { return }
    do { try open().sync() } catch { throw error.moved(to: destination) }
    isFlushed.store(true, ordering: .relaxed)
  }

  /// Opens the complete file as a reader would, and compares what it says it holds.
  func prove(
    _ manifest: Manifest, opening open: (String) throws(CheckpointError) -> any TensorSource
  ) throws(CheckpointError) {
    func failure(_ tensor: String?, _ problem: String) -> CheckpointError {
      CheckpointError(
        file: destination, tensor: tensor, problem, remedy: "check the disk that it is on")
    }
    let found: Manifest
    do { found = try open(temporaryPath).manifest } catch {
      throw failure(error.tensor, "does not read back as it was written: \(error.problem)")
    }
    for tensor in manifest.tensors where found[tensor.name] != tensor {
      throw failure(tensor.name, "does not read back as it was written")
    }
    guard found.tensors.count == manifest.tensors.count else {
      throw failure(nil, "reads back with tensors that were not written")
    }
  }

  func commit() throws(CheckpointError) {
    try complete()
    try name.putInPlace(synced: isSynced)
  }
}
