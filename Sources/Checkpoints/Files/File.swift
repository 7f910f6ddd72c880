import CLinux
import Glibc

/// An open file, closed when its owner lets go of it.
///
/// Every system call on files is in this file or `PendingFile`; each turns −1 into an error
/// that says what failed and why, and takes up again after a signal.
public struct File: ~Copyable, Sendable {
  public let path: String
  let descriptor: Int32

  /// At most so many bytes are written at once.
  private let largestWrite: Int

  private init(path: String, descriptor: Int32, largestWrite: Int = .max) {
    self.path = path
    self.descriptor = descriptor
    self.largestWrite = largestWrite
  }

  deinit { close(descriptor) }

  public init(reading path: String) throws(CheckpointError) {
    // Looked at before it is opened: opening a pipe would wait for its other end.
    var status = stat()
    guard stat(path, &status) == 0 else { throw .system(path, "cannot be opened") }
    let kind = status.st_mode & S_IFMT
    guard kind == S_IFREG else {
      throw CheckpointError(
        file: path, kind == S_IFDIR ? "is a folder, not a file" : "is not a regular file")
    }
    let descriptor = retrying { Glibc.open(path, O_RDONLY | O_CLOEXEC) }
    guard descriptor >= 0 else { throw .system(path, "cannot be opened") }
    self.init(path: path, descriptor: descriptor)
  }

  /// Opens for reading and writing a file that must not exist yet.
  /// - Parameter isPrivate: whether nobody but the owner can open it.
  public init(creating path: String, isPrivate: Bool = false) throws(CheckpointError) {
    let mode: mode_t = isPrivate ? 0o600 : 0o644
    let descriptor = retrying { Glibc.open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode) }
    guard descriptor >= 0 else { throw .system(path, "cannot be created") }
    self.init(path: path, descriptor: descriptor)
  }

  /// Opens for reading and writing a new file in the folder of `path`, which has no name and
  /// goes when it is closed.
  init(temporaryBeside path: String) throws(CheckpointError) {
    var name = Array("\(path).XXXXXX".utf8CString)
    let descriptor = retrying { mkstemp(&name) }
    guard descriptor >= 0 else { throw .system(path, "cannot have a temporary file beside it") }
    _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
    unlink(name)
    self.init(path: path, descriptor: descriptor)
  }

  /// Opens for reading and writing a file that exists.
  init(updating path: String, largestWrite: Int = .max) throws(CheckpointError) {
    let descriptor = retrying { Glibc.open(path, O_RDWR | O_CLOEXEC) }
    guard descriptor >= 0 else { throw .system(path, "cannot be opened for writing") }
    self.init(path: path, descriptor: descriptor, largestWrite: largestWrite)
  }

  func status() throws(CheckpointError) -> stat {
    var result = stat()
    guard fstat(descriptor, &result) == 0 else { throw .system(path, "cannot be examined") }
    return result
  }

  public func size() throws(CheckpointError) -> Int { Int(try status().st_size) }

  /// Fills the buffer from byte `offset` on; an end of file before that is an error.
  public func read(at offset: Int, into buffer: inout MutableRawSpan) throws(CheckpointError) {
    let count = buffer.byteCount
    var done = 0
    var failure: Int32 = 0
    buffer.withUnsafeMutableBytes { bytes in
      while done < count {
        let got = pread(descriptor, bytes.baseAddress! + done, count - done, off_t(offset + done))
        if got < 0 && errno == EINTR { continue }
        if got < 0 { failure = errno }
        if got <= 0 { break }
        done += got
      }
    }
    guard failure == 0 else {
      throw .system(path, "cannot be read at byte \(offset + done)", code: failure)
    }
    guard done == count else {
      throw CheckpointError(
        file: path, "ends at byte \(offset + done) where \(count - done) more were expected",
        remedy: "it was truncated while it was being read")
    }
  }

  /// The first bytes, as many of `count` as there are.
  public func beginning(_ count: Int) throws(CheckpointError) -> [UInt8] {
    try bytes(at: 0, count: min(count, try size()))
  }

  /// A copy of some bytes; for headers, not for tensors.
  public func bytes(at offset: Int, count: Int) throws(CheckpointError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var span = bytes.mutableSpan
    var raw = span.mutableBytes
    try read(at: offset, into: &raw)
    return bytes
  }

  public func write(_ bytes: RawSpan, at offset: Int) throws(CheckpointError) {
    let count = bytes.byteCount
    var done = 0
    var failure: Int32 = 0
    bytes.withUnsafeBytes { bytes in
      while done < count && failure == 0 {
        let size = min(count - done, largestWrite)
        let put = pwrite(descriptor, bytes.baseAddress! + done, size, off_t(offset + done))
        if put < 0 { failure = errno == EINTR ? 0 : errno } else { done += put }
      }
    }
    guard failure == 0 else { throw .system(path, "cannot be written", code: failure) }
  }

  /// Reserves room on the disk, so that a full disk is found before the work is done.
  func preallocate(_ size: Int) throws(CheckpointError) {
    guard size > 0 else { return }
    var code = posix_fallocate(descriptor, 0, off_t(size))
    while code == EINTR { code = posix_fallocate(descriptor, 0, off_t(size)) }
    // File systems that cannot reserve still get their size set; they fail while writing.
    if code == EOPNOTSUPP || code == EINVAL {
      code = ftruncate(descriptor, off_t(size)) == 0 ? 0 : errno
    }
    guard code == 0 else { throw .system(path, "cannot take \(size) bytes", code: code) }
  }

  func sync() throws(CheckpointError) {
    guard retrying({ fsync(descriptor) }) == 0 else {
      throw .system(path, "cannot be flushed to disk")
    }
  }

  /// Starts writing a range to the disk, without waiting for it.
  func startFlush(at offset: Int, count: Int) {
    _ = sync_file_range(descriptor, off_t(offset), off_t(count), smelt_sync_file_range_write)
  }

  /// Waits until a range is on the disk.
  func finishFlush(at offset: Int, count: Int) {
    _ = sync_file_range(descriptor, off_t(offset), off_t(count), smelt_sync_file_range_wait)
  }

  /// Lets the kernel forget its cached copy of a range that will not be read again.
  func dropCache(at offset: Int, count: Int) {
    _ = posix_fadvise(descriptor, off_t(offset), off_t(count), POSIX_FADV_DONTNEED)
  }
}

