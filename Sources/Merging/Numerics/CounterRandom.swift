import CKernels
import Glibc

/// Random numbers that are a pure function of (seed, tensor, stream, index), so that neither the
/// order of the work nor its tiling changes a result.
///
/// The generator is Philox4x32-10 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*,
/// SC 2011). Its key is the seed; its counter is the index and a hash of tensor and stream.
public struct CounterRandom: Sendable {
  private let seed: UInt64
  private let sequence: UInt64

  /// The random numbers of one tensor; `stream` tells a model's from another's.
  public init(seed: UInt64, tensor: String, stream: UInt64 = 0) {
    self.seed = seed
    // FNV-1a over the stream and the name, so that the hash is the same on every machine.
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    func absorb(_ byte: UInt8) { hash = (hash ^ UInt64(byte)) &* 0x0000_0100_0000_01B3 }
    for shift in stride(from: 0, to: 64, by: 8) {
      absorb(UInt8(truncatingIfNeeded: stream >> shift))
    }
    for byte in tensor.utf8 { absorb(byte) }
    sequence = hash
  }

  /// Block `index` of the sequence: four words.
  public func words(at index: UInt64) -> SIMD4<UInt32> {
    philox(
      counter: SIMD4(index.low, index.high, sequence.low, sequence.high),
      key: SIMD2(seed.low, seed.high))
  }

  /// The word of an element, for choices that are made element by element.
  ///
  /// Sixteen blocks serve 64 elements, and a word of each goes to sixteen neighbours, so that
  /// wide registers hold neighbours.
  func word(ofElement element: Int) -> UInt32 {
    words(at: UInt64(element / 64 * 16 + element % 16))[element / 16 % 4]
  }

  /// The words of consecutive elements.
  func fill(_ words: inout MutableSpan<UInt32>, fromElement first: Int) {
    // Sound: the kernel writes the span's elements and nothing else.
    words.withUnsafeMutableBufferPointer { words in
      guard let start = words.baseAddress else { return }
      withDraws { smelt_draw($0, UInt64(first), start, words.count) }
    }
  }

  /// Multiplies by `scale` the values whose word · 2⁻³² is below `p`, and sets the others to 0.
  func thin(
    _ values: inout MutableSpan<Float>, from first: Int, keeping p: Double, scale: Float
  ) {
    values.withUnsafeMutableBufferPointer { values in
      guard let start = values.baseAddress else { return }
      withDraws { smelt_thin($0, UInt64(first), threshold(p), scale, start, values.count) }
    }
  }

  /// Σ|values|, and the part of it that `thin` would keep.
  func magnitudes(_ values: Span<Float>, from first: Int, keeping p: Double) -> SIMD2<Double> {
    var sums = (0.0, 0.0)
    values.withUnsafeBufferPointer { values in
      guard let start = values.baseAddress else { return }
      withUnsafeMutableBytes(of: &sums) { sums in
        let sums = sums.assumingMemoryBound(to: Double.self).baseAddress!
        withDraws {
          smelt_sum_thinned($0, UInt64(first), threshold(p), start, values.count, sums)
        }
      }
    }
    return SIMD2(sums.0, sums.1)
  }

  /// word · 2⁻³² < p, in whole numbers; p = 1 is never asked for.
  private func threshold(_ p: Double) -> UInt32 { UInt32(min(max(0, p), 1 - 0x1p-32) * 0x1p32) }

  private func withDraws(_ body: (UnsafePointer<smelt_draws>) -> Void) {
    withUnsafePointer(to: smelt_draws(key: seed, sequence: sequence), body)
  }

  /// A number of the uniform distribution on [0, 1), a multiple of 2⁻³².
  public func uniform(at index: UInt64) -> Double {
    Double(words(at: index / 4)[Int(index % 4)]) * 0x1p-32
  }

  /// A number of the standard normal distribution (Box and Muller 1958).
  public func normal(at index: UInt64) -> Double {
    let words = words(at: index)
    let radius = UInt64(words.x) << 32 | UInt64(words.y)
    let angle = UInt64(words.z) << 32 | UInt64(words.w)
    // (radius + ½)·2⁻⁵³ lies within (0, 1), so the logarithm is finite.
    let scaled = (Double(radius >> 11) + 0.5) * 0x1p-53
    return (-2 * log(scaled)).squareRoot() * cos(2 * .pi * Double(angle >> 11) * 0x1p-53)
  }

  /// Fills `values` with numbers `first`, `first` + 1, … of the normal distribution with this
  /// standard deviation around 0, four a block and in single precision: routers of wide models
  /// begin with hundreds of millions of them.
  ///
  /// - Precondition: `first` is a multiple of four.
  func fill(_ values: inout MutableSpan<Float>, from first: Int, deviation: Float) {
    precondition(first.isMultiple(of: 4))
    for start in stride(from: 0, to: values.count, by: 4) {
      let block = deviation * normals(at: UInt64((first + start) / 4))
      for lane in 0..<min(4, values.count - start) { values[start + lane] = block[lane] }
    }
  }

  /// Two pairs of normal numbers.
  private func normals(at block: UInt64) -> SIMD4<Float> {
    let words = words(at: block)
    func pair(_ radius: UInt32, _ angle: UInt32) -> (Float, Float) {
      // (radius + ½)·2⁻²⁴ lies within (0, 1], so the logarithm is finite.
      let length = (-2 * logf((Float(radius >> 8) + 0.5) * 0x1p-24)).squareRoot()
      let turn = 2 * Float.pi * (Float(angle >> 8) * 0x1p-24)
      return (length * cosf(turn), length * sinf(turn))
    }
    let (one, two) = (pair(words.x, words.y), pair(words.z, words.w))
    return SIMD4(one.0, one.1, two.0, two.1)
  }
}

/// Ten rounds of Philox on four words.
func philox(counter: SIMD4<UInt32>, key: SIMD2<UInt32>) -> SIMD4<UInt32> {
  var counter = counter
  var key = key
  for _ in 0..<10 {
    let left = UInt64(counter.x) * 0xD251_1F53
    let right = UInt64(counter.z) * 0xCD9E_8D57
    counter = SIMD4(
      right.high ^ counter.y ^ key.x, right.low, left.high ^ counter.w ^ key.y, left.low)
    key &+= SIMD2(0x9E37_79B9, 0xBB67_AE85)
  }
  return counter
}

extension UInt64 {
  fileprivate var low: UInt32 { UInt32(truncatingIfNeeded: self) }
  fileprivate var high: UInt32 { UInt32(truncatingIfNeeded: self >> 32) }
}
