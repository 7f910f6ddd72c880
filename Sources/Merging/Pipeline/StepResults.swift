import Synchronization

/// What each step found out, kept in the order of the steps.
final class StepResults<Result: Sendable>: Sendable {
  private let results: Mutex<[Result?]>

  init(count: Int) { results = Mutex(Array(repeating: nil, count: count)) }

  subscript(step: Int) -> Result? {
    get { results.withLock { $0[step] } }
    set { results.withLock { $0[step] = newValue } }
  }

  /// - Precondition: every step has finished.
  var all: [Result] { results.withLock { $0.map { $0! } } }
}
