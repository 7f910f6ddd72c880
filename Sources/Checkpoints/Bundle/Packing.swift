/// A bundle before it is written: every tensor has been looked at and the layout is known.
struct Packing: Sendable {
  /// All that is read.
  let inputs: [any TensorSource]
  let path: String
  let models: [(name: String, source: any TensorSource)]
  /// Where the factors of low-rank tensors wait.
  let factors: FactorFile?
  var tensors: [Planned] = []
  /// All streams, in the order of the file; the first is the inner file's header.
  var streams: [Stream] = []
  /// For each stream the number of its first frame.
  var firstFrames: [Int] = []
  /// All frames: which of which stream, and the bytes that it holds.
  var frames: [(stream: Int, index: Int, size: Int)] = []

  /// How a tensor is kept as the difference from which other.
  typealias Difference = (choice: Bundle.Choice, candidate: Bundle.Candidate)

  struct Planned: Sendable {
    let tensor: TensorInfo
    let fullName: String
    let source: any TensorSource
    var finding = Bundle.Finding()
    var choice: Bundle.Choice { difference?.choice ?? finding.own }
    /// How it is kept as a difference, if it is.
    var difference: Difference?
    /// How many tensors of the bundle have to be decoded first, each for the next.
    var depth = 0
    /// The position of an earlier tensor with the same bytes.
    var twin: Int?
  }

  struct Stream: Sendable {
    let content: Content
    let mode: ZstdFrame.Mode
    /// The sizes of its frames' contents.
    let sizes: [Int]

    init(_ content: Content, _ mode: ZstdFrame.Mode, sizes: [Int]) {
      self.content = content
      self.mode = mode
      self.sizes = sizes
    }

    /// A stream of so many bytes, in frames of 1 MiB.
    init(_ content: Content, _ mode: ZstdFrame.Mode, length: Int) {
      self.init(
        content, mode,
        sizes: stride(from: 0, to: length, by: ZstdFrame.contentSize).map {
          min(ZstdFrame.contentSize, length - $0)
        })
    }
  }

  /// What tensors of the same content have in common.
  struct Likeness: Hashable {
    let dtype: DType
    /// Nil where the parts are the same for every shape.
    let shape: [Int]?
    let checksum: UInt64
    /// The codec if it is lossy, whose checksum is of what it makes of the tensor.
    let lossy: Codec?
  }

  enum Content: Sendable {
    case bytes([UInt8])
    /// A stream of a tensor, counted through all its parts.
    case coded(Int, stream: Int)
  }

  init(
    _ models: [(name: String, source: any TensorSource)], against base: (any TensorSource)?,
    _ path: String, lossy: Bundle.Lossy?, workers: Int, memory: Int
  ) throws {
    self.path = path
    self.models = models
    factors = if case .lowRank = lossy { try FactorFile(for: path) } else { nil }
    inputs = models.map { $0.source } + (base.map { [$0] } ?? [])
    for (name, source) in models {
      for tensor in source.manifest.tensors {
        let fullName = name.isEmpty ? tensor.name : name + "/" + tensor.name
        tensors.append(Planned(tensor: tensor, fullName: fullName, source: source))
      }
    }
    try survey(against: base, lossy, workers: surveyors(lossy, workers, memory))
    try hash(workers: workers)
    try settle()
    try layOut()
  }
}
