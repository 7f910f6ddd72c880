import Glibc
import Synchronization

/// How two checkpoints differ.
public struct CheckpointDifference: Sendable {
  /// Tensors that only one of the two has.
  public let onlyInFirst: [TensorInfo]
  public let onlyInSecond: [TensorInfo]
  /// The tensors that both have, in the order of the first.
  public let common: [TensorDifference]

  /// Whether both hold the same tensors, bit for bit; their order and metadata do not count.
  public var isEmpty: Bool {
    onlyInFirst.isEmpty && onlyInSecond.isEmpty && common.allSatisfy { $0.isIdentical }
  }
}

/// How two tensors of one name differ.
public struct TensorDifference: Sendable {
  public let first: TensorInfo
  public let second: TensorInfo
  /// Whether type, shape and every bit are the same.
  public let isIdentical: Bool
  /// Why the two could not be compared: one of them cannot be read.
  public let failure: CheckpointError?
  /// Nil unless both can be read, have the same shape and are numbers: neither of 4 or 6 bits, which share
  /// bytes in an order that the format does not say, and complex both or neither.
  public let numbers: Numbers?

  /// The difference in numbers; NaN where a NaN or an infinity is in only one of the two.
  public struct Numbers: Equatable, Sendable {
    /// The largest |a − b|; of complex numbers its absolute value.
    public let maximum: Double
    /// ‖a − b‖ / ‖a‖; zero where both are the same.
    public let relativeNorm: Double
    /// The cosine of the angle between both, real and imaginary parts taken as elements of their
    /// own; one where both are the same.
    public let cosine: Double
  }
}

extension Checkpoint {
  /// Compares two checkpoints, of whatever formats, tensor by tensor.
  ///
  /// Memory is two pieces of a million elements a worker; the numbers are the same for every
  /// number of workers, because sums are taken a piece at a time in order.
  /// - Throws: a failure that is not of one tensor, or if one of the two was changed meanwhile.
  public static func difference(
    _ first: any TensorSource, _ second: any TensorSource, workers: Int = 2
  ) throws -> CheckpointDifference {
    let pairs = first.manifest.tensors.compactMap { tensor in
      second.manifest[tensor.name].map { (tensor, $0) }
    }
    // A base that is missing, or another one, is not of one tensor.
    for source in [first, second] {
      try (source as? BundleSource)?.proveBase(workers: workers)
    }
    // A step is a piece of a pair that can be compared: of one shape, and either of one type
    // or of types that are numbers.
    let compared = pairs.indices.filter { pair in
      let (a, b) = pairs[pair]
      return a.shape == b.shape && (a.dtype == b.dtype || a.dtype.isComparable(with: b.dtype))
    }
    let steps = compared.flatMap { pair in
      stride(from: 0, to: pairs[pair].0.elementCount, by: 1 << 20).map { begin in
        (pair: pair, elements: begin..<min(begin + 1 << 20, pairs[pair].0.elementCount))
      }
    }
    let pieces = Mutex([PieceDifference](repeating: .init(), count: steps.count))
    let failures = ReadingFailures()
    try forEachStep(count: steps.count, workers: workers) {
      PairOfBuffers()
    } body: { step, buffers in
      let (a, b) = pairs[steps[step].pair]
      do throws(CheckpointError) {
        let piece = try PieceDifference(
          first, a, second, b, steps[step].elements, through: &buffers.left, &buffers.right)
        pieces.withLock { $0[step] = piece }
      } catch {
        guard error.tensor != nil else { throw error }
        failures.add(error, ofTensorAt: steps[step].pair, step: step)
      }
    }
    try first.checkUnchanged()
    try second.checkUnchanged()
    var sums = [PieceDifference?](repeating: nil, count: pairs.count)
    for pair in compared { sums[pair] = PieceDifference() }
    for (step, piece) in zip(steps, pieces.withLock { $0 }) { sums[step.pair]!.add(piece) }
    let causes = failures.causes
    for pair in causes.keys { sums[pair] = nil }
    return CheckpointDifference(
      onlyInFirst: first.manifest.tensors.filter { second.manifest[$0.name] == nil },
      onlyInSecond: second.manifest.tensors.filter { first.manifest[$0.name] == nil },
      common: zip(pairs, sums).enumerated().map { position, found in
        let (pair, sum) = found
        return TensorDifference(
          first: pair.0, second: pair.1,
          isIdentical: pair.0.dtype == pair.1.dtype && sum?.isIdentical ?? false,
          failure: causes[position],
          numbers: pair.0.dtype.isComparable(with: pair.1.dtype) ? sum?.numbers : nil)
      })
  }
}

/// What a worker reads into: a million elements of at most eight bytes of each tensor.
private struct PairOfBuffers: ~Copyable {
  var left = Buffer(byteCount: 8 << 20)
  var right = Buffer(byteCount: 8 << 20)
}

/// The sums over some elements of two tensors from which their difference is told.
private struct PieceDifference: Sendable {
  var isIdentical = true
  var maximum = 0.0
  var squares = (first: 0.0, second: 0.0, difference: 0.0)
  var product = 0.0

  init() {}

