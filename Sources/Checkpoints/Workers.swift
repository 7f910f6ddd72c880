import Dispatch
import Synchronization

/// Runs `body` for steps `0..<count` on `workers` threads, which take the next free step in order.
///
/// Each worker makes one `State` (its buffers) and keeps it for all its steps. The threads
/// are Dispatch's, because steps block on the disk.
/// - Throws: the error of the earliest failed step; after a failure no new step begins.
public func forEachStep<State: ~Copyable>(
  count: Int, workers: Int,
  state makeState: @Sendable () throws -> State,
  body: @Sendable (_ step: Int, _ state: inout State) throws -> Void
) throws {
  let next = Atomic<Int>(0)
  let failure = Mutex<(step: Int, error: any Error)?>(nil)
  @Sendable func fail(_ step: Int, _ error: any Error) {
    next.store(count, ordering: .relaxed)
    failure.withLock { if $0 == nil || step < $0!.step { $0 = (step, error) } }
  }
  DispatchQueue.concurrentPerform(iterations: max(1, min(workers, count))) { _ in
    do {
      var state = try makeState()
      while true {
        let step = next.wrappingAdd(1, ordering: .relaxed).oldValue
        guard step < count else { return }
        do { try body(step, &state) } catch { return fail(step, error) }
      }
    } catch { fail(-1, error) }
  }
  if let failure = failure.withLock({ $0 }) { throw failure.error }
}
