/// How a tensor is coded. FORMAT.md says it in full; the order is from simple to special.
enum Codec: String, Sendable, CaseIterable {
  /// As it is.
  case raw
  /// Planes of bytes: see `Planes`.
  case planes
  /// The places of the elements that are not zero, and these: see `Gaps`.
  case sparse
  /// Differences, in steps from one float to the next, from another tensor: see `Steps`.
  case ulp
  /// Such differences, most of which are none, sorted and then as `sparse` keeps elements.
  case sparseULP = "sparseulp"
  /// The bits that differ from another tensor's, as planes.
  case xor
  /// Lossy: integers of 8 bits times a scale for each group of elements.
  case int8
  /// Lossy: integers of 4 bits times a scale for each group of elements.
  case int4
  /// Lossy: signs times a scale for each group of elements.
  case sign1
  /// Lossy: the product of two thin matrices: see `ThinProduct`.
  case lowrank

  var needsReference: Bool { self == .ulp || self == .sparseULP || self == .xor }
  /// Gaps and values.
  var isSparse: Bool { self == .sparse || self == .sparseULP }
  /// Small integers times scales.
  var isQuantised: Bool { self == .int8 || self == .int4 || self == .sign1 }
  var isLossy: Bool { isQuantised || self == .lowrank }

  /// Whether tensors of this type can be coded so.
  func suits(_ dtype: DType) -> Bool {
    switch self {
    case .raw: true
    case .planes, .int8, .int4, .sign1, .lowrank: dtype.isArithmetic
    case .sparse, .xor: dtype.bitWidth >= 8
    case .ulp, .sparseULP: dtype.isFloat
    }
  }
}

extension DType {
  /// Bytes of one element; of types packed below a byte, 1.
  var byteWidth: Int { max(1, bitWidth / 8) }

  /// Whether the type is a sign, an exponent and a mantissa, in this order, in whole bytes.
  var isFloat: Bool {
    switch self {
    case .bf16, .f16, .f32, .f64, .f8E5M2, .f8E4M3, .f8E4M3FNUZ, .f8E5M2FNUZ: true
    default: false
    }
  }
}

// MARK: - Parts

/// An inner tensor that a codec needs.
struct PartShape: Equatable {
  /// What follows the tensor's name in the part's.
  let suffix: String
  let dtype: DType
  let shape: [Int]
  /// How many streams it is cut into.
  let streams: Int
  /// Whether each stream has a frame for each block of elements, however long.
  var isCutByBlock = false
}

extension Codec {
  /// Elements that are coded together; the last block of a tensor has fewer.
  static let blockCount = 1 << 20

  static func blocks(of tensor: TensorInfo) -> Int {
    (tensor.elementCount >> 20) + (tensor.elementCount & (blockCount - 1) == 0 ? 0 : 1)
  }

  var suffixes: [String] {
    switch self {
    case .raw, .planes, .ulp, .xor: [""]
    case .sparse, .sparseULP: ["#gaps", "#values"]
    case .int8, .int4, .sign1: ["", "#scale"]
    case .lowrank: ["#left", "#right"]
    }
  }

  /// The inner tensors of a tensor that is coded so.
  /// - Parameters:
  ///   - sparse: the lengths of the gaps and of the values, for `sparse` and `sparseULP`.
  ///   - group: the elements that share a scale, for the quantised ones.
  ///   - rank: the shorter side of both factors, for `lowrank`.
  func parts(
    of tensor: TensorInfo, sparse: (gaps: Int, values: Int) = (0, 0), group: Int = 1, rank: Int = 1
  ) -> [PartShape] {
    let (width, count) = (tensor.dtype.byteWidth, tensor.elementCount)
    func scaled(_ dtype: DType, _ shape: [Int]) -> [PartShape] {
      let groups = count / group + (count % group == 0 ? 0 : 1)
      return [
        PartShape(suffix: "", dtype: dtype, shape: shape, streams: 1),
        PartShape(suffix: "#scale", dtype: .f32, shape: [groups], streams: 1),
      ]
    }
    switch self {
    case .raw:
      return [PartShape(suffix: "", dtype: tensor.dtype, shape: tensor.shape, streams: 1)]
    case .planes, .ulp, .xor:
      return [PartShape(suffix: "", dtype: .u8, shape: [width, count], streams: width)]
    case .sparse, .sparseULP:
      return [
        PartShape(
          suffix: "#gaps", dtype: .u8, shape: [sparse.gaps], streams: 1, isCutByBlock: true),
        PartShape(
          suffix: "#values", dtype: .u8, shape: [width, sparse.values], streams: width,
          isCutByBlock: true),
      ]
    case .int8: return scaled(.i8, tensor.shape)
    case .int4: return scaled(.u8, [count / 2 + count % 2])
    case .sign1: return scaled(.u8, [count / 8 + (count % 8 == 0 ? 0 : 1)])
    case .lowrank:
      let (rows, columns) = ThinProduct.shape(of: tensor)
      return [
        PartShape(suffix: "#left", dtype: .f32, shape: [rows, rank], streams: 1),
        PartShape(suffix: "#right", dtype: .f32, shape: [rank, columns], streams: 1),
      ]
    }
  }
}