/// What tells whether a file is still what it was: it is another file, or it was written to.
struct FileStamp: Equatable, Sendable {
  private let device: UInt
  private let inode: UInt
  private let size: Int
  private let seconds: Int
  private let nanoseconds: Int

  init(_ file: borrowing File) throws(CheckpointError) {
    let status = try file.status()
    device = UInt(status.st_dev)
    inode = UInt(status.st_ino)
    size = Int(status.st_size)
    seconds = status.st_mtim.tv_sec
    nanoseconds = status.st_mtim.tv_nsec
  }
}

extension File {
  /// - Throws: if the file was written to since it had this stamp, or is another.
  func checkUnchanged(since stamp: FileStamp) throws(CheckpointError) {
    guard try FileStamp(self) == stamp else {
      throw CheckpointError(
        file: path, "was changed while it was being read",
        remedy: "try again when nothing writes to it")
    }
  }
}

/// Who may read, write and enter what has this path, if anything has; of a folder also whose group
/// new files get and who may remove them.
func permissions(of path: String) -> mode_t? {
  var status = stat()
  guard stat(path, &status) == 0 else { return nil }
  return status.st_mode & (status.st_mode & S_IFMT == S_IFDIR ? 0o3777 : 0o777)
}

/// Where temporary files go that belong to no output.
var temporaryFolder: String { getenv("TMPDIR").map { String(cString: $0) } ?? "/var/tmp" }

/// Whether two paths lead to the same file; a path that leads nowhere is no file's.
public func isSameFile(_ one: String, _ other: String) throws(CheckpointError) -> Bool {
  var statuses = [stat(), stat()]
  for (index, path) in [one, other].enumerated() where stat(path, &statuses[index]) != 0 {
    guard errno == ENOENT || errno == ENOTDIR else { throw .system(path, "cannot be examined") }
    return false
  }
  return statuses[0].st_dev == statuses[1].st_dev && statuses[0].st_ino == statuses[1].st_ino
}

/// The bytes that may still be written to the disk that a new file of this path would be on.
public func freeSpace(for path: String) -> Int? {
  var folder = path
  var status = statvfs()
  repeat {
    folder = split(folder.hasSuffix("/") ? String(folder.dropLast()) : folder).folder
    if statvfs(folder, &status) == 0 {
      return Int(
        clamping: UInt64(status.f_bavail).multipliedReportingOverflow(by: UInt64(status.f_frsize))
          .partialValue)
    }
  } while folder != "/" && folder != "."
  return nil
}

/// The size of a file in bytes.
public func fileSize(_ path: String) throws(CheckpointError) -> Int {
  try File(reading: path).size()
}

/// Calls again for as long as a signal interrupts.
@inline(__always)
func retrying<Result: SignedNumeric>(_ call: () -> Result) -> Result {
  while true {
    let result = call()
    if result == -1 && errno == EINTR { continue }
    return result
  }
}

extension CheckpointError {
  /// A system call's failure; `code` is `errno` unless given.
  static func system(_ path: String, _ what: String, code: Int32 = errno) -> CheckpointError {
    let reason = String(cString: strerror(code))
    let remedy = code == ENOSPC ? "free some space or write to another disk" : nil
    return CheckpointError(file: path, "\(what): \(reason)", remedy: remedy)
  }
}
