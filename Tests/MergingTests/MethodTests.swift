import Checkpoints
import TestSupport
import Testing

@testable import Merging

/// Every method against a plain computation of its formula, and all against themselves under
/// other budgets and numbers of workers.
struct MethodTests {
  /// Base and models of random values, from a seed that a failure prints.
  static func values(_ count: Int, models: Int, seed: UInt64, steps: Float = 0) -> [[Float]] {
    var generator = SeededGenerator(seed: seed)
    func random() -> Float {
      let value = Float.random(in: -1...1, using: &generator)
      // Coarse steps make many equal magnitudes.
      return steps == 0 ? value : (value * steps).rounded() / steps
    }
    let base = (0..<count).map { _ in random() }
    return [base] + (0..<models).map { _ in base.map { $0 + 0.1 * random() } }
  }

  private func merge(
    _ method: String, _ values: [[Float]], shape: [Int], weights: [Double] = [0.5, 0.3, 0.7]
  ) -> SingleTensorMerge {
    SingleTensorMerge(
      method: method, base: values[0], models: Array(values[1...]), shape: shape,
      perModel: ["weight": Array(weights.prefix(values.count - 1))])
  }

  @Test func `linear accumulates fused products in order and divides once`() throws {
    let values = Self.values(1000, models: 2, seed: 1)
    var merge = SingleTensorMerge(
      method: "linear", base: nil, models: values, shape: [1000],
      perModel: ["weight": [0.5, 0.3, 0.7]])
    func expected(divisor: Float) -> [Float] {
      (0..<1000).map { i in
        var sum: Float = 0
        for (model, weight) in [Float(0.5), 0.3, 0.7].enumerated() {
          sum = sum.addingProduct(values[model][i], weight)
        }
        return sum / divisor
      }
    }
    #expect(try merge.result() == expected(divisor: Float(0.5) + 0.3 + 0.7))
    merge.shared["normalize"] = .flag(false)
    #expect(try merge.result() == expected(divisor: 1))
  }

  /// The elements of `values` kept by rank, lowest index first among equals.
  private func band(_ values: [Float], keeping kept: Range<Int>) -> [Float] {
    // Rank from the smallest; at both ends a tie with a lower index is kept first.
    let magnitudes = values.map { abs($0) }
    let sorted = magnitudes.sorted()
    guard !kept.isEmpty else { return values.map { _ in 0 } }
    let (low, high) = (sorted[kept.lowerBound], sorted[kept.upperBound - 1])
    let lowKept = sorted[kept].filter { $0 == low }.count
    let highKept = sorted[kept].filter { $0 == high }.count
    var (lows, highs) = (0, 0)
    return values.indices.map { i in
      let m = magnitudes[i]
      if m == low {
        lows += 1
        return lows <= lowKept ? values[i] : 0
      }
      if m == high {
        highs += 1
        return highs <= highKept ? values[i] : 0
      }
      return m > low && m < high ? values[i] : 0
    }
  }

  private func consensus(_ deltas: [[Float]], _ weights: [Float], normalize: Bool) -> [Float] {
    deltas[0].indices.map { i in
      let weighted = deltas.indices.map { deltas[$0][i] * weights[$0] }
      let total = weighted.reduce(0, +)
      var (sum, divisor): (Float, Float) = (0, 0)
      for (value, weight) in zip(weighted, weights) where total >= 0 ? value > 0 : value < 0 {
        sum += value
        divisor += weight
      }
      return normalize ? sum / (divisor == 0 ? 1 : divisor) : sum
    }
  }

  /// Steps of 0, 64 and 4: no ties, many, and hardly anything else.
  @Test(arguments: [0, 64, 4] as [Float], [0.001, 0.2, 0.5, 0.9])
  func `TIES keeps exactly the largest, lowest index first`(steps: Float, density: Double) throws {
    let count = 34_000
    let values = Self.values(count, models: 3, seed: 7, steps: steps)
    var merge = merge("ties", values, shape: [100, 340])
    merge.perModel["density"] = [density, density, 1]
    let kept = max(1, Int(density * Double(count)))
    let deltas = values[1...].enumerated().map { index, model in
      let delta = zip(model, values[0]).map { $0 - $1 }
      return index == 2 ? delta : band(delta, keeping: count - kept..<count)
    }
    let expected = zip(values[0], consensus(deltas, [0.5, 0.3, 0.7], normalize: true)).map(+)
    #expect(try merge.result() == expected)
  }

