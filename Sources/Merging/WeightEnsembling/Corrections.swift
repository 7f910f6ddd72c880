import CKernels
import Checkpoints
import Synchronization

/// What makes one-hot routing exact: the elements of an expert that base + task vector, rounded to
/// the model's type, does not give back.
///
/// Where an expert's weight is smaller than its change, the task vector's last digit is coarser
/// than the weight's, and no task vector of this type adds up to the weight. Those weights are
/// stored themselves, beside the dense task vector T that they belong to:
///
/// - `T#places`: U32 `[n]` (U64 if T has more than 2³² elements), the elements' numbers, ascending;
/// - `T#weights`: `[n]`, of the model's type, the expert's weights there.
///
/// Neither is there if n is 0. Only a collapse to one expert reads them: a mixture of several is
/// base + Σ wⱼTⱼ.
enum Corrections {
  /// Stands for an element that is right already: a NaN that no computation makes.
  static let none = Float(bitPattern: 0x7FA5_C3D1)

  static func layout(of vector: TensorInfo, count: Int) -> [TensorInfo] {
    guard count > 0 else { return [] }
    let places = vector.elementCount >> 32 == 0 ? DType.u32 : .u64
    return [
      try! TensorInfo(name: "\(vector.name)#places", dtype: places, shape: [count]),
      try! TensorInfo(name: "\(vector.name)#weights", dtype: vector.dtype, shape: [count]),
    ]
  }

  /// The corrections as a tensor of the task vector's shape: weights, and `none` elsewhere.
  static func spread(over vector: TensorInfo) -> TensorInfo {
    try! TensorInfo(name: "\(vector.name)#corrected", dtype: .f32, shape: vector.shape)
  }

  /// How many weights are kept.
  static func count(_ weights: Span<Float>) -> Int {
    var count = 0
    for i in weights.indices { count += weights[i].bitPattern == none.bitPattern ? 0 : 1 }
    return count
  }
}

extension Tile {
  /// Makes of self[row], an expert's weights, the task vector that they are from self[base], and
  /// of self[missed] the weights that base + task vector does not give back, `Corrections.none`
  /// elsewhere. Weights and vector are rounded to the type they are stored in, as the base is.
  mutating func split(_ row: Int, base: Int, missed: Int, _ dtype: DType) {
    precondition(row != base && row != missed && base != missed)
    let (weights, base, missed) = (buffer(row), buffer(base), buffer(missed))
    guard columns > 0 else { return }
    _ = smelt_split_weights(
      weights.baseAddress!, base.baseAddress!, columns, dtype.rounding,
      Corrections.none.bitPattern, missed.baseAddress!)
  }

  /// How many of self[row], an expert's weights, `split` would find missed.
  func missedCount(_ row: Int, base: Int, _ dtype: DType) -> Int {
    guard columns > 0 else { return 0 }
    return smelt_count_missed(
      buffer(row).baseAddress!, buffer(base).baseAddress!, columns, dtype.rounding)
  }
}

extension DType {
  /// What Float has to be rounded to.
  fileprivate var rounding: smelt_rounding {
    switch self {
    case .bf16: smelt_bfloat16
    case .f16: smelt_half
    default: smelt_exact
    }
  }
}

// MARK: - Writing

/// Stores corrections: takes them spread, piece by piece in order, and writes places and weights.
/// Everything else goes through as it is.
final class CorrectionSink: TensorSink {
  let manifest: Manifest
  private let sink: any TensorSink
  /// The models that are read, to tell which one was written to meanwhile.
  private let sources: [any TensorSource]
  private let vectors: [String: Vector]

  private struct Progress { var elements = 0, kept = 0 }

  private final class Vector: Sendable {
    let info: TensorInfo
    let count: Int
    let progress = Mutex(Progress())

    init(_ info: TensorInfo, _ count: Int) { (self.info, self.count) = (info, count) }
  }

  /// - Parameter vectors: those that have corrections, and how many.
  init(
    _ sink: any TensorSink, _ vectors: [(info: TensorInfo, count: Int)],
    from sources: [any TensorSource]
  ) {
    self.sink = sink
    self.sources = sources
    let spread = vectors.map { Corrections.spread(over: $0.info) }
    self.vectors = Dictionary(
      uniqueKeysWithValues: zip(spread, vectors).map { ($0.name, Vector($1.info, $1.count)) })
    manifest = Manifest(sink.manifest.tensors + spread)
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    guard let vector = vectors[tensor.name] else {
      return try sink.write(bytes, of: tensor, at: offset)
    }
    var progress = vector.progress.withLock { $0 }
    precondition(progress.elements == offset / 4, "pieces of corrections come in order")
    let parts = Corrections.layout(of: vector.info, count: vector.count)
    var places: [Int] = []
    var weights: [Float] = []
    let count = bytes.byteCount / 4
    for begin in stride(from: 0, to: count, by: Self.run) {
      let run = begin..<min(begin + Self.run, count)
      guard run.count < Self.run || !isEmpty(bytes, from: 4 * begin) else { continue }
      for i in run {
        let bits = bytes.unsafeLoadUnaligned(fromByteOffset: 4 * i, as: UInt32.self)
        guard bits != Corrections.none.bitPattern else { continue }
        places.append(progress.elements + i)
        weights.append(Float(bitPattern: bits))
      }
    }
    progress.elements += count
    let end = progress.kept + places.count
    guard end <= vector.count, progress.elements < vector.info.elementCount || end == vector.count
    else { throw sources.errorOfChange(of: vector.info.name) }
    try sink.write(places, of: parts[0], from: progress.kept)
    try sink.write(weights, of: parts[1], from: progress.kept)
    progress.kept = end
    vector.progress.withLock { $0 = progress }
  }

