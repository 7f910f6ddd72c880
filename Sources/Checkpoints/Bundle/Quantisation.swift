/// Lossy coding: each element as a small integer times a scale that its group shares.
///
/// `int8`: −127…127, scale = largest magnitude / 127. `int4`: −7…7, stored plus 8, the earlier
/// element in the lower half of a byte, scale = largest magnitude / 7. `sign1`: −1 or 1 (a set
/// bit; lowest bit first), scale = mean magnitude.
enum Quantisation {
  /// Smaller groups would take as much for their scales as for their elements.
  static let smallestGroup = 16

  /// Elements that share a scale: a row, or 128 elements for `int4`.
  static func group(of tensor: TensorInfo, _ codec: Codec) -> Int? {
    let group = codec == .int4 ? 128 : tensor.rowLength
    return tensor.shape.count > 1 && group >= smallestGroup ? group : nil
  }

  /// Bytes that hold so many coded elements.
  static func codedSize(_ count: Int, _ codec: Codec) -> Int {
    switch codec {
    case .int8: count
    case .int4: count / 2 + count % 2
    default: count / 8 + (count % 8 == 0 ? 0 : 1)
    }
  }

  /// The scale of a group.
  static func scale(of values: UnsafeBufferPointer<Float>, _ codec: Codec) -> Float {
    if codec == .sign1 {
      return Float(values.reduce(0.0) { $0 + Double(abs($1)) } / Double(max(1, values.count)))
    }
    // A NaN is the largest of all, so that it shows.
    let largest = values.reduce(0) { $0.isNaN || abs($1) <= $0 ? $0 : abs($1) }
    return largest / (codec == .int8 ? 127 : 7)
  }

  /// Codes elements of one group into the places from `first` on of bytes that were zero.
  static func encode(
    _ values: UnsafeBufferPointer<Float>, _ codec: Codec, scale: Float,
    into bytes: UnsafeMutablePointer<UInt8>, at first: Int
  ) {
    for i in values.indices {
      let (value, place) = (values[i], first + i)
      let steps = scale == 0 ? 0 : (value / scale).rounded(.toNearestOrEven)
      switch codec {
      case .int8: bytes[place] = UInt8(bitPattern: Int8(max(-127, min(127, steps))))
      case .int4:
        bytes[place / 2] |= UInt8(Int(max(-7, min(7, steps))) + 8) << (4 * UInt8(place % 2))
      default: if value >= 0 { bytes[place / 8] |= 1 << UInt8(place % 8) }
      }
    }
  }

  static func decode(
    _ bytes: UnsafePointer<UInt8>, _ codec: Codec, scale: (Int) -> Float,
    into values: UnsafeMutableBufferPointer<Float>
  ) {
    for i in values.indices {
      let steps: Float
      switch codec {
      case .int8: steps = Float(Int8(bitPattern: bytes[i]))
      case .int4: steps = Float(Int(bytes[i / 2] >> (4 * UInt8(i % 2)) & 15) - 8)
      default: steps = bytes[i / 8] >> UInt8(i % 8) & 1 == 1 ? 1 : -1
      }
      values[i] = steps * scale(i)
    }
  }
}
