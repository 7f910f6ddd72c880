import Glibc

/// A linear gate fitted to the experts' outputs: the mean of ‖MoE(h) − MLPᵢ(h)‖² over samples of
/// known task i, from a one-hot fit downhill.
///
/// One-hot targets are wrong where one-hot mixtures are not the experts, as with pruned task
/// vectors, and treat all mistakes alike, though some hardly change the output. The output is a
/// smooth function of the k weights of a sample, close to linear where fine-tuning moved little.
/// So its derivatives at the one-hot mixture turn the loss into a quadratic form of k variables a
/// sample (Gauss and Newton's approximation), computed once with 3k + 4 matrix products a sample,
/// and the gate is the solution of a linear system. A descent through the network would take as
/// many products for every few steps.
///
/// The gate is held near the one-hot fit by a ridge. A quarter of the samples chooses the ridge
/// and measures the outcome.
public struct OutputMatching: Sendable {
  /// What a gate does on samples that its fit has not seen.
  public struct Quality: Sendable, Equatable {
    /// ‖MoE(h) − MLPᵢ(h)‖ over ‖MLP₀(h) − MLPᵢ(h)‖, root mean square: 1 for the base model.
    public let outputError: Double
    /// The share of samples whose largest weight is their own task's.
    public let routingAccuracy: Double
  }

  /// Fitted to all samples.
  public let gate: Dense
  /// The strength that holds the gate near the one-hot fit; nil where output matching did not
  /// help and the one-hot fit was kept.
  public let ridge: Double?
  /// Of the one-hot fit to three quarters of the samples.
  public let before: Quality
  /// Of the matched fit to three quarters of the samples.
  public let after: Quality

  /// - Parameters:
  ///   - samples: What the router sees: means over tokens, at least four samples a task.
  ///   - tokens: What the MLP sees: the same number of rows for every sample, in their order.
  ///   - module: The mixture; its router is not looked at.
  ///   - experts: The experts' MLPs, where the task vectors of the mixture are not exactly theirs.
  public init(
    _ samples: CalibrationSamples, tokens: Matrix<Float>, module: WeightEnsemblingMLP,
    experts: [MLPWeights]? = nil
  ) throws(CalibrationError) {
    let split = try samples.split()
    let layer = MatchedLayer(
      samples: samples, tokens: tokens, module: module, experts: experts)
    let forms = layer.quadraticForms()
    let principal = PrincipalFeatures(samples.features)

    let start = RouterCalibration(samples.subset(split.fitted)).gate
    let path = GatePath(principal, forms, start: start(samples.features))
    var best = (ridge: Double.infinity, gate: start, loss: path.startLoss(of: split.held))
    var offset: Matrix<Double>?
    // From the strongest ridge, where the gate stays at the start, each fit begins at the last.
    for exponent in (-4...3).reversed() {
      let ridge = pow(10, Double(exponent))
      let found = path.solve(split.fitted, relativeRidge: ridge, from: offset)
      offset = found
      let loss = path.loss(of: split.held, found)
      if loss < best.loss {
        best = (ridge, start + path.gate(found), loss)
      } else if loss > 1.1 * best.loss {
        break
      }
    }

    before = layer.quality(of: start, split.held)
    let matched = layer.quality(of: best.gate, split.held)
    let everything = RouterCalibration(samples, principal).gate
    if best.ridge.isFinite, matched.outputError < before.outputError {
      let path = GatePath(principal, forms, start: everything(samples.features))
      gate = everything + path.gate(path.solve(nil, relativeRidge: best.ridge, from: nil))
      ridge = best.ridge
      after = matched
    } else {
      gate = everything
      ridge = nil
      after = before
    }
  }
}

extension CalibrationSamples {
  /// Every fourth sample of each task is held out of a fit.
  fileprivate func split() throws(CalibrationError) -> (fitted: [Int], held: [Int]) {
    var seen = Array(repeating: 0, count: taskCount)
    var split: (fitted: [Int], held: [Int]) = ([], [])
    for (row, task) in tasks.enumerated() {
      seen[task] += 1
      if seen[task].isMultiple(of: 4) { split.held.append(row) } else { split.fitted.append(row) }
    }
    for (task, count) in seen.enumerated() where count < 4 {
      throw CalibrationError(
        "output matching needs at least 4 samples of every task, and task \(task) has \(count)")
    }
    return split
  }
}

