/// Elements split into planes: the first bytes of all, then the second bytes of all, and so on,
/// most significant first.
///
/// A float is first rotated left by one bit, so that the first plane is the exponent (of BF16
/// and F32 the whole of it) and the sign joins the mantissa, which is as random as it is.
enum Planes {
  /// Writes plane `plane` of `count` elements of `width` bytes.
  static func extract(
    _ plane: Int, of count: Int, width: Int, rotated: Bool,
    from elements: UnsafeRawPointer, into bytes: UnsafeMutablePointer<UInt8>
  ) {
    switch (width, rotated) {
    case (2, true): extract(plane, count, rotation: 1, UInt16.self, elements, bytes)
    case (2, false): extract(plane, count, rotation: 0, UInt16.self, elements, bytes)
    case (4, true): extract(plane, count, rotation: 1, UInt32.self, elements, bytes)
    case (4, false): extract(plane, count, rotation: 0, UInt32.self, elements, bytes)
    case (8, true): extract(plane, count, rotation: 1, UInt64.self, elements, bytes)
    case (8, false): extract(plane, count, rotation: 0, UInt64.self, elements, bytes)
    default: UnsafeMutableRawPointer(bytes).copyMemory(from: elements, byteCount: count)
    }
  }

  /// Puts `count` elements together again from their planes, which lie `stride` bytes apart.
  static func join(
    _ planes: UnsafePointer<UInt8>, stride: Int, count: Int, width: Int, rotated: Bool,
    into elements: UnsafeMutableRawPointer
  ) {
    switch (width, rotated) {
    case (2, true): join(planes, stride, count, rotation: 1, UInt16.self, elements)
    case (2, false): join(planes, stride, count, rotation: 0, UInt16.self, elements)
    case (4, true): join(planes, stride, count, rotation: 1, UInt32.self, elements)
    case (4, false): join(planes, stride, count, rotation: 0, UInt32.self, elements)
    case (8, true): join(planes, stride, count, rotation: 1, UInt64.self, elements)
    case (8, false): join(planes, stride, count, rotation: 0, UInt64.self, elements)
    default: elements.copyMemory(from: planes, byteCount: count)
    }
  }

  @inline(__always)
  private static func extract<Bits: FixedWidthInteger & UnsignedInteger>(
    _ plane: Int, _ count: Int, rotation: Int, _: Bits.Type,
    _ elements: UnsafeRawPointer, _ bytes: UnsafeMutablePointer<UInt8>
  ) {
    let shift = Bits(Bits.bitWidth - 8 - 8 * plane)
    for i in 0..<count {
      let bits = elements.loadUnaligned(
        fromByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
      let rotated = rotation == 0 ? bits : bits &<< 1 | bits &>> Bits(Bits.bitWidth - 1)
      bytes[i] = UInt8(truncatingIfNeeded: rotated &>> shift)
    }
  }

  @inline(__always)
  private static func join<Bits: FixedWidthInteger & UnsignedInteger>(
    _ planes: UnsafePointer<UInt8>, _ stride: Int, _ count: Int, rotation: Int, _: Bits.Type,
    _ elements: UnsafeMutableRawPointer
  ) {
    for i in 0..<count {
      var rotated: Bits = 0
      for plane in 0..<MemoryLayout<Bits>.size {
        rotated = rotated &<< 8 | Bits(truncatingIfNeeded: planes[plane &* stride &+ i])
      }
      let bits =
        rotation == 0 ? rotated : rotated &>> 1 | rotated &<< Bits(Bits.bitWidth - 1)
      elements.storeBytes(of: bits, toByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
    }
  }
}
