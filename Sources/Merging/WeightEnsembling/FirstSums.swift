/// What the first maps of a mixture say to rows of tokens, the base's and each task vector's apart.
///
/// The maps are linear, so those of any mixture of weights are sums of these: they are computed
/// once for all that is asked about the same tokens.
struct FirstSums: Sendable {
  /// Neighbouring rows of one task.
  typealias Run = (task: Int, rows: Range<Int>)

  /// Of the base, then of every task vector: [rows, hidden].
  private(set) var fc1: [Matrix<Float>]
  /// The same of a gated MLP's gate.
  private(set) var gate: [Matrix<Float>]?

  init(_ module: WeightEnsemblingMLP, _ tokens: Matrix<Float>) {
    let parts = [module.base] + module.taskVectors
    fc1 = parts.map { $0.fc1(tokens) }
    gate = module.base.gate == nil ? nil : parts.map { $0.gate!(tokens) }
  }

  /// What the second map gets from the base alone, or if every row has a mixture of its own,
  /// [rows, experts].
  func hidden(of mixtures: Matrix<Float>? = nil, _ activation: Activation) -> Matrix<Float> {
    let scales = mixtures.map { mixtures in
      (0..<mixtures.columnCount).map { mixtures.column($0) }
    }
    return hidden(activation) { sum, parts in
      for (task, scales) in (scales ?? []).enumerated() {
        sum.add(parts[task + 1], rowsTimes: scales)
      }
    }
  }

  /// What it gets if runs of rows have the one-hot mixture of their task.
  func hidden(at runs: [Run], _ activation: Activation) -> Matrix<Float> {
    hidden(activation) { Self.mix(&$0, $1, at: runs) }
  }

  private static func mix(
    _ sum: inout Matrix<Float>, _ parts: [Matrix<Float>], at runs: [Run]
  ) {
    for run in runs { sum.add(parts[run.task + 1], rows: run.rows) }
  }

  private func hidden(
    _ activation: Activation, mix: (inout Matrix<Float>, [Matrix<Float>]) -> Void
  ) -> Matrix<Float> {
    func mixed(_ parts: [Matrix<Float>]) -> Matrix<Float> {
      var sum = parts[0]
      mix(&sum, parts)
      return sum
    }
    var hidden = mixed(gate ?? fc1).map { activation($0) }
    if gate != nil { hidden.multiply(mixed(fc1)) }
    return hidden
  }

  /// What is inside the MLP where runs of rows have the one-hot mixture of their task.
  func tangent(at runs: [Run], _ activation: Activation) -> MLPTangent {
    func mixed(_ parts: [Matrix<Float>]) -> Matrix<Float> {
      var sum = parts[0]
      Self.mix(&sum, parts, at: runs)
      return sum
    }
    return MLPTangent(sums: mixed(fc1), gate: gate.map(mixed), activation)
  }

  /// The derivative of what the second map gets towards a task vector, whose sums are no longer
  /// there afterwards.
  mutating func takeChange(by task: Int, at tangent: MLPTangent) -> Matrix<Float> {
    var change = fc1.take(task + 1)
    guard let opened = tangent.gates else {
      change.multiply(tangent.slopes)
      return change
    }
    change.multiply(opened)
    var opening = gate!.take(task + 1)
    opening.multiply(tangent.slopes)
    change.add(opening)
    return change
  }
}

/// What is inside an MLP at some inputs, and how it follows a change of its weights.
struct MLPTangent {
  /// What the second map gets.
  let hidden: Matrix<Float>
  /// By how much `hidden` grows with the input of the activation.
  let slopes: Matrix<Float>
  /// Of a gated MLP: by how much `hidden` grows with the other factor.
  let gates: Matrix<Float>?

  /// - Parameters:
  ///   - sums: what the first map says.
  ///   - gate: what a gated MLP's gate says.
  init(sums: Matrix<Float>, gate: Matrix<Float>?, _ activation: Activation) {
    var (values, slopes) = (gate ?? sums, gate ?? sums)
    for index in values.elements.indices {
      (values.elements[index], slopes.elements[index]) = activation.valueAndDerivative(
        values.elements[index])
    }
    guard gate != nil else {
      (hidden, self.slopes, gates) = (values, slopes, nil)
      return
    }
    gates = values
    slopes.multiply(sums)
    values.multiply(sums)
    (hidden, self.slopes) = (values, slopes)
  }
}

extension [Matrix<Float>] {
  /// Moves a matrix out, so that it can be worked in without a copy.
  fileprivate mutating func take(_ index: Int) -> Matrix<Float> {
    let matrix = self[index]
    self[index] = Matrix(rowCount: 0, columnCount: 0, elements: [])
    return matrix
  }
}
