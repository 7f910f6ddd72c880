import Synchronization

/// An open bundle, from which tensors are decoded block by block.
final class BundleFile: Sendable {
  let path: String
  let models: [Model]
  let frames: FrameFile
  private let contents: Bundle.Contents
  /// The model that tensors may be differences from, if the user has named one.
  private let base: (any TensorSource)?
  /// The base's tensors whose checksums have been found right.
  private let provenBases = Mutex<Set<ExactName>>([])
  /// Readers that no thread is using; there are never more than there were threads at once.
  private let idle = Mutex<[BlockReader]>([])

  struct Model: Sendable {
    let name: String
    /// Its tensors' own names, its metadata and header.
    let manifest: Manifest
    /// Where its tensors begin among those of all models.
    let first: Int
  }

  /// The tensors of all models in order, under their full names.
  var tensors: [Bundle.Stored] { contents.tensors }

  var recipe: Bundle.Recipe { contents.recipe }
  var parts: [Bundle.Part] { contents.parts }

  init(_ path: String, base: (any TensorSource)?) throws(CheckpointError) {
    frames = try FrameFile(path)
    self.base = base
    self.path = path
    let reader = BlockReader(blockSize: 0)
    let inner = try Self.readHeader(frames, reader)
    guard let json = inner.manifest.metadata["bundle"] else {
      throw CheckpointError(
        file: path, "has no recipe in its metadata",
        remedy: "decompressed with 'zstd -d' it may be an ordinary safetensors file")
    }
    let recipe = try Bundle.Recipe(parsing: json, file: path)
    contents = try Bundle.Contents(recipe, inner, frames.table, path: path)
    models = try Self.models(contents, frames, reader)
  }

  /// The inner file's header, from the first frames.
  private static func readHeader(_ frames: FrameFile, _ reader: BlockReader)
    throws(CheckpointError) -> Safetensors.Layout
  {
    let sizes = frames.table.contentSizes
    let total = sizes.reduce(0, +)
    guard let first = sizes.first, first >= 8 else {
      throw CheckpointError(file: frames.path, "holds nothing")
    }
    let beginning = try frames.bytes(of: 0..<1, of: nil, reader)
    let length = beginning.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
    guard length > 0, length <= UInt64(Safetensors.largestHeader), Int(length) + 8 <= total else {
      throw CheckpointError(
        file: frames.path, "declares an inner header of \(length) bytes",
        remedy: "it is not a bundle, or damaged")
    }
    let count = Bundle.frameCount(of: 8 + Int(length))
    guard count <= sizes.count, sizes[..<count].reduce(0, +) == 8 + Int(length) else {
      throw CheckpointError(
        file: frames.path, "has an inner header that does not fill its frames",
        remedy: "it is not a bundle, or damaged")
    }
    let header = try frames.bytes(of: 0..<count, of: nil, reader).dropFirst(8)
    return try Safetensors.Layout(parsing: Array(header), fileSize: total, path: frames.path)
  }

  private static func models(
    _ contents: Bundle.Contents, _ frames: FrameFile, _ reader: BlockReader
  ) throws(CheckpointError) -> [Model] {
    var models: [Model] = []
    var first = 0
    for (model, header) in zip(contents.recipe.models, contents.headers) {
      guard !models.contains(where: { ExactName($0.name) == ExactName(model.name) }) else {
        throw CheckpointError(file: frames.path, "has two models \(quoted(model.name))")
      }
      let tensors = model.tensors.map { $0.tensor }
      var manifest = Manifest(tensors, metadata: model.metadata)
      if let part = header.map({ contents.parts[$0] }) {
        let bytes = try frames.bytes(
          of: part.firstFrame..<part.firstFrame + part.framesPerStream, of: part.tensor, reader)
        let layout = try Safetensors.Layout(
          parsing: bytes, fileSize: 8 + bytes.count + manifest.byteCount, path: frames.path)
        guard layout.manifest.tensors.count == tensors.count,
          tensors.allSatisfy({ layout.manifest[$0.name] == $0 })
        else {
          throw CheckpointError(
            file: frames.path, tensor: part.tensor.name,
            "is a header of other tensors than the recipe's",
            remedy: "the bundle was not made as its format says")
        }
        manifest = Manifest(
          tensors, metadata: layout.manifest.metadata, safetensorsHeader: bytes)
      }
      models.append(Model(name: model.name, manifest: manifest, first: first))
      first += tensors.count
    }
    return models
  }
}

