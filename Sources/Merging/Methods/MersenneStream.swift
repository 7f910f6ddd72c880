import Synchronization

/// The 32-bit draws of one MT19937 generator (Matsumoto and Nishimura 1998), from any place.
///
/// The generator can only step forward, so its state is kept wherever a merge's chunks begin:
/// the plan announces these places, and one run through the stream before the merge records them.
public final class MersenneStream: Sendable {
  private struct Known {
    /// The generator before these draws; they are asked for once in every pass.
    var places: [Int: MersenneTwister]
    /// The generator where a chunk has been left off, until its next tile comes.
    var continuations: [Int: MersenneTwister] = [:]
  }
  private let seed: UInt32
  private let known: Mutex<Known>

  public init(seed: UInt32) {
    self.seed = seed
    known = Mutex(Known(places: [0: MersenneTwister(seed: seed)]))
  }

  /// Runs through the stream once and remembers the generator at each of these draws.
  func prepare(_ places: [Int]) {
    var generator = MersenneTwister(seed: seed)
    var position = 0
    for place in places.sorted() {
      generator.skip(place - position)
      position = place
      let state = generator
      known.withLock { $0.places[place] = state }
    }
  }

  /// - Parameter start: a prepared place, or where an earlier call ended.
  func withDraws(from start: Int, count: Int, _ body: (Span<UInt32>) -> Void) {
    var generator = known.withLock { known in
      if let state = known.places[start] ?? known.continuations.removeValue(forKey: start) {
        return state
      }
      let nearest = known.places.filter { $0.key <= start }.max { $0.key < $1.key }!
      var state = nearest.value
      state.skip(start - nearest.key)
      return state
    }
    let draws = [UInt32](unsafeUninitializedCapacity: count) { buffer, filled in
      for i in 0..<count { buffer[i] = generator.next() }
      filled = count
    }
    let state = generator
    known.withLock { known in
      let end = start + count
      if known.places[end] == nil { known.continuations[end] = state }
    }
    body(draws.span)
  }
}

struct MersenneTwister: Sendable {
  private var state: [UInt32]
  private var index = 624

  init(seed: UInt32) {
    state = [seed]
    for i in 1..<624 {
      let last = state[i - 1]
      state.append(1_812_433_253 &* (last ^ last >> 30) &+ UInt32(i))
    }
  }

  mutating func next() -> UInt32 {
    if index == 624 { refill() }
    var word = state[index]
    index += 1
    word ^= word >> 11
    word ^= word << 7 & 0x9D2C_5680
    word ^= word << 15 & 0xEFC6_0000
    return word ^ word >> 18
  }

  mutating func skip(_ count: Int) {
    var left = count
    while left > 0 {
      if index == 624 { refill() }
      let step = min(left, 624 - index)
      index += step
      left -= step
    }
  }

  private mutating func refill() {
    for i in 0..<624 {
      let mixed = state[i] & 0x8000_0000 | state[(i + 1) % 624] & 0x7FFF_FFFF
      let twist = mixed & 1 == 0 ? 0 : 0x9908_B0DF as UInt32
      state[i] = state[(i + 397) % 624] ^ mixed >> 1 ^ twist
    }
    index = 0
  }
}
