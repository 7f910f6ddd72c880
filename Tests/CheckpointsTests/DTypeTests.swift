import Testing

@testable import Checkpoints

@Suite struct `Conversions to and from Float` {
  private func decode(_ dtype: DType, _ codes: [UInt16]) -> [Float] {
    var values = [Float](repeating: 0, count: codes.count)
    var span = values.mutableSpan
    dtype.decode(codes.span.bytes, into: &span)
    return values
  }

  private func encode(_ dtype: DType, _ values: [Float]) -> [UInt16] {
    var codes = [UInt16](repeating: 0, count: values.count)
    var span = codes.mutableSpan
    var bytes = span.mutableBytes
    dtype.encode(values.span, into: &bytes)
    return codes
  }

  static let everyCode = Array(0...UInt16.max)

  @Test func `every F16 is the Float that Float16 says`() {
    let wrong = zip(Self.everyCode, decode(.f16, Self.everyCode)).filter { code, value in
      let expected = Float(Float16(bitPattern: code))
      return value.bitPattern != expected.bitPattern && !(value.isNaN && expected.isNaN)
    }
    #expect(wrong.isEmpty)
  }

  @Test(arguments: [DType.f16, .bf16])
  func `every code survives the way through Float`(dtype: DType) {
    let values = decode(dtype, Self.everyCode)
    // Signalling NaNs come back quiet: their highest mantissa bit is set.
    let quiet: UInt16 = dtype == .f16 ? 0x0200 : 0x0040
    let expected = zip(Self.everyCode, values).map { $1.isNaN ? $0 | quiet : $0 }
    #expect(encode(dtype, values) == expected)
  }

  /// A float, the floats around it and the halves between, for each sixteen-bit code.
  private func neighbourhood(_ dtype: DType) -> [Float] {
    let ends = decode(dtype, Self.everyCode)
    let halves = zip(ends, ends.dropFirst()).map { ($0 + $1) / 2 }.filter { $0.isFinite }
    let middle = ends.filter { $0.isFinite } + halves
    return middle.flatMap { [$0.nextDown, $0, $0.nextUp] }
  }

  @Test func `Float to F16 rounds to nearest even, as Float16 does`() {
    let values = neighbourhood(.f16) + [65_519.996, 65_520, .infinity, -.infinity, 1e30, 1e-30]
    let wrong = zip(values, encode(.f16, values)).filter { $1 != Float16($0).bitPattern }
    #expect(wrong.isEmpty)
  }

  @Test func `Float to BF16 rounds to nearest even`() {
    let values = neighbourhood(.bf16) + [.greatestFiniteMagnitude, .infinity, -.infinity]
    let wrong = zip(values, encode(.bf16, values)).filter { $1 != nearestBFloat16($0) }
    #expect(wrong.isEmpty)
  }

  /// The naive way: of the two neighbours the nearer one, of two as near the even one.
  private func nearestBFloat16(_ value: Float) -> UInt16 {
    let down = UInt16(value.bitPattern >> 16)
    let up = down + 1
    // Beyond the largest finite code the next one stands for 2¹²⁸, not for infinity.
    func exact(_ code: UInt16) -> Double {
      let isBeyond = code & 0x7FFF == 0x7F80
      let magnitude = isBeyond ? 0x1p128 : Double(Float(bitPattern: UInt32(code & 0x7FFF) << 16))
      return code & 0x8000 == 0 ? magnitude : -magnitude
    }
    guard value.isFinite else { return down }
    let (below, above) = (abs(Double(value) - exact(down)), abs(exact(up) - Double(value)))
    if below != above { return below < above ? down : up }
    return down.isMultiple(of: 2) ? down : up
  }

  @Test func `F64 is rounded to nearest even`() {
    let doubles = [1 + 0x1p-24, 1 + 0x1.8p-23, 1e300, -0.0, 0x1p-150, .nan]
    var values = [Float](repeating: 0, count: doubles.count)
    var span = values.mutableSpan
    DType.f64.decode(doubles.span.bytes, into: &span)
    #expect(values[..<5] == [1, 1 + 0x1p-22, .infinity, 0, 0])
    #expect(values[3].sign == .minus)
    #expect(values[5].isNaN)
  }
}