// MARK: - Reading

extension BundleFile {
  /// Fills `bytes` from byte `offset` of the tensor on.
  func read(_ index: Int, at offset: Int, into bytes: UnsafeMutableRawBufferPointer)
    throws(CheckpointError)
  {
    guard !bytes.isEmpty else { return }
    let blockSize = tensors[index].blockSize
    let reader = takeReader(for: index, block: offset / blockSize)
    defer { idle.withLock { $0.append(reader) } }
    var done = 0
    while done < bytes.count {
      let (block, begin) = (offset + done).quotientAndRemainder(dividingBy: blockSize)
      let size = min(blockSize, tensors[index].tensor.byteCount - block * blockSize)
      let count = min(size - begin, bytes.count - done)
      let target = UnsafeMutableRawBufferPointer(rebasing: bytes[done..<done + count])
      if count == size {
        try decode(block, of: index, into: target, reader)
      } else {
        if reader.held ?? (-1, -1) != (index, block) {
          reader.held = nil
          try decode(
            block, of: index,
            into: reader.block.part(0..<size), reader)
          reader.held = (index, block)
        }
        target.copyMemory(
          from: UnsafeRawBufferPointer(reader.block.part(begin..<begin + count)))
      }
      done += count
    }
  }

  /// A reader for this thread; if one holds the wanted block, that one.
  private func takeReader(for index: Int, block: Int) -> BlockReader {
    let reader = idle.withLock { readers in
      (readers.firstIndex { $0.held ?? (-1, -1) == (index, block) } ?? readers.indices.last)
        .map { readers.remove(at: $0) }
    }
    return reader ?? BlockReader(blockSize: tensors.map { $0.blockSize }.max() ?? 0)
  }

  /// Decodes a whole block of a tensor.
  private func decode(
    _ block: Int, of index: Int, into bytes: UnsafeMutableRawBufferPointer, _ reader: BlockReader
  ) throws(CheckpointError) {
    let stored = tensors[index]
    switch stored.codec {
    case .raw:
      let part = contents.parts[stored.parts[0]]
      let first = block * (stored.blockSize >> 20)
      for begin in stride(from: 0, to: bytes.count, by: ZstdFrame.contentSize) {
        let end = min(begin + ZstdFrame.contentSize, bytes.count)
        try frames.decode(
          part.frame(first + begin >> 20, of: 0), of: stored.tensor, reader,
          into: UnsafeMutableRawBufferPointer(rebasing: bytes[begin..<end]))
      }
    case .planes:
      try decodePlanes(block, of: stored, part: 0, rotation: stored.rotation, into: bytes, reader)
    case .xor:
      try decodePlanes(block, of: stored, part: 0, rotation: 0, into: bytes, reader)
      let other = reader.elements.part(0..<bytes.count)
      try decodeReference(block, of: stored, into: other, reader)
      exclusiveOr(
        bytes.baseAddress!, with: UnsafeRawPointer(other.baseAddress!), count: bytes.count)
    case .ulp:
      try decodeReference(block, of: stored, into: bytes, reader)
      let codes = reader.elements.part(0..<bytes.count)
      try decodePlanes(block, of: stored, part: 0, rotation: 0, into: codes, reader)
      let width = stored.tensor.dtype.byteWidth
      Steps.add(
        UnsafeRawPointer(codes.baseAddress!), count: bytes.count / width, width: width,
        to: bytes.baseAddress!)
    case .sparse: try decodeSparse(block, of: stored, into: bytes, reader)
    case .int8, .int4, .sign1: try decodeLossy(block, of: stored, into: bytes, reader)
    }
  }

