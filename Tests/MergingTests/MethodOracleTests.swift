import Checkpoints
import TestSupport
import Testing

@testable import Merging

/// Merges a single tensor by a method, through the whole engine.
struct SingleTensorMerge {
  var method: String
  var base: [Float]?
  var models: [[Float]]
  var shape: [Int]
  var shared: [String: ParameterValue] = [:]
  var perModel: [String: [Double]] = [:]
  var dtype = DType.f32
  var seed: UInt64 = 0
  var memory = 1 << 26
  var workers = 2
  var chunkSize = MergeRun.standardChunkSize

  func result() throws -> [Float] {
    let method = try #require(MergeMethod[self.method])
    let all = (base.map { [$0] } ?? []) + models
    let sources = try all.map {
      MemorySource([try SmallTensor("layers.0.weight", shape, dtype: dtype, $0)])
    }
    let isDifference =
      switch method.operand {
      case .weights: false
      case .differences: true
      case .differencesIfBased: base != nil
      }
    let own = isDifference ? models.count : all.count
    var setting = TensorSetting(
      name: "layers.0.weight", shape: shape, elementCount: all[0].count, models: own,
      hasDifferences: isDifference, baseRow: base == nil ? nil : 0)
    setting.randomness = .counter(seed: seed)
    for parameter in method.parameters {
      if case .value(let value) = parameter.fallback {
        setting.shared[parameter.name] = value
        setting.perModel[parameter.name] = Array(repeating: value, count: own)
      }
    }
    for (name, value) in shared { setting.shared[name] = value }
    for (name, values) in perModel { setting.perModel[name] = values.map { .number($0) } }
    let tensor = sources[0].manifest.tensors[0]
    let output = try TensorInfo(name: tensor.name, dtype: .f32, shape: shape)
    let sink = MemorySink([output])
    let task = TensorTask(
      output: output,
      work: .merge(
        try method.make(setting), inputs: sources.indices.map { ($0, tensor) },
        differences: isDifference, rounding: nil))
    var run = MergeRun(
      sources: sources, sink: sink, tasks: [task], memory: memory, workers: workers)
    run.chunkSize = chunkSize
    try run.run()
    return sink.floats(of: output)
  }
}

/// The specification's numbers: θ₀ = 0.5·G(0), τ_k = 0.05·G(9) + 0.1·G(k), on [3, 4].
struct MethodOracleTests {
  static let base = filler(0, count: 12).map { 0.5 * $0 }
  static func model(_ k: Int) -> [Float] {
    let (common, own) = (filler(9, count: 12), filler(k, count: 12))
    return (0..<12).map { Float(base[$0] + 0.05 * common[$0] + 0.1 * own[$0]) }
  }

  private func merge(_ method: String, models: ClosedRange<Int> = 1...3) -> SingleTensorMerge {
    SingleTensorMerge(
      method: method, base: Self.base.map { Float($0) }, models: models.map { Self.model($0) },
      shape: [3, 4], perModel: ["weight": models.map { _ in 1 }])
  }

  private func expectClose(_ values: [Float], _ expected: [Float]) {
    #expect(values.count == expected.count)
    for (value, wanted) in zip(values, expected) { #expect(abs(value - wanted) < 1.01e-5) }
  }

  private func minusBase(_ values: [Float]) -> [Float] {
    zip(values, Self.base).map { $0 - Float($1) }
  }

  @Test func `task arithmetic at 0.3`() throws {
    var merge = merge("task_arithmetic")
    merge.shared["lambda"] = .number(0.3)
    expectClose(
      try merge.result(),
      [
        0.01216, 0.33240, 0.50812, 0.23464, -0.27242, -0.46922, -0.34874, -0.01772, 0.41331,
        0.48478, 0.14231, -0.19936,
      ])
  }

  @Test func `TIES keeping half, by sum and by mean`() throws {
    var merge = merge("ties")
    // The reference keeps what is at least the sixth smallest magnitude: 7 of 12.
    merge.perModel["density"] = [0.59, 0.59, 0.59]
    merge.shared["normalize"] = .flag(false)
    expectClose(
      minusBase(try merge.result()),
      [
        0.119, -0.14863, 0.12633, 0.14641, -0.21881, 0.12543, 0.12629, -0.13649, 0, 0.12497,
        -0.22793, 0.06076,
      ])
    merge.shared["normalize"] = .flag(true)
    expectClose(
      minusBase(try merge.result()),
      [
        0.119, -0.14863, 0.12633, 0.0732, -0.1094, 0.06272, 0.12629, -0.13649, 0, 0.12497,
        -0.11397, 0.06076,
      ])
  }

  @Test func `SLERP halfway between two models`() throws {
    var merge = SingleTensorMerge(
      method: "slerp", base: Self.model(1), models: [Self.model(2)], shape: [3, 4])
    merge.shared["t"] = .number(0.5)
    let result = try merge.result()
    expectClose(Array(result[0..<4]), [0.0576, 0.31772, 0.46682, 0.21871])
    expectClose(Array(result[8..<12]), [0.40608, 0.52076, 0.16489, -0.21367])
  }
}
