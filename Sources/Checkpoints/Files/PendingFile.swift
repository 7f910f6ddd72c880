import Dispatch
import Glibc
import Synchronization

/// A file that does not exist under its own name until it is complete.
///
/// It is written beside its destination under a temporary name; `commit()` flushes it, moves it
/// into place and flushes the folder. Dropped before, it is removed: the destination is absent,
/// what it was, or complete.
final class PendingFile: Sendable {
  let destination: String
  let temporaryPath: String
  private let isFlushed = Atomic<Bool>(false)
  private let committed = Atomic<Bool>(false)

  /// Begins the file; an existing file at `destination` stays as it is until `commit()`.
  init(for destination: String) throws(CheckpointError) {
    let (folder, name) = split(destination)
    guard !name.isEmpty else {
      throw CheckpointError(file: destination, "names a folder, not a file to write")
    }
    var status = stat()
    if stat(destination, &status) == 0, status.st_mode & S_IFMT != S_IFREG {
      throw CheckpointError(file: destination, "exists and is not a regular file")
    }
    self.destination = destination
    self.temporaryPath = PendingFile.temporaryPath(folder: folder, name: name)
    guard !Unfinished.contains(temporaryPath) else {
      throw CheckpointError(
        file: destination, "is being written already", remedy: "give each output its own name")
    }
    // Between being made and being on the list of what is to be removed, it could be left behind.
    Unfinished.creation.wait()
    defer { Unfinished.creation.signal() }
    // Made here so that the name is ours (O_EXCL) before anyone is told of it.
    unlink(temporaryPath)
    do { _ = try File(creating: temporaryPath) } catch {
      throw CheckpointError(
        file: destination, error.problem, remedy: error.remedy)
    }
    Unfinished.add(temporaryPath)
  }

  /// The same for every way to write the same destination, be it a file or a folder.
  static func temporaryPath(folder: String, name: String) -> String {
    let resolved = realpath(folder, nil)
    defer { free(resolved) }
    // Shortened, because a name may have 255 bytes and this one has more than the destination's.
    let short = String(decoding: name.utf8.prefix(200), as: UTF8.self)
    return "\(resolved.map { String(cString: $0) } ?? folder)/.\(short).\(getpid()).partial"
  }

  /// Opens the file for writing, under its temporary name.
  func open() throws(CheckpointError) -> File { try File(updating: temporaryPath) }

  /// Flushes the file to the disk, where it stays without its name. Nothing is written after that.
  func complete() throws(CheckpointError) {
    // A second flush finds nothing to write and takes as long as the disk does to say so.
    guard !isFlushed.load(ordering: .relaxed) else { return }
    do { try open().sync() } catch {
      throw CheckpointError(file: destination, error.problem, remedy: error.remedy)
    }
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
    guard rename(temporaryPath, destination) == 0 else {
      throw .system(destination, "cannot be put in place")
    }
    committed.store(true, ordering: .relaxed)
    Unfinished.remove(temporaryPath)
    try syncFolder(split(destination).folder)
  }

  deinit {
    guard !committed.load(ordering: .relaxed) else { return }
    unlink(temporaryPath)
    Unfinished.remove(temporaryPath)
  }
}

/// Flushes what a folder says of its files to the disk.
func syncFolder(_ folder: String) throws(CheckpointError) {
  let descriptor = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
  guard descriptor >= 0 else { throw .system(folder, "cannot be opened") }
  defer { close(descriptor) }
  // Some file systems have no way to flush a folder and say so with EINVAL.
  guard fsync(descriptor) == 0 || errno == EINVAL else {
    throw .system(folder, "cannot be flushed to disk")
  }
}

/// The temporary names of what is still being written.
enum Unfinished {
  private static let paths = Mutex<Set<String>>([])

  static func contains(_ path: String) -> Bool { paths.withLock { $0.contains(path) } }
  static func add(_ path: String) { paths.withLock { _ = $0.insert(path) } }
  static func remove(_ path: String) { paths.withLock { _ = $0.remove(path) } }

  /// Held while something is created and put on the list, or created anew by libhdf5: it must not
  /// be missed, nor come back between its being removed and the end of the process.
  static let creation = DispatchSemaphore(value: 1)

  /// Removes every file that is still being written; for a command that was told to stop.
  static func abandonAll() {
    creation.wait()
    paths.withLock { paths in paths.forEach { unlink($0) == 0 ? () : removeFolder($0) } }
  }
}

/// The folder and the name in it of a path.
func split(_ path: String) -> (folder: String, name: String) {
  guard let slash = path.lastIndex(of: "/") else { return (".", path) }
  let folder = path[..<slash]
  return (folder.isEmpty ? "/" : String(folder), String(path[path.index(after: slash)...]))
}

extension Checkpoint {
  /// Removes every output that is still being written. Call it before leaving on a signal.
  public static func abandonUnfinishedOutputs() { Unfinished.abandonAll() }
}
