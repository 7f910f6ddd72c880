import Checkpoints
import TestSupport
import Testing

@testable import Merging

/// Pruned and coded task vectors, shared gates, and the way back.
@Suite struct `efficient mixtures` {
  let small: SmallFamily
  static let mlp = SmallFamily.mlp

  init() throws { small = try SmallFamily(SmallFamily.clip) }

  private func options(
    _ storage: TaskVectorStorage = .dense, prune: Double? = nil
  ) -> Upscaling.Options {
    var options = Upscaling.Options()
    options.storage = storage
    options.pruning = prune
    return options
  }

  private func vector(_ mixture: any TensorSource, _ expert: Int, _ key: String) throws -> [Float] {
    try Mixture(mixture).decoded.floats(of: "\(Self.mlp).task_vectors.\(expert).\(key)")
  }

  @Test(arguments: [
    (0.9, [9]), (0.85, [8, 9]), (0.5, [5, 6, 7, 8, 9]), (1.0, []),
  ])
  func `pruning follows the oracle`(ratio: Double, kept: [Int]) throws {
    let values: [Float] = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0]
    let small = try SmallFamily([
      ("encoder.layers.0.mlp.fc1.weight", [2, 5]), ("encoder.layers.0.mlp.fc2.weight", [5, 2]),
    ])
    func model(_ values: [Float]) throws -> [SmallTensor] {
      try small.shapes.map { try SmallTensor($0.name, $0.shape, values) }
    }
    let family = try ModelFamily(
      base: small.open(0) { _ in try model(Array(repeating: 0, count: 10)) },
      experts: [.init(name: "e", source: small.open(1) { _ in try model(values) })])
    let mixture = try small.upscale(family, options(prune: ratio))
    let expected = values.indices.map { kept.contains($0) ? values[$0] : 0 }
    #expect(
      try mixture.floats(of: "encoder.layers.0.mlp.task_vectors.0.fc1.weight") == expected)
    let description = try #require(try MixtureDescription(of: mixture).pruning)
    #expect(description.ratio == ratio)
    func norm(_ values: [Float]) -> Double {
      values.reduce(0) { $0 + Double($1) * Double($1) }.squareRoot()
    }
    let error = norm(zip(values, expected).map { $0 - $1 }) / norm(values)
    #expect(abs(description.errors[0] - error) < 1e-7)
  }

  @Test func `what is not finite cannot be pruned, and is kept sparse as it is`() throws {
    let small = try SmallFamily(SmallFamily.clip)
    let name = "\(SmallFamily.mlp).fc1.weight"
    let expert = try small.open(1) { tensors in
      try tensors.map { tensor in
        var values = tensor.values
        if tensor.info.name == name { values[3] = .nan }
        return try SmallTensor(tensor.info.name, tensor.info.shape, dtype: .f32, values)
      }
    }
    let family = try ModelFamily(
      base: small.open(0), experts: [.init(name: "a", source: expert)])
    #expect(
      throws: CheckpointError(
        file: expert.path, tensor: name,
        "has differences to the base that are not finite, which have no magnitude to prune by",
        remedy: "leave out --prune: such a vector can only be stored dense or sparse")
    ) { try small.upscale(family, options(prune: 0.5)) }
    let sparse = try Mixture(small.upscale(family, options(.sparse))).decoded
    #expect(try sparse.floats(of: "\(SmallFamily.mlp).task_vectors.0.fc1.weight")[3].isNaN)
  }

  @Test(arguments: [
    (
      TaskVectorStorage.int8, 4 * 6 + 4 * 6 + 6 + 4 + (6 + 4),
      24 + 24 + 4 * (6 + 4) + 4 * 10 + 2 * 4
    ),
    (.lowRank(1), (6 + 4) + (4 + 6) + 6 + 4, 4 * (10 + 10 + 10) + 2 * 4),
  ])
  func `a plan counts what will be stored`(
    storage: TaskVectorStorage, numbers: Int, bytes: Int
  ) throws {
    let small = try SmallFamily(SmallFamily.clip)
    let upscaling = try Upscaling(small.family(experts: 2), options(storage))
    let cost = upscaling.cost(memory: 0, workers: 1, withTaskVectors: false)
    let dense = 2 * (24 + 24 + 6 + 4)
    #expect(cost.denseVectorBytes == 4 * dense)
    #expect(cost.parameters - cost.stored == dense - 2 * numbers)
    #expect(cost.taskVectorBytes == 2 * bytes)
  }

  @Test func `sparse and dense storage hold the same pruned vectors`() throws {
    let family = try small.family(experts: 3, base: .bf16)
    let dense = try small.upscale(family, options(prune: 0.7), name: "dense")
    let sparse = try small.upscale(family, options(.sparse, prune: 0.7), name: "sparse")
    for key in ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"] {
      for expert in 0..<3 {
        let name = "\(Self.mlp).task_vectors.\(expert).\(key)"
        #expect(try dense.floats(of: name) == vector(sparse, expert, key))
        #expect(sparse.manifest[name] == nil)
        let kept = try dense.floats(of: name).count { $0 != 0 }
        #expect(sparse.manifest["\(name)#values"]?.shape == [kept])
      }
    }
    #expect(
      try MixtureDescription(of: dense).pruning == MixtureDescription(of: sparse).pruning)
    let unpruned = try small.upscale(family, options(.sparse), name: "unpruned")
    let plain = try small.upscale(family, options(), name: "plain")
    #expect(
      try vector(unpruned, 1, "fc1.weight")
        == plain.floats(of: "\(Self.mlp).task_vectors.1.fc1.weight"))
  }

  @Test(arguments: [
    (TaskVectorStorage.int8, 0.01), (.int4, 0.15), (.lowRank(1), 0.95), (.lowRank(2), 0.9),
  ])
  func `the error that is stored is the error that there is`(
    storage: TaskVectorStorage, limit: Double
  ) throws {
    let family = try small.family(experts: 2)
    for prune in [nil, 0.3] {
      let coded = try small.upscale(family, options(storage, prune: prune), name: "coded")
      let dense = try small.upscale(family, options(), name: "dense")
      for expert in 0..<2 {
        for key in ["fc1.weight", "fc2.weight"] {
          let name = "\(Self.mlp).task_vectors.\(expert).\(key)"
          let (own, found) = (
            try dense.floats(of: name), try vector(coded, expert, key)
          )
          let isCoded = coded.manifest[name] == nil
          #expect(isCoded == (storage != .lowRank(4)))
          var distance = CodingDistance()
          distance.add(own.span, found.span)
          let error = try coded.floats(of: "\(name)#error")[0]
          #expect(abs(distance.relative - Double(error)) < 1e-5)
          if prune == nil { #expect(distance.relative < limit) }
        }
        // Biases stay as they are, pruned or not.
        #expect(coded.manifest["\(Self.mlp).task_vectors.\(expert).fc1.bias"] != nil)
      }
    }
  }

  @Test func `factors that would be larger than the matrix are not made`() throws {
    let mixture = try small.upscale(small.family(), options(.lowRank(3)))
    #expect(mixture.manifest["\(Self.mlp).task_vectors.0.fc1.weight"] != nil)
  }

  @Test(arguments: [
    TaskVectorStorage.dense, .sparse, .int8, .int4, .lowRank(2),
  ])
  func `workers and memory do not change a byte of an efficient mixture`(
    storage: TaskVectorStorage
  ) throws {
    let family = try small.family(experts: 3, base: .bf16)
    var options = options(storage, prune: 0.5)
    options.cleaning = .row
    let reference = try small.upscale(
      family, options, name: "reference", memory: 1 << 24, workers: 1)
    for (memory, workers) in [(1 << 20, 3), (20000, 1), (20000, 2)] {
      let other = try small.upscale(
        family, options, name: "other", memory: memory, workers: workers)
      #expect(reference.manifest.metadata == other.manifest.metadata)
      for tensor in reference.manifest.tensors {
        #expect(try reference.bytes(of: tensor) == other.bytes(of: tensor), "\(tensor.name)")
      }
    }
  }

  @Test func `a shared gate is stored once, or for every layer if so asked`() throws {
    let small = try SmallFamily(
      (0..<2).flatMap { layer in
        SmallFamily.clip.map { ($0.name.replacing(".0.", with: ".\(layer).") + "", $0.shape) }
          .filter { $0.0.contains("mlp") }
      })
    let family = try small.family()
    let second = "model.encoder.layers.1.mlp.gate"
    let first = "model.encoder.layers.0.mlp.gate"
    var options = Upscaling.Options()
    options.gates = .shared
    let shared = try small.upscale(family, options, name: "shared")
    #expect(shared.manifest["\(second).fc1.weight"] == nil)
    let description = try MixtureDescription(of: shared)
    #expect(description.aliases == [second: first])
    #expect(description.modules.map { $0.gate } == [first, first])
    options.gates = .duplicated
    let copies = try small.upscale(family, options, name: "copies")
    for tensor in ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"] {
      let values = try copies.floats(of: "\(first).\(tensor)")
      #expect(try copies.floats(of: "\(second).\(tensor)") == values)
      #expect(try shared.floats(of: "\(first).\(tensor)") == values)
    }
    options.gates = .own
    let own = try small.upscale(family, options, name: "own")
    #expect(
      try own.floats(of: "\(first).fc1.weight") != own.floats(of: "\(second).fc1.weight"))
  }

  @Test(arguments: [0, 1, 2])
  func `routers are written as they are initialised`(depth: Int) throws {
    var options = Upscaling.Options()
    options.routerDepth = depth
    options.seed = 5
    let mixture = try small.upscale(small.family(), options)
    let gate = "\(Self.mlp).gate"
    let router = Router.initial(depth: depth, width: 4, experts: 2, name: gate, seed: 5)
    #expect(try Router(of: mixture, gate: gate, depth: depth) == router)
  }

  @Test func `a budget without room for a matrix is refused with both numbers`() throws {
    #expect {
      try small.upscale(small.family(), options(.lowRank(2)), memory: 1000, workers: 1)
    } throws: { error in
      let text = "\(error)"
      return text.contains("for its singular values; the budget is 1000")
    }
  }

  @Test func `collapsing with weights adds the task vectors up`() throws {
    let family = try small.family(experts: 2)
    let mixture = try small.upscale(family, options(.int8))
    let plain = try small.collapse(mixture, .given([0.5, -1]))
    let name = "\(Self.mlp).fc2.weight"
    let base = try family.base.floats(of: name)
    let vectors = try (0..<2).map { try vector(mixture, $0, "fc2.weight") }
    for (i, value) in try plain.floats(of: name).enumerated() {
      #expect(value == base[i] + 0.5 * vectors[0][i] + -1 * vectors[1][i])
    }
    #expect(plain.manifest.metadata["wemoe"] == nil)
  }

  @Test func `collapsing for activations takes the routers' mean`() throws {
    let mixture = try small.upscale(small.family(), options())
    let inputs = filler(6, count: 24).map { Float($0) }
    let activations = try Checkpoint.open(
      Checkpoint.write(
        [SmallTensor(Self.mlp, [3, 2, 4], inputs)], to: small.folder("activations.safetensors")))
    let collapse = try Collapse(Mixture(mixture), .activations(activations))
    let router = try Router(of: mixture, gate: "\(Self.mlp).gate", depth: 2)
    let expected = router.mixture(Matrix(rowCount: 6, columnCount: 4, elements: inputs))
    for (weight, own) in zip(try collapse.moduleWeights()[0].weights, expected) {
      #expect(abs(weight - own) < 1e-6)
    }
  }

  @Test func `weights that do not fit the experts are refused`() throws {
    let mixture = try Mixture(small.upscale(small.family(), options()))
    #expect(throws: MergeError.self) { try Collapse(mixture, .given([1])) }
    #expect(
      throws: MergeError(
        "\(mixture.source.path) has no expert \"other\"",
        remedy: "it has \"expert1\", \"expert2\"")
    ) { try Collapse(mixture, .expert("other")) }
  }

  @Test func `a bitmap that does not fit its values is refused by name`() throws {
    let mixture = try small.upscale(small.family(), options(.sparse, prune: 0.5))
    let name = "\(Self.mlp).task_vectors.0.fc1.weight#bitmap"
    let damaged = Damaged(source: mixture, tensor: name)
    #expect {
      try Mixture(damaged).decoded.floats(of: "\(Self.mlp).task_vectors.0.fc1.weight")
    } throws: { error in "\(error)".contains("\"\(name)\": marks") }
  }
}

/// A checkpoint in which one tensor is all ones.
private struct Damaged: TensorSource {
  let source: any TensorSource
  let tensor: String
  var path: String { source.path }
  var manifest: Manifest { source.manifest }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    try source.read(tensor, at: offset, into: &buffer)
    guard tensor.name == self.tensor else { return }
    buffer.withUnsafeMutableBytes { bytes in
      for index in bytes.indices { bytes[index] = 0xFF }
    }
  }
}
