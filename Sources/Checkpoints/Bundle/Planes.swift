/// Elements split into planes: the first bytes of all, then the second bytes of all, and so on,
/// most significant first.
///
/// A float is first rotated left by one bit, so that the first plane is the exponent (of BF16
/// and F32 the whole of it) and the sign joins the mantissa, which is as random as it is.
enum Planes {
  /// Writes plane `plane` of `count` elements of `width` bytes.
  static func extract(
    _ plane: Int, of count: Int, width: Int, rotation: Int,
    from elements: UnsafeRawPointer, into bytes: UnsafeMutablePointer<UInt8>
  ) {
    switch width {
    case 2: extract(plane, count, UInt16(rotation), elements, bytes)
    case 4: extract(plane, count, UInt32(rotation), elements, bytes)
    case 8: extract(plane, count, UInt64(rotation), elements, bytes)
    default: extract(plane, count, UInt8(rotation), elements, bytes)
    }
  }

  /// Puts `count` elements together again from their planes, which lie `stride` bytes apart.
  static func join(
    _ planes: UnsafePointer<UInt8>, stride: Int, count: Int, width: Int, rotation: Int,
    into elements: UnsafeMutableRawPointer
  ) {
    switch width {
    case 2: join(planes, stride, count, UInt16(rotation), elements)
    case 4: join(planes, stride, count, UInt32(rotation), elements)
    case 8: join(planes, stride, count, UInt64(rotation), elements)
    default: join(planes, stride, count, UInt8(rotation), elements)
    }
  }

  @inline(__always)
  private static func extract<Bits: FixedWidthInteger & UnsignedInteger>(
    _ plane: Int, _ count: Int, _ rotation: Bits,
    _ elements: UnsafeRawPointer, _ bytes: UnsafeMutablePointer<UInt8>
  ) {
    let shift = Bits(Bits.bitWidth - 8 - 8 * plane)
    // Masked shifts: without rotation both are by 0 and the two halves the same.
    let opposite = Bits(Bits.bitWidth) &- rotation
    for i in 0..<count {
      let bits = elements.loadUnaligned(
        fromByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
      let rotated = bits &<< rotation | bits &>> opposite
      bytes[i] = UInt8(truncatingIfNeeded: rotated &>> shift)
    }
  }

  @inline(__always)
  private static func join<Bits: FixedWidthInteger & UnsignedInteger>(
    _ planes: UnsafePointer<UInt8>, _ stride: Int, _ count: Int, _ rotation: Bits,
    _ elements: UnsafeMutableRawPointer
  ) {
    let opposite = Bits(Bits.bitWidth) &- rotation
    for i in 0..<count {
      var rotated: Bits = 0
      for plane in 0..<MemoryLayout<Bits>.size {
        rotated = rotated &<< 8 | Bits(truncatingIfNeeded: planes[plane &* stride &+ i])
      }
      let bits = rotated &>> rotation | rotated &<< opposite
      elements.storeBytes(of: bits, toByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
    }
  }
}
