/// Lets numbered steps pass one at a time and in order, whatever thread each runs on.
///
/// Workers take steps in order, so the one that is waited for is always being worked on.
final class Turnstile: @unchecked Sendable {
  // Sound: `next` and `isClosed` are touched only with the lock held.
  private let monitor = Monitor()
  private var next = 0
  private var isClosed = false

  /// Waits until all steps before `step` have passed, then runs `body` and lets the next one in.
  ///
  /// After `body` has thrown, or `close()`, no further step passes.
  /// - Returns: nil if the turnstile was closed.
  func pass<Result, Failure: Error>(
    _ step: Int, _ body: () throws(Failure) -> Result
  ) throws(Failure) -> Result? {
    monitor.lock()
    defer {
      monitor.changed()
      monitor.unlock()
    }
    while next != step && !isClosed { monitor.wait() }
    if isClosed { return nil }
    isClosed = true  // Stays so if the body throws.
    let result = try body()
    isClosed = false
    next = step + 1
    return result
  }

  /// Sends everyone away who waits or comes later; for a worker whose step failed.
  func close() {
    monitor.lock()
    isClosed = true
    monitor.changed()
    monitor.unlock()
  }
}
