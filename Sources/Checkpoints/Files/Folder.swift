import Glibc

/// A folder that does not exist under its own name until all its files are complete.
///
/// It is filled beside its destination under a temporary name; `commit()` moves it into place.
/// Dropped before, it is removed with all that is in it.
final class PendingFolder: Sendable {
  private let name: PendingName
  private let isReplacing: Bool
  /// Whether all is on the disk before it has its name.
  let isSynced: Bool
  var destination: String { name.destination }
  var temporaryPath: String { name.temporaryPath }

  /// - Parameter isReplacing: whether a folder that is there may go, with all its files.
  init(
    for path: String, replacing isReplacing: Bool, synced isSynced: Bool = true
  ) throws(CheckpointError) {
    var destination = path
    while destination.count > 1, destination.hasSuffix("/") { destination.removeLast() }
    let name = split(destination).name
    guard !name.isEmpty, name != ".", name != ".." else {
      throw CheckpointError(file: path, "does not name a folder that can be made")
    }
    guard !isLink(destination) else {
      throw CheckpointError(
        file: path, "is a symbolic link", remedy: "name the folder itself")
    }
    var status = stat()
    if stat(destination, &status) == 0 {
      guard status.st_mode & S_IFMT == S_IFDIR else {
        throw CheckpointError(file: path, "exists and is not a folder")
      }
      let isEmpty = try listFolder(destination).isEmpty
      guard isReplacing || isEmpty else {
        throw CheckpointError(
          file: path, "is a folder with files in it", remedy: "write to a new folder")
      }
    }
    self.isReplacing = isReplacing
    self.isSynced = isSynced
    self.name = try PendingName(for: destination) { (temporaryPath) throws(CheckpointError) in
      let mode: mode_t = permissions(of: destination) == nil ? 0o755 : 0o700
      guard mkdir(temporaryPath, mode) == 0 else { throw .system(path, "cannot be created") }
    }
  }

  func commit() throws(CheckpointError) {
    if isSynced {
      do { try syncFolder(temporaryPath) } catch { throw error.moved(to: destination) }
    }
    let isReplacing = isReplacing && isFolder(destination)
    if isReplacing { try keepPermissions(in: temporaryPath, of: destination) }
    try name.putInPlace(replacingFolder: isReplacing, synced: isSynced)
  }

  /// Gives what is in a folder the permissions of what has the same name in another.
  private func keepPermissions(in folder: String, of other: String) throws(CheckpointError) {
    for name in try listFolder(folder) {
      let (path, before) = ("\(folder)/\(name)", "\(other)/\(name)")
      guard !isLink(before), let mode = permissions(of: before) else { continue }
      if isFolder(path) { try keepPermissions(in: path, of: before) }
      guard isFolder(path) == isFolder(before) else { continue }
      guard chmod(path, mode) == 0 else {
        throw .system(destination, "cannot get the permissions of what it replaces")
      }
    }
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

/// The folder and the name in it of a path.
func split(_ path: String) -> (folder: String, name: String) {
  guard let slash = path.lastIndex(of: "/") else { return (".", path) }
  let folder = path[..<slash]
  return (folder.isEmpty ? "/" : String(folder), String(path[path.index(after: slash)...]))
}

/// The names in a folder, sorted, without `.` and `..`.
func listFolder(_ path: String) throws(CheckpointError) -> [String] {
  guard let folder = opendir(path) else { throw .system(path, "cannot be listed") }
  defer { closedir(folder) }
  var names: [String] = []
  while let entry = readdir(folder) {
    // The name is a C array in the struct, which Swift shows as a tuple.
    let name = withUnsafePointer(to: &entry.pointee.d_name) {
      $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
    }
    if name != ".", name != ".." { names.append(name) }
  }
  return names.sorted()
}

/// Whether a path leads to a folder, itself or through symbolic links.
public func isFolder(_ path: String) -> Bool {
  var status = stat()
  return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR
}

/// Whether a path is that of a symbolic link.
func isLink(_ path: String) -> Bool {
  var status = stat()
  return lstat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFLNK
}

/// Whether a path leads to a regular file, itself or through symbolic links.
func isFile(_ path: String) -> Bool {
  var status = stat()
  return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
}

/// Removes a folder of ours and all that is in it, as far as it can; links are not followed.
func removeFolder(_ path: String) {
  guard !isLink(path) else { return }
  for name in (try? listFolder(path)) ?? [] where unlink("\(path)/\(name)") != 0 {
    removeFolder("\(path)/\(name)")
  }
  rmdir(path)
}

/// Where a path leads when every symbolic link on the way is followed.
public func resolved(_ path: String) -> String? {
  guard let name = realpath(path, nil) else { return nil }
  defer { free(name) }
  return String(cString: name)
}

/// Copies a file's bytes to a new file.
func copyFile(
  _ path: String, to destination: String, synced isSynced: Bool
) throws(CheckpointError) {
  let source = try File(reading: path)
  let size = try source.size()
  let target = try File(creating: destination)
  var offset = 0
  while offset < size {
    let piece = try source.bytes(at: offset, count: min(1 << 20, size - offset))
    try target.write(piece.span.bytes, at: offset)
    offset += piece.count
  }
  if isSynced { try target.sync() }
}
