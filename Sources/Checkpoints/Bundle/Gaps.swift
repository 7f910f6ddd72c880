/// The places of the elements that are not zero, as the numbers of zeros before each.
///
/// For each block of elements: a byte up to 253 is so many zeros and then an element; 254 is
/// 254 zeros; 255 ends the block, whatever of it is left being zeros.
enum Gaps {
  static let longRun: UInt8 = 254
  static let end: UInt8 = 255

  /// Most bytes that the gaps of a block can take.
  static func largest(_ count: Int) -> Int { count + count / 254 + 2 }

  /// Writes the gaps of a block and copies its elements that are not zero.
  /// - Returns: the lengths of both.
  static func write(
    _ elements: UnsafeRawPointer, count: Int, width: Int, gaps: UnsafeMutablePointer<UInt8>,
    values: UnsafeMutableRawPointer
  ) -> (gaps: Int, values: Int) {
    switch width {
    case 1: write(elements, count, UInt8.self, gaps, values)
    case 2: write(elements, count, UInt16.self, gaps, values)
    case 4: write(elements, count, UInt32.self, gaps, values)
    default: write(elements, count, UInt64.self, gaps, values)
    }
  }

  /// The same of the codes of the steps from another block's elements: see `Steps`.
  /// - Parameter codes: scratch memory for as many elements; `values` may be the elements' own.
  static func writeSteps(
    of elements: PinnedBytes, from reference: PinnedBytes, through codes: PinnedBytes, count: Int,
    width: Int, gaps: UnsafeMutablePointer<UInt8>, values: UnsafeMutableRawPointer
  ) -> (gaps: Int, values: Int) {
    Steps.difference(
      of: count, width: width, UnsafeRawPointer(elements.start),
      from: UnsafeRawPointer(reference.start), into: codes.start)
    return write(
      UnsafeRawPointer(codes.start), count: count, width: width, gaps: gaps, values: values)
  }

  /// Puts the values of a block between its zeros.
  /// - Returns: false if the gaps and the values do not make a block of so many elements.
  static func read(
    _ gaps: UnsafeBufferPointer<UInt8>, values: UnsafeRawPointer, valueCount: Int, width: Int,
    into elements: UnsafeMutableRawPointer, count: Int
  ) -> Bool {
    switch width {
    case 1: read(gaps, values, valueCount, UInt8.self, elements, count)
    case 2: read(gaps, values, valueCount, UInt16.self, elements, count)
    case 4: read(gaps, values, valueCount, UInt32.self, elements, count)
    default: read(gaps, values, valueCount, UInt64.self, elements, count)
    }
  }

  @inline(__always)
  private static func write<Bits: FixedWidthInteger>(
    _ elements: UnsafeRawPointer, _ count: Int, _: Bits.Type,
    _ gaps: UnsafeMutablePointer<UInt8>, _ values: UnsafeMutableRawPointer
  ) -> (gaps: Int, values: Int) {
    var (gapCount, valueCount, zeros) = (0, 0, 0)
    for i in 0..<count {
      let element = elements.loadUnaligned(
        fromByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
      guard element != 0 else {
        zeros &+= 1
        continue
      }
      while zeros >= Int(longRun) {
        gaps[gapCount] = longRun
        gapCount &+= 1
        zeros &-= Int(longRun)
      }
      gaps[gapCount] = UInt8(truncatingIfNeeded: zeros)
      gapCount &+= 1
      zeros = 0
      values.storeBytes(
        of: element, toByteOffset: valueCount &* MemoryLayout<Bits>.size, as: Bits.self)
      valueCount &+= 1
    }
    gaps[gapCount] = end
    return (gapCount + 1, valueCount)
  }

  @inline(__always)
  private static func read<Bits: FixedWidthInteger>(
    _ gaps: UnsafeBufferPointer<UInt8>, _ values: UnsafeRawPointer, _ valueCount: Int,
    _: Bits.Type, _ elements: UnsafeMutableRawPointer, _ count: Int
  ) -> Bool {
    guard gaps.last == end else { return false }
    elements.initializeMemory(
      as: UInt8.self, repeating: 0, count: count * MemoryLayout<Bits>.size)
    var (place, value) = (0, 0)
    for gap in gaps.dropLast() {
      place &+= Int(gap)
      guard gap != longRun else { continue }
      guard gap != end, place < count, value < valueCount else { return false }
      elements.storeBytes(
        of: values.loadUnaligned(
          fromByteOffset: value &* MemoryLayout<Bits>.size, as: Bits.self),
        toByteOffset: place &* MemoryLayout<Bits>.size, as: Bits.self)
      place &+= 1
      value &+= 1
    }
    return value == valueCount && place <= count
  }
}