  @Test(arguments: [0, 64, 4] as [Float], [(0.5, 0.1), (0.9, 0.2), (0.3, 0.0)])
  func `breadcrumbs drops both ends exactly`(steps: Float, setting: (Double, Double)) throws {
    let (density, gamma) = setting
    let count = 34_000
    let values = Self.values(count, models: 2, seed: 8, steps: steps)
    var merge = merge("breadcrumbs", values, shape: [count])
    merge.perModel["density"] = [density, density]
    merge.perModel["gamma"] = [gamma, gamma]
    let kept = Int(density * Double(count))
    let bottom = max(0, count - kept - Int(gamma * Double(count)))
    let deltas = values[1...].map { model in
      band(zip(model, values[0]).map { $0 - $1 }, keeping: bottom..<bottom + kept)
    }
    let expected = (0..<count).map {
      values[0][$0] + (deltas[0][$0] * 0.5 + deltas[1][$0] * 0.3)
    }
    #expect(try merge.result() == expected)
  }

  @Test(arguments: [0.1, 0.5, 0.9])
  func `DARE keeps its share and the sum of magnitudes`(density: Double) throws {
    let count = 50_000
    let values = Self.values(count, models: 1, seed: 9)
    var merge = merge("dare_linear", values, shape: [count], weights: [1])
    merge.perModel["density"] = [density]
    let delta = zip(values[1], values[0]).map { $0 - $1 }
    merge.base = values[0].map { _ in 0 }
    merge.models = [delta]
    let result = try merge.result()
    let kept = Double(result.count { $0 != 0 }) / Double(count)
    // Five standard deviations.
    #expect(abs(kept - density) < 5 * (density * (1 - density) / Double(count)).squareRoot())
    let (before, after) = (sumOfMagnitudes(delta.span), sumOfMagnitudes(result.span))
    #expect(abs(after / before - 1) < 1e-5)
  }

  @Test func `DELLA keeps larger changes more often`() throws {
    let count = 1 << 16
    let delta = (0..<count).map { Float($0 % 512 + 1) / 512 }
    var merge = SingleTensorMerge(
      method: "della_linear", base: delta.map { _ in 0 }, models: [delta], shape: [128, 512],
      perModel: ["weight": [1], "density": [0.5], "epsilon": [0.2]])
    merge.shared["rescale"] = .flag(false)
    let result = try merge.result()
    func share(_ columns: Range<Int>) -> Double {
      let kept = (0..<count).count { columns.contains($0 % 512) && result[$0] != 0 }
      return Double(kept) / Double(128 * columns.count)
    }
    #expect(abs(share(0..<512) - 0.5) < 0.02)
    #expect(abs(share(0..<64) - (0.3 + 0.4 * 31.5 / 511)) < 0.04)
    #expect(abs(share(448..<512) - (0.7 - 0.4 * 31.5 / 511)) < 0.04)
  }

  /// Equal magnitudes, and a row of one element.
  @Test(arguments: [1, 2, 300], [0, 8] as [Float])
  func `DELLA draws by the rank in the row, lowest index first`(length: Int, steps: Float) throws {
    let count = length * 7
    let delta = Self.values(count, models: 0, seed: 21, steps: steps)[0]
    var merge = SingleTensorMerge(
      method: "della_linear", base: delta.map { _ in 0 }, models: [delta], shape: [7, length],
      perModel: ["weight": [1], "density": [0.5], "epsilon": [0.3]])
    merge.shared["rescale"] = .flag(false)
    let random = CounterRandom(seed: 0, tensor: "layers.0.weight")
    var expected = delta
    for start in stride(from: 0, to: count, by: length) {
      let row = start..<start + length
      for (rank, i) in row.sorted(by: { (abs(delta[$0]), $0) < (abs(delta[$1]), $1) }).enumerated()
      {
        let probability =
          length == 1 ? 0.5 : Float(0.5 - 0.3) + Float(rank) / Float(length - 1) * 2 * Float(0.3)
        let uniform = Float(random.word(ofElement: i) >> 8) * 0x1p-24
        if uniform >= probability { expected[i] = 0 }
      }
    }
    #expect(try merge.result() == expected)
  }