  /// Reads the same elements of both tensors. They begin at a multiple of eight, so at whole
  /// bytes for every type.
  init(
    _ first: any TensorSource, _ a: TensorInfo, _ second: any TensorSource, _ b: TensorInfo,
    _ elements: Range<Int>, through left: inout Buffer, _ right: inout Buffer
  ) throws(CheckpointError) {
    var leftBytes = left.first(elements.count * a.dtype.bitWidth / 8)
    try first.read(a, at: elements.lowerBound * a.dtype.bitWidth / 8, into: &leftBytes)
    var rightBytes = right.first(elements.count * b.dtype.bitWidth / 8)
    try second.read(b, at: elements.lowerBound * b.dtype.bitWidth / 8, into: &rightBytes)
    self.init(leftBytes.bytes, a.dtype, rightBytes.bytes, b.dtype, count: elements.count)
  }

  init(_ a: RawSpan, _ first: DType, _ b: RawSpan, _ second: DType, count: Int) {
    isIdentical = a.withUnsafeBytes { a in
      b.withUnsafeBytes { b in
        a.count == b.count && (a.count == 0 || memcmp(a.baseAddress!, b.baseAddress!, a.count) == 0)
      }
    }
    guard first.isComparable(with: second) else { return }
    let distances = first == second ? first.wideDistances(a, b, count: count) : nil
    let parts = first == .c64 ? 2 : 1
    let (a, b) = (first.doubles(a, count: count), second.doubles(b, count: count))
    var realPart = 0.0
    for i in 0..<count * parts {
      let (x, y) = (a[i], b[i])
      // Equal infinities, and NaN beside NaN, are no difference.
      let isEqual = x == y || (x.isNaN && y.isNaN)
      let difference = distances?[i] ?? (isEqual ? 0 : abs(x - y))
      var distance = difference
      if parts == 2 {
        distance = i.isMultiple(of: 2) ? 0 : hypot(realPart, difference)
        realPart = difference
      }
      // `max` would lose a NaN.
      maximum = distance <= maximum ? maximum : maximum.isNaN ? maximum : distance
      if difference == 0, !x.isFinite { continue }
      squares.first += x * x
      squares.second += y * y
      squares.difference += difference * difference
      product += x * y
    }
  }

  mutating func add(_ other: PieceDifference) {
    isIdentical = isIdentical && other.isIdentical
    maximum = maximum.isNaN || other.maximum.isNaN ? .nan : max(maximum, other.maximum)
    squares.first += other.squares.first
    squares.second += other.squares.second
    squares.difference += other.squares.difference
    product += other.product
  }

  var numbers: TensorDifference.Numbers {
    let isSame = maximum == 0
    return .init(
      maximum: maximum,
      relativeNorm: isSame ? 0 : (squares.difference / squares.first).squareRoot(),
      cosine: isSame ? 1 : product / (squares.first.squareRoot() * squares.second.squareRoot()))
  }
}

extension DType {
  /// Whether numbers of both types can be subtracted from each other.
  fileprivate func isComparable(with other: DType) -> Bool {
    bitWidth >= 8 && other.bitWidth >= 8 && (self == .c64) == (other == .c64)
  }

  /// Elements as `Double`: exactly, but for integers beyond 2⁵³; of complex ones both parts.
  fileprivate func doubles(_ bytes: RawSpan, count: Int) -> [Double] {
    func load<Element>(_ type: Element.Type, _ number: (Element) -> Double) -> [Double] {
      bytes.withUnsafeBytes { bytes in
        (0..<count).map {
          number(bytes.loadUnaligned(fromByteOffset: MemoryLayout<Element>.size * $0, as: type))
        }
      }
    }
    switch self {
    case .bool, .u8: return load(UInt8.self) { Double($0) }
    case .i8: return load(Int8.self) { Double($0) }
    case .u16: return load(UInt16.self) { Double($0) }
    case .i16: return load(Int16.self) { Double($0) }
    case .u32: return load(UInt32.self) { Double($0) }
    case .i32: return load(Int32.self) { Double($0) }
    case .u64: return load(UInt64.self) { Double($0) }
    case .i64: return load(Int64.self) { Double($0) }
    case .f64: return load(Double.self) { $0 }
    case .c64: return DType.f32.doubles(bytes, count: 2 * count)
    case .bf16, .f16, .f32:
      var floats = [Float](repeating: 0, count: count)
      var span = floats.mutableSpan
      decode(bytes, into: &span)
      return floats.map { Double($0) }
    case .f8E5M2, .f8E4M3, .f8E8M0, .f8E4M3FNUZ, .f8E5M2FNUZ:
      let codes = eightBitCodes!
      return load(UInt8.self) { codes[Int($0)] }
    case .f4, .f6E2M3, .f6E3M2: preconditionFailure("\(rawValue) shares bytes")
    }
  }

  /// |a − b| of integers of 64 bits, which as `Double` could be equal though they are not; nil for
  /// other types.
  fileprivate func wideDistances(_ a: RawSpan, _ b: RawSpan, count: Int) -> [Double]? {
    func distances<Element: FixedWidthInteger & BitwiseCopyable>(_ type: Element.Type) -> [Double] {
      (0..<count).map {
        let x = a.unsafeLoadUnaligned(fromByteOffset: 8 * $0, as: type)
        let y = b.unsafeLoadUnaligned(fromByteOffset: 8 * $0, as: type)
        let difference = max(x, y) &- min(x, y)
        return Double(UInt64(truncatingIfNeeded: difference))
      }
    }
    switch self {
    case .i64: return distances(Int64.self)
    case .u64: return distances(UInt64.self)
    default: return nil
    }
  }
}