extension Dense {
  fileprivate static func + (left: Dense, right: Dense) -> Dense {
    var sum = left
    sum.add(right, scale: 1)
    return sum
  }
}

/// The loss of every sample as a function of its mixture w near a point e:
/// (w − e)ᵀH(w − e) + 2cᵀ(w − e) + constant.
struct QuadraticForms: Sendable {
  let order: Int
  /// H of every sample, row after row.
  var curvatures: Matrix<Double>
  var slopes: Matrix<Double>
  var constants: [Double]
  var points: Matrix<Double>

  init(order: Int, count: Int) {
    self.order = order
    curvatures = Matrix(rowCount: count, columnCount: order * order, repeating: 0)
    slopes = Matrix(rowCount: count, columnCount: order, repeating: 0)
    constants = Array(repeating: 0, count: count)
    points = slopes
  }

  /// H·vector of a sample, into `result`.
  @inline(__always)
  func curve(_ sample: Int, _ vectors: inout Matrix<Double>, row: Int) {
    var result = 0.0
    let old = Array(vectors[row: row])
    for i in 0..<order {
      result = 0
      for j in 0..<order { result += curvatures[sample, i * order + j] * old[j] }
      vectors[row, i] = result
    }
  }

  func loss(_ sample: Int, _ mixture: ArraySlice<Double>) -> Double {
    let offset = zip(mixture, points[row: sample]).map { $0 - $1 }
    var sum = constants[sample]
    for i in 0..<order {
      sum += 2 * slopes[sample, i] * offset[i]
      for j in 0..<order { sum += offset[i] * curvatures[sample, i * order + j] * offset[j] }
    }
    return sum
  }
}

/// One layer's mixture with the inputs and experts to match.
struct MatchedLayer: Sendable {
  let samples: CalibrationSamples
  let tokens: Matrix<Float>
  let module: WeightEnsemblingMLP
  /// The experts' MLPs, unless a one-hot mixture is the expert.
  let experts: [MLPWeights]?

  /// How many rows of tokens go through the matrix products together.
  private static let batch = 256

  private var tokensPerSample: Int { tokens.rowCount / samples.tasks.count }

  private func tokens(of samples: ArraySlice<Int>) -> Matrix<Float> {
    let count = tokensPerSample
    return tokens.rows(samples.flatMap { $0 * count..<($0 + 1) * count })
  }

  private func batches(_ rows: [Int]) -> [ArraySlice<Int>] {
    let size = max(1, Self.batch / tokensPerSample)
    return stride(from: 0, to: rows.count, by: size).map { rows[$0..<min($0 + size, rows.count)] }
  }

  /// The losses at the one-hot mixtures, with their derivatives.
  func quadraticForms() -> QuadraticForms {
    let order = module.taskVectors.count
    var forms = QuadraticForms(order: order, count: samples.tasks.count)
    for task in 0..<order {
      let mixed = module.expert(task)
      let rows = samples.tasks.indices.filter { samples.tasks[$0] == task }
      for sample in rows { forms.points[sample, task] = 1 }
      for batch in batches(rows) {
        let inputs = tokens(of: batch)
        let sums = mixed.fc1(inputs)
        let hidden = sums.map { module.activation($0) }
        let slopes = sums.map { module.activation.derivative($0) }
        var residuals: Matrix<Float>?
        if let experts {
          residuals = mixed.fc2(hidden)
          residuals!.subtract(experts[task](inputs, module.activation))
        }
        let derivatives = module.taskVectors.map { taskVector in
          var change = taskVector.fc1(inputs)
          for index in change.elements.indices { change.elements[index] *= slopes.elements[index] }
          var derivative = taskVector.fc2(hidden)
          derivative.add(.plain(change), .transposed(mixed.fc2.weight))
          return derivative
        }
        let rowLength = tokensPerSample * tokens.columnCount
        for (index, sample) in batch.enumerated() {
          let range = index * rowLength..<(index + 1) * rowLength
          func product(_ left: Matrix<Float>, _ right: Matrix<Float>) -> Double {
            dotProduct(
              left.elements.span.extracting(range), right.elements.span.extracting(range))
          }
          for i in 0..<order {
            for j in 0...i {
              let value = product(derivatives[i], derivatives[j])
              forms.curvatures[sample, i * order + j] = value
              forms.curvatures[sample, j * order + i] = value
            }
            if let residuals { forms.slopes[sample, i] = product(derivatives[i], residuals) }
          }
          if let residuals { forms.constants[sample] = product(residuals, residuals) }
        }
      }
    }
    return forms
  }

