import Glibc

/// Lets numbered steps pass one at a time and in order, whatever thread each runs on.
///
/// Workers take steps in order, so the one that is waited for is always being worked on.
final class Turnstile: @unchecked Sendable {
  // Sound: `next` and `isClosed` are touched only with the lock held; the lock lives at a
  // fixed address, which pthread demands.
  private let lock = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let moved = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  private var next = 0
  private var isClosed = false

  init() {
    pthread_mutex_init(lock, nil)
    pthread_cond_init(moved, nil)
  }

  deinit {
    pthread_cond_destroy(moved)
    pthread_mutex_destroy(lock)
    moved.deallocate()
    lock.deallocate()
  }

  /// Waits until all steps before `step` have passed, then runs `body` and lets the next one in.
  ///
  /// After `body` has thrown, or `close()`, no further step passes.
  /// - Returns: nil if the turnstile was closed.
  func pass<Result, Failure: Error>(
    _ step: Int, _ body: () throws(Failure) -> Result
  ) throws(Failure) -> Result? {
    pthread_mutex_lock(lock)
    defer {
      pthread_cond_broadcast(moved)
      pthread_mutex_unlock(lock)
    }
    while next != step && !isClosed { pthread_cond_wait(moved, lock) }
    if isClosed { return nil }
    isClosed = true  // Stays so if the body throws.
    let result = try body()
    isClosed = false
    next = step + 1
    return result
  }

  /// Sends everyone away who waits or comes later; for a worker whose step failed.
  func close() {
    pthread_mutex_lock(lock)
    isClosed = true
    pthread_cond_broadcast(moved)
    pthread_mutex_unlock(lock)
  }
}
