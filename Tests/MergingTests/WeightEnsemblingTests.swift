import Glibc
import Merging
import TestSupport
import Testing

private func matrix(_ rows: Int, _ columns: Int, _ values: [Double]) -> Matrix<Float> {
  Matrix(rowCount: rows, columnCount: columns, elements: values.map { Float($0) })
}

/// Parameters in the order of the oracle: fc1.weight, fc1.bias, fc2.weight, fc2.bias.
private func mlp(_ parameter: (_ index: Int, _ count: Int) -> [Double]) -> MLPWeights {
  MLPWeights(
    fc1: Dense(weight: matrix(6, 4, parameter(0, 24)), bias: parameter(1, 6).map { Float($0) }),
    fc2: Dense(weight: matrix(4, 6, parameter(2, 24)), bias: parameter(3, 4).map { Float($0) }))
}

private func gateParameter(_ index: Int, _ count: Int, isLastBias: Bool = false) -> [Double] {
  filler(40 + index, count: count).map { 0.3 * $0 + (isLastBias ? 0.3 : 0) }
}

private func oracleRouter(depth: Int) -> Router {
  func dense(_ index: Int, _ outputs: Int, isLast: Bool) -> Dense {
    Dense(
      weight: matrix(outputs, 4, gateParameter(index, outputs * 4)),
      bias: gateParameter(index + 1, outputs, isLastBias: isLast).map { Float($0) })
  }
  switch depth {
  case 0: return .constant(gateParameter(0, 2).map { Float($0) })
  case 1: return .linear(dense(0, 2, isLast: true))
  default: return .hidden(dense(0, 4, isLast: false), dense(2, 2, isLast: true))
  }
}

private func oracleModule(depth: Int) -> WeightEnsemblingMLP {
  WeightEnsemblingMLP(
    router: oracleRouter(depth: depth),
    base: mlp { filler(10 + $0, count: $1).map { 0.5 * $0 } },
    taskVectors: (1...2).map { expert in
      mlp { filler(20 + 5 * expert + $0, count: $1).map { 0.1 * $0 } }
    },
    activation: .quickGELU)
}

private let oracleSamples: [Matrix<Float>] = {
  let values = filler(1, count: 24)
  return [matrix(3, 4, Array(values[..<12])), matrix(3, 4, Array(values[12...]))]
}()

struct ForwardOracle: Sendable {
  let depth: Int
  let mixtures: [[Double]]
  let first: [Double]
  let sum: Double
  let averagedMixture: [Double]?
  let averagedSum: Double?
}

@Suite struct `weight-ensembling modules` {
  @Test(arguments: [
    ForwardOracle(
      depth: 0, mixtures: [[-0.269378, -0.288924], [-0.269378, -0.288924]],
      first: [-0.259606, -0.406872, 0.867264, -0.782679], sum: -3.325273, averagedMixture: nil,
      averagedSum: -3.325273),
    ForwardOracle(
      depth: 1, mixtures: [[0.484341, 0.465943], [0.482215, 0.463245]],
      first: [-0.283488, -0.428794, 0.880811, -0.907945], sum: -3.893220,
      averagedMixture: [0.483278, 0.464594], averagedSum: -3.893223),
    ForwardOracle(
      depth: 2, mixtures: [[0.243682, 0.147032], [0.235400, 0.141371]],
      first: [-0.272963, -0.414095, 0.875877, -0.862980], sum: -3.646239,
      averagedMixture: [0.239541, 0.144201], averagedSum: -3.646246),
  ])
  func `the forward pass follows the oracle`(oracle: ForwardOracle) {
    let module = oracleModule(depth: oracle.depth)
    #expect(module.router.depth == oracle.depth)
    let mixtures = oracleSamples.map { module.router.mixture($0) }
    for (mixture, expected) in zip(mixtures, oracle.mixtures) {
      for (weight, value) in zip(mixture, expected) { #expect(abs(Double(weight) - value) < 1e-6) }
    }
    let outputs = module(oracleSamples)
    for (value, expected) in zip(outputs[0][row: 0], oracle.first) {
      #expect(abs(Double(value) - expected) < 2e-6)
    }
    let sum = outputs.flatMap(\.elements).reduce(0.0) { $0 + Double($1) }
    #expect(abs(sum - oracle.sum) < 3e-6)

    if let averaged = oracle.averagedMixture {
      for index in 0..<2 {
        let mean = Double(mixtures[0][index] + mixtures[1][index]) / 2
        #expect(abs(mean - averaged[index]) < 1e-6)
      }
    }
    if let expected = oracle.averagedSum {
      let outputs = module(oracleSamples, batchAveraged: true)
      let sum = outputs.flatMap(\.elements).reduce(0.0) { $0 + Double($1) }
      #expect(abs(sum - expected) < 3e-6)
    }
  }

  @Test(arguments: Activation.allCases)
  func `an activation's derivative is its slope`(activation: Activation) {
    for x in stride(from: Float(-4.05), through: 4, by: 0.3) {
      let slope = (activation(x + 1e-2) - activation(x - 1e-2)) / 2e-2
      #expect(abs(slope - activation.derivative(x)) < 3e-4, "at \(x)")
    }
  }

  @Test(
    arguments: [
      (Activation.quickGELU, 0.8457958), (.gelu, 0.8413447), (.geluTanh, 0.8411920), (.relu, 1),
      (.silu, 0.7310586),
    ] as [(Activation, Double)])
  func `activations have their known values at 1`(activation: Activation, value: Double) {
    #expect(abs(Double(activation(1)) - value) < 1e-6)
  }

  @Test(arguments: [0, 1, 2])
  func `a router before calibration is near task arithmetic`(depth: Int) {
    let router = Router.initial(
      depth: depth, width: 64, experts: 3, name: "layers.0.mlp.gate", seed: 11)
    let tokens = matrix(2, 64, filler(3, count: 128))
    for weight in router.mixture(tokens) { #expect(abs(weight - 0.3) < 0.3) }
    let again = Router.initial(
      depth: depth, width: 64, experts: 3, name: "layers.0.mlp.gate", seed: 11)
    #expect(router == again)
    if depth > 0 {
      let other = Router.initial(
        depth: depth, width: 64, experts: 3, name: "layers.1.mlp.gate", seed: 11)
      #expect(router != other)
      let weights = router.tensors[0].values
      let deviation = weights.reduce(0.0) { $0 + Double($1 * $1) } / Double(weights.count)
      #expect(abs(deviation.squareRoot() - 0.01) < 0.002)
    }
  }

  @Test func `a gate's tensors have the names and shapes of its depth`() {
    func shapes(_ depth: Int) -> [String: [Int]] {
      let router = Router.initial(depth: depth, width: 5, experts: 3, name: "gate", seed: 1)
      return Dictionary(uniqueKeysWithValues: router.tensors.map { ($0.name, $0.shape) })
    }
    #expect(shapes(0) == ["weight": [3]])
    #expect(shapes(1) == ["fc.weight": [3, 5], "fc.bias": [3]])
    #expect(
      shapes(2) == [
        "fc1.weight": [5, 5], "fc1.bias": [5], "fc2.weight": [3, 5], "fc2.bias": [3],
      ])
  }
}