  /// What a gate does on some of the samples.
  func quality(of gate: Dense, _ rows: [Int]) -> OutputMatching.Quality {
    let mixtures = gate(samples.features)
    var (error, distance) = (0.0, 0.0)
    for task in 0..<module.taskVectors.count {
      let expert = experts?[task] ?? module.expert(task)
      for batch in batches(rows.filter { samples.tasks[$0] == task }) {
        let inputs = tokens(of: batch)
        let perToken = mixtures.rows(
          batch.flatMap { repeatElement($0, count: tokensPerSample) })
        let wanted = expert(inputs, module.activation)
        var outputs = module.outputs(inputs, mixtures: perToken)
        var base = module.base(inputs, module.activation)
        outputs.subtract(wanted)
        base.subtract(wanted)
        error += dotProduct(outputs.elements.span, outputs.elements.span)
        distance += dotProduct(base.elements.span, base.elements.span)
      }
    }
    let weights = mixtures.rows(rows)
    return OutputMatching.Quality(
      outputError: distance > 0 ? (error / distance).squareRoot() : 0,
      routingAccuracy: routingAccuracy(weights.map { Double($0) }, rows.map { samples.tasks[$0] }))
  }
}

extension WeightEnsemblingMLP {
  /// θ₀ + τⱼ.
  func expert(_ task: Int) -> MLPWeights {
    var expert = base
    expert.add(taskVectors[task], scale: 1)
    return expert
  }

  /// The outputs for rows of tokens, each with a mixture of its own, without putting together
  /// weights for every sample.
  func outputs(_ tokens: Matrix<Float>, mixtures: Matrix<Float>) -> Matrix<Float> {
    func mix(_ inputs: Matrix<Float>, _ part: KeyPath<MLPWeights, Dense>) -> Matrix<Float> {
      var sum = base[keyPath: part](inputs)
      for (expert, taskVector) in taskVectors.enumerated() {
        let term = taskVector[keyPath: part](inputs)
        for row in 0..<sum.rowCount {
          let weight = mixtures[row, expert]
          for column in 0..<sum.columnCount { sum[row, column] += weight * term[row, column] }
        }
      }
      return sum
    }
    return mix(mix(tokens, \.fc1).map { activation($0) }, \.fc2)
  }
}

/// The gates between a start and the least loss, one for every strength of the ridge.
///
/// A gate is start + offset; an offset is [rank + 1, tasks] in principal coordinates, the last
/// row the bias. The system is solved by conjugate gradients, preconditioned with what the
/// matrix would be if all samples had the same curvature: that one is diagonal in the principal
/// coordinates of features and curvature.
struct GatePath {
  private let principal: PrincipalFeatures
  private let forms: QuadraticForms
  private let start: Matrix<Double>
  /// The scores with a column of ones for the bias.
  private let scores: Matrix<Double>
  private let curvatureValues: [Double]
  private let curvatureVectors: Matrix<Double>
  private let scale: Double

  /// - Parameter start: The mixtures that the start gives to the samples.
  init(_ principal: PrincipalFeatures, _ forms: QuadraticForms, start: Matrix<Float>) {
    self.principal = principal
    self.forms = forms
    self.start = start.map { Double($0) }
    let (count, rank) = (principal.scores.rowCount, principal.scores.columnCount)
    var scores = Matrix(rowCount: count, columnCount: rank + 1, repeating: 1.0)
    for row in 0..<count {
      for column in 0..<rank { scores[row, column] = principal.scores[row, column] }
    }
    self.scores = scores
    var mean = Matrix(rowCount: forms.order, columnCount: forms.order, repeating: 0.0)
    for sample in 0..<count {
      for index in mean.elements.indices {
        mean.elements[index] += forms.curvatures[sample, index] / Double(count)
      }
    }
    let (values, vectors) = eigen(mean)
    // Where no task vector changes the output, nothing pulls; a floor keeps the division finite.
    let floor = max(1e-9 * (values.last ?? 0), 1e-300)
    curvatureValues = values.map { max($0, floor) }
    curvatureVectors = vectors
    scale =
      curvatureValues.reduce(0, +) / Double(forms.order)
      * (principal.values.reduce(0, +) / Double(max(1, rank)))
  }

