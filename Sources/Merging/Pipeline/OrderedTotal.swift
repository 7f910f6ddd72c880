import Synchronization

/// A total of parts that arrive in any order and are added in theirs.
final class OrderedTotal<Part: Sendable>: Sendable {
  private struct State: Sendable {
    var total: Part
    var next = 0
    var waiting: [Int: Part] = [:]
  }
  private let state: Mutex<State>

  init(_ zero: Part) { state = Mutex(State(total: zero)) }

  var value: Part { state.withLock { $0.total } }

  func add(_ part: Part, number: Int, _ combine: (Part, inout Part) -> Void) {
    state.withLock { state in
      state.waiting[number] = part
      while let next = state.waiting.removeValue(forKey: state.next) {
        combine(next, &state.total)
        state.next += 1
      }
    }
  }
}
