internal import CHDF5
import Glibc

/// What libhdf5 would not do, or what Smelt will not read, as the end of a sentence about a file.
struct HDF5Failure: Error {
  let problem: String
  var remedy: String?
  var tensor: String?

  init(_ problem: String, remedy: String? = nil) {
    self.problem = problem
    self.remedy = remedy
  }

  /// The same failure, known to be about a tensor.
  func of(_ tensor: String) -> HDF5Failure {
    var failure = self
    failure.tensor = tensor
    return failure
  }

  func error(file: String) -> CheckpointError {
    CheckpointError(file: file, tensor: tensor, problem, remedy: remedy)
  }
}

/// libhdf5, called by one thread at a time.
enum HDF5Library {
  // Recursive, because a handle that is let go of inside takes it too. Never freed.
  private static let lock = {
    let lock = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    var attributes = pthread_mutexattr_t()
    pthread_mutexattr_init(&attributes)
    pthread_mutexattr_settype(&attributes, Int32(PTHREAD_MUTEX_RECURSIVE))
    pthread_mutex_init(lock, &attributes)
    pthread_mutexattr_destroy(&attributes)
    // Sound to share: a mutex is made for several threads.
    return Lock(mutex: lock)
  }()

  private struct Lock: @unchecked Sendable { let mutex: UnsafeMutablePointer<pthread_mutex_t> }

  private static let start: Void = {
    _ = smelt_h5_start()
    // We undo filters ourselves: no file makes the library load code.
    H5PLset_loading_state(0)
  }()

  static func withLock<Result: ~Copyable, Failure: Error>(_ body: () throws(Failure) -> Result)
    throws(Failure) -> Result
  {
    pthread_mutex_lock(lock.mutex)
    defer { pthread_mutex_unlock(lock.mutex) }
    _ = start
    // Failures become errors of ours; unasked, each thread would print them.
    H5Eset_auto2(hid_t(H5E_DEFAULT), nil, nil)
    return try body()
  }

  /// The last failure in the library's words: what it could not do and, innermost, why.
  static func failure() -> HDF5Failure {
    var messages: [String] = []
    withUnsafeMutablePointer(to: &messages) {
      _ = H5Ewalk2(
        hid_t(H5E_DEFAULT), H5E_WALK_DOWNWARD,
        { _, entry, context in
          let messages = context!.assumingMemoryBound(to: [String].self)
          if let text = entry?.pointee.desc { messages.pointee.append(String(cString: text)) }
          return 0
        }, $0)
    }
    H5Eclear2(hid_t(H5E_DEFAULT))
    if messages.contains(where: { $0.contains("No space left on device") }) {
      return HDF5Failure(
        "cannot be written: No space left on device",
        remedy: "free some space or write to another disk")
    }
    if messages.contains(where: { $0.contains("bad version number for layout message") }) {
      return HDF5Failure(
        "is stored in a way that only libhdf5 2.0 and later read, as h5py writes it with libver=\"latest\"",
        remedy: "write it again with libver=\"v114\", or without libver")
    }
    // Behind the first colon the library tells of its own buffers and clocks.
    messages = messages.map { String($0.prefix { $0 != ":" && $0 != "\n" }) }
    guard let what = messages.first, let why = messages.last else {
      return HDF5Failure("libhdf5 failed and does not say why")
    }
    return HDF5Failure("libhdf5: \(what)" + (messages.count > 1 ? " (\(why))" : ""))
  }

  /// Throws the library's failure if a call returned a negative number.
  @discardableResult
  static func check<Number: SignedInteger>(_ result: Number) throws(HDF5Failure) -> Number {
    guard result >= 0 else { throw failure() }
    return result
  }
}

/// An object of libhdf5, given back when its owner lets go of it.
struct HDF5Handle: ~Copyable {
  let id: hid_t

  /// Takes over what a call returned.
  init(_ id: hid_t) throws(HDF5Failure) { self.id = try HDF5Library.check(id) }

  deinit { _ = HDF5Library.withLock { H5Idec_ref(id) } }

  /// Lets go, and says so when what was still to be written could not be.
  consuming func close() throws(HDF5Failure) {
    let id = id
    discard self
    try HDF5Library.check(H5Idec_ref(id))
  }
}
