import Checkpoints
import FoundationEssentials

/// The inner products of a family's task vectors, tensor by tensor: all that any disentanglement
/// wider than a row needs to know of the models.
public struct TaskVectorGrams: Sendable {
  public let experts: [String]
  /// In the order of the model.
  public private(set) var tensors: [(name: String, gram: GramMatrix)] = []

  init(experts: [String]) { self.experts = experts }

  mutating func append(_ name: String, _ gram: GramMatrix) { tensors.append((name, gram)) }

  /// Puts the tensors in the order of the model.
  mutating func sort(like manifest: Manifest) {
    tensors.sort { manifest.position(of: $0.name)! < manifest.position(of: $1.name)! }
  }

  /// The matrices of these tensors.
  func grams(of tensors: [TensorInfo]) -> [GramMatrix] {
    let known = Dictionary(uniqueKeysWithValues: self.tensors.map { ($0.name, $0.gram) })
    return tensors.map { known[$0.name]! }
  }

  /// The sum of all.
  public var whole: GramMatrix { sum { _ in true } }

  /// The sums of the layers, by their numbers; what is in no layer is left out.
  public var layers: [(name: String, gram: GramMatrix)] {
    var sums: [(name: String, gram: GramMatrix)] = []
    for (name, gram) in tensors {
      guard let layer = layerName(of: name) else { continue }
      if let position = sums.lastIndex(where: { $0.name == layer }) {
        sums[position].gram += gram
      } else {
        sums.append((layer, gram))
      }
    }
    return sums.sorted { isBefore($0.name, $1.name) }
  }

  func sum(where isTaken: (String) -> Bool) -> GramMatrix {
    tensors.reduce(into: GramMatrix(order: experts.count)) { sum, tensor in
      if isTaken(tensor.name) { sum += tensor.gram }
    }
  }
}

// MARK: - From models

extension TaskVectorGrams {
  /// Reads a family once.
  public init(of family: ModelFamily, memory: Int, workers: Int) throws {
    self.init(experts: family.experts.map { $0.name })
    let tensors = family.base.manifest.tensors.filter { $0.dtype.isArithmetic }
    let grams = try TaskVectorGrams.measure(
      tensors, of: family, from: family.sources, memory: memory, workers: workers)
    for (tensor, gram) in zip(tensors, grams) { append(tensor.name, gram) }
  }

  /// The Gram matrix of each of these tensors' task vectors.
  static func measure(
    _ tensors: [TensorInfo], of family: ModelFamily, from sources: [any TensorSource],
    memory: Int, workers: Int
  ) throws -> [GramMatrix] {
    let observation = TaskVectorObservation(experts: family.experts.count)
    let pipeline = Pipeline(from: sources, into: [], memory: memory, workers: workers)
    let steps = tensors.map {
      Step.covering(family.places(of: $0), outputs: [], with: observation)
    }
    let sums = try pipeline.run(steps.flatMap { $0 })
    return fold(sums, steps.map { $0.count }) { $0 += $1 }
      .map { $0 ?? GramMatrix(order: family.experts.count) }
  }
}

/// Folds the results of consecutive steps, `counts[i]` of them to the i-th result.
func fold<Result>(
  _ results: [Result], _ counts: [Int], by add: (inout Result, Result) -> Void
) -> [Result?] {
  var start = 0
  return counts.map { count in
    defer { start += count }
    guard count > 0 else { return nil }
    return results[start + 1..<start + count].reduce(into: results[start], add)
  }
}

private struct TaskVectorObservation: TileOperation {
  let experts: Int

  // The sums are the same bits for every tile whose columns are a multiple of 1024.
  var grain: Int { 1024 }

  func makeSummary() -> GramMatrix { GramMatrix(order: experts) }

  func apply(_ input: inout Tile, into output: inout Tile, summary: inout GramMatrix) {
    for row in 1...experts { input.subtract(row: 0, from: row) }
    summary.add(input.rows(from: 1), stride: input.capacity, columns: input.columns)
  }
}

// MARK: - In a file

extension TaskVectorGrams {
  private static let key = "task_vector_grams"

  /// Reads what `write(to:)` wrote.
  public init(contentsOf path: String) throws {
    let source = try Checkpoint.open(path)
    guard let list = source.manifest.metadata[TaskVectorGrams.key],
      let experts = try? JSONDecoder().decode([String].self, from: Data(list.utf8))
    else {
      throw CheckpointError(
        file: path, "holds no Gram matrices of task vectors",
        remedy: "make them with 'smelt gram' or 'smelt disentangle'")
    }
    self.init(experts: experts)
    let order = experts.count
    for tensor in source.manifest.tensors {
      guard tensor.dtype == .f64, tensor.shape == [order, order] else {
        throw CheckpointError(
          file: path, tensor: tensor.name,
          "is \(tensor.dtype.rawValue) \(tensor.shapeDescription), not F64 [\(order), \(order)]")
      }
      let bytes = try source.bytes(of: tensor)
      let elements = bytes.withUnsafeBytes { bytes in
        (0..<order * order).map { index in
          Double(
            bitPattern: UInt64(
              littleEndian: bytes.loadUnaligned(fromByteOffset: 8 * index, as: UInt64.self)))
        }
      }
      append(tensor.name, GramMatrix(order: order, elements: elements))
    }
  }

  /// Writes a small checkpoint: for every tensor a matrix of Doubles under its name.
  public func write(to path: String) throws {
    let encoder = JSONEncoder()
    encoder.outputFormatting = .withoutEscapingSlashes
    let list = String(decoding: try encoder.encode(experts), as: UTF8.self)
    let infos = tensors.map {
      try! TensorInfo(name: $0.name, dtype: .f64, shape: [experts.count, experts.count])
    }
    let sink = try Checkpoint.create(path, Manifest(infos, metadata: [TaskVectorGrams.key: list]))
    for (info, tensor) in zip(infos, tensors) {
      let bytes = tensor.gram.elements.flatMap { number in
        withUnsafeBytes(of: number.bitPattern.littleEndian) { Array($0) }
      }
      try sink.write(bytes.span.bytes, of: info, at: 0)
    }
    try sink.finish()
  }

  /// - Throws: `MergeError` if these are not of this family, as far as names tell.
  func check(against family: ModelFamily) throws(MergeError) {
    let names = family.experts.map { $0.name }
    guard names == experts else {
      throw MergeError(
        "the Gram matrices are of the experts \(experts.joined(separator: ", ")), not \(names.joined(separator: ", "))",
        remedy: "give the same experts in the same order")
    }
    let own = family.base.manifest.tensors.filter { $0.dtype.isArithmetic }.map { $0.name }
    guard own == tensors.map({ $0.name }) else {
      throw MergeError("the Gram matrices are of another model: its tensors have other names")
    }
  }
}

extension GramMatrix {
  /// - Throws: `MergeError` if another matrix was found in the models.
  func check(isFoundAs found: GramMatrix, in tensor: TensorInfo) throws(MergeError) {
    for i in 0..<order {
      for j in 0..<order where self[i, j].isFinite {
        // Sums over rows and over whole tensors round differently.
        let scale = (found[i, i] * found[j, j]).squareRoot()
        guard abs(self[i, j] - found[i, j]) <= 1e-5 * scale else {
          throw MergeError(
            "the Gram matrices are of other models: tensor \(quoted(tensor.name)) has changed since",
            remedy: "measure them again by leaving --gram out")
        }
      }
    }
  }
}
