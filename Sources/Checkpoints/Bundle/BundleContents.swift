extension Bundle {
  /// What a bundle holds, proven: every tensor of the recipe has the parts that it needs, every
  /// inner tensor belongs to someone, and the frames are cut as the format says.
  struct Contents: Sendable {
    /// The inner tensors, in the order of their bytes.
    private(set) var parts: [Part] = []
    /// The tensors of all models in order, under their full names.
    private(set) var tensors: [Stored] = []
    /// For each model of the recipe, the part that is its header.
    private(set) var headers: [Int?] = []
    let recipe: Recipe

    private let path: String
    private let inner: Manifest
    private var streams: [Int?]

    /// - Throws: what in the recipe does not fit the inner tensors or the frames.
    init(
      _ recipe: Recipe, _ inner: Safetensors.Layout, _ table: SeekTable, path: String
    ) throws(CheckpointError) {
      self.recipe = recipe
      self.inner = inner.manifest
      self.path = path
      streams = Array(repeating: nil, count: inner.manifest.tensors.count)
      var names = Set<ExactName>()
      for model in recipe.models {
        headers.append(try model.header.map { (name) throws(CheckpointError) in try header(name) })
        for entry in model.tensors {
          let name = model.fullName(entry.tensor.name)
          guard names.insert(ExactName(name)).inserted else {
            throw malformed(name, "is in the recipe twice")
          }
          tensors.append(try stored(entry, as: name))
        }
      }
      try placeFrames(after: inner.prefix.count, table)
    }

    private func malformed(_ tensor: String?, _ problem: String) -> CheckpointError {
      CheckpointError(
        file: path, tensor: tensor, problem, remedy: "the bundle was not made as its format says")
    }
  }

  /// A tensor as it lies in a bundle.
  struct Stored: Sendable {
    let tensor: TensorInfo
    let codec: Codec
    let checksum: UInt64
    /// The positions of its parts.
    let parts: [Int]

    /// Tensor bytes that are coded together: a frame of every stream.
    var blockSize: Int {
      codec == .raw ? ZstdFrame.contentSize : tensor.dtype.byteWidth * ZstdFrame.contentSize
    }
  }
}

extension Bundle.Contents {
  /// The part that a recipe calls `name`, claimed as cut into so many streams.
  private mutating func part(_ name: String, of tensor: String, streams count: Int)
    throws(CheckpointError) -> (position: Int, tensor: TensorInfo)
  {
    guard let position = inner.position(of: name) else {
      throw malformed(tensor, "needs \(quoted(name)), which the bundle does not hold")
    }
    guard streams[position] == nil || streams[position] == count else {
      throw malformed(tensor, "shares \(quoted(name)) with a tensor that is coded otherwise")
    }
    streams[position] = count
    return (position, inner.tensors[position])
  }

  private mutating func header(_ name: String) throws(CheckpointError) -> Int {
    let part = try part(name, of: name, streams: 1)
    guard part.tensor.dtype == .u8, part.tensor.byteCount <= Safetensors.largestHeader else {
      throw malformed(name, "cannot be a safetensors header")
    }
    return part.position
  }

  private mutating func stored(_ entry: Bundle.Recipe.Entry, as name: String)
    throws(CheckpointError) -> Bundle.Stored
  {
    let tensor = entry.tensor.renamed(name)
    guard entry.codec.suits(tensor.dtype) else {
      throw malformed(name, "is \(tensor.dtype.rawValue), which codec \(entry.codec) cannot hold")
    }
    let names = entry.parts.isEmpty ? [name] : entry.parts
    guard names.count == 1 else {
      throw malformed(name, "has \(names.count) parts instead of 1")
    }
    let count = entry.codec == .raw ? 1 : tensor.dtype.byteWidth
    let part = try part(names[0], of: name, streams: count)
    let isRight =
      entry.codec == .raw
      ? part.tensor.dtype == tensor.dtype && part.tensor.shape == tensor.shape
      : part.tensor.dtype == .u8 && part.tensor.shape == [count, tensor.elementCount]
    guard isRight else {
      throw malformed(name, "does not have the size of \(quoted(names[0])), which holds it")
    }
    return Bundle.Stored(
      tensor: tensor, codec: entry.codec, checksum: entry.checksum, parts: [part.position])
  }

  /// Numbers the frames and compares their sizes with the seek table's.
  private mutating func placeFrames(after headerSize: Int, _ table: SeekTable)
    throws(CheckpointError)
  {
    var next = Bundle.frameCount(of: headerSize)
    for (tensor, streams) in zip(inner.tensors, streams) {
      guard let streams else {
        throw malformed(tensor.name, "is in the bundle but not in its recipe")
      }
      var part = Bundle.Part(tensor, streams: streams)
      part.firstFrame = next
      next += part.frameCount
      guard next <= table.count else {
        throw malformed(tensor.name, "has more frames than the seek table")
      }
      for stream in 0..<streams {
        for index in 0..<part.framesPerStream
        where table.contentSizes[part.frame(index, of: stream)] != part.range(of: index).count {
          throw malformed(tensor.name, "is not cut into frames as the format says")
        }
      }
      parts.append(part)
    }
    guard next == table.count else {
      throw malformed(nil, "has \(table.count - next) frames that belong to no tensor")
    }
  }
}
