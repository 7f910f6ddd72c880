import Glibc

/// The MLP inputs of one layer (means over tokens) with the task that each sample belongs to.
public struct CalibrationSamples: Sendable {
  /// [layers × samples, width].
  public private(set) var features: Matrix<Float>
  public private(set) var tasks: [Int]
  public let taskCount: Int
  /// How many layers' inputs follow each other: row l·(samples) + s is sample s at layer l.
  public private(set) var layerCount = 1

  public init(
    features: Matrix<Float>, tasks: [Int], taskCount: Int
  ) throws(CalibrationError) {
    guard features.rowCount == tasks.count else {
      throw CalibrationError(
        "there are \(features.rowCount) samples, but tasks for \(tasks.count)")
    }
    for task in tasks where !(0..<taskCount).contains(task) {
      throw CalibrationError("task \(task) is not one of the \(taskCount) experts")
    }
    for task in 0..<taskCount where !tasks.contains(task) {
      throw CalibrationError("task \(task) has no samples")
    }
    guard features.columnCount > 0, tasks.count > 1 else {
      throw CalibrationError("a fit needs at least two samples of at least one feature")
    }
    for (index, value) in features.elements.enumerated() where !value.isFinite {
      throw CalibrationError("sample \(index / features.columnCount) is not finite")
    }
    self.features = features
    self.tasks = tasks
    self.taskCount = taskCount
  }
}

extension CalibrationSamples {
  /// The inputs of several layers that share one gate.
  public init(layers: [CalibrationSamples]) throws(CalibrationError) {
    for layer in layers where layer.tasks != layers[0].tasks {
      throw CalibrationError("layers that share a gate have samples of different tasks")
    }
    for layer in layers
    where layer.features.columnCount != layers[0].features.columnCount {
      throw CalibrationError("layers that share a gate differ in width")
    }
    try self.init(
      features: Matrix(
        rowCount: layers.reduce(0) { $0 + $1.features.rowCount },
        columnCount: layers.first?.features.columnCount ?? 0,
        elements: layers.flatMap(\.features.elements)),
      tasks: layers.flatMap(\.tasks), taskCount: layers.first?.taskCount ?? 0)
    layerCount = layers.count
  }

  /// Some of the samples.
  func subset(_ rows: [Int]) -> CalibrationSamples {
    var subset = self
    subset.features = features.rows(rows)
    subset.tasks = rows.map { tasks[$0] }
    return subset
  }
}

/// What is wrong with calibration samples.
public struct CalibrationError: Error, Equatable, CustomStringConvertible {
  public let description: String
  init(_ description: String) { self.description = description }
}

/// A linear gate W h + b fitted to one-hot targets: ‖W h + b − e_task‖² + ridge·‖W‖², with the
/// ridge that predicts best what was left out.
///
/// A small fixed ridge overfits where there are about as many samples as features. Leaving a
/// sample out needs no second fit: with H its block of the hat matrix, its residual becomes
/// (1 − H)⁻¹ times the fit's. A sample that several layers share is left out of all at once.
public struct RouterCalibration: Sendable {
  /// W [tasks, width] and b.
  public let gate: Dense
  public let ridge: Double
  /// The mean squared distance of W h + b from the one-hot target, each sample left out in turn.
  public let leaveOneOutError: Double
  /// The share of samples whose largest weight is their own task's, each left out in turn.
  public let leaveOneOutAccuracy: Double

  /// The ridges that are tried, in units of trace/width of the centred Gram matrix.
  static let relativeRidges = (-12...6).map { pow(10, Double($0) / 2) }

  public init(_ samples: CalibrationSamples) {
    self.init(samples, PrincipalFeatures(samples.features))
  }