  /// Reads the planes' frames of a block into the reader, 1 MiB apart.
  private func readPlanes(
    _ block: Int, of stored: Bundle.Stored, part: Int, count: Int, _ reader: BlockReader
  ) throws(CheckpointError) {
    let part = contents.parts[stored.parts[part]]
    for plane in 0..<part.streams {
      try frames.decode(
        part.frame(block, of: plane), of: stored.tensor, reader,
        into: reader.planes.part(plane << 20..<plane << 20 + count))
    }
  }

  private func decodePlanes(
    _ block: Int, of stored: Bundle.Stored, part: Int, rotation: Int,
    into bytes: UnsafeMutableRawBufferPointer, _ reader: BlockReader
  ) throws(CheckpointError) {
    let width = stored.tensor.dtype.byteWidth
    try readPlanes(block, of: stored, part: part, count: bytes.count / width, reader)
    Planes.join(
      reader.planes.octets, stride: 1 << 20, count: bytes.count / width, width: width,
      rotation: rotation, into: bytes.baseAddress!)
  }

  private func decodeSparse(
    _ block: Int, of stored: Bundle.Stored, into bytes: UnsafeMutableRawBufferPointer,
    _ reader: BlockReader
  ) throws(CheckpointError) {
    let (gaps, values) = (contents.parts[stored.parts[0]], contents.parts[stored.parts[1]])
    let width = stored.tensor.dtype.byteWidth
    let gapCount = frames.table.contentSizes[gaps.frame(block, of: 0)]
    let valueCount = frames.table.contentSizes[values.frame(block, of: 0)]
    try frames.decode(
      gaps.frame(block, of: 0), of: stored.tensor, reader, into: reader.octets.part(0..<gapCount))
    let target = reader.elements.part(0..<valueCount * width)
    if valueCount > 0 {
      try decodePlanes(block, of: stored, part: 1, rotation: stored.rotation, into: target, reader)
    }
    let fits = Gaps.read(
      UnsafeBufferPointer(start: reader.octets.octets, count: gapCount),
      values: UnsafeRawPointer(reader.elements.start), valueCount: valueCount, width: width,
      into: bytes.baseAddress!, count: bytes.count / width)
    guard fits else {
      throw CheckpointError(
        file: path, tensor: stored.tensor.name, "has gaps that do not fit its values",
        remedy: "the bundle was not made as its format says")
    }
  }

  private func decodeLossy(
    _ block: Int, of stored: Bundle.Stored, into bytes: UnsafeMutableRawBufferPointer,
    _ reader: BlockReader
  ) throws(CheckpointError) {
    let count = bytes.count / stored.tensor.dtype.byteWidth
    let first = block * Codec.blockCount
    let groups = first / stored.group...(first + count - 1) / stored.group
    try readStream(
      contents.parts[stored.parts[1]], of: stored.tensor,
      4 * groups.lowerBound..<4 * groups.upperBound + 4, into: reader.scales.start, reader)
    let begin = block * Quantisation.codedSize(Codec.blockCount, stored.codec)
    try readStream(
      contents.parts[stored.parts[0]], of: stored.tensor,
      begin..<begin + Quantisation.codedSize(count, stored.codec), into: reader.elements.start,
      reader)
    let scales = reader.scales.start.assumingMemoryBound(to: Float.self)
    let values = UnsafeMutableBufferPointer(
      start: reader.floats.start.assumingMemoryBound(to: Float.self), count: count)
    Quantisation.decode(
      UnsafePointer(reader.elements.octets), stored.codec,
      scale: { scales[(first + $0) / stored.group - groups.lowerBound] }, into: values)
    var target = MutableRawSpan(_unsafeBytes: bytes)
    stored.tensor.dtype.encode(Span(_unsafeElements: UnsafeBufferPointer(values)), into: &target)
  }

  /// Reads some bytes of a part's only stream.
  private func readStream(
    _ part: Bundle.Part, of tensor: TensorInfo, _ range: Range<Int>,
    into bytes: UnsafeMutableRawPointer, _ reader: BlockReader
  ) throws(CheckpointError) {
    for index in range.lowerBound >> 20...(range.upperBound - 1) >> 20 {
      let size = frames.table.contentSizes[part.frame(index, of: 0)]
      let content = reader.octets.part(0..<size)
      try frames.decode(part.frame(index, of: 0), of: tensor, reader, into: content)
      let wanted = range.clamped(to: index << 20..<index << 20 + size)
      (bytes + (wanted.lowerBound - range.lowerBound)).copyMemory(
        from: content.baseAddress! + (wanted.lowerBound - index << 20), byteCount: wanted.count)
    }
  }

