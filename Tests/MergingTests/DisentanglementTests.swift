import Glibc
import Merging
import TestSupport
import Testing

@testable import struct Merging.CleanedProducts
@testable import struct Merging.Descent

/// The Gram matrix of vectors of Doubles.
private func gram(_ vectors: [[Double]]) -> GramMatrix {
  GramMatrix(
    order: vectors.count,
    elements: vectors.flatMap { left in
      vectors.map { right in zip(left, right).reduce(0) { $0 + $1.0 * $1.1 } }
    })
}

private func isClose(_ a: Double, _ b: Double, relative: Double, absolute: Double = 0) -> Bool {
  abs(a - b) <= max(relative * abs(b), absolute)
}

private func areClose(_ a: [Double], _ b: [Double], _ tolerance: Double) -> Bool {
  a.count == b.count && zip(a, b).allSatisfy { abs($0 - $1) <= tolerance }
}

/// The rows' Gram matrices of the row oracle: k = 3, R = 2, C = 8.
private let rowOracle: [GramMatrix] = {
  let shared = filler(9, count: 16)
  let tasks = (1...3).map { task in
    zip(shared, filler(task, count: 16)).map { 0.01 * (0.8 * $0 + $1) }
  }
  return (0..<2).map { row in gram(tasks.map { Array($0[row * 8..<row * 8 + 8]) }) }
}()

private let vectorOracle: [[Double]] = (1...3).map { task in
  zip(filler(9, count: 12), filler(task, count: 12)).map { 0.8 * $0 + $1 }
}

struct RowOracle: Sendable {
  let steps: Int
  let penalty: Double
  let loss: Double
  let norm: Double
  let coefficients: [Double]
}

@Suite struct `adaptive weight disentanglement` {
  @Test func `the Gram matrices of the row oracle are as published`() {
    let expected: [[Double]] = [
      [6.818098e-4, 5.30315e-5, 1.195833e-4, 7.400629e-4, 6.59148e-5, 6.648105e-4],
      [5.160423e-4, -2.0392e-4, 5.240327e-4, 6.936378e-4, -8.51241e-5, 6.605361e-4],
    ]
    for (gram, values) in zip(rowOracle, expected) {
      let upper = [gram[0, 0], gram[0, 1], gram[0, 2], gram[1, 1], gram[1, 2], gram[2, 2]]
      #expect(areClose(upper, values, 5e-11))
    }
  }

  @Test(arguments: [
    RowOracle(
      steps: 1, penalty: 0, loss: 0.28506894, norm: 0.0002860259,
      coefficients: [0.00420514, 0.00434263, 0.00417076]),
    RowOracle(
      steps: 2, penalty: 0, loss: 0.27687936, norm: 0.0008300638,
      coefficients: [0.01222974, 0.0126256, 0.01213103]),
    RowOracle(
      steps: 2, penalty: 0.05, loss: 0.27687936, norm: 0.0008293582,
      coefficients: [0.01221994, 0.01261549, 0.01212132]),
    RowOracle(
      steps: 10, penalty: 0, loss: 0.21171253, norm: 0.0064864686,
      coefficients: [0.07474562, 0.03466807, 0.09966961]),
    RowOracle(
      steps: 100, penalty: 0, loss: 0.14750485, norm: 0.0139402604,
      coefficients: [0.06286818, -0.0036081, 0.10022065]),
    RowOracle(
      steps: 100, penalty: 0.05, loss: 0.14817990, norm: 0.0135965605,
      coefficients: [0.06735639, -0.00680801, 0.09718022]),
  ])
  func `row scope follows the oracle`(oracle: RowOracle) {
    let method = AdaptiveWeightDisentanglement(
      scope: .row, penalty: .norm(oracle.penalty),
      optimizer: .descent(rate: 1e-5, momentum: 0.9, weightDecay: 1e-4), iterations: oracle.steps,
      epsilon: 1e-8)
    let (solutions, loss, norm) = method.solve(rows: rowOracle)
    #expect(abs(loss - oracle.loss) <= 5.1e-9)
    #expect(abs(norm - oracle.norm) <= 5.1e-11)
    #expect(areClose(solutions[0].coefficients, oracle.coefficients, 5.1e-9))
  }

