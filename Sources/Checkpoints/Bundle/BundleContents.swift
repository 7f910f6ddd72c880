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

    /// The binary logarithm of how many times larger than its frames what is unpacked may be;
    /// zeros, the smallest that there is, are about 2¹⁵ times.
    private static let largestExpansion = 20
    /// Multiplications for each byte of the frames that products of thin matrices may ask for. A
    /// square matrix of 2¹⁷ rows asks for 2¹⁴.
    private static let mostMultiplications = 0x1p16

    private let path: String
    private let inner: Manifest
    private var cuts: [Cut?]
    private var positions: [ExactName: Int] = [:]

    private struct Cut: Equatable {
      let streams: Int
      let blocks: Int?
    }

    /// - Throws: what in the recipe does not fit the inner tensors or the frames.
    init(
      _ recipe: Recipe, _ inner: Safetensors.Layout, _ table: SeekTable, path: String
    ) throws(CheckpointError) {
      self.recipe = recipe
      self.inner = inner.manifest
      self.path = path
      cuts = Array(repeating: nil, count: inner.manifest.tensors.count)
      var (headerSize, tensorSize, multiplications) = (0, 0, 0.0)
      for model in recipe.models {
        headers.append(try model.header.map { (name) throws(CheckpointError) in try header(name) })
        // All of them are kept in memory, and models may share one.
        headerSize += headers.last!.map { inner.manifest.tensors[$0].byteCount } ?? 0
        guard headerSize <= Safetensors.largestHeader else {
          throw malformed(nil, "has headers of more than \(Safetensors.largestHeader) bytes")
        }
        for entry in model.tensors {
          let name = model.fullName(entry.tensor.name)
          guard positions[ExactName(name)] == nil else {
            throw malformed(name, "is in the recipe twice")
          }
          tensors.append(try stored(entry, as: name))
          // A product of thin matrices, or a part that many share, is a bomb for whoever unpacks.
          let (sum, overflow) = tensorSize.addingReportingOverflow(entry.tensor.byteCount)
          guard !overflow, sum >> Self.largestExpansion <= table.starts.last! else {
            throw malformed(name, "is too large for so small a bundle")
          }
          tensorSize = sum
          multiplications += tensors.last!.multiplications
          guard multiplications <= Self.mostMultiplications * Double(table.starts.last!) else {
            throw malformed(name, "asks for more multiplications than so small a bundle may")
          }
          positions[ExactName(name)] = tensors.count - 1
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
    let reference: Reference?
    /// How many tensors of the bundle have to be decoded first, each for the next.
    let depth: Int
    /// For `planes` and `sparse`: how far elements are rotated.
    let rotation: Int
    /// For the quantised codecs: elements that share a scale.
    let group: Int
    /// For `lowrank`.
    let rank: Int
    /// What decoding it takes in products of thin matrices, those of its references included.
    let multiplications: Double
    /// For the lossy codecs, if the recipe has it.
    let error: Double?

    /// Tensor bytes that are coded together.
    var blockSize: Int { tensor.dtype.byteWidth * Codec.blockCount }
  }

  /// Another tensor that is needed to decode one.
  enum Reference: Sendable {
    /// An earlier one of the bundle, by its position.
    case inside(Int)
    case base(String, checksum: UInt64)
  }
}

extension Bundle.Contents {
  private mutating func header(_ name: String) throws(CheckpointError) -> Int {
    guard let part = inner[name], part.dtype == .u8, part.byteCount <= Safetensors.largestHeader
    else {
      throw malformed(name, "should be a safetensors header and is not")
    }
    let shape = PartShape(suffix: "", dtype: .u8, shape: part.shape, streams: 1)
    return try claim(name, as: shape, blocks: 0, of: name)
  }

  /// The inner tensor of this name, which must have this shape and not be shared otherwise.
  private mutating func claim(
    _ name: String, as shape: PartShape, blocks: Int, of tensor: String
  ) throws(CheckpointError) -> Int {
    guard let position = inner.position(of: name) else {
      throw malformed(tensor, "needs \(quoted(name)), which the bundle does not hold")
    }
    let part = inner.tensors[position]
    guard part.dtype == shape.dtype, part.shape == shape.shape else {
      throw malformed(
        tensor,
        "needs \(quoted(name)) as \(shape.dtype.rawValue) \(shape.shape), but it is \(part.dtype.rawValue) \(part.shape)"
      )
    }
    let cut = Cut(streams: shape.streams, blocks: shape.isCutByBlock ? blocks : nil)
    guard cuts[position] == nil || cuts[position] == cut else {
      throw malformed(tensor, "shares \(quoted(name)) with a tensor that is coded otherwise")
    }
    cuts[position] = cut
    return position
  }

  private mutating func stored(_ entry: Bundle.Recipe.Entry, as name: String)
    throws(CheckpointError) -> Bundle.Stored
  {
    let (tensor, codec) = (entry.tensor.renamed(name), entry.codec)
    guard codec != .sparseULP || recipe.version > 1 else {
      throw malformed(name, "has codec \(codec.rawValue), which came with version 2")
    }
    guard codec.suits(tensor.dtype) else {
      throw malformed(name, "is \(tensor.dtype.rawValue), which codec \(codec) cannot hold")
    }
    let names = entry.parts.isEmpty ? codec.suffixes.map { name + $0 } : entry.parts
    guard names.count == codec.suffixes.count else {
      throw malformed(name, "has \(names.count) parts instead of \(codec.suffixes.count)")
    }
    let group = entry.group ?? 1
    guard codec.isQuantised ? group >= Quantisation.smallestGroup : entry.group == nil else {
      throw malformed(name, "has groups of \(group) elements")
    }
    let rotation = entry.rotation ?? 1
    guard (0..<8 * tensor.dtype.byteWidth).contains(rotation) else {
      throw malformed(name, "is rotated by \(rotation) bits")
    }
    var lengths = (gaps: 0, values: 0)
    if codec.isSparse {
      lengths = (inner[names[0]]?.elementCount ?? 0, inner[names[1]]?.shape.last ?? 0)
      guard !lengths.values.multipliedReportingOverflow(by: 8).overflow else {
        throw malformed(name, "has too many values")
      }
    }
    let rank = codec == .lowrank ? inner[names[0]]?.shape.last ?? 0 : 1
    guard codec != .lowrank || ThinProduct.isAllowed(rank, of: tensor) else {
      throw malformed(name, "is of rank \(rank)")
    }
    var parts: [Int] = []
    let shapes = codec.parts(of: tensor, sparse: lengths, group: group, rank: rank)
    for (partName, shape) in zip(names, shapes) {
      parts.append(
        try claim(partName, as: shape, blocks: Codec.blocks(of: tensor), of: name))
    }
    let reference = try reference(of: entry, tensor)
    var (depth, multiplications) = (0, 0.0)
    if case .inside(let other) = reference {
      (depth, multiplications) = (tensors[other].depth + 1, tensors[other].multiplications)
    }
    if codec == .lowrank { multiplications = Double(rank) * Double(tensor.elementCount) }
    guard depth <= Bundle.largestDepth(inVersion: recipe.version) else {
      throw malformed(
        name, "refers to a tensor that is itself a difference from another, \(depth) in a row")
    }
    return Bundle.Stored(
      tensor: tensor, codec: codec, checksum: entry.checksum, parts: parts,
      reference: reference, depth: depth, rotation: rotation,
      group: group, rank: rank, multiplications: multiplications,
      error: entry.error.flatMap(Double.init))
  }

  /// What the entry refers to: an earlier tensor like it, so that no circle can be.
  private func reference(of entry: Bundle.Recipe.Entry, _ tensor: TensorInfo)
    throws(CheckpointError) -> Bundle.Reference?
  {
    guard entry.codec.needsReference == (entry.reference != nil) else {
      throw malformed(tensor.name, "has a reference and needs none, or the reverse")
    }
    switch entry.reference {
    case nil: return nil
    case .base(let name, let checksum): return .base(name, checksum: checksum)
    case .inside(let name):
      guard let position = positions[ExactName(name)] else {
        throw malformed(
          tensor.name, "refers to \(quoted(name)), which is not among the tensors before it")
      }
      let other = tensors[position]
      guard other.tensor.dtype == tensor.dtype, other.tensor.elementCount == tensor.elementCount
      else {
        throw malformed(tensor.name, "refers to \(quoted(name)), which is of another size")
      }
      return .inside(position)
    }
  }

  /// Numbers the frames and compares their sizes with the seek table's.
  private mutating func placeFrames(after headerSize: Int, _ table: SeekTable)
    throws(CheckpointError)
  {
    var next = Bundle.frameCount(of: headerSize)
    for (tensor, cut) in zip(inner.tensors, cuts) {
      guard let cut else {
        throw malformed(tensor.name, "is in the bundle but not in its recipe")
      }
      let part = Bundle.Part(
        tensor: tensor, streams: cut.streams, blocks: cut.blocks, firstFrame: next)
      for _ in 0..<part.streams {
        guard part.framesPerStream <= table.count - next,
          part.fits(table.contentSizes[next..<next + part.framesPerStream])
        else {
          throw malformed(tensor.name, "is not cut into frames as the format says")
        }
        next += part.framesPerStream
      }
      parts.append(part)
    }
    guard next == table.count else {
      throw malformed(nil, "has \(table.count - next) frames that belong to no tensor")
    }
  }
}
