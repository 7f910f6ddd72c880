public import Checkpoints

/// Writing the cleaned task vectors of a family, as a plan: every tensor that comes out, before
/// any is read.
public struct Disentangling: Sendable {
  /// What is written for each expert.
  public enum Form: String, Sendable, CaseIterable {
    /// The cleaned task vector.
    case vectors
    /// The base plus the cleaned task vector, a model like the expert.
    case models
  }

  public struct Options: Sendable {
    public var cleaning = Cleaning.row
    public var form = Form.vectors
    /// The element type of what is written; as the expert's if not given.
    public var dtype: DType?

    public init() {}
  }

  public let family: ModelFamily
  public let options: Options
  /// What is written for each expert, under the names of the model's tensors.
  public let manifests: [Manifest]
  /// The redundant vector, 0 where nothing is cleaned.
  public let redundantManifest: Manifest

  public init(_ family: ModelFamily, _ options: Options) throws {
    self.family = family
    self.options = options
    try options.cleaning.refuseTooFew(family)
    if let dtype = options.dtype, !dtype.isArithmetic {
      throw MergeError("\(dtype.rawValue) is not a type that results can be written in")
    }
    let cleaning = options.cleaning.description
    func stored(_ tensor: TensorInfo) -> TensorInfo {
      guard let dtype = options.dtype, tensor.dtype.isArithmetic else { return tensor }
      return try! TensorInfo(name: tensor.name, dtype: dtype, shape: tensor.shape)
    }
    // Integers and the like have no task vector, but a model has them.
    let base = family.base.manifest.tensors.filter {
      options.form == .models || $0.dtype.isArithmetic
    }
    manifests = family.experts.enumerated().map { index, expert in
      // What an expert lacks is the base's, and other names than the base's are not kept.
      let own = base.map { stored(family.places(of: $0)[index + 1].tensor.renamed($0.name)) }
      let description = [
        options.form == .vectors ? "task_vector" : "expert": expert.name, "cleaning": cleaning,
      ]
      let metadata = options.form == .models ? expert.source.manifest.metadata : [:]
      return Manifest(own, metadata: metadata.merging(description) { $1 })
    }
    redundantManifest = Manifest(
      family.base.manifest.tensors.filter { $0.dtype.isArithmetic }.map(stored),
      metadata: [
        "redundant_vector": family.experts.map { $0.name }.joined(separator: ", "),
        "cleaning": cleaning,
      ])
  }

  /// Everything in one checkpoint: `{expert}/{tensor}`, which in HDF5 is a group an expert.
  public var jointManifest: Manifest {
    let prefixes = family.experts.map { $0.name + "/" }
    return Manifest(
      zip(prefixes, manifests).flatMap { prefix, manifest in
        manifest.tensors.map { $0.renamed(prefix + $0.name) }
      },
      metadata: [
        "task_vectors": options.form.rawValue,
        "experts": family.experts.map { $0.name }.joined(separator: ", "),
        "cleaning": options.cleaning.description,
      ])
  }

  /// The part of a joint checkpoint that each expert is written to.
  public func parts(of joint: any TensorSink) -> [any TensorSink] {
    zip(family.experts, manifests).map { PartSink($1, of: joint, prefix: $0.name + "/") }
  }
}

/// Tensors that are written to another sink under longer names.
private struct PartSink: TensorSink {
  let manifest: Manifest
  private let whole: any TensorSink
  private let prefix: String

  init(_ manifest: Manifest, of whole: any TensorSink, prefix: String) {
    self.manifest = manifest
    self.whole = whole
    self.prefix = prefix
  }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    try whole.write(bytes, of: whole.manifest[prefix + tensor.name]!, at: offset)
  }

  func complete() throws(CheckpointError) {}
  func finish() throws(CheckpointError) {}
}

// MARK: - Cost

extension Disentangling {
  /// What a run takes of the machine.
  public struct Cost: Sendable {
    public var bytesRead = 0
    public var bytesWritten = 0
    /// How often groups wider than a row are read.
    public var reads = CleaningReads()
  }

  /// - Parameter hasGrams: whether the Gram matrices are known.
  public func cost(memory: Int, workers: Int, hasGrams: Bool, hasRedundant: Bool) -> Cost {
    var cost = Cost()
    if !hasGrams {
      cost.reads = options.cleaning.reads(of: family, memory: memory, workers: workers)
    }
    cost.bytesRead = cost.reads.bytesReadAgain
    for tensor in family.base.manifest.tensors
    where options.form == .models || tensor.dtype.isArithmetic {
      let places = family.places(of: tensor).dropFirst(tensor.dtype.isArithmetic ? 0 : 1)
      cost.bytesRead += places.reduce(0) { $0 + $1.tensor.byteCount }
    }
    cost.bytesWritten = manifests.reduce(0) { $0 + $1.byteCount }
    if hasRedundant { cost.bytesWritten += redundantManifest.byteCount }
    return cost
  }
}