  @Test func `the whole-vector oracle starts as published`() {
    let gram = gram(vectorOracle)
    #expect(
      areClose(
        [gram[0, 0], gram[0, 1], gram[0, 2], gram[1, 1], gram[1, 2], gram[2, 2]],
        [9.4334508, -0.2113441, 3.88196633, 9.68473928, 0.53028036, 10.07941543], 5.1e-8))
    #expect(abs(gram.meanAbsoluteCosine - 0.1579629050) <= 5.1e-11)
    let step = Descent(order: 3, squared: false, rate: -1).run(gram, iterations: 1)
    #expect(areClose(step.last, [0.015538068, 0.003744308, -0.052981454], 5.1e-10))
    #expect(abs(Descent.slope(gram, squared: false) - 0.1551776236) <= 5.1e-11)
  }

  @Test(
    arguments: [
      (0.0, 10, [-0.00742965, -0.00154797, 0.0268024], 0.07867499, 0.14556070, false),
      (0.0, 50, [-0.02268885, -0.03368955, 0.10331814], nil, 0.11173711, false),
      (0.1, 10, [-0.00319106, -0.00070102, 0.0112909], nil, 0.15278987, false),
      (0.1, 50, [-0.01281417, -0.0016471, 0.05259077], 0.15530568, 0.13306864, false),
      (0.0, 50, [0.03097531, -0.00453243, 0.04511461], nil, 0.03762466, true),
    ] as [(Double, Int, [Double], Double?, Double, Bool)])
  func `whole vectors follow the oracle`(
    alpha: Double, steps: Int, coefficients: [Double], norm: Double?, loss: Double, squared: Bool
  ) {
    let gram = gram(vectorOracle)
    let objective: AdaptiveWeightDisentanglement.Objective = squared ? .squared : .absolute
    let method = AdaptiveWeightDisentanglement(
      scope: .model, objective: objective, penalty: .norm(alpha), optimizer: .descent(rate: 0.05),
      iterations: steps)
    let solution = method.solve(gram)
    #expect(areClose(solution.coefficients, coefficients, 5.1e-9))
    if let norm { #expect(abs(solution.redundantNorm - norm) <= 5.1e-9) }
    let cleaned = CleanedProducts(gram, solution.coefficients)
    #expect(abs(cleaned.loss(objective) - loss) <= 5.1e-9)
  }

  @Test(arguments: [(8, 0.1, 0.0340, 0.126, 0.949), (3, 0.2, 0.0814, 0.167, 0.894)])
  func `vectors of equal norm and cosine become orthogonal where the formula says`(
    k: Int, cosine: Double, coefficient: Double, redundancy: Double, retained: Double
  ) {
    let gram = GramMatrix(
      order: k, elements: (0..<k * k).map { $0 % (k + 1) == 0 ? 4 : 4 * cosine })
    let method = AdaptiveWeightDisentanglement(
      scope: .model, optimizer: .converged, iterations: 5)
    let solution = method.solve(gram)
    let formula = (1 - ((1 - cosine) / (1 + Double(k - 1) * cosine)).squareRoot()) / Double(k)
    #expect(areClose(solution.coefficients, Array(repeating: formula, count: k), 1e-9))
    #expect(abs(formula - coefficient) <= 5.1e-5)
    #expect(abs(solution.report.relativeRedundancy - redundancy) <= 5.1e-4)
    for norm in solution.report.retainedNorms {
      #expect(abs(norm - (1 - cosine).squareRoot()) <= 1e-9)
      #expect(abs(norm - retained) <= 5.1e-4)
    }
    #expect(solution.report.meanCosineAfter < 1e-9)
    #expect(abs(solution.report.meanCosineBefore - cosine) < 1e-12)
  }

  @Test func `two vectors of equal norm end on the sphere between them`() {
    let vectors: [[Double]] = [[3, 1, 0.5, 0], [1, 3, 0, 0.5]]
    let solution = AdaptiveWeightDisentanglement(
      scope: .model, optimizer: .converged, iterations: 8
    ).solve(gram(vectors))
    let middle = zip(vectors[0], vectors[1]).map { ($0 + $1) / 2 }
    let distance = zip(vectors[0], vectors[1]).reduce(0.0) { $0 + pow($1.0 - $1.1, 2) }.squareRoot()
    let norm = middle.reduce(0) { $0 + $1 * $1 }.squareRoot()
    let share = (1 - distance / (2 * norm)) / 2
    #expect(areClose(solution.coefficients, [share, share], 1e-9))
  }

  @Test(arguments: [2, 3, 4, 5, 8, 9, 16, 17, 20, 23])
  func `the descent in k dimensions is the descent of whole vectors`(k: Int) {
    var generator = SeededGenerator(seed: UInt64(k))
    let vectors = (0..<k).map { _ in
      let common = 0.4
      return (0..<24).map {
        common * sin(Double($0)) + Double.random(in: -1...1, using: &generator)
      }
    }
    for (squared, penalty, epsilon) in [(false, 0.0, 0.0), (false, 0.02, 0.3), (true, 0.01, 0)] {
      let steps = 20
      let descent = Descent(
        order: k, squared: squared, epsilon: epsilon, penalty: penalty, rate: 0.02, momentum: 0.5,
        weightDecay: 1e-3)
      let a = descent.run(gram(vectors), iterations: steps).last
      let whole = descendWhole(
        vectors, squared: squared, epsilon: epsilon, penalty: penalty, rate: 0.02, momentum: 0.5,
        weightDecay: 1e-3, steps: steps)
      let combined = combination(vectors, a)
      #expect(areClose(combined, whole, 1e-11), "k = \(k), squared = \(squared)")
    }
  }

  @Test(
    arguments: [
      ("equal", [[1, 2, 3], [1, 2, 3], [1, 2, 3]]),
      ("two equal", [[1, 2, 3], [1, 2, 3], [0, -1, 2]]),
      ("opposite", [[1, 2, 3], [-1, -2, -3]]),
      ("opposite and another", [[1, 2, 3], [-1, -2, -3], [0.5, 0.1, 0]]),
      ("one the sum of the others", [[1, 2, 3], [1, -1, 0.5], [2, 1, 3.5]]),
      ("a zero vector", [[1, 2, 3], [0, 0, 0], [1, 0, 1]]),
      ("all zero", [[0, 0, 0], [0, 0, 0]]),
      ("tiny and huge", [[1e-20, 1e-20, 0], [1e18, 0, 1e18], [0, 1, 1]]),
      ("a single vector", [[1, 2, 3]]),
    ] as [(String, [[Double]])])
  func `degenerate vectors give numbers`(name: String, vectors: [[Double]]) {
    let gram = gram(vectors)
    var method = AdaptiveWeightDisentanglement.model
    for optimizer in [method.optimizer, .descent(rate: 1, momentum: 0.9), .converged] {
      method.optimizer = optimizer
      let solution = method.solve(gram)
      let report = solution.report
      let numbers =
        solution.coefficients + report.retainedNorms + [
          solution.loss, solution.redundantNorm, report.relativeRedundancy,
          report.meanCosineBefore, report.meanCosineAfter, report.thresholds.upperBound,
        ]
      #expect(numbers.allSatisfy { $0.isFinite }, "\(name), \(optimizer): \(numbers)")
    }
  }

  @Test(
    arguments: [
      [[1, 2, 3, 0], [-1, -2, -3, 0], [0.5, 0.1, 0, 1]],
      [[1, 2, 3, 1], [1, 2, 3, 1], [0, -1, 2, 2]],
      [[1, 2, 3, 1], [1, -1, 0.5, 1], [2, 1, 3.5, 2]],
      [[1, 2, 3, 1], [0, 0, 0, 0], [1, 0, 1, 2]],
    ] as [[[Double]]])
  func `dependent vectors take the same path as whole ones`(vectors: [[Double]]) {
    let descent = Descent(
      order: 3, squared: true, penalty: 0.01, rate: 0.5, momentum: 0.9, weightDecay: 1e-3)
    let whole = descendWhole(
      vectors, squared: true, penalty: 0.01, rate: 0.5, momentum: 0.9, weightDecay: 1e-3,
      steps: 100)
    let a = descent.run(gram(vectors), iterations: 100).last
    #expect(areClose(combination(vectors, a), whole, 1e-9))
  }

  @Test func `weights that are not numbers are left as they are`() {
    let gram = GramMatrix(order: 2, elements: [1, .nan, .nan, 2])
    let solution = AdaptiveWeightDisentanglement.row.solve(gram, rowCount: 4)
    #expect(solution.coefficients == [0, 0])
  }

  @Test func `permuting tasks permutes the coefficients`() {
    let order = [2, 0, 1]
    let method = AdaptiveWeightDisentanglement(
      scope: .model, penalty: .norm(0.01), optimizer: .descent(rate: 0.05), iterations: 40)
    let plain = method.solve(gram(vectorOracle)).coefficients
    let permuted = method.solve(gram(order.map { vectorOracle[$0] })).coefficients
    #expect(areClose(permuted, order.map { plain[$0] }, 1e-12))
  }

  @Test func `scaling the vectors, the rate and the penalty scales the redundant vector`() {
    let scale = 7.0
    let method = AdaptiveWeightDisentanglement(
      scope: .model, penalty: .norm(0.05), optimizer: .descent(rate: 0.05), iterations: 30)
    let scaled = AdaptiveWeightDisentanglement(
      scope: .model, penalty: .norm(0.05 / scale),
      optimizer: .descent(rate: 0.05 * scale * scale), iterations: 30)
    let plain = method.solve(gram(vectorOracle))
    let other = scaled.solve(gram(vectorOracle.map { $0.map { $0 * scale } }))
    #expect(areClose(other.coefficients, plain.coefficients, 1e-12))
    #expect(isClose(other.redundantNorm, plain.redundantNorm * scale, relative: 1e-12))
  }

  @Test func `task arithmetic of cleaned vectors is task arithmetic with other weights`() {
    let a = AdaptiveWeightDisentanglement.model.solve(gram(vectorOracle)).coefficients
    let delta = combination(vectorOracle, a)
    let weights = a.map { 0.3 * (1 - 3 * $0) }
    let cleaned = vectorOracle.map { zip($0, delta).map { $0 - $1 } }
    #expect(
      areClose(
        combination(cleaned, [0.3, 0.3, 0.3]), combination(vectorOracle, weights), 1e-12))
  }

  @Test func `a penalty at the threshold is reported as idle`() {
    let gram = gram(vectorOracle)
    var method = AdaptiveWeightDisentanglement.model
    method.penalty = .norm(0.1551)
    #expect(method.solve(gram).report.idleGroups == 0)
    method.penalty = .norm(0.1552)
    #expect(method.solve(gram).report.idleGroups == 1)
  }

  @Test func `the gradient is the slope of the loss`() {
    let vectors = vectorOracle
    let delta = combination(vectors, [0.05, 0.1, -0.02])
    for (squared, epsilon) in [(false, 0.0), (true, 0), (false, 0.2)] {
      let gradient = wholeGradient(vectors, delta, squared: squared, epsilon: epsilon)
      for index in delta.indices {
        let step = 1e-6
        var (above, below) = (delta, delta)
        above[index] += step
        below[index] -= step
        let slope =
          (wholeLoss(vectors, above, squared: squared, epsilon: epsilon)
            - wholeLoss(vectors, below, squared: squared, epsilon: epsilon)) / (2 * step)
        #expect(abs(slope - gradient[index]) <= 1e-8)
      }
    }
  }

  @Test func `reports of groups add up`() {
    let method = AdaptiveWeightDisentanglement.row
    let reports = method.solve(rows: rowOracle).solutions.map(\.report)
    var sum = reports[0]
    sum += reports[1]
    #expect(sum.groups == 2)
    #expect(
      isClose(
        sum.meanCosineBefore,
        (reports[0].meanCosineBefore + reports[1].meanCosineBefore) / 2, relative: 1e-14))
    #expect(sum.thresholds.upperBound >= reports[1].thresholds.upperBound)
  }
}

