/// The element type of a tensor: the 22 types of the safetensors format, under its names.
public enum DType: String, CaseIterable, Sendable {
  case bool = "BOOL"
  case f4 = "F4"
  case f6E2M3 = "F6_E2M3"
  case f6E3M2 = "F6_E3M2"
  case u8 = "U8"
  case i8 = "I8"
  case f8E5M2 = "F8_E5M2"
  case f8E4M3 = "F8_E4M3"
  case f8E8M0 = "F8_E8M0"
  case f8E4M3FNUZ = "F8_E4M3FNUZ"
  case f8E5M2FNUZ = "F8_E5M2FNUZ"
  case i16 = "I16"
  case u16 = "U16"
  case f16 = "F16"
  case bf16 = "BF16"
  case i32 = "I32"
  case u32 = "U32"
  case f32 = "F32"
  case c64 = "C64"
  case f64 = "F64"
  case i64 = "I64"
  case u64 = "U64"

  /// Bits of one element; 4 and 6 for the types that are packed below a byte.
  public var bitWidth: Int {
    switch self {
    case .f4: 4
    case .f6E2M3, .f6E3M2: 6
    case .bool, .u8, .i8, .f8E5M2, .f8E4M3, .f8E8M0, .f8E4M3FNUZ, .f8E5M2FNUZ: 8
    case .i16, .u16, .f16, .bf16: 16
    case .i32, .u32, .f32: 32
    case .c64, .f64, .i64, .u64: 64
    }
  }

  /// Whether Smelt computes with this type: the floating-point types of 16 bits and more.
  ///
  /// Everything else is copied bit for bit. (Eight-bit floats come with scales in other
  /// tensors, so their values alone mean nothing.)
  public var isArithmetic: Bool {
    switch self {
    case .bf16, .f16, .f32, .f64: true
    default: false
    }
  }
}

// MARK: - To and from Float

extension DType {
  /// Decodes little-endian elements to `Float`, as many as `values` holds.
  ///
  /// BF16, F16 and F32 convert exactly; F64 is rounded to nearest even.
  /// - Precondition: `isArithmetic`, and `bytes` holds at least `values.count` elements.
  public func decode(_ bytes: RawSpan, into values: inout MutableSpan<Float>) {
    let count = values.count
    precondition(bytes.byteCount >= count * bitWidth / 8)
    // Pointers, because the loads may be misaligned: a file promises no alignment. Bare ones,
    // because a checked index keeps the compiler from vectorising.
    bytes.withUnsafeBytes { source in
      values.withUnsafeMutableBufferPointer { target in
        guard count > 0, let source = source.baseAddress, let target = target.baseAddress else {
          return
        }
        switch self {
        case .bf16:
          for i in 0..<count {
            let bits = (source + 2 &* i).loadUnaligned(as: UInt16.self)
            target[i] = Float(bitPattern: UInt32(bits) << 16)
          }
        case .f16:
          for i in 0..<count {
            target[i] = floatFromHalf((source + 2 &* i).loadUnaligned(as: UInt16.self))
          }
        case .f32:
          for i in 0..<count {
            target[i] = (source + 4 &* i).loadUnaligned(as: Float.self)
          }
        case .f64:
          for i in 0..<count {
            target[i] = Float((source + 8 &* i).loadUnaligned(as: Double.self))
          }
        default: preconditionFailure("\(rawValue) has no arithmetic")
        }
      }
    }
  }

  /// Encodes `values` as little-endian elements, rounding to nearest even.
  /// - Precondition: `isArithmetic`, and `bytes` has room for `values.count` elements.
  public func encode(_ values: Span<Float>, into bytes: inout MutableRawSpan) {
    let count = values.count
    precondition(bytes.byteCount >= count * bitWidth / 8)
    bytes.withUnsafeMutableBytes { target in
      values.withUnsafeBufferPointer { source in
        guard count > 0, let source = source.baseAddress, let target = target.baseAddress else {
          return
        }
        switch self {
        case .bf16:
          for i in 0..<count {
            (target + 2 &* i).storeBytes(of: bfloat16FromFloat(source[i]), as: UInt16.self)
          }
        case .f16:
          for i in 0..<count {
            (target + 2 &* i).storeBytes(of: halfFromFloat(source[i]), as: UInt16.self)
          }
        case .f32:
          for i in 0..<count { (target + 4 &* i).storeBytes(of: source[i], as: Float.self) }
        case .f64:
          for i in 0..<count {
            (target + 8 &* i).storeBytes(of: Double(source[i]), as: Double.self)
          }
        default: preconditionFailure("\(rawValue) has no arithmetic")
        }
      }
    }
  }