  init(_ samples: CalibrationSamples, _ features: PrincipalFeatures) {
    var targets = Matrix(
      rowCount: samples.tasks.count, columnCount: samples.taskCount, repeating: 0.0)
    for (row, task) in samples.tasks.enumerated() { targets[row, task] = 1 }
    let (centredTargets, targetMean) = centred(targets)
    let cross = Matrix(.transposed(features.scores), .plain(centredTargets))
    let scale = features.values.reduce(0, +) / Double(features.mean.count)

    // How much every sample pulls its own fit, for every ridge.
    let ridges = Self.relativeRidges.map { max($0 * scale, .leastNormalMagnitude) }
    let shares = ridges.map { ridge in features.values.map { 1 / ($0 + ridge) } }
    let leverages =
      samples.layerCount == 1
      ? Matrix(
        .plain(features.scores.map { $0 * $0 }),
        .transposed(
          Matrix(
            rowCount: ridges.count, columnCount: features.values.count,
            elements: shares.flatMap { $0 })))
      : nil

    var best: (ridge: Double, error: Double, accuracy: Double, coefficients: Matrix<Double>)?
    for (index, (ridge, shares)) in zip(ridges, shares).enumerated() {
      var coefficients = cross
      for row in 0..<cross.rowCount {
        for column in 0..<cross.columnCount { coefficients[row, column] *= shares[row] }
      }
      var residuals = centredTargets
      residuals.subtract(Matrix(.plain(features.scores), .plain(coefficients)))
      if let leverages {
        leaveOut(&residuals, leverages.column(index))
      } else {
        leaveOut(&residuals, features.scores, shares, layers: samples.layerCount)
      }
      let error = residuals.elements.reduce(0) { $0 + $1 * $1 } / Double(residuals.rowCount)
      guard best == nil || error < best!.error else { continue }
      let weights = residuals.elements.indices.map { targets.elements[$0] - residuals.elements[$0] }
      let accuracy = routingAccuracy(
        Matrix(rowCount: targets.rowCount, columnCount: targets.columnCount, elements: weights),
        samples.tasks)
      best = (ridge, error, accuracy, coefficients)
    }
    ridge = best!.ridge
    leaveOneOutError = best!.error
    leaveOneOutAccuracy = best!.accuracy
    gate = features.gate(best!.coefficients, bias: targetMean)
  }
}

/// Turns the residuals of a fit into those of samples that the fit has not seen.
private func leaveOut(_ residuals: inout Matrix<Double>, _ leverages: [Double]) {
  for (row, leverage) in leverages.enumerated() {
    // The share of the unpenalised bias included. A sample that alone determines the fit cannot
    // be left out: it predicts nothing.
    let rest = max(1 - 1 / Double(residuals.rowCount) - leverage, 1e-12)
    for column in 0..<residuals.columnCount { residuals[row, column] /= rest }
  }
}

/// The same where several layers share every sample.
private func leaveOut(
  _ residuals: inout Matrix<Double>, _ scores: Matrix<Double>, _ shares: [Double], layers: Int
) {
  let count = residuals.rowCount / layers
  for sample in 0..<count {
    let rows = (0..<layers).map { $0 * count + sample }
    // 1 − H, its share of the unpenalised bias included.
    var block = Array(repeating: 0.0, count: layers * layers)
    for (i, row) in rows.enumerated() {
      for (j, other) in rows[...i].enumerated() {
        var leverage = 1 / Double(residuals.rowCount)
        for index in shares.indices {
          leverage += shares[index] * scores[row, index] * scores[other, index]
        }
        block[i * layers + j] = -leverage
        block[j * layers + i] = -leverage
      }
      block[i * layers + i] = max(1 + block[i * layers + i], 1e-12)
    }
    for column in 0..<residuals.columnCount {
      let fitted = rows.map { residuals[$0, column] }
      // A sample that alone determines the fit cannot be left out: it predicts nothing.
      let left = solveDefinite(block, fitted) ?? fitted.map { $0 * 1e12 }
      for (row, value) in zip(rows, left) { residuals[row, column] = value }
    }
  }
}

/// The share of rows whose largest weight is their own task's.
func routingAccuracy(_ weights: Matrix<Double>, _ tasks: [Int]) -> Double {
  let hits = tasks.indices.count { row in
    let mixture = Array(weights[row: row])
    return mixture.firstIndex(of: mixture.max()!) == tasks[row]
  }
  return Double(hits) / Double(tasks.count)
}

extension Router {
  /// A linear gate in the layout of a deeper router, with the same answers.
  ///
  /// For depth 2 the hidden layer passes h through: ReLU(h + c) = h + c where h ≥ −c, and the
  /// second layer takes c off again. Of a c equal to the largest |h| seen, an unseen input would
  /// be clipped sooner or later; four times as much leaves a margin, and costs two bits of h in
  /// the rounding of h + c. A power of two adds no rounding of its own. Such a gate must be stored
  /// as F32: b − c·W·1 does not survive BF16.
  ///
  /// - Parameter largestInput: The largest |h| of any token that was seen.
  public init(embedding gate: Dense, depth: Int, largestInput: Float) {
    guard depth == 2 else {
      precondition(depth == 1)
      self = .linear(gate)
      return
    }
    let width = gate.weight.columnCount
    let magnitude = Double(largestInput).isFinite ? max(Double(largestInput), 0x1p-20) : 1
    let shift = exp2(ceil(log2(4 * magnitude)))
    var identity = Matrix(rowCount: width, columnCount: width, repeating: Float(0))
    for index in 0..<width { identity[index, index] = 1 }
    let bias = gate.bias.indices.map { task in
      let sum = gate.weight[row: task].reduce(0.0) { $0 + Double($1) }
      return Float(Double(gate.bias[task]) - shift * sum)
    }
    self = .hidden(
      Dense(weight: identity, bias: Array(repeating: Float(shift), count: width)),
      Dense(weight: gate.weight, bias: bias))
  }
}
