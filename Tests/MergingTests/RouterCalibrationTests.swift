import Glibc
import Merging
import TestSupport
import Testing

/// Samples around one centre a task, in all `width` directions.
private func samples(
  perTask: Int, width: Int, tasks: Int, noise: Double, seed: UInt64
) throws -> CalibrationSamples {
  let random = CounterRandom(seed: seed, tensor: "samples")
  var elements: [Float] = []
  var labels: [Int] = []
  var index: UInt64 = 1_000_000
  for sample in 0..<perTask * tasks {
    let task = sample % tasks
    labels.append(task)
    for feature in 0..<width {
      let centre = random.normal(at: UInt64(task * width + feature))
      elements.append(Float(3 + centre + noise * random.normal(at: index)))
      index += 1
    }
  }
  return try CalibrationSamples(
    features: Matrix(rowCount: labels.count, columnCount: width, elements: elements),
    tasks: labels, taskCount: tasks)
}

/// The ridge fit with an unpenalised bias, by elimination on the normal equations.
private func bruteForce(_ samples: CalibrationSamples, ridge: Double, without: [Int]) -> [[Double]]
{
  let width = samples.features.columnCount
  let size = width + 1
  var matrix = Array(repeating: Array(repeating: 0.0, count: size + samples.taskCount), count: size)
  for row in 0..<samples.features.rowCount where !without.contains(row) {
    let x = samples.features[row: row].map { Double($0) } + [1]
    for i in 0..<size {
      for j in 0..<size { matrix[i][j] += x[i] * x[j] }
      matrix[i][size + samples.tasks[row]] += x[i]
    }
  }
  for i in 0..<width { matrix[i][i] += ridge }
  for pivot in 0..<size {
    let best = (pivot..<size).max { abs(matrix[$0][pivot]) < abs(matrix[$1][pivot]) }!
    matrix.swapAt(pivot, best)
    for row in 0..<size where row != pivot {
      let factor = matrix[row][pivot] / matrix[pivot][pivot]
      for column in pivot..<matrix[row].count {
        matrix[row][column] -= factor * matrix[pivot][column]
      }
    }
  }
  return (0..<samples.taskCount).map { task in
    (0..<size).map { matrix[$0][size + task] / matrix[$0][$0] }
  }
}

private func predict(_ fit: [[Double]], _ x: ArraySlice<Float>) -> [Double] {
  fit.map { row in zip(row, x).reduce(row.last!) { $0 + $1.0 * Double($1.1) } }
}

@Suite struct `calibrating a router by ridge regression` {
  @Test(arguments: [(perTask: 8, width: 6), (perTask: 4, width: 20)])
  func `leaving out by formula is leaving out by hand`(perTask: Int, width: Int) throws {
    let samples = try samples(perTask: perTask, width: width, tasks: 3, noise: 1, seed: 5)
    let calibration = RouterCalibration(samples)
    var error = 0.0
    var hits = 0
    let count = samples.features.rowCount
    for row in 0..<count {
      let fit = bruteForce(samples, ridge: calibration.ridge, without: [row])
      let weights = predict(fit, samples.features[row: row])
      for (task, weight) in weights.enumerated() {
        let target = task == samples.tasks[row] ? 1.0 : 0
        error += (weight - target) * (weight - target) / Double(count)
      }
      if weights.indices.max(by: { weights[$0] < weights[$1] }) == samples.tasks[row] { hits += 1 }
    }
    #expect(abs(calibration.leaveOneOutError - error) < 1e-8)
    #expect(calibration.leaveOneOutAccuracy == Double(hits) / Double(count))

    let fit = bruteForce(samples, ridge: calibration.ridge, without: [])
    for task in 0..<3 {
      for feature in 0..<width {
        #expect(abs(Double(calibration.gate.weight[task, feature]) - fit[task][feature]) < 1e-6)
      }
      #expect(abs(Double(calibration.gate.bias[task]) - fit[task][width]) < 1e-5)
    }
  }

  @Test func `layers that share a gate leave a sample out of all at once`() throws {
    let layers = try (1...3).map { seed in
      try samples(perTask: 5, width: 7, tasks: 2, noise: 1.5, seed: UInt64(seed))
    }
    let shared = try CalibrationSamples(layers: layers)
    let calibration = RouterCalibration(shared)
    var error = 0.0
    for sample in 0..<10 {
      let rows = (0..<3).map { $0 * 10 + sample }
      let fit = bruteForce(shared, ridge: calibration.ridge, without: rows)
      for row in rows {
        for (task, weight) in predict(fit, shared.features[row: row]).enumerated() {
          let target = task == shared.tasks[row] ? 1.0 : 0
          error += (weight - target) * (weight - target) / 30
        }
      }
    }
    #expect(abs(calibration.leaveOneOutError - error) < 1e-8)
  }

  @Test func `tasks that lie apart are told apart`() throws {
    let samples = try samples(perTask: 32, width: 64, tasks: 4, noise: 0.5, seed: 6)
    let calibration = RouterCalibration(samples)
    #expect(calibration.leaveOneOutAccuracy == 1)
    #expect(calibration.leaveOneOutError < 0.1)
  }

  @Test func `noise without tasks asks for a large ridge and predicts the mean`() throws {
    let random = CounterRandom(seed: 3, tensor: "noise")
    let samples = try CalibrationSamples(
      features: Matrix(
        rowCount: 40, columnCount: 20,
        elements: (0..<800).map { Float(random.normal(at: UInt64($0))) }),
      tasks: (0..<40).map { $0 % 2 }, taskCount: 2)
    let calibration = RouterCalibration(samples)
    #expect(calibration.leaveOneOutError < 0.6)
    #expect(abs(calibration.gate.bias[0] - 0.5) < 0.1)
  }

  @Test(arguments: [1, 2])
  func `a deeper router gives the gate's answers`(depth: Int) throws {
    let samples = try samples(perTask: 8, width: 24, tasks: 3, noise: 1, seed: 9)
    let gate = RouterCalibration(samples).gate
    let largest = samples.features.elements.reduce(0) { max($0, abs($1)) }
    let router = Router(embedding: gate, depth: depth, largestInput: largest)
    let plain = Router.linear(gate)
    #expect(router.depth == depth)
    // Inputs three times as large as any seen are still within the margin.
    for scale in [Float(1), -3] {
      let tokens = Matrix(
        rowCount: samples.features.rowCount, columnCount: 24,
        elements: samples.features.elements.map { $0 * scale })
      for (left, right) in zip(router.mixture(tokens), plain.mixture(tokens)) {
        #expect(abs(left - right) < 1e-5)
      }
    }
  }

  @Test func `bad samples are refused with a sentence`() {
    func problem(_ values: [Float], _ tasks: [Int], _ taskCount: Int = 2) -> String? {
      do {
        _ = try CalibrationSamples(
          features: Matrix(rowCount: values.count, columnCount: 1, elements: values),
          tasks: tasks, taskCount: taskCount)
        return nil
      } catch { return error.description }
    }
    #expect(problem([1, 2], [0, 1]) == nil)
    #expect(problem([1, 2], [0]) == "there are 2 samples, but tasks for 1")
    #expect(problem([1, 2], [0, 2]) == "task 2 is not one of the 2 experts")
    #expect(problem([1, 2], [0, -1]) == "task -1 is not one of the 2 experts")
    #expect(problem([1, 2], [0, 0]) == "task 1 has no samples")
    #expect(problem([1, .nan], [0, 1]) == "sample 1 is not finite")
    #expect(problem([1], [0], 1) == "a fit needs at least two samples of at least one feature")
  }
}
