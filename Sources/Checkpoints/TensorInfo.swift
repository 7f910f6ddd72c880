/// A tensor's name, element type and shape.
///
/// Its size in bytes has been proven to fit an `Int` when it was made, so nobody checks again.
public struct TensorInfo: Sendable, Hashable {
  public let name: String
  public let dtype: DType
  /// Dimensions, slowest first (row-major); empty for a scalar.
  public let shape: [Int]
  public let elementCount: Int
  public let byteCount: Int

  /// - Throws: why such a tensor cannot exist.
  public init(name: String, dtype: DType, shape: [Int]) throws(TensorSizeError) {
    var count = 1
    for dimension in shape {
      guard dimension >= 0 else { throw .negativeDimension }
      // Zeros count as ones until the end: 2⁶³ × 0 must not pass or fail by their order.
      let (product, overflow) = count.multipliedReportingOverflow(by: max(dimension, 1))
      guard !overflow else { throw .overflow }
      count = product
    }
    let (bits, overflow) = count.multipliedReportingOverflow(by: dtype.bitWidth)
    guard !overflow else { throw .overflow }
    let isEmpty = shape.contains(0)
    guard isEmpty || bits.isMultiple(of: 8) else { throw .partialByte }
    self.name = name
    self.dtype = dtype
    self.shape = shape
    self.elementCount = isEmpty ? 0 : count
    self.byteCount = isEmpty ? 0 : bits / 8
  }

  /// The length of the last dimension: what one row of a matrix holds.
  public var rowLength: Int { shape.last ?? 1 }

  /// The shape as a person writes it: `[768, 3072]`.
  public var shapeDescription: String {
    "[" + shape.map(String.init).joined(separator: ", ") + "]"
  }

  public func renamed(_ name: String) -> TensorInfo {
    try! TensorInfo(name: name, dtype: dtype, shape: shape)  // Same size: it has been proven.
  }
}

/// Why a tensor of some type and shape cannot exist.
public enum TensorSizeError: Error {
  case negativeDimension
  /// More than 2⁶³ − 1 bits, zero dimensions counted as one.
  case overflow
  /// Elements of 4 or 6 bits that do not fill whole bytes.
  case partialByte
}
