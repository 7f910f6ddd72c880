import TestSupport
import Testing

@testable import Merging

/// Reproducible normal numbers.
private struct Numbers {
  private let random: CounterRandom
  private var index: UInt64 = 0

  init(_ name: String) { random = CounterRandom(seed: 4, tensor: name) }

  mutating func matrix(_ rows: Int, _ columns: Int, _ scale: Double) -> Matrix<Float> {
    Matrix(
      rowCount: rows, columnCount: columns,
      elements: (0..<rows * columns).map { _ in
        index += 1
        return Float(scale * random.normal(at: index))
      })
  }

  mutating func mlp(_ width: Int, _ hidden: Int, _ scale: Double) -> MLPWeights {
    MLPWeights(
      fc1: Dense(weight: matrix(hidden, width, scale), bias: matrix(1, hidden, scale).elements),
      fc2: Dense(weight: matrix(width, hidden, scale), bias: matrix(1, width, scale).elements))
  }
}

/// A small layer whose tasks differ by the mean of their inputs.
private struct SmallLayer {
  static let (width, hidden, tasks) = (10, 16, 3)
  let samples: CalibrationSamples
  let tokens: Matrix<Float>
  let module: WeightEnsemblingMLP

  init(perTask: Int, tokensPerSample: Int, spread: Double = 1) throws {
    var numbers = Numbers("layer")
    let (width, tasks) = (Self.width, Self.tasks)
    let centres = numbers.matrix(tasks, width, 1)
    let count = perTask * tasks
    var tokens = numbers.matrix(count * tokensPerSample, width, spread)
    var features = Matrix(rowCount: count, columnCount: width, repeating: Float(0))
    for sample in 0..<count {
      for token in sample * tokensPerSample..<(sample + 1) * tokensPerSample {
        for column in 0..<width {
          tokens[token, column] += centres[sample % tasks, column]
          features[sample, column] += tokens[token, column] / Float(tokensPerSample)
        }
      }
    }
    self.tokens = tokens
    samples = try CalibrationSamples(
      features: features, tasks: (0..<count).map { $0 % tasks }, taskCount: tasks)
    module = WeightEnsemblingMLP(
      router: .constant([0, 0, 0]), base: numbers.mlp(width, Self.hidden, 0.3),
      taskVectors: (0..<tasks).map { _ in numbers.mlp(width, Self.hidden, 0.05) },
      activation: .gelu)
  }

  /// The same layer with all but the largest values of its task vectors set to zero.
  func pruned() -> WeightEnsemblingMLP {
    var pruned = module
    func cut(_ values: inout [Float]) {
      let threshold = values.map(\.magnitude).sorted()[values.count * 8 / 10]
      for index in values.indices where values[index].magnitude < threshold { values[index] = 0 }
    }
    for task in pruned.taskVectors.indices {
      cut(&pruned.taskVectors[task].fc1.weight.elements)
      cut(&pruned.taskVectors[task].fc2.weight.elements)
    }
    return pruned
  }

  /// ‖MLP(h; mixture) − MLP_expert(h)‖² of one sample.
  func loss(_ module: WeightEnsemblingMLP, _ sample: Int, _ mixture: [Float]) -> Double {
    let count = tokens.rowCount / samples.tasks.count
    let inputs = tokens.rows(sample * count..<(sample + 1) * count)
    var outputs = module.weights(mixture)(inputs, module.activation)
    outputs.subtract(self.module.expert(samples.tasks[sample])(inputs, module.activation))
    return outputs.elements.reduce(0) { $0 + Double($1) * Double($1) }
  }
}

@Suite struct `matching the experts' outputs` {
  @Test func `mixing outputs is mixing weights`() throws {
    let layer = try SmallLayer(perTask: 2, tokensPerSample: 2)
    let mixtures = Matrix<Float>(rowCount: 2, columnCount: 3, elements: [0.3, -0.2, 1, 0, 0.5, 2])
    let inputs = layer.tokens.rows(0..<2)
    let zero = Matrix(rowCount: 2, columnCount: 3, repeating: Float(0))
    let outputs = layer.module.outputs(
      FirstSums(layer.module, inputs), mixtures: [zero, mixtures])[1]
    for row in 0..<2 {
      let exact = layer.module.weights(Array(mixtures[row: row]))(inputs.rows([row]), .gelu)
      for column in 0..<SmallLayer.width {
        #expect(abs(outputs[row, column] - exact[0, column]) < 1e-5)
      }
    }
  }

