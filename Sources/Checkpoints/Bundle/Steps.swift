internal import CKernels

/// Differences between floats counted in steps: how many representable values lie between.
///
/// Two models that differ little differ by few steps, whatever their weights' size, and by the
/// fewer the larger the weight is. So the differences of a block are put into the order of the
/// other tensor's leading bytes (a stable sort): neighbours then have one distribution, which a
/// Huffman code fits much better than the mixture. The reader has the other tensor and knows the
/// order.
enum Steps {
  /// Writes the sorted codes of the differences of `elements` from `reference`.
  static func difference(
    of count: Int, width: Int, _ elements: UnsafeRawPointer, from reference: UnsafeRawPointer,
    into codes: UnsafeMutableRawPointer
  ) {
    switch width {
    case 1: difference(count, UInt8.self, elements, reference, codes)
    case 2: difference(count, UInt16.self, elements, reference, codes)
    case 4: difference(count, UInt32.self, elements, reference, codes)
    default: difference(count, UInt64.self, elements, reference, codes)
    }
  }

  /// Adds the differences of which `codes` are the sorted codes to the reference's elements in
  /// place.
  static func add(
    _ codes: UnsafeRawPointer, count: Int, width: Int, to elements: UnsafeMutableRawPointer
  ) {
    switch width {
    case 1: add(codes, count, UInt8.self, elements)
    case 2: add(codes, count, UInt16.self, elements)
    case 4: add(codes, count, UInt32.self, elements)
    default: add(codes, count, UInt64.self, elements)
    }
  }

  @inline(__always)
  private static func difference<Bits: FixedWidthInteger & UnsignedInteger>(
    _ count: Int, _: Bits.Type, _ elements: UnsafeRawPointer, _ reference: UnsafeRawPointer,
    _ sorted: UnsafeMutableRawPointer
  ) {
    forEachChunk(of: count, sortedBy: reference, Bits.self) { chunk, codes in
      for lane in 0..<chunk.lanes {
        let (first, codes) = (chunk.first(of: lane), codes + lane &* Chunk.length)
        for i in 0..<chunk.count {
          let steps =
            ordered(load(elements, first &+ i, Bits.self))
            &- ordered(load(reference, first &+ i, Bits.self))
          // Zigzag: 0, −1, 1, −2 … become 0, 1, 2, 3 …
          codes[i] = steps &<< 1 ^ (0 &- steps &>> Bits(Bits.bitWidth - 1))
        }
      }
      chunk.forEachPlace { element, place in
        store(codes[element], sorted, place)
      }
    }
  }

  @inline(__always)
  private static func add<Bits: FixedWidthInteger & UnsignedInteger>(
    _ sorted: UnsafeRawPointer, _ count: Int, _: Bits.Type, _ elements: UnsafeMutableRawPointer
  ) {
    forEachChunk(of: count, sortedBy: UnsafeRawPointer(elements), Bits.self) { chunk, codes in
      chunk.forEachPlace { element, place in
        codes[element] = load(sorted, place, Bits.self)
      }
      for lane in 0..<chunk.lanes {
        let (first, codes) = (chunk.first(of: lane), codes + lane &* Chunk.length)
        for i in 0..<chunk.count {
          let steps = codes[i] &>> 1 ^ (0 &- (codes[i] & 1))
          let other = load(UnsafeRawPointer(elements), first &+ i, Bits.self)
          store(unordered(ordered(other) &+ steps), elements, first &+ i)
        }
      }
    }
  }

