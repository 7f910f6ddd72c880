import CKernels
import Checkpoints
import Merging
import TestSupport
import Testing

/// The kernels in C beside the plain loops that they replace, bit for bit. Those of the random
/// words, of Gram matrices and of the descent are beside the Swift that they are a part of.
struct KernelTests {
  private static let counts = [1, 15, 16, 17, 1000, 1024, 5000]

  /// Values of all sizes, with zeros of both signs and equal magnitudes among them.
  private func values(_ count: Int, seed: Int) -> [Float] {
    var generator = SeededGenerator(seed: UInt64(seed))
    return (0..<count).map { _ in
      let value = Float.random(in: -4...4, using: &generator)
      switch Int.random(in: 0..<8, using: &generator) {
      case 0: return value < 0 ? -0.0 : 0
      case 1: return value.rounded()
      default: return value
      }
    }
  }

  private func bits(_ values: [Float]) -> [UInt32] { values.map { $0.bitPattern } }

  @Test(arguments: [1, 2, 4, 7], counts)
  func `weighted rows are summed row after row`(order: Int, count: Int) {
    let rows = values(order * count, seed: count)
    let weights = values(order, seed: order)
    var sums = [Float](repeating: .nan, count: count)
    smelt_weigh(rows, count, order, weights, count, &sums)
    var expected = [Float](repeating: 0, count: count)
    for row in 0..<order {
      for i in 0..<count { expected[i] += rows[row * count + i] * weights[row] }
    }
    #expect(bits(sums) == bits(expected))
  }

  @Test(arguments: [(1, true), (2, false), (4, true), (4, false), (7, true)], counts)
  func `only what has the sign of all together is summed`(
    election: (order: Int, weighsVotes: Bool), count: Int
  ) {
    let (order, weighsVotes) = election
    let rows = values(order * count, seed: count)
    let weights = values(order, seed: order)
    var sums = [Float](repeating: .nan, count: count)
    var agreed = sums
    smelt_elect(rows, count, order, weights, weighsVotes, count, &sums, &agreed)
    for i in 0..<count {
      let column = (0..<order).map { rows[$0 * count + i] }
      let products = zip(column, weights).map { $0 * $1 }
      let votes = weighsVotes ? products : column
      let isPlus = votes.reduce(0, +) >= 0
      var (sum, weight): (Float, Float) = (0, 0)
      for row in 0..<order where isPlus ? votes[row] > 0 : votes[row] < 0 {
        sum += products[row]
        weight += weights[row]
      }
      #expect(sums[i] == sum && agreed[i] == weight)
    }
    var alone = [Float](repeating: .nan, count: count)
    smelt_elect(rows, count, order, weights, weighsVotes, count, &alone, nil)
    #expect(bits(alone) == bits(sums))
  }

  @Test(arguments: counts)
  func `accumulating rounds once an element`(count: Int) {
    let values = values(count, seed: 1)
    var sum = self.values(count, seed: 2)
    let expected = zip(sum, values).map { $0.addingProduct($1, 0.3) }
    smelt_accumulate(&sum, values, 0.3, count)
    #expect(bits(sum) == bits(expected))
  }

  @Test(arguments: counts)
  func `magnitudes are summed in sixteen lanes and blocks of 1024`(count: Int) {
    let values = values(count, seed: 3)
    var expected = 0.0
    for start in stride(from: 0, to: count, by: 1024) {
      var lanes = SIMD16<Float>()
      for i in start..<min(start + 1024, count) { lanes[(i - start) % 16] += abs(values[i]) }
      let eight = SIMD8<Double>(lanes.lowHalf) + SIMD8<Double>(lanes.highHalf)
      let four = eight.lowHalf + eight.highHalf
      expected += (four[0] + four[2]) + (four[1] + four[3])
    }
    #expect(smelt_sum_magnitudes(values, count) == expected)
  }

