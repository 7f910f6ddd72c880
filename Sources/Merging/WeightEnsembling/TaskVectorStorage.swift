import Checkpoints

/// How the task vectors of a mixture's MLPs are kept.
///
/// A task vector T of shape `[…, columns]` and n elements, rows being runs of `columns`
/// elements, is one of these groups of tensors; which, their names and types say:
///
/// - dense: `T`, the numbers themselves; beside them there may be `Corrections`.
/// - sparse: `T#bitmap`, U8 `[⌈n/8⌉]`: bit i mod 8 (the lowest first) of byte ⌊i/8⌋ tells whether
///   element i is stored; `T#values`, the stored elements in order. The others are 0.
/// - int8: `T#values`, I8 `[rows, columns]`; `T#scale`, F32 `[rows]`. Element (r, c) is
///   values[r, c]·scale[r].
/// - int4: `T#values`, U8 `[rows, ⌈columns/2⌉]`: element c of a row is nibble c mod 2 (the lower
///   first) of byte ⌊c/2⌋, a two's complement number; `T#scale`, F32 `[rows, ⌈columns/128⌉]`, one
///   for every 128 elements of a row.
/// - low rank: `T#left`, `[rows, r]`, and `T#right`, `[r, columns]`; T is their product.
///
/// Beside every group but a dense one is `T#error`, F32 `[]`: ‖stored − T‖/‖T‖, pruning included.
/// Vectors of one dimension (biases) are small and stay dense unless the rest is sparse, and a
/// matrix whose factors would be larger than itself stays dense as well.
public enum TaskVectorStorage: Codable, Sendable, Equatable {
  case dense, sparse, int8, int4
  case lowRank(Int)
}

extension TaskVectorStorage {
  /// How one tensor's task vectors are kept.
  enum Coding: Sendable, Equatable {
    case dense, sparse
    case quantized(Quantizer)
    case lowRank(Int)
  }

  func coding(of tensor: TensorInfo) -> Coding {
    guard tensor.elementCount > 0 else { return .dense }
    guard self != .sparse else { return .sparse }
    guard tensor.shape.count > 1 else { return .dense }
    switch self {
    case .dense, .sparse: return .dense
    case .int8: return .quantized(.int8)
    case .int4: return .quantized(.int4)
    case .lowRank(let rank):
      let factors = rank * (tensor.rowCount + tensor.rowLength)
      return factors < tensor.elementCount ? .lowRank(rank) : .dense
    }
  }
}

extension TaskVectorStorage.Coding {
  /// The tensors that stand for a task vector.
  ///
  /// - Parameter kept: how many elements a sparse one stores.
  func layout(of vector: TensorInfo, kept: Int) -> [TensorInfo] {
    func tensor(_ part: String, _ dtype: DType, _ shape: [Int]) -> TensorInfo {
      try! TensorInfo(name: "\(vector.name)#\(part)", dtype: dtype, shape: shape)
    }
    let (rows, columns) = (vector.rowCount, vector.rowLength)
    let error = tensor("error", .f32, [])
    switch self {
    case .dense: return [vector]
    case .sparse:
      return [
        tensor("bitmap", .u8, [(vector.elementCount + 7) / 8]),
        tensor("values", vector.dtype, [kept]), error,
      ]
    case .quantized(let quantizer):
      let scales = quantizer.scaleCount(rowLength: columns)
      return [
        tensor(
          "values", quantizer.bits == 8 ? .i8 : .u8,
          [rows, quantizer.byteCount(rowLength: columns)]),
        tensor("scale", .f32, quantizer.bits == 8 ? [rows] : [rows, scales]), error,
      ]
    case .lowRank(let rank):
      return [
        tensor("left", vector.dtype, [rows, rank]), tensor("right", vector.dtype, [rank, columns]),
        error,
      ]
    }
  }

  /// How many numbers stand for a task vector, scales included.
  func numberCount(of vector: TensorInfo, kept: Int) -> Int {
    switch self {
    case .dense: vector.elementCount
    case .sparse: kept
    case .quantized(let quantizer):
      vector.elementCount
        + vector.rowCount
        * (quantizer.bits == 8 ? 1 : quantizer.scaleCount(rowLength: vector.rowLength))
    case .lowRank(let rank): rank * (vector.rowCount + vector.rowLength)
    }
  }

  /// Elements of a task vector that are coded together.
  func grain(of tensor: TensorInfo) -> Int {
    switch self {
    case .dense, .lowRank: 1
    case .sparse: 8
    case .quantized: tensor.rowLength
    }
  }
}

extension TensorInfo {
  /// How many rows of `rowLength` there are.
  var rowCount: Int { rowLength == 0 ? 0 : elementCount / rowLength }
}
