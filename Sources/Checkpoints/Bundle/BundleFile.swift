import Synchronization

/// An open bundle, from which tensors are decoded block by block.
final class BundleFile: Sendable {
  let path: String
  let models: [Model]
  let frames: FrameFile
  let contents: Bundle.Contents
  /// The model outside that tensors may be differences from.
  let base: ProvenBase
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
    do { frames = try FrameFile(path) } catch {
      throw (try? CutBundle(path).loss()) ?? error
    }
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
    self.base = try ProvenBase(base, of: contents.tensors, path: path)
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
    let inner = try Safetensors.Layout(parsing: Array(header), fileSize: nil, path: frames.path)
    let listed = 8 + Int(length) + inner.manifest.byteCount
    guard total == listed else {
      throw CheckpointError(
        file: frames.path,
        "has a seek table for \(total) bytes of content where its header lists \(listed)",
        remedy: "it is not a bundle, or damaged: get it again")
    }
    return inner
  }

  private static func models(
    _ contents: Bundle.Contents, _ frames: FrameFile, _ reader: BlockReader
  ) throws(CheckpointError) -> [Model] {
    var models: [Model] = []
    var names = Set<ExactName>()
    var first = 0
    for (model, header) in zip(contents.recipe.models, contents.headers) {
      guard names.insert(ExactName(model.name)).inserted else {
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
          tensors, metadata: layout.manifest.metadata,
          safetensorsHeader: layout.manifest.safetensorsHeader)
      }
      models.append(Model(name: model.name, manifest: manifest, first: first))
      first += tensors.count
    }
    return models
  }
}

// MARK: - Reading

extension BundleFile {
  /// These tensors and those that they are differences from, each once.
  func withReferences(_ positions: [Int]) -> [Bundle.Stored] {
    var found = Set<Int>()
    for var position in positions {
      while found.insert(position).inserted, case .inside(let other) = tensors[position].reference {
        position = other
      }
    }
    return found.sorted().map { tensors[$0] }
  }

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
}

extension FrameFile {
  func decode(
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