  /// A ridge in the units of the loss.
  func ridge(_ relative: Double) -> Double { max(relative * scale, .leastNormalMagnitude) }

  func startLoss(of rows: [Int]) -> Double {
    rows.reduce(0) { $0 + forms.loss($1, start[row: $1]) }
  }

  func loss(of rows: [Int], _ offset: Matrix<Double>) -> Double {
    let held = scores.rows(rows)
    let changes = Matrix(.plain(held), .plain(offset))
    return rows.enumerated().reduce(0) { sum, entry in
      let mixture = zip(start[row: entry.element], changes[row: entry.offset]).map { $0 + $1 }
      return sum + forms.loss(entry.element, mixture[...])
    }
  }

  func gate(_ offset: Matrix<Double>) -> Dense {
    let rank = offset.rowCount - 1
    return principal.gate(offset.rows(0..<rank), bias: Array(offset[row: rank]))
  }

  /// The offset of least loss plus ridge·‖W‖² over some of the samples (or all).
  func solve(
    _ rows: [Int]?, relativeRidge: Double, from first: Matrix<Double>?
  ) -> Matrix<Double> {
    let rows = rows ?? Array(0..<scores.rowCount)
    let used = rows.count == scores.rowCount ? scores : scores.rows(rows)
    let rank = scores.columnCount - 1
    let ridge = ridge(relativeRidge)
    let share = Double(rows.count) / Double(scores.rowCount)

    /// Σ H(offset·x)xᵀ + ridge·offset.
    func applied(_ offset: Matrix<Double>) -> Matrix<Double> {
      var changes = Matrix(.plain(used), .plain(offset))
      for (row, sample) in rows.enumerated() { forms.curve(sample, &changes, row: row) }
      var result = Matrix(.transposed(used), .plain(changes))
      for row in 0..<rank {
        for column in 0..<offset.columnCount { result[row, column] += ridge * offset[row, column] }
      }
      return result
    }

    func preconditioned(_ residual: Matrix<Double>) -> Matrix<Double> {
      var rotated = Matrix(.plain(residual), .transposed(curvatureVectors))
      for row in 0...rank {
        for column in 0..<rotated.columnCount {
          let curvature = curvatureValues[column] * share
          rotated[row, column] /=
            row == rank
            ? curvature * Double(scores.rowCount) : curvature * principal.values[row] + ridge
        }
      }
      return Matrix(.plain(rotated), .plain(curvatureVectors))
    }

    // The right side: how far the start is from where each sample's slope vanishes.
    var pulls = Matrix(rowCount: rows.count, columnCount: forms.order, repeating: 0.0)
    for (row, sample) in rows.enumerated() {
      for task in 0..<forms.order {
        pulls[row, task] = forms.points[sample, task] - start[sample, task]
      }
      forms.curve(sample, &pulls, row: row)
      for task in 0..<forms.order { pulls[row, task] -= forms.slopes[sample, task] }
    }
    let right = Matrix(.transposed(used), .plain(pulls))

    var offset =
      first ?? Matrix(rowCount: rank + 1, columnCount: forms.order, repeating: 0.0)
    var residual = right
    residual.subtract(applied(offset))
    var improved = preconditioned(residual)
    var direction = improved
    var progress = dot(residual, improved)
    let enough = 1e-8 * dot(right, preconditioned(right))
    for _ in 0..<100 where progress > enough {
      let image = applied(direction)
      let step = progress / dot(direction, image)
      offset.add(direction, scale: step)
      residual.add(image, scale: -step)
      improved = preconditioned(residual)
      let next = dot(residual, improved)
      var turned = improved
      turned.add(direction, scale: next / progress)
      direction = turned
      progress = next
    }
    return offset
  }
}

private func dot(_ left: Matrix<Double>, _ right: Matrix<Double>) -> Double {
  var sum = 0.0
  for index in left.elements.indices { sum += left.elements[index] * right.elements[index] }
  return sum
}

extension Matrix where Scalar == Double {
  /// Adds another matrix, `scale` times.
  fileprivate mutating func add(_ other: Matrix, scale: Double) {
    for index in elements.indices { elements[index] += scale * other.elements[index] }
  }
}
