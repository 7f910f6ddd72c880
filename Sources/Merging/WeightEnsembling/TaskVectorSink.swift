import Checkpoints
import Synchronization

/// Stores task vectors coded: takes them as Float, piece by piece in order, and writes the
/// tensors that stand for them. Everything else goes through as it is.
final class TaskVectorSink: TensorSink {
  let manifest: Manifest
  private let sink: any TensorSink
  private let vectors: [String: Vector]

  /// A task vector while it is being coded. One worker writes it, piece after piece.
  private final class Vector: Sendable {
    let info: TensorInfo
    let coding: TaskVectorStorage.Coding
    let progress: Mutex<Progress>

    init(_ info: TensorInfo, _ coding: TaskVectorStorage.Coding, dropped: Double) {
      self.info = info
      self.coding = coding
      progress = Mutex(Progress(distance: CodingDistance(dropped: dropped)))
    }
  }

  private struct Progress {
    var elements = 0
    var kept = 0
    var distance: CodingDistance
  }

  /// - Parameter vectors: the coded task vectors as they would be stored dense, with the sum of
  ///   squares of what pruning has taken away already.
  init(
    _ sink: any TensorSink,
    _ vectors: [(info: TensorInfo, coding: TaskVectorStorage.Coding, dropped: Double)]
  ) {
    self.sink = sink
    self.vectors = Dictionary(
      uniqueKeysWithValues: vectors.map {
        ($0.info.name, Vector($0.info, $0.coding, dropped: $0.dropped))
      })
    let decoded = vectors.map {
      try! TensorInfo(name: $0.info.name, dtype: .f32, shape: $0.info.shape)
    }
    manifest = Manifest(sink.manifest.tensors + decoded)
  }

  /// ‖stored − τ‖/‖τ‖ of every vector that has been coded, by name.
  var errors: [String: CodingDistance] {
    vectors.filter {
      if case .lowRank = $0.value.coding { false } else { true }
    }.mapValues { $0.progress.withLock { $0.distance } }
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    guard let vector = vectors[tensor.name] else {
      return try sink.write(bytes, of: tensor, at: offset)
    }
    // The factors of a low-rank vector need the whole matrix, and are written apart.
    if case .lowRank = vector.coding { return }
    var values = [Float](repeating: 0, count: bytes.byteCount / 4)
    var span = values.mutableSpan
    DType.f32.decode(bytes, into: &span)
    var progress = vector.progress.withLock { $0 }
    precondition(progress.elements == offset / 4, "pieces of a coded vector come in order")
    if case .quantized(let quantizer) = vector.coding {
      try writeRows(values.span, of: vector, quantizer, &progress)
    } else {
      try writeSparse(values.span, of: vector, &progress)
    }
    progress.elements += values.count
    if progress.elements == vector.info.elementCount {
      try sink.write(
        [Float(progress.distance.relative)], of: part("error", of: vector), from: 0)
    }
    vector.progress.withLock { $0 = progress }
  }

  func complete() throws(CheckpointError) { try sink.complete() }
  func finish() throws(CheckpointError) { try sink.finish() }

  private func writeSparse(
    _ values: Span<Float>, of vector: Vector, _ progress: inout Progress
  ) throws(CheckpointError) {
    precondition(progress.elements.isMultiple(of: 8))
    var bitmap = [UInt8](repeating: 0, count: (values.count + 7) / 8)
    var kept: [Float] = []
    for index in values.indices where values[index] != 0 {
      bitmap[index / 8] |= 1 << UInt8(index % 8)
      kept.append(values[index])
    }
    try sink.write(bitmap.span.bytes, of: part("bitmap", of: vector), at: progress.elements / 8)
    try sink.write(kept, of: part("values", of: vector), from: progress.kept)
    var stored = kept
    var span = stored.mutableSpan
    vector.info.dtype.round(&span)
    progress.distance.add(kept.span, stored.span)
    progress.kept += kept.count
  }

  private func writeRows(
    _ values: Span<Float>, of vector: Vector, _ quantizer: Quantizer, _ progress: inout Progress
  ) throws(CheckpointError) {
    let length = vector.info.rowLength
    let (rows, firstRow) = (values.count / length, progress.elements / length)
    precondition(values.count == rows * length && progress.elements == firstRow * length)
    let width = quantizer.byteCount(rowLength: length)
    let groups = quantizer.scaleCount(rowLength: length)
    var codes: [UInt8] = []
    var scales: [Float] = []
    codes.reserveCapacity(rows * width)
    var rowCodes = [UInt8](repeating: 0, count: width)
    var rowScales = [Float](repeating: 0, count: groups)
    var decoded = [Float](repeating: 0, count: length)
    for row in 0..<rows {
      let original = values.extracting(row * length..<(row + 1) * length)
      var codeSpan = rowCodes.mutableSpan
      var scaleSpan = rowScales.mutableSpan
      guard quantizer.encode(original, into: &codeSpan, scales: &scaleSpan) else {
        throw CheckpointError(
          file: "the task vectors", tensor: vector.info.name,
          "has values that are not finite in row \(firstRow + row)",
          remedy: "such a vector can only be stored dense or sparse")
      }
      var span = decoded.mutableSpan
      quantizer.decode(rowCodes.span, scales: rowScales.span, into: &span)
      progress.distance.add(original, decoded.span)
      codes += rowCodes
      scales += rowScales
    }
    try sink.write(codes.span.bytes, of: part("values", of: vector), at: firstRow * width)
    try sink.write(scales, of: part("scale", of: vector), from: firstRow * groups)
  }

  private func part(_ name: String, of vector: Vector) -> TensorInfo {
    sink.manifest["\(vector.info.name)#\(name)"]!
  }
}

extension TensorSink {
  /// Writes some of a tensor's elements, from element `first` on.
  func write(
    _ values: [Float], of tensor: TensorInfo, from first: Int
  ) throws(CheckpointError) {
    guard !values.isEmpty else { return }
    let width = tensor.dtype.bitWidth / 8
    var buffer = Buffer(byteCount: values.count * width)
    var bytes = buffer.first(values.count * width)
    tensor.dtype.encode(values.span, into: &bytes)
    try write(bytes.bytes, of: tensor, at: first * width)
  }
}

/// How far task vectors as they are stored are from what they were.
///
/// Sums run element by element, so that the cuts of the tiles do not show.
struct CodingDistance: Sendable {
  private(set) var squaredError = 0.0
  private(set) var squaredNorm = 0.0

  /// - Parameters:
  ///   - dropped: the sum of squares of elements that were set to zero.
  ///   - kept: of those that are as they were.
  init(dropped: Double = 0, kept: Double = 0) {
    squaredError = dropped
    squaredNorm = dropped + kept
  }

  mutating func add(_ original: Span<Float>, _ stored: Span<Float>) {
    for index in original.indices {
      let difference = Double(stored[index]) - Double(original[index])
      squaredError += difference * difference
      squaredNorm += Double(original[index]) * Double(original[index])
    }
  }

  static func += (sum: inout CodingDistance, other: CodingDistance) {
    sum.squaredError += other.squaredError
    sum.squaredNorm += other.squaredNorm
  }

  /// ‖stored − τ‖/‖τ‖: NaN where τ is not finite.
  var relative: Double { squaredNorm == 0 ? 0 : (squaredError / squaredNorm).squareRoot() }
}
