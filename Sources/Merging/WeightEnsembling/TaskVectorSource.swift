import Checkpoints
import Synchronization

/// A mixture whose task vectors are read decoded: for every coded one, whatever its coding, there
/// is the tensor it stands for, in Float.
final class TaskVectorSource: TensorSource {
  let manifest: Manifest
  private let source: any TensorSource
  private let vectors: [String: Vector]
  /// Of sparse vectors: how many elements are stored before each block.
  private let indices = Mutex<[String: [Int]]>([:])

  private struct Vector: Sendable {
    let info: TensorInfo
    let coding: TaskVectorStorage.Coding
    /// The tensors that stand for it, the `#error` left out.
    let parts: [TensorInfo]
  }

  var path: String { source.path }

  /// - Throws: `CheckpointError` if the parts of a vector do not fit the base of its module.
  init(_ source: any TensorSource, _ description: MixtureDescription) throws {
    var vectors: [String: Vector] = [:]
    for module in description.modules {
      let prefix = "\(module.prefix).base_model."
      for base in source.manifest.tensors where base.name.hasPrefix(prefix) {
        for expert in description.experts.indices {
          let key = base.name.dropFirst(prefix.count)
          let dense = base.renamed("\(module.prefix).task_vectors.\(expert).\(key)")
          vectors[dense.name] = try Self.coded(dense, in: source)
        }
      }
    }
    self.source = source
    self.vectors = vectors
    let names = Set(vectors.values.flatMap { $0.parts.map { $0.name } + ["\($0.info.name)#error"] })
    manifest = Manifest(
      source.manifest.tensors.filter { !names.contains($0.name) }
        + vectors.values.map { $0.info }.sorted { $0.name < $1.name },
      metadata: source.manifest.metadata)
  }

