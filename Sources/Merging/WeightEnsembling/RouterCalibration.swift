import COpenBLAS
import Glibc

/// The MLP inputs of one layer (means over tokens) with the task that each sample belongs to.
public struct CalibrationSamples: Sendable {
  /// [samples, width].
  public let features: Matrix<Float>
  public let tasks: [Int]
  public let taskCount: Int

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

/// What is wrong with calibration samples.
public struct CalibrationError: Error, Equatable, CustomStringConvertible {
  public let description: String
  init(_ description: String) { self.description = description }
}

/// A linear gate W h + b fitted to one-hot targets: ‖W h + b − e_task‖² + ridge·‖W‖², with the
/// ridge that predicts best what was left out.
///
/// A small fixed ridge overfits where there are about as many samples as features. Leaving one
/// sample out needs no second fit: its residual is the fit's, divided by 1 − its leverage (the
/// diagonal of the hat matrix).
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
    let (count, width) = (samples.features.rowCount, samples.features.columnCount)
    let (features, mean) = centred(samples.features)
    var targets = Matrix(rowCount: count, columnCount: samples.taskCount, repeating: 0.0)
    for (row, task) in samples.tasks.enumerated() { targets[row, task] = 1 }
    let (centredTargets, targetMean) = centred(targets)

    // Features = U·S·Vᵀ by the eigenvectors of the smaller of the two Gram matrices.
    let isWide = count < width
    let gram =
      isWide
      ? Matrix(.plain(features), .transposed(features))
      : Matrix(.transposed(features), .plain(features))
    let scale = features.elements.reduce(0) { $0 + $1 * $1 } / Double(width)
    let (values, vectors) = eigen(gram)
    // `scores` are U·S (primal) or U (dual), one row a sample.
    let scores = isWide ? vectors : Matrix(.plain(features), .plain(vectors))
    let cross = Matrix(.transposed(scores), .plain(centredTargets))

    var best: (error: Double, accuracy: Double, ridge: Double)?
    for relative in Self.relativeRidges {
      let ridge = max(relative * scale, .leastNormalMagnitude)
      let shares = values.map { (isWide ? max(0, $0) : 1) / (max(0, $0) + ridge) }
      var scaled = cross
      for row in 0..<scaled.rowCount {
        for column in 0..<scaled.columnCount { scaled[row, column] *= shares[row] }
      }
      let fitted = Matrix(.plain(scores), .plain(scaled))
      var error = 0.0
      var hits = 0
      for row in 0..<count {
        var leverage = 1 / Double(count)
        for (share, score) in zip(shares, scores[row: row]) { leverage += share * score * score }
        let rest = max(1 - leverage, 1e-12)
        var largest = (task: 0, weight: -Double.infinity)
        for task in 0..<samples.taskCount {
          let residual = (centredTargets[row, task] - fitted[row, task]) / rest
          let weight = targets[row, task] - residual
          error += residual * residual / Double(count)
          if weight > largest.weight { largest = (task, weight) }
        }
        if largest.task == samples.tasks[row] { hits += 1 }
      }
      if best == nil || error < best!.error {
        best = (error, Double(hits) / Double(count), ridge)
      }
    }

    ridge = best!.ridge
    leaveOneOutError = best!.error
    leaveOneOutAccuracy = best!.accuracy
    let ridge = ridge
    var scaled = cross
    for row in 0..<scaled.rowCount {
      for column in 0..<scaled.columnCount { scaled[row, column] /= max(0, values[row]) + ridge }
    }
    let weight =
      isWide
      ? Matrix(.transposed(Matrix(.plain(scores), .plain(scaled))), .plain(features))
      : Matrix(.transposed(scaled), .transposed(vectors))
    let bias = (0..<samples.taskCount).map { task in
      targetMean[task] - zip(weight[row: task], mean).reduce(0) { $0 + $1.0 * $1.1 }
    }
    gate = Dense(
      weight: Matrix(
        rowCount: weight.rowCount, columnCount: width, elements: weight.elements.map { Float($0) }),
      bias: bias.map { Float($0) })
  }
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

/// A matrix less the mean of its rows, and that mean.
private func centred<Scalar: BinaryFloatingPoint & Sendable>(
  _ matrix: Matrix<Scalar>
) -> (Matrix<Double>, mean: [Double]) {
  var mean = Array(repeating: 0.0, count: matrix.columnCount)
  var elements = matrix.elements.map { Double($0) }
  for row in 0..<matrix.rowCount {
    for column in mean.indices { mean[column] += elements[row * mean.count + column] }
  }
  for column in mean.indices { mean[column] /= Double(matrix.rowCount) }
  for row in 0..<matrix.rowCount {
    for column in mean.indices { elements[row * mean.count + column] -= mean[column] }
  }
  let centred = Matrix(
    rowCount: matrix.rowCount, columnCount: matrix.columnCount, elements: elements)
  return (centred, mean)
}

/// The eigenvalues of a symmetric matrix, ascending, and its eigenvectors as columns.
func eigen(_ matrix: Matrix<Double>) -> (values: [Double], vectors: Matrix<Double>) {
  _ = singleThreadedBLAS
  var vectors = matrix.elements
  var order = CInt(matrix.rowCount)
  var values = Array(repeating: 0.0, count: matrix.rowCount)
  var status: CInt = 0
  var size = 0.0
  var integerSize: CInt = 0
  var query: CInt = -1
  // The first call asks how much scratch memory the second needs.
  dsyevd_("V", "U", &order, &vectors, &order, &values, &size, &query, &integerSize, &query, &status)
  query = CInt(size)
  var scratch = Array(repeating: 0.0, count: Int(size))
  var integers = Array(repeating: CInt(0), count: Int(integerSize))
  dsyevd_(
    "V", "U", &order, &vectors, &order, &values, &scratch, &query, &integers, &integerSize, &status)
  precondition(status == 0, "dsyevd does not converge")
  // Fortran's columns are our rows.
  let count = matrix.rowCount
  var columns = Matrix(rowCount: count, columnCount: count, repeating: 0.0)
  for row in 0..<count {
    for column in 0..<count { columns[column, row] = vectors[row * count + column] }
  }
  return (values, columns)
}