// MARK: - Running

extension Disentangling {
  /// Writes every expert to its sink and, if asked, the redundant vector.
  ///
  /// - Parameters:
  ///   - grams: the family's Gram matrices, if they were found before; see `TaskVectorGrams`.
  ///   - memory: bytes that all workers' tiles take together.
  @discardableResult
  public func run(
    into sinks: [any TensorSink], redundant: (any TensorSink)? = nil,
    grams: TaskVectorGrams? = nil, memory: Int, workers: Int
  ) throws -> DisentanglementSummary {
    precondition(sinks.count == family.experts.count)
    let summary = try options.cleaning.run(
      on: family, grams: grams, memory: memory, workers: workers
    ) { parts, inputs in
      let pipeline = Pipeline(
        from: inputs.sources, into: sinks + (redundant.map { [$0] } ?? []), memory: inputs.memory,
        workers: workers)
      let steps = parts.map {
        self.steps(for: $0.tensor, $0.cleaning, hasRedundant: redundant != nil)
      }
      let findings = try pipeline.run(steps.flatMap { $0 })
      return fold(findings, steps.map { $0.count }) { $0 += $1 }
        .map { $0 ?? TensorFindings(experts: family.experts.count) }
    }
    try copyTheRest(into: sinks)
    return summary
  }

  private func steps(for tensor: TensorInfo, _ cleaning: TensorCleaning, hasRedundant: Bool)
    -> [Step<DisentanglingOperation>]
  {
    var outputs = manifests.enumerated().map { (file: $0, tensor: $1[tensor.name]!) }
    if hasRedundant { outputs.append((manifests.count, redundantManifest[tensor.name]!)) }
    let operation = DisentanglingOperation(
      experts: family.experts.count, cleaning: cleaning, form: options.form,
      hasRedundant: hasRedundant)
    return Step.covering(family.places(of: tensor), outputs: outputs, with: operation)
  }

  /// Integers and the like see no arithmetic: they are each expert's own, bit for bit.
  private func copyTheRest(into sinks: [any TensorSink]) throws {
    guard options.form == .models else { return }
    for tensor in family.base.manifest.tensors where !tensor.dtype.isArithmetic {
      for (place, sink) in zip(family.places(of: tensor).dropFirst(), sinks) {
        let own = sink.manifest[tensor.name]!
        try family.sources[place.file].copy(place.tensor, into: sink, as: own)
      }
    }
  }
}

/// The arithmetic of one tensor: in come the base and the experts, out go the experts' cleaned
/// task vectors or models and, if it is asked for, the redundant vector.
private struct DisentanglingOperation: TileOperation {
  let experts: Int
  let cleaning: TensorCleaning
  let form: Disentangling.Form
  let hasRedundant: Bool

  // A Gram matrix is the same bits for every tile whose columns are a multiple of 1024.
  var grain: Int { cleaning.isByRow ? cleaning.grain : 1024 }

  func makeSummary() -> TensorFindings { TensorFindings(experts: experts) }

  func apply(_ input: inout Tile, into output: inout Tile, summary: inout TensorFindings) {
    // What is not cleaned stays the expert's, without the rounding of a difference and a sum.
    let isKept = form == .models && cleaning.isNone
    if isKept { for expert in 0..<experts { output.copyRow(expert, from: input, expert + 1) } }
    for expert in 0..<experts { input.subtract(row: 0, from: expert + 1) }
    if !cleaning.isByRow {
      summary.gram.add(input.rows(from: 1), stride: input.capacity, columns: input.columns)
    }
    let vectors = cleaning.redundantVectors(
      in: input, from: 1, experts: experts, findings: &summary)
    if isKept {
      if hasRedundant { output.clear(row: experts) }
      return
    }
    // The first row holds the redundant vector until the first expert takes its place.
    input.takeOut(vectors, from: 1, keeping: &output, row: 0)
    if hasRedundant { output.copyRow(experts, fromRow: 0) }
    for expert in 0..<experts {
      output.copyRow(expert, from: input, expert + 1)
      if form == .models { output.add(input, row: 0, to: expert) }
    }
  }
}
