/// Differences between floats counted in steps: how many representable values lie between.
///
/// Two models that differ little differ by few steps, whatever their weights' size, and by the
/// fewer the larger the weight is. So the differences of a block are put into the order of the
/// other tensor's leading bytes (a stable sort): neighbours then have one distribution, which a
/// Huffman code fits much better than the mixture. The reader has the other tensor and knows the
/// order.
enum Steps {
  /// Writes plane `plane` of the differences of `elements` from `reference`, in order.
  static func difference(
    _ plane: Int, of count: Int, width: Int, _ elements: UnsafeRawPointer,
    from reference: UnsafeRawPointer, into bytes: UnsafeMutablePointer<UInt8>
  ) {
    switch width {
    case 1: difference(plane, count, UInt8.self, elements, reference, bytes)
    case 2: difference(plane, count, UInt16.self, elements, reference, bytes)
    case 4: difference(plane, count, UInt32.self, elements, reference, bytes)
    default: difference(plane, count, UInt64.self, elements, reference, bytes)
    }
  }

  /// Adds the differences in `planes`, which lie `stride` bytes apart, to the reference's
  /// elements in place.
  static func add(
    _ planes: UnsafePointer<UInt8>, stride: Int, count: Int, width: Int,
    to elements: UnsafeMutableRawPointer
  ) {
    switch width {
    case 1: add(planes, stride, count, UInt8.self, elements)
    case 2: add(planes, stride, count, UInt16.self, elements)
    case 4: add(planes, stride, count, UInt32.self, elements)
    default: add(planes, stride, count, UInt64.self, elements)
    }
  }

  /// Where the differences of each leading byte begin.
  @inline(__always)
  private static func starts<Bits: FixedWidthInteger & UnsignedInteger>(
    _ count: Int, _: Bits.Type, _ reference: UnsafeRawPointer,
    into starts: UnsafeMutablePointer<Int32>
  ) {
    starts.update(repeating: 0, count: 256)
    for i in 0..<count {
      starts[leading(load(reference, i, Bits.self))] &+= 1
    }
    var sum: Int32 = 0
    for key in 0..<256 { (starts[key], sum) = (sum, sum &+ starts[key]) }
  }

  @inline(__always)
  private static func difference<Bits: FixedWidthInteger & UnsignedInteger>(
    _ plane: Int, _ count: Int, _: Bits.Type, _ elements: UnsafeRawPointer,
    _ reference: UnsafeRawPointer, _ bytes: UnsafeMutablePointer<UInt8>
  ) {
    let shift = Bits(Bits.bitWidth - 8 - 8 * plane)
    withUnsafeTemporaryAllocation(of: Int32.self, capacity: 256) { places in
      let places = places.baseAddress!
      starts(count, Bits.self, reference, into: places)
      for i in 0..<count {
        let other = load(reference, i, Bits.self)
        let steps = ordered(load(elements, i, Bits.self)) &- ordered(other)
        // Zigzag: 0, −1, 1, −2 … become 0, 1, 2, 3 …
        let coded = steps &<< 1 ^ (0 &- steps &>> Bits(Bits.bitWidth - 1))
        let key = leading(other)
        bytes[Int(places[key])] = UInt8(truncatingIfNeeded: coded &>> shift)
        places[key] &+= 1
      }
    }
  }

  @inline(__always)
  private static func add<Bits: FixedWidthInteger & UnsignedInteger>(
    _ planes: UnsafePointer<UInt8>, _ stride: Int, _ count: Int, _: Bits.Type,
    _ elements: UnsafeMutableRawPointer
  ) {
    withUnsafeTemporaryAllocation(of: Int32.self, capacity: 256) { places in
      let places = places.baseAddress!
      starts(count, Bits.self, elements, into: places)
      for i in 0..<count {
        let other = load(elements, i, Bits.self)
        let key = leading(other)
        let place = Int(places[key])
        places[key] &+= 1
        var coded: Bits = 0
        for plane in 0..<MemoryLayout<Bits>.size {
          coded = coded &<< 8 | Bits(truncatingIfNeeded: planes[plane &* stride &+ place])
        }
        let steps = coded &>> 1 ^ (0 &- (coded & 1))
        elements.storeBytes(
          of: unordered(ordered(other) &+ steps),
          toByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
      }
    }
  }

  @inline(__always)
  private static func load<Bits: FixedWidthInteger & UnsignedInteger>(
    _ elements: UnsafeRawPointer, _ i: Int, _: Bits.Type
  ) -> Bits {
    elements.loadUnaligned(fromByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
  }

  /// The first byte after the sign: of BF16 and F32 the exponent.
  @inline(__always)
  private static func leading<Bits: FixedWidthInteger & UnsignedInteger>(_ bits: Bits) -> Int {
    let rotated = bits &<< 1 | bits &>> Bits(Bits.bitWidth - 1)
    return Int(rotated &>> Bits(Bits.bitWidth - 8))
  }

  /// Bits as an integer that grows with the float they are: negative ones are turned round.
  @inline(__always)
  private static func ordered<Bits: FixedWidthInteger & UnsignedInteger>(_ bits: Bits) -> Bits {
    let isNegative = 0 &- bits &>> Bits(Bits.bitWidth - 1)
    return bits ^ (isNegative | 1 &<< Bits(Bits.bitWidth - 1))
  }

  @inline(__always)
  private static func unordered<Bits: FixedWidthInteger & UnsignedInteger>(_ value: Bits) -> Bits {
    let isNegative = 0 &- (~value &>> Bits(Bits.bitWidth - 1))
    return value ^ (isNegative | 1 &<< Bits(Bits.bitWidth - 1))
  }
}

/// `a ^= b`, of so many bytes.
func exclusiveOr(_ bytes: UnsafeMutableRawPointer, with others: UnsafeRawPointer, count: Int) {
  let (a, b) = (
    bytes.assumingMemoryBound(to: UInt8.self), others.assumingMemoryBound(to: UInt8.self)
  )
  for i in 0..<count { a[i] ^= b[i] }
}
