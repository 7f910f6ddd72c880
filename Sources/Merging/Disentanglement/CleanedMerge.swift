import Checkpoints
import Synchronization

/// A merge method that is shown cleaned task vectors instead of the differences themselves.
///
/// A tile's redundant vectors are taken out before the method observes or merges it. A method
/// that only adds up weighted differences gets other weights instead, wᵢ − aᵢ·Σw, and the tile
/// stays as it is.
struct CleanedMerge<Method: TensorMerge>: TensorMerge, TaskVectorCleaning {
  /// What is known of the redundant vectors.
  private enum State: Sendable {
    case known(TensorCleaning)
    /// The tensor is a group; its Gram matrix is summed in the first observing pass.
    case tensor(AdaptiveWeightDisentanglement)
    /// The tensor belongs to a group of several, which is solved before the merge runs.
    case group
  }

  enum Observation: Sendable {
    case gram(GramMatrix)
    case method(Method.Observation)
  }

  private var method: Method
  private var state: State
  /// Models beside the base, in the rows from 1 on.
  private let experts: Int
  private let tensor: TensorInfo
  private var findings: CleaningFindings?

  init(_ method: Method, of tensor: TensorInfo, experts: Int, by cleaning: Cleaning) {
    self.method = method
    self.experts = experts
    self.tensor = tensor
    switch cleaning.method.scope {
    case .row: state = .known(cleaning.rowCleaning(tensor))
    case .tensor: state = .tensor(cleaning.method)
    case .block, .model: state = .group
    }
  }

  // MARK: Before the merge

  var isWaitingForGroup: Bool { if case .group = state { true } else { false } }

  func prepared(_ findings: CleaningFindings, coefficients: [Double]?) -> any TensorMerge {
    var result = self
    result.findings = findings
    if let coefficients { result.state = .known(.group(coefficients: coefficients)) }
    return result
  }

  // MARK: Observing

  private var cleaning: TensorCleaning? {
    if case .known(let cleaning) = state { cleaning } else { nil }
  }

  private var isWaitingForTensor: Bool { if case .tensor = state { true } else { false } }

  // All are 1 or the length of a row.
  var grain: Int { max(method.grain, cleaning?.grain ?? 1) }
  var scratchRows: Int { method.scratchRows }
  var isReady: Bool { !isWaitingForTensor && method.isReady }
  var observationBytes: Int { method.observationBytes }
  var observingPasses: Int { method.observingPasses + (isWaitingForTensor ? 1 : 0) }

  func makeObservation() -> Observation {
    isWaitingForTensor
      ? .gram(GramMatrix(order: experts)) : .method(method.makeObservation())
  }

  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout Observation
  ) {
    switch observation {
    case .gram(var gram):
      gram.add(tile.rows(from: 1), stride: tile.capacity, columns: tile.columns)
      observation = .gram(gram)
    case .method(var seen):
      var unused = TensorFindings(experts: experts)
      tile.takeOut(vectors(in: tile, &unused), from: 1, keeping: &scratch, row: 0)
      // Taken out while it is changed, so that it has one owner and is not copied.
      observation = .gram(GramMatrix(order: 0))
      method.observe(&tile, at: position, scratch: &scratch, into: &seen)
      observation = .method(seen)
    }
  }

  func combine(_ next: Observation, into total: inout Observation) {
    switch (next, total) {
    case (.gram(let next), .gram(var sum)):
      sum += next
      total = .gram(sum)
    case (.method(let next), .method(var sum)):
      total = .gram(GramMatrix(order: 0))
      method.combine(next, into: &sum)
      total = .method(sum)
    default: preconditionFailure("one pass observes one thing")
    }
  }

  mutating func learn(_ total: Observation) throws(PassesDiffer) {
    switch (state, total) {
    case (.tensor(let solver), .gram(let gram)):
      findings?.add(TensorFindings(gram: gram, experts: experts), to: tensor.name)
      state = .known(.group(coefficients: solver.solve(gram).coefficients))
    case (_, .method(let seen)): try method.learn(seen)
    default: preconditionFailure("inner products are summed for tensor scope only")
    }
  }

  // MARK: Merging

  private func vectors(in tile: borrowing Tile, _ found: inout TensorFindings) -> RedundantVectors {
    guard let cleaning else { preconditionFailure("the group has not been solved") }
    return cleaning.redundantVectors(in: tile, from: 1, experts: experts, findings: &found)
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    var found = TensorFindings(experts: experts)
    let vectors = vectors(in: tile, &found)
    if cleaning!.isByRow { findings?.add(found, to: tensor.name) }
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