// The plain way: all vectors in memory, the gradient with respect to δ itself.

private func combination(_ vectors: [[Double]], _ coefficients: [Double]) -> [Double] {
  vectors[0].indices.map { i in
    zip(vectors, coefficients).reduce(0) { $0 + $1.0[i] * $1.1 }
  }
}

private func dot(_ a: [Double], _ b: [Double]) -> Double {
  zip(a, b).reduce(0) { $0 + $1.0 * $1.1 }
}

private func cleaned(_ vectors: [[Double]], _ delta: [Double]) -> [[Double]] {
  // A zero task vector stays zero: it has nothing to clean.
  vectors.map { vector in
    dot(vector, vector) > 0 ? zip(vector, delta).map { $0 - $1 } : vector
  }
}

private func wholeLoss(
  _ vectors: [[Double]], _ delta: [Double], squared: Bool, epsilon: Double
) -> Double {
  let v = cleaned(vectors, delta)
  var sum = 0.0
  for i in v.indices {
    for j in v.indices where j != i {
      let (ni, nj) = (dot(v[i], v[i]).squareRoot(), dot(v[j], v[j]).squareRoot())
      let cosine = dot(v[i], v[j]) / ((ni + epsilon) * (nj + epsilon))
      sum += squared ? cosine * cosine : abs(cosine)
    }
  }
  return sum / Double(v.count * (v.count - 1))
}

