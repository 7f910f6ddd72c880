import CLinux
import Dispatch
import Glibc
import Synchronization

/// The temporary name beside its destination of a file or folder that is not complete.
///
/// What has it is removed when this goes, or the command is told to stop, unless it was put in
/// place before.
final class PendingName: Sendable {
  let destination: String
  let temporaryPath: String
  private let isInPlace = Atomic<Bool>(false)

  /// - Parameter create: makes an empty file or folder of the given path.
  init(
    for destination: String, create: (String) throws(CheckpointError) -> Void
  ) throws(CheckpointError) {
    self.destination = destination
    // The same for every way to write the same destination.
    let (folder, name) = split(destination)
    // Shortened, because a name may have 255 bytes and this one has more than the destination's.
    let short = String(decoding: name.utf8.prefix(200), as: UTF8.self)
    temporaryPath = "\(resolved(folder) ?? folder)/.\(short).\(getpid()).partial"
    guard !Unfinished.contains(temporaryPath) else {
      throw CheckpointError(
        file: destination, "is being written already", remedy: "give each output its own name")
    }
    // An earlier process may have had this one's number.
    removeWhatever(temporaryPath)
    // Between being made and being on the list of what is to be removed, it could be left behind.
    Unfinished.creation.wait()
    defer { Unfinished.creation.signal() }
    try create(temporaryPath)
    Unfinished.add(temporaryPath)
  }

  /// Gives it its own name, with the permissions of what had that name before, and flushes the
  /// folder that it is in.
  /// - Parameters:
  ///   - isReplacingFolder: whether the destination is a folder, which goes.
  ///   - isSynced: false if the folder is not to be flushed.
  func putInPlace(
    replacingFolder isReplacingFolder: Bool = false, synced isSynced: Bool
  ) throws(CheckpointError) {
    if let mode = permissions(of: destination) {
      guard chmod(temporaryPath, mode) == 0 else {
        throw .system(destination, "cannot get the permissions of what it replaces")
      }
    }
    if isReplacingFolder {
      // The old and the new folder change names at once; then the old one goes.
      let swapped = renameat2(
        AT_FDCWD, temporaryPath, AT_FDCWD, destination, smelt_rename_exchange)
      guard swapped == 0 else { throw .system(destination, "cannot be replaced") }
      removeFolder(temporaryPath)
    } else {
      guard rename(temporaryPath, destination) == 0 else {
        throw .system(destination, "cannot be put in place")
      }
    }
    isInPlace.store(true, ordering: .relaxed)
    Unfinished.remove(temporaryPath)
    if isSynced { try syncFolder(split(destination).folder) }
  }

  deinit {
    guard !isInPlace.load(ordering: .relaxed) else { return }
    removeWhatever(temporaryPath)
    Unfinished.remove(temporaryPath)
  }
}

private func removeWhatever(_ path: String) {
  if unlink(path) != 0 { removeFolder(path) }
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
    paths.withLock { paths in paths.forEach(removeWhatever) }
  }
}

extension Checkpoint {
  /// Removes every output that is still being written. Call it before leaving on a signal.
  public static func abandonUnfinishedOutputs() { Unfinished.abandonAll() }
}