  /// The coded vector of this name; `nil` if it is stored dense.
  private static func coded(_ dense: TensorInfo, in source: any TensorSource) throws -> Vector? {
    func part(_ name: String) -> TensorInfo? { source.manifest["\(dense.name)#\(name)"] }
    if let own = source.manifest[dense.name] {
      guard own.shape == dense.shape, own.dtype.isArithmetic else {
        throw CheckpointError(
          file: source.path, tensor: own.name,
          "is \(own.dtype.rawValue) \(own.shapeDescription), but its module's base has the shape \(dense.shapeDescription)"
        )
      }
      return nil
    }
    let coding: TaskVectorStorage.Coding
    if part("bitmap") != nil {
      coding = .sparse
    } else if let left = part("left") {
      coding = .lowRank(left.rowLength)
    } else if let values = part("values") {
      coding = .quantized(values.dtype == .i8 ? .int8 : .int4)
    } else {
      throw CheckpointError(file: source.path, tensor: dense.name, "is missing")
    }
    let kept = part("values")?.elementCount ?? 0
    let parts = try coding.layout(of: dense, kept: kept).dropLast().map { expected in
      let own = try source.tensor(expected.name)
      let fits =
        own.shape == expected.shape
        && (own.dtype == expected.dtype || own.dtype.isArithmetic && expected.dtype.isArithmetic)
      guard fits else {
        throw CheckpointError(
          file: source.path, tensor: own.name,
          "is \(own.dtype.rawValue) \(own.shapeDescription) instead of \(expected.dtype.rawValue) \(expected.shapeDescription)"
        )
      }
      return own
    }
    return Vector(
      info: try TensorInfo(name: dense.name, dtype: .f32, shape: dense.shape), coding: coding,
      parts: parts)
  }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    guard let vector = vectors[tensor.name] else {
      return try source.read(tensor, at: offset, into: &buffer)
    }
    precondition(offset.isMultiple(of: 4) && buffer.byteCount.isMultiple(of: 4))
    let range = offset / 4..<(offset + buffer.byteCount) / 4
    guard !range.isEmpty else { return }
    let values = try decode(vector, range)
    DType.f32.encode(values.span, into: &buffer)
  }

  private func decode(_ vector: Vector, _ range: Range<Int>) throws(CheckpointError) -> [Float] {
    switch vector.coding {
    case .dense: preconditionFailure("a dense vector is not coded")
    case .sparse: try sparse(vector, range)
    case .quantized(let quantizer): try quantized(vector, range, quantizer)
    case .lowRank: try product(vector, range)
    }
  }

  // MARK: Sparse

  /// Elements between two entries of an index.
  private static let block = 1 << 15

  private func sparse(_ vector: Vector, _ range: Range<Int>) throws(CheckpointError) -> [Float] {
    let (bitmap, stored) = (vector.parts[0], vector.parts[1])
    let index = try index(of: vector)
    let first = range.lowerBound / Self.block * Self.block
    let bits = try source.bytes(
      of: bitmap, at: first / 8, count: (range.upperBound + 7) / 8 - first / 8)
    func isStored(_ element: Int) -> Bool {
      bits[(element - first) / 8] >> UInt8(element % 8) & 1 == 1
    }
    var before = index[first / Self.block]
    for element in first..<range.lowerBound where isStored(element) { before += 1 }
    let count = range.reduce(0) { $0 + (isStored($1) ? 1 : 0) }
    let kept = try source.floats(of: stored, before..<before + count)
    var values = [Float](repeating: 0, count: range.count)
    var next = 0
    for element in range where isStored(element) {
      values[element - range.lowerBound] = kept[next]
      next += 1
    }
    return values
  }

  private func index(of vector: Vector) throws(CheckpointError) -> [Int] {
    if let known = indices.withLock({ $0[vector.info.name] }) { return known }
    let bitmap = vector.parts[0]
    var counts = [0]
    for begin in stride(from: 0, to: bitmap.byteCount, by: Self.block / 8) {
      let size = min(Self.block / 8, bitmap.byteCount - begin)
      let bits = try source.bytes(of: bitmap, at: begin, count: size)
      counts.append(counts.last! + bits.reduce(0) { $0 + $1.nonzeroBitCount })
    }
    let padding = bitmap.byteCount * 8 - vector.info.elementCount
    let last = try source.bytes(of: bitmap, at: bitmap.byteCount - 1, count: 1)[0]
    guard counts.last! == vector.parts[1].elementCount, padding == 0 || last >> (8 - padding) == 0
    else {
      throw CheckpointError(
        file: path, tensor: bitmap.name,
        "marks \(counts.last!) elements of \(vector.info.elementCount), but \(vector.parts[1].elementCount) are stored"
      )
    }
    indices.withLock { $0[vector.info.name] = counts }
    return counts
  }

  // MARK: Quantised and low rank

  private func quantized(
    _ vector: Vector, _ range: Range<Int>, _ quantizer: Quantizer
  ) throws(CheckpointError) -> [Float] {
    let length = vector.info.rowLength
    let rows = range.lowerBound / length..<(range.upperBound + length - 1) / length
    let width = quantizer.byteCount(rowLength: length)
    let groups = quantizer.scaleCount(rowLength: length)
    let codes = try source.bytes(
      of: vector.parts[0], at: rows.lowerBound * width, count: rows.count * width)
    let scales = try source.floats(
      of: vector.parts[1], rows.lowerBound * groups..<rows.upperBound * groups)
    var values: [Float] = []
    values.reserveCapacity(rows.count * length)
    var decoded = [Float](repeating: 0, count: length)
    for row in 0..<rows.count {
      var own = decoded.mutableSpan
      quantizer.decode(
        codes.span.extracting(row * width..<(row + 1) * width),
        scales: scales.span.extracting(row * groups..<(row + 1) * groups), into: &own)
      values += decoded
    }
    return cut(values, from: rows.lowerBound * length, to: range)
  }

  private func product(_ vector: Vector, _ range: Range<Int>) throws(CheckpointError) -> [Float] {
    let (left, right) = (vector.parts[0], vector.parts[1])
    let (length, rank) = (vector.info.rowLength, left.rowLength)
    let rows = range.lowerBound / length..<(range.upperBound + length - 1) / length
    let product = Matrix(
      .plain(
        Matrix(
          rowCount: rows.count, columnCount: rank,
          elements: try source.floats(
            of: left, rows.lowerBound * rank..<rows.upperBound * rank))),
      .plain(
        Matrix(
          rowCount: rank, columnCount: length,
          elements: try source.floats(of: right, 0..<right.elementCount))))
    return cut(product.elements, from: rows.lowerBound * length, to: range)
  }

  private func cut(_ values: [Float], from first: Int, to range: Range<Int>) -> [Float] {
    first == range.lowerBound && values.count == range.count
      ? values : Array(values[range.lowerBound - first..<range.upperBound - first])
  }
}

extension TensorSource {
  /// Some of a tensor's bytes.
  func bytes(of tensor: TensorInfo, at offset: Int, count: Int)
    throws(CheckpointError) -> [UInt8]
  {
    var bytes = [UInt8](repeating: 0, count: count)
    var span = bytes.mutableSpan
    var raw = span.mutableBytes
    try read(tensor, at: offset, into: &raw)
    return bytes
  }

  /// Some of a tensor's elements.
  func floats(of tensor: TensorInfo, _ range: Range<Int>) throws(CheckpointError) -> [Float] {
    let width = tensor.dtype.bitWidth / 8
    let bytes = try bytes(of: tensor, at: range.lowerBound * width, count: range.count * width)
    var values = [Float](repeating: 0, count: range.count)
    var span = values.mutableSpan
    tensor.dtype.decode(bytes.span.bytes, into: &span)
    return values
  }
}