  @Test(arguments: [1, 3])
  func `the quadratic form is the loss near the one-hot mixture`(tokensPerSample: Int) throws {
    let layer = try SmallLayer(perTask: 2, tokensPerSample: tokensPerSample)
    for module in [layer.module, layer.pruned()] {
      let isExact = module == layer.module
      let forms = MatchedLayer(
        samples: layer.samples, tokens: layer.tokens, module: module,
        experts: isExact ? nil : (0..<3).map { layer.module.expert($0) }
      ).quadraticForms()
      for sample in 0..<6 {
        var point: [Float] = [0, 0, 0]
        point[sample % 3] = 1
        #expect(abs(forms.constants[sample] - layer.loss(module, sample, point)) < 1e-5)
        for task in 0..<3 {
          let step: Float = 0.05
          var (above, below) = (point, point)
          above[task] += step
          below[task] -= step
          let (up, down) = (layer.loss(module, sample, above), layer.loss(module, sample, below))
          let slope = (up - down) / (4 * Double(step))
          let size = forms.curvatures[sample, task * 4].squareRoot()
          #expect(abs(slope - forms.slopes[sample, task]) < 0.02 * size + 1e-4)
          if isExact {
            let curvature = (up + down) / (2 * Double(step * step))
            #expect(abs(curvature / forms.curvatures[sample, task * 4] - 1) < 0.02)
          }
        }
      }
    }
  }

  @Test(arguments: [1e-3, 1.0])
  func `conjugate gradients solve the linear system`(ridge: Double) throws {
    let layer = try SmallLayer(perTask: 8, tokensPerSample: 1)
    let principal = PrincipalFeatures(layer.samples.features)
    let forms = MatchedLayer(
      samples: layer.samples, tokens: layer.tokens, module: layer.pruned(),
      experts: (0..<3).map { layer.module.expert($0) }
    ).quadraticForms()
    let start = Matrix(rowCount: 24, columnCount: 3, repeating: Float(0.3))
    let path = GatePath(principal, forms, start: start)
    let rows = Array(0..<20)
    let found = path.solve(rows, relativeRidge: ridge, from: nil)

    // At the solution no direction lowers the penalised loss.
    func objective(_ offset: Matrix<Double>) -> Double {
      let rank = offset.rowCount - 1
      let norm = offset.elements[..<(rank * 3)].reduce(0) { $0 + $1 * $1 }
      return path.loss(of: rows, offset) + path.ridge(ridge) * norm
    }
    let least = objective(found)
    #expect(least < objective(Matrix(rowCount: 11, columnCount: 3, repeating: 0)))
    for index in found.elements.indices {
      var (above, below) = (found, found)
      let step = 1e-3 * max(1e-3, abs(found.elements[index]))
      above.elements[index] += step
      below.elements[index] -= step
      let (up, down) = (objective(above), objective(below))
      let curvature = up + down - 2 * least
      #expect(curvature > 0)
      // The distance to the least value along this direction, in steps.
      #expect(abs(up - down) / (2 * curvature) * step < 2e-3)
    }
  }

  @Test func `outputs match better, and so on samples that were not seen`() throws {
    let layer = try SmallLayer(perTask: 60, tokensPerSample: 2, spread: 1.5)
    let matching = try OutputMatching(layer.samples, tokens: layer.tokens, module: layer.module)
    #expect(matching.ridge != nil)
    #expect(matching.after.outputError < matching.before.outputError)
    #expect(matching.before.outputError < 1)
    #expect(matching.after.routingAccuracy > 0.6)
  }

  @Test func `for pruned task vectors larger weights are found`() throws {
    let layer = try SmallLayer(perTask: 60, tokensPerSample: 2, spread: 0.2)
    let pruned = layer.pruned()
    let experts = (0..<3).map { layer.module.expert($0) }
    let matching = try OutputMatching(
      layer.samples, tokens: layer.tokens, module: pruned, experts: experts)
    #expect(matching.after.outputError < 0.97 * matching.before.outputError)
    let mixtures = matching.gate(layer.samples.features)
    let own = (0..<180).map { mixtures[$0, layer.samples.tasks[$0]] }
    #expect(own.reduce(0, +) / 180 > 1.02)
    #expect(matching.after.routingAccuracy == 1)
  }

  @Test func `too few samples are refused`() throws {
    let layer = try SmallLayer(perTask: 3, tokensPerSample: 1)
    #expect(
      throws: CalibrationError(
        "output matching needs at least 4 samples of every task, and task 0 has 3")
    ) {
      try OutputMatching(layer.samples, tokens: layer.tokens, module: layer.module)
    }
  }
}