  /// The first byte after the sign: of BF16 and F32 the exponent.
  @inline(__always)
  private static func leading<Bits: FixedWidthInteger & UnsignedInteger>(_ bits: Bits) -> UInt8 {
    let rotated = bits &<< 1 | bits &>> Bits(Bits.bitWidth - 1)
    return UInt8(truncatingIfNeeded: rotated &>> Bits(Bits.bitWidth - 8))
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

// MARK: - Sixteen bits

extension Steps {
  /// Whether the two below do for elements of this width what `difference` and `add` do and
  /// `Planes` would do then, which wide registers do much faster.
  static func splits(_ width: Int) -> Bool { width == 2 && smelt_sorts_steps() }

  /// Scratch memory that the two below need.
  static let scratch = Int(smelt_steps_scratch)

  /// Writes the planes of the sorted codes of the differences of `elements` from `reference`.
  /// - Parameter elements: overwritten.
  static func split(
    _ elements: PinnedBytes, count: Int, from reference: PinnedBytes,
    into planes: (UnsafeMutablePointer<UInt8>, UnsafeMutablePointer<UInt8>), _ scratch: PinnedBytes
  ) {
    smelt_split_steps(
      elements.start.assumingMemoryBound(to: UInt16.self),
      reference.start.assumingMemoryBound(to: UInt16.self), count, planes.0, planes.1,
      scratch.start)
  }

  /// Adds the differences of which these are the planes to the reference's elements in place.
  /// - Parameter places: scratch memory, of two bytes for each element.
  static func add(
    _ planes: (UnsafePointer<UInt8>, UnsafePointer<UInt8>), count: Int,
    to elements: UnsafeMutableRawPointer, _ places: PinnedBytes, _ scratch: PinnedBytes
  ) {
    smelt_add_steps(
      planes.0, planes.1, count, elements.assumingMemoryBound(to: UInt16.self),
      places.start.assumingMemoryBound(to: UInt16.self), scratch.start)
  }
}

// MARK: - Sorting

extension Steps {
  /// Some elements of each of the block's eighths, and where they go when they are sorted.
  ///
  /// Weights have few exponents, so neighbours often go to neighbouring places, and each waits
  /// for the one before it to have counted up. Eight parts that are sorted side by side, each
  /// from places of its own, wait an eighth as long.
  private struct Chunk {
    /// Most elements of each lane.
    static let length = 1024
    static let lanes = 8

    /// Where its lanes begin in the block: so far apart, from here on.
    var begin = 0
    var distance = 0
    var lanes = Chunk.lanes
    var count = 0
    /// The leading byte of each element, a lane after the other.
    let keys: UnsafeMutablePointer<UInt8>
    /// The next place for each key, a lane after the other.
    let places: UnsafeMutablePointer<Int32>

    @inline(__always)
    func first(of lane: Int) -> Int { begin &+ lane &* distance }

    /// Calls `body` with each element of the chunk, counted through its lanes, and its place.
    @inline(__always)
    func forEachPlace(_ body: (_ element: Int, _ place: Int) -> Void) {
      guard lanes == Chunk.lanes else {
        for i in 0..<count { take(i, Chunk.lanes - 1, body) }
        return
      }
      for i in 0..<count {
        take(i, 0, body)
        take(Chunk.length &+ i, 1, body)
        take(2 &* Chunk.length &+ i, 2, body)
        take(3 &* Chunk.length &+ i, 3, body)
        take(4 &* Chunk.length &+ i, 4, body)
        take(5 &* Chunk.length &+ i, 5, body)
        take(6 &* Chunk.length &+ i, 6, body)
        take(7 &* Chunk.length &+ i, 7, body)
      }
    }

    @inline(__always)
    private func take(_ element: Int, _ lane: Int, _ body: (Int, Int) -> Void) {
      let next = places + (lane &* 256 &+ Int(keys[element]))
      body(element, Int(next.pointee))
      next.pointee &+= 1
    }
  }

  /// Calls `body` with all elements of a block, in chunks, and with room for a chunk's codes.
  @inline(__always)
  private static func forEachChunk<Bits: FixedWidthInteger & UnsignedInteger>(
    of count: Int, sortedBy reference: UnsafeRawPointer, _: Bits.Type,
    _ body: (Chunk, UnsafeMutablePointer<Bits>) -> Void
  ) {
    let size = Chunk.lanes * Chunk.length
    withUnsafeTemporaryAllocation(of: Int32.self, capacity: Chunk.lanes * 256) { places in
      withUnsafeTemporaryAllocation(of: UInt8.self, capacity: size) { keys in
        withUnsafeTemporaryAllocation(of: Bits.self, capacity: size) { codes in
          var chunk = Chunk(keys: keys.baseAddress!, places: places.baseAddress!)
          chunk.places.update(repeating: 0, count: Chunk.lanes * 256)
          forEachPiece(of: count, &chunk) { chunk in
            readKeys(of: chunk, reference, Bits.self)
            chunk.forEachPlace { _, _ in }
          }
          // Counts become places: by key, then by lane.
          var sum: Int32 = 0
          for key in 0..<256 {
            for lane in 0..<Chunk.lanes {
              let count = chunk.places[lane * 256 + key]
              chunk.places[lane * 256 + key] = sum
              sum &+= count
            }
          }
          forEachPiece(of: count, &chunk) { chunk in
            readKeys(of: chunk, reference, Bits.self)
            body(chunk, codes.baseAddress!)
          }
        }
      }
    }
  }

  /// The eighths of a block chunk by chunk, then the up to seven elements that are left; these
  /// are sorted with the last eighth.
  @inline(__always)
  private static func forEachPiece(
    of count: Int, _ chunk: inout Chunk, _ body: (Chunk) -> Void
  ) {
    chunk.distance = count / Chunk.lanes
    chunk.lanes = Chunk.lanes
    for begin in stride(from: 0, to: chunk.distance, by: Chunk.length) {
      chunk.begin = begin
      chunk.count = min(Chunk.length, chunk.distance - begin)
      body(chunk)
    }
    chunk.begin = chunk.distance * Chunk.lanes
    chunk.count = count - chunk.begin
    chunk.lanes = 1
    if chunk.count > 0 { body(chunk) }
  }

  @inline(__always)
  private static func readKeys<Bits: FixedWidthInteger & UnsignedInteger>(
    of chunk: Chunk, _ reference: UnsafeRawPointer, _: Bits.Type
  ) {
    for lane in 0..<chunk.lanes {
      let (first, keys) = (chunk.first(of: lane), chunk.keys + lane &* Chunk.length)
      for i in 0..<chunk.count { keys[i] = leading(load(reference, first &+ i, Bits.self)) }
    }
  }

  @inline(__always)
  private static func load<Bits: FixedWidthInteger & UnsignedInteger>(
    _ elements: UnsafeRawPointer, _ i: Int, _: Bits.Type
  ) -> Bits {
    elements.loadUnaligned(fromByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
  }

  @inline(__always)
  private static func store<Bits: FixedWidthInteger & UnsignedInteger>(
    _ bits: Bits, _ elements: UnsafeMutableRawPointer, _ i: Int
  ) {
    elements.storeBytes(of: bits, toByteOffset: i &* MemoryLayout<Bits>.size, as: Bits.self)
  }
}

/// `a ^= b`, of so many bytes.
func exclusiveOr(_ bytes: UnsafeMutableRawPointer, with others: UnsafeRawPointer, count: Int) {
  let (a, b) = (
    bytes.assumingMemoryBound(to: UInt8.self), others.assumingMemoryBound(to: UInt8.self)
  )
  for i in 0..<count { a[i] ^= b[i] }
}
