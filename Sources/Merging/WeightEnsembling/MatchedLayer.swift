/// One layer's mixture with the inputs and experts to match.
struct MatchedLayer: Sendable {
  let samples: CalibrationSamples
  let tokens: Matrix<Float>
  let module: WeightEnsemblingMLP
  /// The experts' MLPs, unless a one-hot mixture is the expert.
  let experts: [MLPWeights]?

  /// How many rows of tokens go through the matrix products together.
  static let batch = 512

  private var tokensPerSample: Int { tokens.rowCount / samples.tasks.count }

  /// Some samples in the order of their tasks, with their tokens and what the first maps say.
  struct Batch: Sendable {
    let samples: ArraySlice<Int>
    let inputs: Matrix<Float>
    /// The rows of every task there is.
    let runs: [FirstSums.Run]
    fileprivate(set) var sums: FirstSums
  }

  /// The samples in batches, each computed as it is asked for.
  func batches(of rows: [Int]) -> some Sequence<Batch> {
    let order = rows.enumerated().sorted {
      (samples.tasks[$0.element], $0.offset) < (samples.tasks[$1.element], $1.offset)
    }.map(\.element)
    let size = max(1, Self.batch / tokensPerSample)
    return stride(from: 0, to: order.count, by: size).lazy.map { begin in
      batch(order[begin..<min(begin + size, order.count)])
    }
  }

  private func batch(_ own: ArraySlice<Int>) -> Batch {
    let count = tokensPerSample
    let inputs = tokens.rows(own.flatMap { $0 * count..<($0 + 1) * count })
    var runs: [FirstSums.Run] = []
    for (index, sample) in own.enumerated() {
      let rows = index * count..<(index + 1) * count
      if let last = runs.last, last.task == samples.tasks[sample] {
        runs[runs.count - 1].rows = last.rows.lowerBound..<rows.upperBound
      } else {
        runs.append((samples.tasks[sample], rows))
      }
    }
    return Batch(samples: own, inputs: inputs, runs: runs, sums: FirstSums(module, inputs))
  }

  /// The losses at the one-hot mixtures, with their derivatives.
  ///
  /// Only inner products of outputs are needed. Those of wide outputs are taken of `sketchWidth`
  /// random directions, which keep them to one part in √sketchWidth, without bias, and cost a
  /// fraction.
  ///
  /// - Parameter known: batches that have been computed already.
  func quadraticForms(_ known: [Batch] = []) -> QuadraticForms {
    let layer = sketched()
    var forms = QuadraticForms(
      order: module.taskVectors.count, count: samples.tasks.count)
    for var batch in known { layer.use(&batch, for: &forms) }
    let seen = Set(known.flatMap(\.samples))
    for var batch in batches(of: samples.tasks.indices.filter { !seen.contains($0) }) {
      layer.use(&batch, for: &forms)
    }
    return forms
  }

  /// Finds the forms of a batch, whose sums are used up.
  private func use(_ batch: inout Batch, for forms: inout QuadraticForms) {
    let order = forms.order
    let inside = batch.sums.tangent(at: batch.runs, module.activation)
    // The second maps of the one-hot mixtures.
    let last = batch.runs.map { module.lastMap(of: $0.task) }
    let derivatives = (0..<order).map { task in
      var derivative = module.taskVectors[task].fc2(inside.hidden)
      let change = batch.sums.takeChange(by: task, at: inside)
      for (run, fc2) in zip(batch.runs, last) {
        derivative.add(.rows(change, run.rows), .transposed(fc2.weight), toRows: run.rows)
      }
      return derivative
    }
    let residuals = experts.map { distances(of: batch, inside.hidden, last, from: $0) }
    let length = tokensPerSample * module.base.fc2.bias.count
    for (index, sample) in batch.samples.enumerated() {
      let range = index * length..<(index + 1) * length
      forms.points[sample, samples.tasks[sample]] = 1
      for i in 0..<order {
        for j in 0...i {
          let value = derivatives[i].product(derivatives[j], in: range)
          forms.curvatures[sample, i * order + j] = value
          forms.curvatures[sample, j * order + i] = value
        }
        if let residuals {
          forms.slopes[sample, i] = derivatives[i].product(residuals, in: range)
        }
      }
      if let residuals { forms.constants[sample] = residuals.product(residuals, in: range) }
    }
  }

  /// The outputs of the one-hot mixtures less the experts'.
  private func distances(
    of batch: Batch, _ hidden: Matrix<Float>, _ last: [Dense], from experts: [MLPWeights]
  ) -> Matrix<Float> {
    var residuals = Matrix(
      stacking: zip(batch.runs, last).map { run, fc2 in fc2(hidden.rows(run.rows)) })
    residuals.subtract(outputs(of: batch, experts))
    return residuals
  }