  /// Decodes the block of the tensor that `stored` differs from.
  private func decodeReference(
    _ block: Int, of stored: Bundle.Stored, into bytes: UnsafeMutableRawBufferPointer,
    _ reader: BlockReader
  ) throws(CheckpointError) {
    switch stored.reference! {
    case .inside(let position): try decode(block, of: position, into: bytes, reader)
    case .base(let name, let checksum):
      let base = try provenBase(name, checksum, of: stored)
      try base.source.read(base.tensor, at: block * stored.blockSize, into: bytes)
    }
  }

  /// The base's tensor, once it has been found to be the one that the bundle was made with.
  private func provenBase(_ name: String, _ checksum: UInt64, of stored: Bundle.Stored)
    throws(CheckpointError) -> (source: any TensorSource, tensor: TensorInfo)
  {
    guard let base else {
      throw CheckpointError(
        file: path, tensor: stored.tensor.name,
        "is kept as a difference from a base model that is not in the bundle",
        remedy: "name the base")
    }
    let tensor = try base.tensor(name)
    if provenBases.withLock({ $0.contains(ExactName(name)) }) { return (base, tensor) }
    guard tensor.dtype == stored.tensor.dtype,
      tensor.elementCount == stored.tensor.elementCount,
      try base.checksum(of: tensor) == checksum
    else {
      throw CheckpointError(
        file: base.path, tensor: name, "is not what \(path) was packed against",
        remedy: "name the base that it was packed with")
    }
    provenBases.withLock { _ = $0.insert(ExactName(name)) }
    return (base, tensor)
  }
}

extension FrameFile {
  fileprivate func decode(
    _ index: Int, of tensor: TensorInfo?, _ reader: BlockReader,
    into content: UnsafeMutableRawBufferPointer
  ) throws(CheckpointError) {
    try decode(
      index, of: tensor?.name, using: reader.decoder, reader.compressed, into: content)
  }

  /// What some frames hold together; for headers, not for tensors.
  fileprivate func bytes(of range: Range<Int>, of tensor: TensorInfo?, _ reader: BlockReader)
    throws(CheckpointError) -> [UInt8]
  {
    let sizes = table.contentSizes[range]
    var bytes = [UInt8](repeating: 0, count: sizes.reduce(0, +))
    var span = bytes.mutableSpan
    try span.withUnsafeMutableBytes { (bytes) throws(CheckpointError) in
      var begin = 0
      for (frame, size) in zip(range, sizes) {
        let content = UnsafeMutableRawBufferPointer(rebasing: bytes[begin..<begin + size])
        try decode(frame, of: tensor, reader, into: content)
        begin += size
      }
    }
    return bytes
  }
}

/// What one thread at a time decodes blocks with.
private final class BlockReader: @unchecked Sendable {
  // Sound: readers are shared through a lock and each is with one thread at a time.
  let decoder = FrameDecoder()
  let compressed = PinnedBytes(count: ZstdFrame.largest)
  /// The streams of a block, 1 MiB apart.
  let planes: PinnedBytes
  /// Values of a sparse block, coded elements, or a reference's block.
  let elements: PinnedBytes
  /// One frame's bytes.
  let octets = PinnedBytes(count: ZstdFrame.contentSize)
  let floats = PinnedBytes(count: 4 * Codec.blockCount)
  let scales = PinnedBytes(count: 4 * (Codec.blockCount / Quantisation.smallestGroup + 2))
  /// The block that was last read in pieces.
  let block: PinnedBytes
  var held: (tensor: Int, block: Int)?

  init(blockSize: Int) {
    planes = PinnedBytes(count: blockSize)
    elements = PinnedBytes(count: blockSize)
    block = PinnedBytes(count: blockSize)
  }
}
