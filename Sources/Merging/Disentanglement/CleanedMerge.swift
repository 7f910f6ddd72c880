import Checkpoints
import Synchronization

/// A merge method that is shown cleaned task vectors instead of the differences themselves.
///
/// A tile's redundant vectors are taken out before the method observes or merges it. A method
/// that only adds up weighted differences gets other weights instead, wᵢ − aᵢ·Σw, and the tile
/// stays as it is.
struct CleanedMerge<Method: TensorMerge>: TensorMerge, TaskVectorCleaning {
  private var method: Method
  /// `nil` while the tensor's group has not been solved.
  private var cleaning: TensorCleaning?
  /// Models beside the base, in the rows from 1 on.
  private let experts: Int
  private let tensor: TensorInfo
  private var findings: CleaningFindings?

  init(_ method: Method, of tensor: TensorInfo, experts: Int, by cleaning: Cleaning) {
    self.method = method
    self.experts = experts
    self.tensor = tensor
    self.cleaning = cleaning.method.scope == .row ? cleaning.rowCleaning(tensor) : nil
  }

  // MARK: Before the merge

  var isWaitingForGroup: Bool { cleaning == nil }

  func prepared(_ findings: CleaningFindings, coefficients: [Double]?) -> any TensorMerge {
    var result = self
    result.findings = findings
    if let coefficients { result.cleaning = .group(coefficients: coefficients) }
    return result
  }

  // MARK: Observing

  // All are 1 or the length of a row.
  var grain: Int { max(method.grain, cleaning?.grain ?? 1) }
  var scratchRows: Int { method.scratchRows }
  var isReady: Bool { method.isReady }
  var observationBytes: Int { method.observationBytes }
  var observingPasses: Int { method.observingPasses }

  func makeObservation() -> Method.Observation { method.makeObservation() }

  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile,
    into observation: inout Method.Observation
  ) {
    var unused = TensorFindings(experts: experts)
    tile.takeOut(vectors(in: tile, &unused), from: 1, keeping: &scratch, row: 0)
    method.observe(&tile, at: position, scratch: &scratch, into: &observation)
  }

  func combine(_ next: Method.Observation, into total: inout Method.Observation) {
    method.combine(next, into: &total)
  }

  mutating func learn(_ total: Method.Observation) throws(PassesDiffer) {
    try method.learn(total)
  }

  // MARK: Merging

  private func vectors(in tile: borrowing Tile, _ found: inout TensorFindings) -> RedundantVectors {
    guard let cleaning else { preconditionFailure("the group has not been solved") }
    return cleaning.redundantVectors(in: tile, from: 1, experts: experts, findings: &found)
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    var found = TensorFindings(experts: experts)
    let vectors = vectors(in: tile, &found)
    if cleaning?.isByRow == true { findings?.add(found, to: tensor.name) }
    guard let weights = method.linearWeights else {
      tile.takeOut(vectors, from: 1, keeping: &output, row: 0)
      return method.merge(&tile, at: position, into: &output)
    }
    guard vectors.groupCount != 1 else {
      return output.weigh(tile, from: 1, weights: vectors.weights(weights, of: 0))
    }
    output.clear(row: 0)
    for group in 0..<vectors.groupCount {
      for (expert, weight) in vectors.weights(weights, of: group).enumerated() {
        output.add(
          tile, row: expert + 1, to: 0, times: weight, columns: vectors.columns(of: group))
      }
    }
  }
}

/// What a plan asks of a `CleanedMerge` whatever its method.
protocol TaskVectorCleaning: TensorMerge {
  /// Whether its group must be solved before the merge can run.
  var isWaitingForGroup: Bool { get }
  /// - Parameter coefficients: those of its group, where it waits for them.
  func prepared(_ findings: CleaningFindings, coefficients: [Double]?) -> any TensorMerge
}

/// The inner products of a tensor's task vectors, as an observing pass sums them.
struct TaskVectorGram: TensorMerge {
  let experts: Int
  let grain: Int

  var isReady: Bool { false }
  func makeObservation() -> GramMatrix { GramMatrix(order: experts) }

  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout GramMatrix
  ) {
    observation.add(tile.rows(from: 1), stride: tile.capacity, columns: tile.columns)
  }

  func combine(_ next: GramMatrix, into total: inout GramMatrix) { total += next }
  mutating func learn(_ total: GramMatrix) {}
  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {}
}

/// What a merge finds out about its tensors' cleaning, from all its workers.
///
/// Rows come in any order, so the last bits of these sums vary from run to run; the merge's
/// result does not depend on them.
final class CleaningFindings: Sendable {
  private let tensors = Mutex<[String: TensorFindings]>([:])

  func add(_ findings: TensorFindings, to tensor: String) {
    tensors.withLock { tensors in
      if tensors[tensor] == nil { tensors[tensor] = findings } else { tensors[tensor]! += findings }
    }
  }

  subscript(tensor: String) -> TensorFindings? { tensors.withLock { $0[tensor] } }
}
