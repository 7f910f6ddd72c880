/// One layer's mixture with the inputs and experts to match.
struct MatchedLayer: Sendable {
  let samples: CalibrationSamples
  let tokens: Matrix<Float>
  let module: WeightEnsemblingMLP
  /// The experts' MLPs, unless a one-hot mixture is the expert.
  let experts: [MLPWeights]?

  /// How many rows of tokens go through the matrix products together.
  private static let batch = 512

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
  ///
  /// Only inner products of outputs are needed. Those of wide outputs are taken of `sketchWidth`
  /// random directions, which keep them to one part in √sketchWidth, without bias, and cost a
  /// fraction.
  func quadraticForms() -> QuadraticForms {
    let layer = sketched()
    let module = layer.module
    let order = module.taskVectors.count
    var forms = QuadraticForms(order: order, count: samples.tasks.count)
    for task in 0..<order {
      let mixed = module.expert(task)
      let rows = samples.tasks.indices.filter { samples.tasks[$0] == task }
      for sample in rows { forms.points[sample, task] = 1 }
      for batch in batches(rows) {
        let inputs = tokens(of: batch)
        let inside = MLPTangent(mixed, at: inputs, module.activation)
        var residuals: Matrix<Float>?
        if let experts = layer.experts {
          residuals = mixed.fc2(inside.hidden)
          residuals!.subtract(experts[task](inputs, module.activation))
        }
        // The derivatives by all weights of the mixture, below each other.
        var derivatives = Matrix(
          .plain(inside.changes(by: module.taskVectors, inputs)), .transposed(mixed.fc2.weight))
        let length = inputs.rowCount * derivatives.columnCount
        for (index, taskVector) in module.taskVectors.enumerated() {
          derivatives.add(taskVector.fc2(inside.hidden), atRow: index * inputs.rowCount)
        }
        let sampleLength = tokensPerSample * derivatives.columnCount
        for (index, sample) in batch.enumerated() {
          func start(_ direction: Int) -> Int { direction * length + index * sampleLength }
          for i in 0..<order {
            let first = derivatives.elements.span.extracting(start(i)..<start(i) + sampleLength)
            for j in 0...i {
              let value = dotProduct(
                first, derivatives.elements.span.extracting(start(j)..<start(j) + sampleLength))
              forms.curvatures[sample, i * order + j] = value
              forms.curvatures[sample, j * order + i] = value
            }
            guard let residuals else { continue }
            forms.slopes[sample, i] = dotProduct(
              first, residuals.elements.span.extracting(start(0)..<start(0) + sampleLength))
          }
          guard let residuals else { continue }
          let own = residuals.elements.span.extracting(start(0)..<start(0) + sampleLength)
          forms.constants[sample] = dotProduct(own, own)
        }
      }
    }
    return forms
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

  /// What gates do on some of the samples.
  func qualities(of gates: [Dense], _ rows: [Int]) -> [OutputMatching.Quality] {
    qualities(ofMixtures: gates.map { $0(samples.features) }, rows)
  }

  /// What mixtures, one for each sample, do on some of the samples.
  func qualities(ofMixtures mixtures: [Matrix<Float>], _ rows: [Int]) -> [OutputMatching.Quality] {
    var errors = mixtures.map { _ in 0.0 }
    var distance = 0.0
    for task in 0..<module.taskVectors.count {
      let expert = experts?[task] ?? module.expert(task)
      for batch in batches(rows.filter { samples.tasks[$0] == task }) {
        let inputs = tokens(of: batch)
        let wanted = expert(inputs, module.activation)
        var base = module.base(inputs, module.activation)
        base.subtract(wanted)
        distance += dotProduct(base.elements.span, base.elements.span)
        let tokenSamples = batch.flatMap { repeatElement($0, count: tokensPerSample) }
        let outputs = module.outputs(inputs, mixtures: mixtures.map { $0.rows(tokenSamples) })
        for (gate, var output) in outputs.enumerated() {
          output.subtract(wanted)
          errors[gate] += dotProduct(output.elements.span, output.elements.span)
        }
      }
    }
    return zip(mixtures, errors).map { mixtures, error in
      OutputMatching.Quality(
        outputError: distance > 0 ? (error / distance).squareRoot() : 0,
        routingAccuracy: Self.accuracy(of: mixtures, rows, samples.tasks))
    }
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

  /// The outputs for rows of tokens, each with a mixture of its own, without putting together
  /// weights for every sample: one result for each choice of mixtures.
  func outputs(_ tokens: Matrix<Float>, mixtures: [Matrix<Float>]) -> [Matrix<Float>] {
    func mixed(_ map: (MLPWeights) -> Dense) -> [Matrix<Float>] {
      var sums = Array(repeating: map(base)(tokens), count: mixtures.count)
      for (task, taskVector) in taskVectors.enumerated() {
        let term = map(taskVector)(tokens)
        for index in sums.indices { sums[index].add(term, rowScales: mixtures[index], task) }
      }
      return sums
    }
    let sums = mixed { $0.fc1 }
    let gates = base.gate == nil ? nil : mixed { $0.gate! }
    return mixtures.enumerated().map { index, mixture in
      var hidden = (gates ?? sums)[index].map { activation($0) }
      if gates != nil { hidden.multiply(sums[index]) }
      var output = base.fc2(hidden)
      for (task, taskVector) in taskVectors.enumerated() {
        output.add(taskVector.fc2(hidden), rowScales: mixture, task)
      }
      return output
    }
  }
}

extension Matrix where Scalar == Float {
  /// Adds another matrix, each row as often as a column of `rowScales` says.
  fileprivate mutating func add(_ other: Matrix, rowScales: Matrix, _ column: Int) {
    for row in 0..<rowCount {
      let scale = rowScales[row, column]
      for index in row * columnCount..<(row + 1) * columnCount {
        elements[index] += scale * other.elements[index]
      }
    }
  }
}

/// What is inside an MLP at some inputs, and how it follows a change of its weights.
private struct MLPTangent {
  /// What the second map gets.
  let hidden: Matrix<Float>
  /// By how much `hidden` grows with the input of the activation.
  private let slopes: Matrix<Float>
  /// Of a gated MLP: by how much `hidden` grows with the other factor.
  private let gates: Matrix<Float>?

  init(_ mlp: MLPWeights, at inputs: Matrix<Float>, _ activation: Activation) {
    let sums = mlp.fc1(inputs)
    guard let gate = mlp.gate else {
      hidden = sums.map { activation($0) }
      slopes = sums.map { activation.derivative($0) }
      gates = nil
      return
    }
    let gateSums = gate(inputs)
    let opened = gateSums.map { activation($0) }
    var slopes = gateSums.map { activation.derivative($0) }
    slopes.multiply(sums)
    var hidden = opened
    hidden.multiply(sums)
    (self.hidden, self.slopes, gates) = (hidden, slopes, opened)
  }

  /// The derivatives of `hidden` towards changes of the weights, below each other.
  func changes(by taskVectors: [MLPWeights], _ inputs: Matrix<Float>) -> Matrix<Float> {
    var changes: [Float] = []
    changes.reserveCapacity(taskVectors.count * hidden.elements.count)
    for taskVector in taskVectors { changes += change(by: taskVector, inputs).elements }
    return Matrix(
      rowCount: taskVectors.count * hidden.rowCount, columnCount: hidden.columnCount,
      elements: changes)
  }

  private func change(by taskVector: MLPWeights, _ inputs: Matrix<Float>) -> Matrix<Float> {
    var change = taskVector.fc1(inputs)
    guard let gates, let gate = taskVector.gate else {
      change.multiply(slopes)
      return change
    }
    change.multiply(gates)
    var opening = gate(inputs)
    opening.multiply(slopes)
    for index in change.elements.indices { change.elements[index] += opening.elements[index] }
    return change
  }
}

extension Matrix where Scalar == Float {
  /// Adds a matrix to some of the rows.
  fileprivate mutating func add(_ other: Matrix, atRow row: Int) {
    let start = row * columnCount
    for index in other.elements.indices { elements[start + index] += other.elements[index] }
  }

  /// Multiplies element by element.
  mutating func multiply(_ other: Matrix) {
    for index in elements.indices { elements[index] *= other.elements[index] }
  }
}