  /// Rounds values to what this type can hold, as if they had been stored and read again.
  public func round(_ values: inout MutableSpan<Float>) {
    switch self {
    case .bf16:
      for i in values.indices {
        values[i] = Float(bitPattern: UInt32(bfloat16FromFloat(values[i])) << 16)
      }
    case .f16: for i in values.indices { values[i] = floatFromHalf(halfFromFloat(values[i])) }
    default: break
    }
  }
}

extension DType {
  /// The numbers that the 256 codes of an eight-bit float stand for; nil for other types.
  ///
  /// OCP 8-bit Floating Point Specification 1.0, its E8M0 from OCP Microscaling Formats 1.0; the
  /// types without infinities and negative zero (FNUZ) as in https://arxiv.org/abs/2206.02915.
  var eightBitCodes: [Double]? {
    let mantissaBits: Int
    let bias: Int
    switch self {
    case .f8E5M2: (mantissaBits, bias) = (2, 15)
    case .f8E4M3: (mantissaBits, bias) = (3, 7)
    case .f8E5M2FNUZ: (mantissaBits, bias) = (2, 16)
    case .f8E4M3FNUZ: (mantissaBits, bias) = (3, 8)
    case .f8E8M0:
      return (0..<256).map {
        $0 == 255 ? .nan : Double(sign: .plus, exponent: $0 - 127, significand: 1)
      }
    default: return nil
    }
    let isUnsignedZero = self == .f8E5M2FNUZ || self == .f8E4M3FNUZ
    return (0..<256).map { code in
      let magnitude = code & 0x7F
      if isUnsignedZero, code == 0x80 { return .nan }
      if self == .f8E4M3, magnitude == 0x7F { return .nan }
      if self == .f8E5M2, magnitude > 0x7C { return .nan }
      let exponent = magnitude >> mantissaBits
      let mantissa = magnitude & ((1 << mantissaBits) - 1)
      // Subnormal numbers have the exponent 1 and no leading one.
      let digits = exponent == 0 ? mantissa : mantissa + (1 << mantissaBits)
      let isInfinite = self == .f8E5M2 && magnitude == 0x7C
      let value =
        isInfinite
        ? .infinity
        : Double(
          sign: .plus, exponent: max(exponent, 1) - bias - mantissaBits,
          significand: Double(digits))
      return code == magnitude ? value : -value
    }
  }
}

/// The upper half of a Float, rounded to nearest even; a NaN stays a (quiet) NaN.
@inline(__always)
func bfloat16FromFloat(_ value: Float) -> UInt16 {
  let bits = value.bitPattern
  let rounded = bits &+ 0x7FFF &+ ((bits >> 16) & 1)
  // Rounding could carry a NaN's payload over into infinity.
  let isNaN = bits & 0x7FFF_FFFF > 0x7F80_0000
  return UInt16(truncatingIfNeeded: (isNaN ? bits | 0x0040_0000 : rounded) >> 16)
}

/// IEEE binary16 to binary32 by bit arithmetic: `Float(Float16)` does not vectorise.
@inline(__always)
func floatFromHalf(_ half: UInt16) -> Float {
  let sign = UInt32(half & 0x8000) << 16
  let magnitude = UInt32(half & 0x7FFF) << 13
  // Scaling by 2^112 moves the exponent from bias 15 to 127 and normalises subnormals.
  let scaled = Float(bitPattern: magnitude) * Float(bitPattern: 0x7780_0000)
  let isSpecial = magnitude >= 0x0F80_0000
  let bits = isSpecial ? magnitude | 0x7F80_0000 : scaled.bitPattern
  return Float(bitPattern: bits | sign)
}

/// IEEE binary32 to binary16, rounded to nearest even, by bit arithmetic.
@inline(__always)
func halfFromFloat(_ value: Float) -> UInt16 {
  let bits = value.bitPattern
  let sign = UInt16(truncatingIfNeeded: (bits >> 16) & 0x8000)
  let magnitude = bits & 0x7FFF_FFFF
  // 0.5 has the exponent at which adding aligns a subnormal's last bit with Float's.
  let subnormal = (Float(bitPattern: magnitude) + 0.5).bitPattern &- 0x3F00_0000
  let normal = (magnitude &- 0x3800_0000 &+ 0x0FFF &+ ((magnitude >> 13) & 1)) >> 13
  let special: UInt32 = magnitude > 0x7F80_0000 ? 0x7E00 | (magnitude >> 13) & 0x3FF : 0x7C00
  let isSubnormal = magnitude < 0x3880_0000
  let overflows = magnitude >= 0x477F_F000
  let result = overflows ? special : (isSubnormal ? subnormal : normal)
  return UInt16(truncatingIfNeeded: result) | sign
}