private func wholeGradient(
  _ vectors: [[Double]], _ delta: [Double], squared: Bool, epsilon: Double
) -> [Double] {
  let v = cleaned(vectors, delta)
  let norms = v.map { dot($0, $0).squareRoot() }
  var gradient = delta.map { _ in 0.0 }
  for i in v.indices where norms[i] > 1e-12 {
    for j in v.indices where j != i && norms[j] > 1e-12 {
      let (ri, rj) = (1 / (norms[i] + epsilon), 1 / (norms[j] + epsilon))
      let cosine = dot(v[i], v[j]) * ri * rj
      let slope = squared ? 2 * cosine : cosine > 0 ? 1 : cosine < 0 ? -1 : 0
      let weight = slope / Double(v.count * (v.count - 1))
      // d cos/dδ = −(∂cos/∂vᵢ + ∂cos/∂vⱼ).
      let byI = cosine * ri / norms[i] - ri * rj
      let byJ = cosine * rj / norms[j] - ri * rj
      for e in gradient.indices { gradient[e] += weight * (byI * v[i][e] + byJ * v[j][e]) }
    }
  }
  return gradient
}

private func descendWhole(
  _ vectors: [[Double]], squared: Bool, epsilon: Double = 0, penalty: Double, rate: Double,
  momentum: Double, weightDecay: Double, steps: Int
) -> [Double] {
  var delta = vectors[0].map { _ in 0.0 }
  var velocity = delta
  for _ in 0..<steps {
    let norm = dot(delta, delta).squareRoot()
    let gradient = wholeGradient(vectors, delta, squared: squared, epsilon: epsilon)
    for e in delta.indices {
      let pull = weightDecay * delta[e] + (norm > 0 ? penalty * delta[e] / norm : 0)
      velocity[e] = momentum * velocity[e] + gradient[e] + pull
    }
    for e in delta.indices { delta[e] -= rate * velocity[e] }
  }
  return delta
}
