import Checkpoints
import TestSupport
import Testing

@testable import Merging

/// A collapse to one expert gives its MLPs back bit for bit.
@Suite struct `corrections of task vectors` {
  static let name = "layers.0.mlp.fc1.weight"
  static let vector = "layers.0.mlp.task_vectors.1.fc1.weight"
  let small: SmallFamily

  init() throws {
    small = try SmallFamily([
      ("layers.0.mlp.fc1.weight", [300, 40]), ("layers.0.mlp.fc1.bias", [300]),
      ("layers.0.mlp.fc2.weight", [40, 300]), ("layers.0.mlp.fc2.bias", [40]),
      ("norm.weight", [40]),
    ])
  }

  /// Weights of all magnitudes, so that many are smaller than their change; zeros and what is not
  /// finite too.
  private func family(_ dtype: DType, experts: Int = 3) throws -> ModelFamily {
    func source(_ number: Int) throws -> any TensorSource {
      try small.open(number, dtype: dtype) { tensors in
        try tensors.map { tensor in
          var values = tensor.values.enumerated().map { index, value in
            let exponent = (index * 7 + number * 5) % 24
            return value / Float(1 << exponent)
          }
          if tensor.info.name == Self.name {
            values[5] = number == 1 ? -0.0 : 0
            values[6] = number == 2 ? .infinity : 1
            values[7] = number == 2 ? .nan : 1
            values[8] = number == 0 ? .infinity : 1
          }
          return try SmallTensor(tensor.info.name, tensor.info.shape, dtype: dtype, values)
        }
      }
    }
    return try ModelFamily(
      base: source(0), experts: (1...experts).map { try .init(name: "\($0)", source: source($0)) })
  }

  private func options(_ cleaning: Cleaning? = nil) -> Upscaling.Options {
    var options = Upscaling.Options()
    options.cleaning = cleaning
    options.mlps = [try! TransformerMLP(pattern: "layers.{i}.mlp:fc1,fc2")]
    return options
  }

  @Test(arguments: [DType.f32, .bf16, .f16], [false, true])
  func `an expert's MLPs come back bit for bit`(dtype: DType, isCleaned: Bool) throws {
    let family = try family(dtype)
    let mixture = try small.upscale(family, options(isCleaned ? .row : nil))
    #expect(mixture.manifest["\(Self.vector)#places"] != nil)
    for weights in [Collapse.Weights.expert("2"), .given([0, 1, 0])] {
      let plain = try small.collapse(mixture, weights)
      for tensor in plain.manifest.tensors where tensor.name.contains("mlp") {
        let own = try family.experts[1].source.tensor(tensor.name)
        #expect(
          try plain.bytes(of: tensor) == family.experts[1].source.bytes(of: own), "\(tensor.name)")
      }
    }
  }

  @Test(arguments: [1, 3], [1 << 22, 9000])
  func `workers and memory change neither a mixture nor a collapse`(
    workers: Int, memory: Int
  ) throws {
    let family = try family(.bf16)
    let one = try small.upscale(family, options(), name: "one", memory: 1 << 24, workers: 1)
    let two = try small.upscale(family, options(), name: "two", memory: memory, workers: workers)
    #expect(one.manifest.tensors == two.manifest.tensors)
    for tensor in one.manifest.tensors {
      #expect(try one.bytes(of: tensor) == two.bytes(of: tensor), "\(tensor.name)")
    }
  }

  @Test func `the other tensors are what they are without corrections`() throws {
    let family = try family(.bf16)
    var plain = options()
    plain.keepsCorrections = false
    let one = try small.upscale(family, options(), name: "one")
    let two = try small.upscale(family, plain, name: "two")
    let added = one.manifest.tensors.map { $0.name }.filter { two.manifest[$0] == nil }
    #expect(!added.isEmpty)
    #expect(added.allSatisfy { $0.hasSuffix("#places") || $0.hasSuffix("#weights") })
    for tensor in two.manifest.tensors {
      #expect(try one.bytes(of: one.tensor(tensor.name)) == two.bytes(of: tensor))
    }
  }

  @Test func `only a collapse to one expert reads them`() throws {
    let family = try family(.bf16)
    let mixture = try small.upscale(family, options())
    let plain = try small.collapse(mixture, .given([0, 0.5, 0]))
    let base = try mixture.floats(of: "layers.0.mlp.base_model.fc2.weight")
    let vector = try mixture.floats(of: "layers.0.mlp.task_vectors.1.fc2.weight")
    var expected = zip(base, vector).map { $0 + 0.5 * $1 }
    var span = expected.mutableSpan
    DType.bf16.round(&span)
    #expect(try plain.floats(of: "layers.0.mlp.fc2.weight") == expected)
  }

  @Test func `pruned and coded task vectors have none`() throws {
    for storage in [TaskVectorStorage.dense, .int8] {
      var options = options()
      options.storage = storage
      if storage == .dense { options.pruning = 0.5 }
      let family = try ModelFamily(
        base: small.open(0), experts: [.init(name: "a", source: small.open(1))])
      let mixture = try small.upscale(family, options)
      #expect(!mixture.manifest.tensors.contains { $0.name.hasSuffix("#places") })
    }
  }

  @Test(arguments: [
    ([UInt32](arrayLiteral: 3, 3), "has place 3 behind 3 in a task vector of 6 elements"),
    ([0, 6], "has place 6 behind 0 in a task vector of 6 elements"),
  ])
  func `places that are none are refused by name`(places: [UInt32], reason: String) throws {
    let small = try SmallFamily([
      ("layers.0.mlp.fc1.weight", [2, 3]), ("layers.0.mlp.fc2.weight", [3, 2]),
    ])
    let family = try small.family(experts: 1)
    var options = options()
    options.keepsCorrections = false
    let mixture = try small.upscale(family, options)
    let name = "layers.0.mlp.task_vectors.0.fc1.weight#places"
    let damaged = WithCorrections(mixture, places: places, name: name)
    #expect(throws: CheckpointError(file: mixture.path, tensor: name, reason)) {
      try small.collapse(damaged, .expert("expert1"))
    }
  }
}

/// A mixture with corrections of its first task vector.
private struct WithCorrections: TensorSource {
  let source: any TensorSource
  let manifest: Manifest
  let places: [UInt32]
  let name: String
  var path: String { source.path }

  init(_ source: any TensorSource, places: [UInt32], name: String) {
    let weights = name.replacing("#places", with: "#weights")
    self.source = source
    self.places = places
    self.name = name
    manifest = Manifest(
      source.manifest.tensors + [
        try! TensorInfo(name: name, dtype: .u32, shape: [places.count]),
        try! TensorInfo(name: weights, dtype: .f32, shape: [places.count]),
      ], metadata: source.manifest.metadata)
  }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    guard tensor.name.contains("#") else {
      return try source.read(tensor, at: offset, into: &buffer)
    }
    for index in 0..<buffer.byteCount / 4 where tensor.name == name {
      buffer.storeBytes(of: places[offset / 4 + index], toByteOffset: 4 * index, as: UInt32.self)
    }
  }
}
