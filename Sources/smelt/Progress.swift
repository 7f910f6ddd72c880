import Checkpoints
import Foundation
import Glibc
import Synchronization

/// How far a long job has come, on standard error: one line that is written over on a terminal,
/// a line every ten seconds elsewhere.
final class Progress: Sendable {
  private struct State {
    var done = 0
    var lastShown: Double
    var isShown = false
  }

  private let total: Int
  private let begin: Double
  private let isQuiet: Bool
  private let isTerminal: Bool
  private let state: Mutex<State>

  init(total: Int, isQuiet: Bool) {
    self.total = total
    self.isQuiet = isQuiet
    isTerminal = isatty(2) == 1
    begin = Progress.now
    state = Mutex(State(lastShown: begin))
  }

  private static var now: Double { ProcessInfo.processInfo.systemUptime }
  var seconds: Double { Progress.now - begin }

  /// Another `bytes` are done, of the tensor of this name.
  func advance(_ bytes: Int, _ tensor: String) {
    state.withLock { state in
      state.done += bytes
      let now = Progress.now
      guard !isQuiet, now - state.lastShown >= (isTerminal ? 0.1 : 10) else { return }
      state.lastShown = now
      state.isShown = true
      write(line(state.done, tensor))
    }
  }

  private func line(_ done: Int, _ tensor: String) -> String {
    let rate = Double(done) / max(seconds, 1e-3)
    let left = Int(Double(max(0, total - done)) / max(rate, 1))
    let percent = total == 0 ? 100 : min(100, 100 * done / total)
    let time = left >= 60 ? "\(left / 60) min \(left % 60) s" : "\(left) s"
    return
      "\(percent) % of \(ByteSize(bytes: total)), \(ByteSize(bytes: Int(rate)))/s, \(time) left, \(quoted(tensor))"
  }

  private func write(_ line: String) {
    let text = isTerminal ? "\r\u{1B}[K\(line.prefix(Progress.terminalWidth - 1))" : "\(line)\n"
    FileHandle.standardError.write(Data(text.utf8))
  }

  /// Columns of the terminal; a longer line would not be written over as a whole.
  private static var terminalWidth: Int {
    var size = winsize()
    return ioctl(2, UInt(TIOCGWINSZ), &size) == 0 && size.ws_col > 0 ? Int(size.ws_col) : 80
  }

  /// Clears the line.
  func finish() {
    state.withLock { state in
      guard state.isShown, isTerminal else { return }
      state.isShown = false
      FileHandle.standardError.write(Data("\r\u{1B}[K".utf8))
    }
  }
}

/// The most memory that this process has had resident so far.
var peakMemory: ByteSize {
  var usage = rusage()
  getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
  return ByteSize(bytes: usage.ru_maxrss * 1024)
}
