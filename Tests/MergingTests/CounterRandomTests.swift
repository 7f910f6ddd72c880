import Glibc
import Testing

@testable import Merging

@Suite struct `counter-based random numbers` {
  // Known answers of the authors' Random123 library.
  @Test(
    arguments: [
      (SIMD4<UInt32>(), SIMD2<UInt32>(), SIMD4(0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8)),
      (
        SIMD4(repeating: .max), SIMD2(repeating: .max),
        SIMD4(0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd)
      ),
      (
        SIMD4(0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344), SIMD2(0xa409_3822, 0x299f_31d0),
        SIMD4(0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1)
      ),
    ] as [(SIMD4<UInt32>, SIMD2<UInt32>, SIMD4<UInt32>)])
  func `Philox gives the published words`(
    counter: SIMD4<UInt32>, key: SIMD2<UInt32>, words: SIMD4<UInt32>
  ) {
    #expect(philox(counter: counter, key: key) == words)
  }

  @Test func `uniform numbers have the moments of the uniform distribution`() {
    let random = CounterRandom(seed: 7, tensor: "a.weight")
    let values = (0..<40_000).map { random.uniform(at: UInt64($0)) }
    let mean = values.reduce(0, +) / 40_000
    let variance = values.reduce(0) { $0 + ($1 - 0.5) * ($1 - 0.5) } / 40_000
    #expect(abs(mean - 0.5) < 0.006)
    #expect(abs(variance - 1.0 / 12) < 0.002)
    #expect(values.allSatisfy { (0..<1).contains($0) })
  }

  @Test func `normal numbers have the moments of the normal distribution`() {
    let random = CounterRandom(seed: 7, tensor: "a.weight")
    let values = (0..<40_000).map { random.normal(at: UInt64($0)) }
    func moment(_ power: Double) -> Double {
      values.reduce(0) { $0 + pow($1, power) } / 40_000
    }
    #expect(abs(moment(1)) < 0.02)
    #expect(abs(moment(2) - 1) < 0.03)
    #expect(abs(moment(3)) < 0.06)
    #expect(abs(moment(4) - 3) < 0.2)
  }

  @Test func `seed, tensor and stream each give other numbers`() {
    let sequences = [
      CounterRandom(seed: 1, tensor: "a"), CounterRandom(seed: 2, tensor: "a"),
      CounterRandom(seed: 1, tensor: "b"), CounterRandom(seed: 1, tensor: "a", stream: 1),
    ]
    #expect(Set(sequences.map { $0.words(at: 5) }).count == 4)
    #expect(sequences[0].words(at: 5) == CounterRandom(seed: 1, tensor: "a").words(at: 5))
  }

  @Test(arguments: [(0, 64), (64, 1024), (1, 62), (63, 2), (100, 3000), (16_384, 33)])
  func `elements have the words of their blocks`(first: Int, count: Int) {
    let random = CounterRandom(seed: 11, tensor: "a.weight", stream: 2)
    var words = [UInt32](repeating: 0, count: count)
    var span = words.mutableSpan
    random.fill(&span, fromElement: first)
    #expect(words == (first..<first + count).map { random.word(ofElement: $0) })
    // No word serves two elements.
    #expect(Set(words).count == count)
  }

  @Test(arguments: [(0, 4096), (64, 1000), (7, 50), (130, 5000)], [0, 0.3, 0.999])
  func `thinning keeps the elements whose words are below p`(
    place: (first: Int, count: Int), p: Double
  ) {
    let random = CounterRandom(seed: 5, tensor: "b.weight")
    let values = (0..<place.count).map { Float($0 % 97) - 48.5 }
    let kept = values.enumerated().map { index, value in
      Double(random.word(ofElement: place.first + index)) * 0x1p-32 < p ? value : 0
    }
    var thinned = values
    var span = thinned.mutableSpan
    random.thin(&span, from: place.first, keeping: p, scale: 3)
    #expect(thinned == kept.map { $0 * 3 })
    let sums = random.magnitudes(values.span, from: place.first, keeping: p)
    func sum(_ values: [Float]) -> Double { values.reduce(0) { $0 + Double(abs($1)) } }
    #expect(abs(sums.x - sum(values)) <= 1e-6 * sum(values))
    #expect(abs(sums.y - sum(kept)) <= 1e-6 * sum(values))
  }
}
