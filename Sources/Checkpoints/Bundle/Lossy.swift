import Synchronization

extension Bundle {
  /// Codings that lose precision. The recipe records the error of each tensor.
  public enum Lossy: Sendable {
    /// An integer times a scale.
    case int8, int4, sign1
    /// The product of two thin matrices of this rank.
    case lowRank(Int, by: Factorisation)
  }

  /// A way to find the thin matrices whose product is near a matrix.
  public struct Factorisation: Sendable {
    /// Bytes that it takes, with the matrix.
    let memory: @Sendable (_ rows: Int, _ columns: Int) -> Int
    let factors: Factors

    /// The elements of the two factors, `[rows, rank]` and `[rank, columns]`, row after row;
    /// nil for a matrix that has none.
    public typealias Factors =
      @Sendable (_ elements: [Float], _ columns: Int, _ rank: Int) throws -> (
        left: [Float], right: [Float]
      )?

    public init(
      memory: @escaping @Sendable (_ rows: Int, _ columns: Int) -> Int, factors: @escaping Factors
    ) {
      self.memory = memory
      self.factors = factors
    }
  }
}

/// The factors of a bundle's low-rank tensors, on disk beside it until they are packed.
final class FactorFile: Sendable {
  private let pending: PendingFile
  private let file: File
  private let end = Atomic(0)

  init(for path: String) throws(CheckpointError) {
    pending = try PendingFile(for: path + ".factors")
    file = try pending.open()
  }

  /// - Returns: where they begin.
  func append(_ factors: [Float]) throws(CheckpointError) -> Int {
    let count = 4 * factors.count
    let begin = end.wrappingAdd(count, ordering: .relaxed).oldValue
    try file.write(factors.span.bytes, at: begin)
    return begin
  }

  func read(at offset: Int, into bytes: UnsafeMutableRawBufferPointer) throws(CheckpointError) {
    var span = MutableRawSpan(_unsafeBytes: bytes)
    try file.read(at: offset, into: &span)
  }
}