  /// Elements that are passed over together if there is no weight among them, as in most.
  private static let run = 32

  /// Whether a run is `Corrections.none` throughout.
  private func isEmpty(_ bytes: RawSpan, from offset: Int) -> Bool {
    let none = UInt64(Corrections.none.bitPattern)
    var difference: UInt64 = 0
    for pair in 0..<Self.run / 2 {
      difference |=
        (none << 32 | none)
        ^ bytes.unsafeLoadUnaligned(fromByteOffset: offset &+ 8 &* pair, as: UInt64.self)
    }
    return difference == 0
  }

  func complete() throws(CheckpointError) { try sink.complete() }
  func finish() throws(CheckpointError) { try sink.finish() }
}

extension TensorSink {
  /// Writes some of an integer tensor's elements, from element `first` on.
  fileprivate func write(
    _ values: [Int], of tensor: TensorInfo, from first: Int
  ) throws(CheckpointError) {
    guard !values.isEmpty else { return }
    if tensor.dtype == .u32 {
      let narrow = values.map { UInt32($0).littleEndian }
      try write(narrow.span.bytes, of: tensor, at: 4 * first)
    } else {
      let wide = values.map { UInt64($0).littleEndian }
      try write(wide.span.bytes, of: tensor, at: 8 * first)
    }
  }
}

// MARK: - Reading

/// The corrections of a mixture's task vectors, spread: see `Corrections.spread`.
final class CorrectionSource: TensorSource {
  let manifest: Manifest
  private let source: any TensorSource
  private let vectors: [String: Vector]
  /// Of every vector that was read: the first place of each block of places.
  private let indices = Mutex<[String: [Int]]>([:])

  private struct Vector: Sendable {
    let elementCount: Int
    let places: TensorInfo
    let weights: TensorInfo
  }

  var path: String { source.path }

  /// - Throws: `CheckpointError` if places and weights do not belong together.
  init(of source: any TensorSource, _ description: MixtureDescription) throws {
    var vectors: [String: Vector] = [:]
    var spread: [TensorInfo] = []
    for module in description.modules {
      let start = "\(module.prefix).task_vectors."
      for vector in source.manifest.tensors where vector.name.hasPrefix(start) {
        guard let places = source.manifest["\(vector.name)#places"] else { continue }
        let weights = try source.tensor("\(vector.name)#weights")
        guard [.u32, .u64].contains(places.dtype), places.shape.count == 1,
          weights.shape == places.shape, weights.dtype.isArithmetic, vector.dtype.isArithmetic
        else {
          throw CheckpointError(
            file: source.path, tensor: places.name,
            "is \(places.dtype.rawValue) \(places.shapeDescription), which are no places of the weights, \(weights.dtype.rawValue) \(weights.shapeDescription)"
          )
        }
        spread.append(Corrections.spread(over: vector))
        vectors[spread.last!.name] = Vector(
          elementCount: vector.elementCount, places: places, weights: weights)
      }
    }
    self.source = source
    self.vectors = vectors
    manifest = Manifest(spread)
  }

  /// Places between two entries of an index.
  private static let block = 1 << 15

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    let vector = vectors[tensor.name]!
    precondition(offset.isMultiple(of: 4) && buffer.byteCount.isMultiple(of: 4))
    let range = offset / 4..<(offset + buffer.byteCount) / 4
    var values = [Float](repeating: Corrections.none, count: range.count)
    let index = try index(of: vector)
    let first = max(0, index.partitioningIndex { $0 > range.lowerBound } - 1)
    let blocks = first..<index.partitioningIndex { $0 >= range.upperBound }
    for block in blocks {
      let entries = entries(of: block, vector)
      let weights = try source.floats(of: vector.weights, entries)
      for (place, weight) in zip(try places(of: vector, entries), weights)
      where range.contains(place) {
        values[place - range.lowerBound] = weight
      }
    }
    DType.f32.encode(values.span, into: &buffer)
  }

  private func entries(of block: Int, _ vector: Vector) -> Range<Int> {
    block * Self.block..<min((block + 1) * Self.block, vector.places.elementCount)
  }

  /// Proves that the places ascend and are within the vector, once.
  private func index(of vector: Vector) throws(CheckpointError) -> [Int] {
    if let known = indices.withLock({ $0[vector.places.name] }) { return known }
    var firsts: [Int] = []
    var last = -1
    for begin in stride(from: 0, to: vector.places.elementCount, by: Self.block) {
      let places = try places(of: vector, entries(of: begin / Self.block, vector))
      firsts.append(places[0])
      for place in places {
        guard place > last, place < vector.elementCount else {
          throw CheckpointError(
            file: path, tensor: vector.places.name,
            "has place \(place) behind \(last) in a task vector of \(vector.elementCount) elements")
        }
        last = place
      }
    }
    indices.withLock { $0[vector.places.name] = firsts }
    return firsts
  }

  private func places(of vector: Vector, _ entries: Range<Int>) throws(CheckpointError) -> [Int] {
    let width = vector.places.dtype.bitWidth / 8
    let bytes = try source.bytes(
      of: vector.places, at: entries.lowerBound * width, count: entries.count * width)
    let raw = bytes.span.bytes
    return entries.indices.map { entry in
      let index = entry - entries.lowerBound
      return width == 4
        ? Int(raw.unsafeLoadUnaligned(fromByteOffset: 4 * index, as: UInt32.self))
        : Int(clamping: raw.unsafeLoadUnaligned(fromByteOffset: 8 * index, as: UInt64.self))
    }
  }
}