  @Test(arguments: counts)
  func `thinning by rank follows a stable sort`(count: Int) {
    var generator = SeededGenerator(seed: 4)
    let before = values(count, seed: count)
    let uniforms = (0..<count).map { _ in Float.random(in: 0..<1, using: &generator) }
    var after = before
    var scratch = [UInt64](repeating: 0, count: 2 * count)
    smelt_thin_by_rank(&after, count, uniforms, 0.5, 0.2, 0.3, &scratch)
    var expected = before
    let order = before.indices.sorted {
      (abs(before[$0]), $0) < (abs(before[$1]), $1)
    }
    for (rank, i) in order.enumerated() {
      let probability =
        count == 1 ? 0.5 : Float(0.2) + Float(rank) / Float(count - 1) * 2 * Float(0.3)
      if !(uniforms[i] < probability) { expected[i] = 0 }
    }
    #expect(bits(after) == bits(expected))
  }

  @Test(arguments: counts)
  func `magnitudes are counted by their bits`(count: Int) {
    let values = values(count, seed: 5)
    let magnitudes = values.map { $0.bitPattern & 0x7FFF_FFFF }
    var upper = [Int64](repeating: 0, count: 1 << 16)
    let lower = smelt_count_upper(values, count, &upper)
    var expected = [Int64](repeating: 0, count: 1 << 16)
    for bits in magnitudes { expected[Int(bits >> 15)] += 1 }
    #expect(upper == expected)
    #expect(lower == magnitudes.reduce(0) { $0 | $1 & 0x7FFF })

    for order in 1...3 {
      let wanted = (0..<order).map { magnitudes[$0 % count] >> 15 }
      var counts = [Int64](repeating: 0, count: order << 15)
      smelt_count_lower(values, count, wanted, order, &counts)
      guard Set(wanted).count == order else { continue }
      var expected = [Int64](repeating: 0, count: order << 15)
      for bits in magnitudes {
        for (k, upper) in wanted.enumerated() where bits >> 15 == upper {
          expected[(k << 15) + Int(bits & 0x7FFF)] += 1
        }
      }
      #expect(counts == expected)
    }

    var equal = [0, 0]
    smelt_count_equal(values, count, magnitudes[0], 0, &equal)
    #expect(equal == [magnitudes.count { $0 == magnitudes[0] }, magnitudes.count { $0 == 0 }])
  }

  /// Weights of all magnitudes, with what is not finite and halves' subnormals among them.
  private func weights(_ count: Int, seed: Int) -> [Float] {
    var generator = SeededGenerator(seed: UInt64(seed))
    return (0..<count).map { _ in
      switch Int.random(in: 0..<16, using: &generator) {
      case 0:
        return [0, -0.0, .infinity, -.infinity, .nan, 65_519.99, 65_520].randomElement(
          using: &generator)!
      case 1: return Float(bitPattern: UInt32.random(in: 0...(.max), using: &generator))
      default:
        let exponent = Int.random(in: -28...2, using: &generator)
        return Float(
          sign: .plus, exponent: exponent, significand: .random(in: -2...2, using: &generator))
      }
    }
  }

  @Test(arguments: [(smelt_exact, DType.f32), (smelt_bfloat16, .bf16), (smelt_half, .f16)], counts)
  func `what base and task vector miss is found`(
    type: (rounding: smelt_rounding, dtype: DType), count: Int
  ) {
    func rounded(_ values: [Float]) -> [Float] {
      var values = values
      var span = values.mutableSpan
      type.dtype.round(&span)
      return values
    }
    let base = rounded(weights(count, seed: count))
    let expert = zip(base, weights(count, seed: count + 1)).map { $0 + 0.01 * $1 }
    let none: UInt32 = 0x7FA5_C3D1
    let vector = rounded(zip(expert, base).map { $0 - $1 })
    let sums = rounded(zip(base, vector).map { $0 + $1 })
    let missed = zip(rounded(expert), sums).map { weight, sum in
      weight.isNaN || weight.bitPattern != sum.bitPattern ? weight : Float(bitPattern: none)
    }
    let missedCount = missed.count { $0.bitPattern != none }

    var (split, found) = (expert, [Float](repeating: 0, count: count))
    #expect(smelt_count_missed(expert, base, count, type.rounding) == missedCount)
    #expect(
      smelt_split_weights(&split, base, count, type.rounding, none, &found) == missedCount)
    #expect(bits(found) == bits(missed))
    // Which NaN a difference is, the order of its terms decides.
    #expect(
      zip(split, vector).allSatisfy { $0.bitPattern == $1.bitPattern || $0.isNaN && $1.isNaN })
    #expect(missedCount > 0 || count < 1000)
  }
}
