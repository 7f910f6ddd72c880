/// Rounds rows of a matrix to few bits: every group of values is a scale times small integers.
///
/// The scale is the group's largest magnitude over the largest integer, so that zero stays zero
/// and nothing is clipped.
public struct Quantizer: Sendable, Equatable {
  /// Bits a value: 8 or 4.
  public let bits: Int
  /// How many values share a scale; a row's last group may be shorter.
  public let groupLength: Int

  /// One scale a row of bytes.
  public static let int8 = Quantizer(bits: 8, groupLength: .max)
  /// One scale for 128 half-bytes; of two in a byte the first is the lower half.
  public static let int4 = Quantizer(bits: 4, groupLength: 128)

  /// How many scales a row has.
  public func scaleCount(rowLength: Int) -> Int {
    rowLength == 0 ? 0 : (rowLength - 1) / groupLength + 1
  }

  /// How many bytes the integers of a row take.
  public func byteCount(rowLength: Int) -> Int { bits == 8 ? rowLength : (rowLength + 1) / 2 }

  private var largest: Float { bits == 8 ? 127 : 7 }

  /// Rounds a row to nearest, ties to even.
  ///
  /// - Returns: Whether all values are finite; if not, nothing of use has been written.
  public func encode(
    _ row: Span<Float>, into codes: inout MutableSpan<UInt8>, scales: inout MutableSpan<Float>
  ) -> Bool {
    precondition(codes.count == byteCount(rowLength: row.count))
    precondition(scales.count == scaleCount(rowLength: row.count))
    for index in codes.indices { codes[index] = 0 }
    for group in scales.indices {
      let range = range(group, row.count)
      var magnitude: Float = 0
      var isFinite = true
      for index in range {
        magnitude = max(magnitude, row[index].magnitude)
        isFinite = isFinite && row[index].isFinite
      }
      guard isFinite else { return false }
      var scale = magnitude / largest
      // Beside the largest of all numbers the product may have been rounded up to infinity.
      if !(scale * largest).isFinite { scale = scale.nextDown }
      scales[group] = scale
      // The smallest of all numbers have no scale; they are rounded to zero.
      guard scale > 0 else { continue }
      for index in range {
        // A scale among the subnormals is coarse: the quotient may pass the largest integer.
        let quotient = max(-largest, min(largest, row[index] / scale))
        // Adding 1.5·2²³ leaves no bits for the fraction: that rounds to nearest, ties to even.
        let code = Int32((quotient + 0x1.8p23) - 0x1.8p23)
        if bits == 8 {
          codes[index] = UInt8(truncatingIfNeeded: code)
        } else {
          codes[index / 2] |= UInt8(truncatingIfNeeded: code & 0xF) << (index % 2 * 4)
        }
      }
    }
    return true
  }

  /// The values that the integers stand for.
  public func decode(
    _ codes: Span<UInt8>, scales: Span<Float>, into row: inout MutableSpan<Float>
  ) {
    precondition(codes.count == byteCount(rowLength: row.count))
    precondition(scales.count == scaleCount(rowLength: row.count))
    for group in scales.indices {
      let scale = scales[group]
      for index in range(group, row.count) {
        let code =
          bits == 8
          ? Int8(truncatingIfNeeded: codes[index])
          : Int8(truncatingIfNeeded: (codes[index / 2] >> (index % 2 * 4)) << 4) >> 4
        row[index] = Float(code) * scale
      }
    }
  }

  private func range(_ group: Int, _ rowLength: Int) -> Range<Int> {
    let start = group == 0 ? 0 : group * groupLength
    return start..<start + min(groupLength, rowLength - start)
  }
}

/// How far values are from what they were, over many rows.
public struct RoundingError: Sendable, Equatable {
  private var squaredError = 0.0
  private var squaredNorm = 0.0
  public private(set) var largest: Float = 0

  public init() {}

  public mutating func add(_ original: Span<Float>, _ rounded: Span<Float>) {
    precondition(original.count == rounded.count)
    for index in original.indices {
      let difference = rounded[index] - original[index]
      squaredError += Double(difference) * Double(difference)
      squaredNorm += Double(original[index]) * Double(original[index])
      largest = max(largest, difference.magnitude)
    }
  }

  public static func += (sum: inout Self, other: Self) {
    sum.squaredError += other.squaredError
    sum.squaredNorm += other.squaredNorm
    sum.largest = max(sum.largest, other.largest)
  }

  /// ‖rounded − original‖ / ‖original‖.
  public var relative: Double {
    squaredNorm > 0 ? (squaredError / squaredNorm).squareRoot() : 0
  }
}
