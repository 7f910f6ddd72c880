import CLinux
import Glibc
import Synchronization

extension HDF5 {
  /// Makes a process of its own read the layout of every HDF5 file that is opened from now on.
  ///
  /// A few damaged bytes can crash libhdf5 or keep it busy for ever. In a child process that
  /// becomes an error like any other. The child is this same executable, started again: **call
  /// this first thing in `main`**, because in the child it answers the parent and ends.
  ///
  /// Without it, libhdf5 reads in this process, which is well for files that one trusts.
  public static func isolateLibrary() {
    let arguments = CommandLine.arguments
    if arguments.count == 3, arguments[1] == childArgument { answerParent(about: arguments[2]) }
    childExecutable.withLock { $0 = "/proc/self/exe" }
  }

  /// What the child is started with, before the file's path.
  private static let childArgument = "--hdf5-layout"
  private static let childExecutable = Mutex<String?>(nil)
  /// Seconds after which an answer is no longer expected; the largest real files take a few.
  private static let patience = 120
  /// More than the layout of the largest model needs; less than would hurt the machine.
  private static let childMemory = 8 << 30

  /// Asks libhdf5 about a file, in a child process if that was wanted.
  static func inventory(_ path: String) throws(CheckpointError) -> Inventory {
    guard let executable = childExecutable.withLock({ $0 }) else {
      return try Inventory(reading: path)
    }
    return try inventory(path, from: executable)
  }

  /// Asks a child process about a file.
  static func inventory(_ path: String, from executable: String, patience: Int = patience)
    throws(CheckpointError) -> Inventory
  {
    let child = try Child(executable, [executable, childArgument, path], file: path)
    let bytes = child.output(within: patience)
    switch (child.wait(), bytes) {
    case (_, nil):
      throw CheckpointError(
        file: path, "keeps libhdf5 busy for more than \(patience) seconds",
        remedy: "it is damaged, or of a huge number of chunks")
    case (.signal(let number), _):
      throw CheckpointError(
        file: path, "crashes libhdf5 (signal \(number))", remedy: "it is damaged: get it again")
    case (.exit, let bytes?):
      guard let answer = HDF5Message.decode(bytes, file: path) else {
        throw CheckpointError(
          file: path, "could not be read: the process that reads HDF5 gave no answer",
          remedy: "it may be damaged")
      }
      return try answer.get()
    }
  }

  /// The child's part.
  private static func answerParent(about path: String) -> Never {
    var limit = rlimit(rlim_cur: rlim_t(childMemory), rlim_max: rlim_t(childMemory))
    setrlimit(__rlimit_resource_t(RLIMIT_AS.rawValue), &limit)
    let answer: Result<Inventory, CheckpointError>
    do { answer = .success(try Inventory(reading: path)) } catch { answer = .failure(error) }
    let bytes = HDF5Message.encode(answer)
    var done = 0
    while done < bytes.count {
      let put = bytes.withUnsafeBytes {
        Glibc.write(STDOUT_FILENO, $0.baseAddress! + done, bytes.count - done)
      }
      if put < 0 && errno != EINTR { _exit(1) }
      done += max(put, 0)
    }
    // Not exit(): nothing of the library is to run any more.
    _exit(0)
  }
}

/// A process whose output is ours to read; ended and waited for in any case.
private struct Child: ~Copyable {
  private let process: pid_t
  private let output: Int32

  enum End {
    case exit
    case signal(Int32)
  }

  init(_ executable: String, _ arguments: [String], file: String) throws(CheckpointError) {
    var ends: [Int32] = [0, 0]
    guard pipe2(&ends, O_CLOEXEC) == 0 else { throw .system(file, "cannot be read: no pipe") }
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0)
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO)
    // A crash is reported by us.
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0)
    var process = pid_t()
    let code = withCStrings(arguments) { arguments in
      withCStrings(["SWIFT_BACKTRACE=enable=no"] + environmentPairs()) {
        posix_spawn(&process, executable, &actions, nil, arguments, $0)
      }
    }
    close(ends[1])
    guard code == 0 else {
      close(ends[0])
      throw .system(file, "cannot be read: the process for it does not start", code: code)
    }
    self.process = process
    self.output = ends[0]
  }

  /// Everything the child writes, or nil if it goes on for more than this many seconds or
  /// bytes; then it is ended.
  func output(within seconds: Int) -> [UInt8]? {
    let largest = 2 << 30
    let deadline = now() + seconds * 1000
    var bytes: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: 1 << 16)
    while bytes.count < largest {
      let left = deadline - now()
      var waited = pollfd(fd: output, events: Int16(POLLIN), revents: 0)
      guard left > 0 else { break }
      guard poll(&waited, 1, Int32(clamping: left)) > 0 else { continue }
      let got = retrying { read(output, &piece, piece.count) }
      if got <= 0 { return bytes }
      bytes.append(contentsOf: piece[..<got])
    }
    kill(process, SIGKILL)
    return nil
  }

  consuming func wait() -> End {
    var status: Int32 = 0
    _ = retrying { waitpid(process, &status, 0) }
    close(output)
    let signal = status & 0x7F  // WTERMSIG, a macro
    return signal == 0 ? .exit : .signal(signal)
  }

  private func now() -> Int {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * 1000 + time.tv_nsec / 1_000_000
  }
}

private func environmentPairs() -> [String] {
  var pairs: [String] = []
  var next = environ
  while let pair = next.pointee {
    pairs.append(String(cString: pair))
    next += 1
  }
  return pairs
}

/// Lends strings as the NULL-terminated list of C strings that `exec` and its kin take.
private func withCStrings<Result>(
  _ strings: [String], _ body: ([UnsafeMutablePointer<CChar>?]) -> Result
) -> Result {
  let copies = strings.map { strdup($0) }
  defer { copies.forEach { free($0) } }
  return body(copies + [nil])
}