  /// What each sample's own expert makes of it.
  private func outputs(of batch: Batch, _ experts: [MLPWeights]) -> Matrix<Float> {
    Matrix(
      stacking: batch.runs.map { run in
        experts[run.task](batch.inputs.rows(run.rows), module.activation)
      })
  }

  /// How many directions stand for wider outputs.
  static let sketchWidth = 256

  /// The layer with outputs of random directions, if there are more.
  private func sketched() -> MatchedLayer {
    let width = module.base.fc2.bias.count
    guard width > Self.sketchWidth else { return self }
    var directions = Matrix<Float>(
      rowCount: Self.sketchWidth, columnCount: width, repeating: 0)
    var values = directions.elements.mutableSpan
    CounterRandom(seed: 0, tensor: "sketch").fill(
      &values, from: 0, deviation: 1 / Float(Self.sketchWidth).squareRoot())
    func sketched(_ mlp: MLPWeights) -> MLPWeights {
      var mlp = mlp
      let bias = Matrix(rowCount: width, columnCount: 1, elements: mlp.fc2.bias)
      mlp.fc2 = Dense(
        weight: Matrix(.plain(directions), .plain(mlp.fc2.weight)),
        bias: Matrix(.plain(directions), .plain(bias)).elements)
      return mlp
    }
    var module = module
    module.base = sketched(module.base)
    module.taskVectors = module.taskVectors.map(sketched)
    return MatchedLayer(
      samples: samples, tokens: tokens, module: module, experts: experts?.map(sketched))
  }

  /// What mixtures, one for each sample, do on the samples of some batches.
  func qualities(
    ofMixtures mixtures: [Matrix<Float>], _ batches: some Sequence<Batch>
  ) -> [OutputMatching.Quality] {
    var errors = mixtures.map { _ in 0.0 }
    var distance = 0.0
    var rows: [Int] = []
    for batch in batches {
      rows += batch.samples
      let wanted = experts.map { outputs(of: batch, $0) } ?? oneHotOutputs(of: batch)
      var base = module.base.fc2(batch.sums.hidden(module.activation))
      base.subtract(wanted)
      distance += dotProduct(base.elements.span, base.elements.span)
      let tokenSamples = batch.samples.flatMap { repeatElement($0, count: tokensPerSample) }
      let mixed = module.outputs(batch.sums, mixtures: mixtures.map { $0.rows(tokenSamples) })
      for (gate, var output) in mixed.enumerated() {
        output.subtract(wanted)
        errors[gate] += dotProduct(output.elements.span, output.elements.span)
      }
    }
    return zip(mixtures, errors).map { mixtures, error in
      OutputMatching.Quality(
        outputError: distance > 0 ? (error / distance).squareRoot() : 0,
        routingAccuracy: Self.accuracy(of: mixtures, rows, samples.tasks))
    }
  }

  /// What each sample's one-hot mixture makes of it.
  private func oneHotOutputs(of batch: Batch) -> Matrix<Float> {
    let hidden = batch.sums.hidden(at: batch.runs, module.activation)
    return Matrix(
      stacking: batch.runs.map { run in module.lastMap(of: run.task)(hidden.rows(run.rows)) })
  }

  /// The share of some samples whose largest weight is their own task's.
  static func accuracy(of mixtures: Matrix<Float>, _ rows: [Int], _ tasks: [Int]) -> Double {
    routingAccuracy(mixtures.rows(rows).map { Double($0) }, rows.map { tasks[$0] })
  }
}

extension WeightEnsemblingMLP {
  /// θ₀ + τⱼ.
  func expert(_ task: Int) -> MLPWeights {
    var expert = base
    expert.add(taskVectors[task], scale: 1)
    return expert
  }

  /// The second map of θ₀ + τⱼ.
  fileprivate func lastMap(of task: Int) -> Dense {
    var last = base.fc2
    last.add(taskVectors[task].fc2, scale: 1)
    return last
  }

  /// The outputs for rows of tokens, each with a mixture of its own, without putting together
  /// weights for every sample: one result for each choice of mixtures.
  func outputs(_ sums: FirstSums, mixtures: [Matrix<Float>]) -> [Matrix<Float>] {
    let hidden = Matrix(stacking: mixtures.map { sums.hidden(of: $0, activation) })
    let stacked = Matrix(stacking: mixtures)
    var outputs = base.fc2(hidden)
    for (task, taskVector) in taskVectors.enumerated() {
      outputs.add(taskVector.fc2(hidden), rowsTimes: stacked.column(task))
    }
    let count = mixtures[0].rowCount
    return mixtures.indices.map { outputs.rows($0 * count..<($0 + 1) * count) }
  }
}

extension Matrix where Scalar == Float {
  /// The inner product of some of the elements.
  fileprivate func product(_ other: Matrix, in range: Range<Int>) -> Double {
    dotProduct(elements.span.extracting(range), other.elements.span.extracting(range))
  }
}
