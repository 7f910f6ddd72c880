import Checkpoints
import Synchronization

extension Upscaling {
  /// Writes the factors of the task vectors that are stored with a low rank.
  ///
  /// A singular value decomposition needs the whole matrix: as many workers take part as have
  /// room for one in the budget.
  func writeFactors(
    into mixture: any TensorSink, _ cleanings: [String: TensorCleaning], memory: Int,
    workers: Int, _ distances: inout [String: CodingDistance]
  ) throws {
    let tasks = modules.flatMap { $0.tensors }.compactMap {
      name -> (tensor: TensorInfo, rank: Int)? in
      let tensor = family.base.manifest[name]!
      guard case .lowRank(let rank) = coding(of: tensor) else { return nil }
      return (tensor, rank)
    }
    guard let largest = tasks.max(by: { need($0.tensor) < need($1.tensor) }) else { return }
    let tile = memory / 8
    let workers = min(workers, (memory - tile) / need(largest.tensor))
    guard workers > 0 else {
      throw MergeError(
        "tensor \(quoted(largest.tensor.name)) needs \(need(largest.tensor) + need(largest.tensor) / 7) bytes for its singular values; the budget is \(memory)",
        remedy: "give it more with --memory or store the task vectors in another way")
    }
    let count = family.experts.count
    let cleanings = cleanings
    let found = StepResults<CodingDistance>(count: tasks.count * count)
    try forEachStep(count: tasks.count * count, workers: workers) {
    } body: { step, _ in
      let (tensor, rank) = tasks[step / count]
      found[step] = try writeFactors(
        of: tensor, cleanings[tensor.name] ?? .none, expert: step % count, rank: rank,
        into: mixture, memory: tile / workers)
    }
    for (step, distance) in found.all.enumerated() {
      distances[member(tasks[step / count].tensor)!.taskVectorName(step % count)] = distance
    }
  }

  /// The matrix, its pruned copy, LAPACK's, the vectors on both sides, its scratch memory and the
  /// product that tells the error.
  private func need(_ tensor: TensorInfo) -> Int {
    let side = min(tensor.rowCount, tensor.rowLength)
    return 4 * (5 * tensor.elementCount + 8 * side * side)
  }

  private func writeFactors(
    of tensor: TensorInfo, _ cleaning: TensorCleaning, expert: Int, rank: Int,
    into mixture: any TensorSink, memory: Int
  ) throws -> CodingDistance {
    let name = member(tensor)!.taskVectorName(expert)
    var unpruned = operation(for: tensor, cleaning)
    unpruned.thresholds = nil
    let collected = Collection(of: tensor, row: expert + 1)
    try Pipeline(from: family.sources, into: [collected], memory: memory, workers: 1).run([
      Step(
        whole: family.places(of: tensor),
        outputs: (0...family.experts.count).map {
          (0, try! TensorInfo(name: "\($0)", dtype: .f32, shape: tensor.shape))
        }, with: unpruned)
    ])
    let original = collected.values
    var elements = original
    if let pruned = pruned[tensor.name]?.experts[expert], options.pruning != nil {
      var span = elements.mutableSpan
      prune(&span, above: pruned.threshold)
    }
    let matrix = Matrix(
      rowCount: tensor.rowCount, columnCount: tensor.rowLength, elements: elements)
    elements = []
    guard let factors = LowRank(matrix, rank: rank) else {
      throw CheckpointError(
        file: family.experts[expert].source.path, tensor: tensor.name,
        "has differences to the base that are not finite",
        remedy: "such a vector can only be stored dense or sparse")
    }
    let parts = TaskVectorStorage.Coding.lowRank(rank).layout(of: tensor.renamed(name), kept: 0)
    var (left, right) = (factors.left, factors.right)
    left.round(to: tensor.dtype)
    right.round(to: tensor.dtype)
    try mixture.write(left.elements, of: parts[0], from: 0)
    try mixture.write(right.elements, of: parts[1], from: 0)
    var distance = CodingDistance()
    let product = Matrix(.plain(left), .plain(right))
    distance.add(original.span, product.elements.span)
    try mixture.write([Float(distance.relative)], of: parts[2], from: 0)
    return distance
  }
}

extension Matrix where Scalar == Float {
  fileprivate mutating func round(to dtype: DType) {
    var span = elements.mutableSpan
    dtype.round(&span)
  }
}

/// Keeps one of a step's outputs in memory, as Float.
private final class Collection: TensorSink {
  let manifest = Manifest([])
  private let name: String
  private let collected: Mutex<[Float]>

  init(of tensor: TensorInfo, row: Int) {
    name = "\(row)"
    collected = Mutex([])
    collected.withLock { $0.reserveCapacity(tensor.elementCount) }
  }

  var values: [Float] { collected.withLock { $0 } }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) {
    guard tensor.name == name else { return }
    var piece = [Float](repeating: 0, count: bytes.byteCount / 4)
    var span = piece.mutableSpan
    tensor.dtype.decode(bytes, into: &span)
    collected.withLock { $0 += piece }
  }

  func complete() {}
  func finish() {}
}
