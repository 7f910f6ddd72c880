import Glibc

/// A lock on which threads can also wait for something to change.
final class Monitor: @unchecked Sendable {
  // Sound: both are made for use by several threads, and live at a fixed address, as they must.
  private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let change = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)

  init() {
    pthread_mutex_init(mutex, nil)
    pthread_cond_init(change, nil)
  }

  deinit {
    pthread_cond_destroy(change)
    pthread_mutex_destroy(mutex)
    change.deallocate()
    mutex.deallocate()
  }

  func lock() { pthread_mutex_lock(mutex) }
  func unlock() { pthread_mutex_unlock(mutex) }

  /// Lets others have the lock until one of them says that something changed.
  func wait() { pthread_cond_wait(change, mutex) }

  /// Wakes all who wait.
  func changed() { pthread_cond_broadcast(change) }
}