  @Test(arguments: [1, 15, 16, 17, 40])
  func `an election and a weighted sum of any width`(count: Int) throws {
    let values = Self.values(count, models: 3, seed: 22, steps: 4)
    let deltas = values[1...].map { zip($0, values[0]).map { $0 - $1 } }
    let weights: [Float] = [0.5, 0.3, 0.7]
    let elected = merge("ties", values, shape: [count])
    #expect(
      try elected.result()
        == zip(values[0], consensus(deltas, weights, normalize: true)).map(+))
    let summed = merge("task_arithmetic", values, shape: [count])
    #expect(
      try summed.result()
        == (0..<count).map { i in
          values[0][i] + (0..<3).reduce(Float(0)) { $0 + deltas[$1][i] * weights[$1] }
        })
  }

  @Test func `DELLA refuses probabilities beyond 0 and 1`() throws {
    let values = Self.values(4, models: 1, seed: 1)
    var merge = merge("della", values, shape: [4], weights: [1])
    merge.perModel["density"] = [0.9]
    #expect(
      throws: MergeError(
        "density 0.9 and epsilon 0.15 give probabilities beyond 0 or 1",
        remedy:
          "choose them so that density − epsilon is above 0 and density + epsilon below 1")
    ) { try merge.result() }
  }

  @Test func `SCE selects by variance, weighs by squares and erases minorities`() throws {
    let count = 5000
    let values = Self.values(count, models: 3, seed: 11)
    var merge = merge("sce", values, shape: [count])
    merge.shared["select_topk"] = .number(0.25)
    var deltas = values[1...].map { zip($0, values[0]).map { $0 - $1 } }
    let variances = (0..<count).map { i -> Float in
      let mean = (deltas[0][i] + deltas[1][i] + deltas[2][i]) / 3
      return deltas.reduce(0) { $0 + ($1[i] - mean) * ($1[i] - mean) } / 3
    }
    let selected = Set(variances.indices.sorted { variances[$0] > variances[$1] }.prefix(1250))
    for m in 0..<3 { for i in 0..<count where !selected.contains(i) { deltas[m][i] = 0 } }
    let squares = deltas.map { $0.reduce(0.0) { $0 + Double($1 * $1) } }
    let weights = squares.map { $0 / squares.reduce(0, +) }
    let result = try merge.result()
    for i in 0..<count {
      let total = deltas.reduce(0) { $0 + $1[i] }
      var (sum, divisor) = (0.0, 0.0)
      for (delta, weight) in zip(deltas, weights)
      where total >= 0 ? delta[i] > 0 : delta[i] < 0 {
        sum += Double(delta[i]) * weight
        divisor += weight
      }
      let expected = Double(values[0][i]) + sum / max(divisor, 1e-6)
      #expect(abs(Double(result[i]) - expected) < 1e-6)
    }
  }

  @Test func `model stock follows the mean cosine, per tensor and per row`() throws {
    let values = Self.values(600, models: 3, seed: 12)
    var merge = merge("model_stock", values, shape: [20, 30])
    for isRowWise in [false, true] {
      merge.shared["filter_wise"] = .flag(isRowWise)
      let result = try merge.result()
      let length = isRowWise ? 30 : 600
      for start in stride(from: 0, to: 600, by: length) {
        let row = start..<start + length
        let deltas = values[1...].map { model in row.map { Double(model[$0] - values[0][$0]) } }
        func dot(_ a: [Double], _ b: [Double]) -> Double {
          zip(a, b).reduce(0) { $0 + $1.0 * $1.1 }
        }
        func cosine(_ i: Int, _ j: Int) -> Double {
          dot(deltas[i], deltas[j])
            / (dot(deltas[i], deltas[i]) * dot(deltas[j], deltas[j])).squareRoot()
        }
        let c = (cosine(0, 1) + cosine(0, 2) + cosine(1, 2)) / 3
        let t = 3 * c / (1 + 2 * c)
        for i in row {
          let mean = Double(values[1][i] + values[2][i] + values[3][i]) / 3
          #expect(abs(Double(result[i]) - (t * mean + (1 - t) * Double(values[0][i]))) < 1e-6)
        }
      }
    }
  }

  @Test func `RAM keeps what one model changed and averages what several did`() throws {
    var merge = SingleTensorMerge(
      method: "ram", base: [1, 1, 1, 1],
      models: [[1.5, 1.5, 1, 1], [1, 2, 1, 1.000001], [1, 1, 4, 1]], shape: [4])
    #expect(try merge.result() == [1.5, 1.75, 4, 1])
    merge.method = "ramplus_tl"
    // Model 0 changed one alone and one shared: 1 + 0.1·min(0.2, 1) = 1.02; model 2 none shared.
    #expect(try merge.result() == [1 + 0.5 * 1.02, 1.75, 4, 1])
  }

  @Test func `nearswap takes what is near`() throws {
    var merge = SingleTensorMerge(
      method: "nearswap", base: [0, 0, 1], models: [[0.5, 2, 1]], shape: [3])
    merge.shared["t"] = .number(1)
    #expect(try merge.result() == [0.5, 1, 1])
  }

  @Test func `an interpolation of a model with itself is the model`() throws {
    let values = Self.values(3000, models: 0, seed: 13)[0]
    for method in ["slerp", "nuslerp", "karcher", "multislerp"] {
      var merge = SingleTensorMerge(
        method: method, base: method == "slerp" ? values : nil,
        models: method == "slerp" ? [values] : [values, values], shape: [3000],
        perModel: ["weight": [0.4, 0.6]])
      merge.shared["t"] = .number(0.3)
      for (value, expected) in zip(try merge.result(), values) {
        #expect(abs(value - expected) < 3e-7, "\(method)")
      }
    }
  }

  @Test(arguments: MergeMethod.all.map { $0.name })
  func `what is zero in every model stays zero`(name: String) throws {
    let method = MergeMethod[name]!
    let zeros = [Float](repeating: 0, count: 40)
    for hasBase in [true, false] where hasBase || method.base == .optional {
      guard name != "passthrough" || !hasBase else { continue }
      let others = method.models.upperBound <= 2 ? 1 : name == "nuslerp" ? 2 : 3
      var merge = SingleTensorMerge(
        method: name, base: hasBase ? zeros : nil, models: Array(repeating: zeros, count: others),
        shape: [5, 8])
      merge.shared["t"] = .number(0.4)
      merge.shared["select_topk"] = .number(0.3)
      merge.perModel["weight"] = (0...others).map { 0.5 + Double($0) }
      if method.operand != .weights || !hasBase { merge.perModel["weight"]!.removeLast() }
      merge.perModel["density"] = Array(repeating: 0.4, count: others)
      #expect(try merge.result() == zeros, "base: \(hasBase)")
    }
  }

  @Test func `a NaN stays where it is`() throws {
    var values = Self.values(100, models: 2, seed: 14)
    values[1][3] = .nan
    for method in ["task_arithmetic", "ties", "breadcrumbs", "linear"] {
      var merge = merge(method, values, shape: [100])
      merge.perModel["weight"] = Array(repeating: 1, count: method == "linear" ? 3 : 2)
      let result = try merge.result()
      #expect(result.filter { $0.isNaN }.count <= 1, "\(method)")
      #expect(result.indices.allSatisfy { $0 == 3 || result[$0].isFinite }, "\(method)")
    }
  }

  /// Tensors of three chunks, budgets that make windows of a tile, parts and wholes, and a budget
  /// that keeps the whole tensor in memory.
  @Test(arguments: MergeMethod.all.map { $0.name })
  func `budget and workers do not change a bit`(method: String) throws {
    let shape = [70, 997]
    let count = shape[0] * shape[1]
    let models = MergeMethod[method]!.models.upperBound <= 2 ? 1 : 2
    var values = Self.values(count, models: models, seed: 15, steps: 256)
    let isSingle = method == "passthrough"
    if isSingle { values = [values[0]] }
    var merge = SingleTensorMerge(
      method: method, base: isSingle || method == "nuslerp" ? nil : values[0],
      models: isSingle ? values : method == "nuslerp" ? values : Array(values[1...]), shape: shape,
      dtype: .bf16)
    if method == "nuslerp" { merge.models = Array(values.prefix(2)) }
    if method == "model_stock" { merge.models.append(values[1].map { $0 * 1.125 }) }
    let rowsOfModels = merge.models.count + (method == "linear" || method == "karcher" ? 1 : 0)
    merge.shared["t"] = .number(0.4)
    merge.shared["select_topk"] = .number(0.3)
    merge.perModel["weight"] = (0..<rowsOfModels).map { 0.5 + 0.25 * Double($0) }
    merge.perModel["density"] = merge.models.map { _ in 0.4 }
    merge.perModel["scale"] = [0.75]
    merge.chunkSize = 33_000
    merge.memory = 1 << 30
    merge.workers = 1
    let expected = try merge.result()
    #expect(expected.contains { $0 != values[0][0] })
    for (memory, workers) in [(1 << 30, 2), (100_000, 1), (200_000, 3), (700_001, 2)] {
      merge.memory = memory
      merge.workers = workers
      let result = try merge.result()
      #expect(
        result.map { $0.bitPattern } == expected.map { $0.bitPattern },
        "memory \(memory), workers \(workers)")
    }
  }
}
