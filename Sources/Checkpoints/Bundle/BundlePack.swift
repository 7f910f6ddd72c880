import Synchronization

extension Bundle {
  /// Packs a checkpoint. The same input gives the same bytes whatever `workers` and `memory` are.
  ///
  /// - Parameters:
  ///   - base: a model that stays outside: tensors may be kept as differences from its own.
  ///   - lossy: how to code matrices if not exactly; other tensors stay exact.
  ///   - memory: bytes that the workers' buffers may take; fewer workers run if it is too
  ///     little for all.
  public static func pack(
    _ source: any TensorSource, against base: (any TensorSource)? = nil, to path: String,
    lossy: Lossy? = nil, workers: Int = 2, memory: Int = 1 << 30
  ) throws {
    try pack([("", source)], against: base, to: path, lossy: lossy, workers, memory)
  }

  /// Packs a family of models, each under its name. Tensors may be kept as differences from
  /// those of the models before: put the base first.
  public static func pack(
    models: [(name: String, source: any TensorSource)], against base: (any TensorSource)? = nil,
    to path: String, lossy: Lossy? = nil, workers: Int = 2, memory: Int = 1 << 30
  ) throws {
    for (index, model) in models.enumerated() {
      guard !model.name.isEmpty, !model.name.contains("/"),
        !models[..<index].contains(where: { ExactName($0.name) == ExactName(model.name) })
      else {
        throw CheckpointError(
          file: path, "cannot hold a model named \(quoted(model.name))",
          remedy: "give each model its own name, without slashes")
      }
    }
    try pack(models, against: base, to: path, lossy: lossy, workers, memory)
  }

  private static func pack(
    _ models: [(name: String, source: any TensorSource)], against base: (any TensorSource)?,
    to path: String, lossy: Lossy?, _ workers: Int, _ memory: Int
  ) throws {
    let affordable = max(1, min(workers, memory / Packing.memoryPerWorker))
    let packing = try Packing(
      models, against: base, path, lossy: lossy?.codec, workers: affordable)
    try packing.write(workers: affordable)
  }

  /// Codings that lose precision: an integer times a scale. The recipe records the error.
  public enum Lossy: String, Sendable, CaseIterable {
    case int8, int4, sign1

    var codec: Codec { Codec(rawValue: rawValue)! }
  }
}

/// A bundle before it is written: every tensor has been looked at and the layout is known.
struct Packing: Sendable {
  private let path: String
  private var tensors: [Planned] = []
  /// All streams, in the order of the file.
  private var streams: [Stream] = []
  /// All frames: which of which stream, and the bytes that it holds.
  private var frames: [(stream: Int, index: Int, size: Int)] = []

  private struct Planned: Sendable {
    let tensor: TensorInfo
    let fullName: String
    let source: any TensorSource
    var finding = Bundle.Finding()
    var choice: Bundle.Choice { difference?.choice ?? finding.own }
    /// How it is kept as a difference, if it is.
    var difference: (choice: Bundle.Choice, candidate: Bundle.Candidate)?
    /// The position of an earlier tensor with the same bytes.
    var twin: Int?
  }

  private struct Stream: Sendable {
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
  private struct Likeness: Hashable {
    let dtype: DType
    let shape: [Int]
    let checksum: UInt64
    let codec: Codec
  }

  private enum Content: Sendable {
    case bytes([UInt8])
    /// A stream of a tensor, counted through all its parts.
    case coded(Int, stream: Int)
  }

  init(
    _ models: [(name: String, source: any TensorSource)], against base: (any TensorSource)?,
    _ path: String, lossy: Codec?, workers: Int
  ) throws {
    self.path = path
    for (name, source) in models {
      for tensor in source.manifest.tensors {
        let fullName = name.isEmpty ? tensor.name : name + "/" + tensor.name
        tensors.append(Planned(tensor: tensor, fullName: fullName, source: source))
      }
    }
    try survey(against: base, lossy, workers: workers)
    try settle()
    try layOut(models)
  }
}

// MARK: - Planning

extension Packing {
  /// Looks at all tensors, several at a time.
  private mutating func survey(against base: (any TensorSource)?, _ lossy: Codec?, workers: Int)
    throws
  {
    let candidates = candidates(against: base)
    let tensors = tensors
    let findings = Mutex([Bundle.Finding?](repeating: nil, count: tensors.count))
    try forEachStep(count: tensors.count, workers: workers) {
      Bundle.Survey()
    } body: { step, survey in
      let finding = try survey.look(
        at: tensors[step].tensor, of: tensors[step].source, candidates[step], lossy: lossy)
      findings.withLock { $0[step] = finding }
    }
    findings.withLock {
      for (index, finding) in $0.enumerated() { self.tensors[index].finding = finding! }
    }
  }

  /// For each tensor those that it may resemble: the base's of the same name, and the first ones
  /// whose names differ from its own in the model's name or in one number (another expert's,
  /// another layer's).
  private func candidates(against base: (any TensorSource)?) -> [[Bundle.Candidate]] {
    var firsts: [String: Int] = [:]
    return tensors.enumerated().map { index, planned in
      let tensor = planned.tensor
      var found: [Bundle.Candidate] = []
      func isLike(_ other: TensorInfo) -> Bool {
        other.dtype == tensor.dtype && other.shape == tensor.shape
      }
      if let base, let other = base.manifest[tensor.name], isLike(other) {
        found.append(Bundle.Candidate(tensor: other, source: base, position: nil))
      }
      for pattern in patterns(of: planned) {
        guard let first = firsts[pattern] else {
          firsts[pattern] = index
          continue
        }
        let other = tensors[first]
        guard isLike(other.tensor), !found.contains(where: { $0.position == first }) else {
          continue
        }
        found.append(
          Bundle.Candidate(tensor: other.tensor, source: other.source, position: first))
      }
      return Array(found.prefix(4))
    }
  }

  /// The tensor's name without its model's, and its full name with one number left out each.
  private func patterns(of planned: Planned) -> [String] {
    let pieces = planned.fullName.split(separator: ".", omittingEmptySubsequences: false)
    let withoutNumber = pieces.indices.filter { Int(pieces[$0]) != nil }.map { place in
      pieces.enumerated().map { $0 == place ? "*" : String($1) }.joined(separator: ".")
    }
    let isOfMany = planned.fullName != planned.tensor.name
    return (isOfMany ? ["*/" + planned.tensor.name] : []) + withoutNumber
  }

  /// Decides what is kept as what, in order, so that no tensor refers to one that refers itself.
  private mutating func settle() throws {
    var seen: [Likeness: Int] = [:]
    for index in tensors.indices {
      let finding = tensors[index].finding
      let key = Likeness(
        dtype: tensors[index].tensor.dtype, shape: tensors[index].tensor.shape,
        checksum: finding.checksum, codec: finding.own.codec)
      if tensors[index].tensor.byteCount > 0, let twin = seen[key],
        // A checksum of 64 bits may collide; a lossy tensor's is not of its own bytes.
        !finding.own.codec.isLossy, try isSame(index, twin)
      {
        tensors[index].twin = twin
        continue
      }
      seen[key] = seen[key] ?? index
      tensors[index].difference = finding.differences.first { _, candidate in
        guard let position = candidate.position else { return true }
        let other = tensors[position]
        return other.difference == nil && other.twin == nil && !other.choice.codec.isLossy
      }
    }
  }

  private func isSame(_ index: Int, _ other: Int) throws -> Bool {
    let (one, two) = (tensors[index], tensors[other])
    let bytes = (PinnedBytes(count: 1 << 20), PinnedBytes(count: 1 << 20))
    for begin in stride(from: 0, to: one.tensor.byteCount, by: 1 << 20) {
      let count = min(1 << 20, one.tensor.byteCount - begin)
      try one.source.read(one.tensor, at: begin, into: bytes.0.part(0..<count))
      try two.source.read(two.tensor, at: begin, into: bytes.1.part(0..<count))
      guard bytes.0.first(count).elementsEqual(bytes.1.first(count)) else { return false }
    }
    return true
  }

  /// Names the parts, writes the recipe and puts the streams into the order of the file.
  private mutating func layOut(_ models: [(name: String, source: any TensorSource)]) throws {
    var recipe = Bundle.Recipe(models: [])
    var names = PartNames(taken: Set(tensors.map { ExactName($0.fullName) }))
    var parts: [TensorInfo] = []
    var streamsOfPart: [ExactName: [Stream]] = [:]
    var partsOfTensor: [[String]] = []
    var index = 0
    for (name, source) in models {
      let manifest = source.manifest
      var model = Bundle.Recipe.Model(
        name: name, metadata: manifest.safetensorsHeader == nil ? manifest.metadata : [:],
        tensors: [])
      if let header = manifest.safetensorsHeader {
        let name = names.new(model.fullName("#header"))
        model.header = name
        parts.append(try TensorInfo(name: name, dtype: .u8, shape: [header.count]))
        streamsOfPart[ExactName(name)] = [Stream(.bytes(header), .text, length: header.count)]
      }
      for tensor in manifest.tensors {
        let planned = tensors[index]
        var partNames: [String] = []
        if let twin = planned.twin {
          partNames = partsOfTensor[twin]
        } else {
          for (shape, streams) in codedStreams(of: index) {
            let name =
              shape.suffix.isEmpty ? planned.fullName : names.new(planned.fullName + shape.suffix)
            partNames.append(name)
            parts.append(try TensorInfo(name: name, dtype: shape.dtype, shape: shape.shape))
            streamsOfPart[ExactName(name)] = streams
          }
        }
        partsOfTensor.append(partNames)
        model.tensors.append(entry(of: tensor, index, parts: partNames))
        index += 1
      }
      recipe.models.append(model)
    }
    let inner = try Safetensors.Layout(
      writing: Manifest(parts, metadata: ["bundle": recipe.json]), path: path)
    streams = [Stream(.bytes(inner.prefix), .text, length: inner.prefix.count)]
    for part in inner.manifest.tensors { streams += streamsOfPart[ExactName(part.name)]! }
    for (stream, index) in zip(streams, streams.indices) {
      for (place, size) in stream.sizes.enumerated() { frames.append((index, place, size)) }
    }
  }

  /// The parts of a tensor, each with its streams.
  private func codedStreams(of index: Int) -> [(PartShape, [Stream])] {
    let planned = tensors[index]
    let (finding, choice) = (planned.finding, planned.choice)
    let lengths = finding.sparse.reduce(into: (gaps: 0, values: 0)) {
      $0.gaps += $1.gaps
      $0.values += $1.values
    }
    let shapes = choice.codec.parts(
      of: planned.tensor, sparse: lengths, group: finding.group ?? 1)
    var next = 0
    return shapes.map { shape in
      let part = try! TensorInfo(name: "", dtype: shape.dtype, shape: shape.shape)
      let streams = (0..<shape.streams).map { _ in
        defer { next += 1 }
        let content = Content.coded(index, stream: next)
        guard shape.isCutByBlock else {
          return Stream(content, choice.modes[next], length: part.byteCount / shape.streams)
        }
        return Stream(
          content, choice.modes[next],
          sizes: finding.sparse.map { next == 0 ? $0.gaps : $0.values })
      }
      return (shape, streams)
    }
  }

  private func entry(of tensor: TensorInfo, _ index: Int, parts: [String]) -> Bundle.Recipe.Entry {
    let planned = tensors[index]
    // A twin is coded as its elder, in the same parts.
    let coded = tensors[planned.twin ?? index]
    let defaults = coded.choice.codec.suffixes.map { planned.fullName + $0 }
    var entry = Bundle.Recipe.Entry(
      tensor: tensor, codec: coded.choice.codec, checksum: planned.finding.checksum,
      parts: parts == defaults ? [] : parts, group: coded.finding.group,
      error: coded.finding.error.map { "\($0)" })
    if coded.choice.rotation != 1 { entry.rotation = coded.choice.rotation }
    if let candidate = coded.difference?.candidate {
      entry.reference =
        candidate.position.map { .inside(tensors[$0].fullName) }
        ?? .base(candidate.tensor.name, checksum: candidate.checksum)
    }
    return entry
  }
}

/// Names for inner tensors that no tensor has.
private struct PartNames {
  var taken: Set<ExactName>

  /// The wanted name, or one like it.
  mutating func new(_ wanted: String) -> String {
    var name = wanted
    while !taken.insert(ExactName(name)).inserted { name += "#" }
    return name
  }
}

// MARK: - Writing

extension Packing {
  /// What a worker's buffers may take, whichever codecs it meets.
  static let memoryPerWorker = 40 << 20

  /// Makes the frames, several at a time, and puts the file in place.
  func write(workers: Int) throws {
    let pending = try PendingFile(for: path)
    let file = try pending.open()
    let table = GrowingTable()
    let turnstile = Turnstile()
    do {
      try forEachStep(count: frames.count, workers: workers) {
        Workbench()
      } body: { step, workbench in
        do {
          let (index, place, size) = frames[step]
          try fill(workbench, with: place, of: streams[index], size)
          let content = workbench.content.first(size)
          let frameSize = workbench.encoder.encode(
            content, streams[index].mode, into: workbench.frame.bytes)
          let checksum = FrameChecksums.of(workbench.frame.first(frameSize))
          guard
            let offset = turnstile.pass(step, { table.append(frameSize, size, checksum) })
          else { return }
          try file.write(workbench.frame.first(frameSize), at: offset)
          file.startFlush(at: offset, count: frameSize)
        } catch {
          turnstile.close()
          throw error
        }
      }
      try file.write(table.ending.span.bytes, at: table.end)
    } catch let error as CheckpointError where error.file == pending.temporaryPath {
      throw CheckpointError(
        file: path, tensor: error.tensor, error.problem, remedy: error.remedy)
    }
    try pending.commit()
  }

  /// Makes what a frame will hold.
  private func fill(_ workbench: Workbench, with index: Int, of stream: Stream, _ size: Int)
    throws(CheckpointError)
  {
    switch stream.content {
    case .bytes(let bytes):
      let begin = index * ZstdFrame.contentSize
      workbench.content.part(0..<size).copyBytes(from: bytes[begin..<begin + size])
    case .coded(let position, let number):
      let planned = tensors[position]
      let made = try code(index, of: planned, stream: number, size, workbench)
      guard made == size else {
        throw CheckpointError(
          file: planned.source.path, tensor: planned.tensor.name,
          "changed while it was being read", remedy: "pack it again")
      }
    }
  }

  /// Codes a frame of one of a tensor's streams into the workbench's content.
  /// - Returns: its size, which is another than planned only if the tensor has changed.
  private func code(
    _ index: Int, of planned: Planned, stream: Int, _ size: Int, _ workbench: Workbench
  ) throws(CheckpointError) -> Int {
    let (tensor, width) = (planned.tensor, planned.tensor.dtype.byteWidth)
    let target = workbench.content.octets
    let codec = planned.choice.codec
    guard codec != .raw else {
      try planned.source.read(
        tensor, at: index * ZstdFrame.contentSize, into: workbench.content.part(0..<size))
      return size
    }
    if codec.isLossy {
      try codeLossy(index, of: planned, codec, isScale: stream == 1, size, workbench)
      return size
    }
    // Every other codec has a frame for each block.
    let begin = index * Codec.blockCount
    let count = min(Codec.blockCount, tensor.elementCount - begin)
    let elements = workbench.elements
    try planned.source.read(tensor, at: begin * width, into: elements.part(0..<count * width))
    if let candidate = planned.difference?.candidate {
      try candidate.source.read(
        candidate.tensor, at: begin * width, into: workbench.other.part(0..<count * width))
    }
    switch codec {
    case .planes:
      Planes.extract(
        stream, of: count, width: width, rotation: planned.choice.rotation,
        from: UnsafeRawPointer(elements.start),
        into: target)
    case .ulp:
      Steps.difference(
        stream, of: count, width: width, UnsafeRawPointer(elements.start),
        from: UnsafeRawPointer(workbench.other.start), into: target)
    case .xor:
      exclusiveOr(
        elements.start, with: UnsafeRawPointer(workbench.other.start), count: count * width)
      Planes.extract(
        stream, of: count, width: width, rotation: 0, from: UnsafeRawPointer(elements.start),
        into: target)
    case .sparse:
      let lengths = Gaps.write(
        UnsafeRawPointer(elements.start), count: count, width: width,
        gaps: workbench.gaps.octets, values: workbench.other.start)
      guard stream > 0 else {
        target.update(from: workbench.gaps.octets, count: min(lengths.gaps, size))
        return lengths.gaps
      }
      Planes.extract(
        stream - 1, of: min(lengths.values, size), width: width,
        rotation: planned.choice.rotation,
        from: UnsafeRawPointer(workbench.other.start), into: target)
      return lengths.values
    case .raw, .int8, .int4, .sign1: preconditionFailure("coded above")
    }
    return count
  }

  private func codeLossy(
    _ index: Int, of planned: Planned, _ codec: Codec, isScale: Bool, _ size: Int,
    _ workbench: Workbench
  ) throws(CheckpointError) {
    let group = planned.finding.group!
    let content = workbench.content
    if isScale {
      let first = index * ZstdFrame.contentSize / 4
      let scales = content.start.assumingMemoryBound(to: Float.self)
      let elements =
        first * group..<min((first + size / 4) * group, planned.tensor.elementCount)
      try workbench.groups.forEachGroup(
        of: planned.tensor, planned.source, size: group, in: elements
      ) { (number, values) in scales[number - first] = Quantisation.scale(of: values, codec) }
      return
    }
    // Elements in a frame: as many as it takes to fill it.
    let perFrame = ZstdFrame.contentSize / Quantisation.codedSize(8, codec) * 8
    let begin = index * perFrame
    let elements = begin..<min(begin + perFrame, planned.tensor.elementCount)
    content.octets.update(repeating: 0, count: size)
    try workbench.groups.forEachGroup(
      of: planned.tensor, planned.source, size: group, in: elements
    ) { (number, values) in
      let wanted = elements.clamped(to: number * group..<number * group + values.count)
      let part = wanted.lowerBound - number * group..<wanted.upperBound - number * group
      Quantisation.encode(
        UnsafeBufferPointer(rebasing: values[part]), codec,
        scale: Quantisation.scale(of: values, codec), into: content.octets,
        at: wanted.lowerBound - begin)
    }
  }
}

/// What one worker makes frames with.
private final class Workbench {
  let encoder = FrameEncoder()
  let content = PinnedBytes(count: ZstdFrame.contentSize)
  let frame = PinnedBytes(count: ZstdFrame.largest)
  let elements = PinnedBytes(count: 8 * Codec.blockCount)
  /// The reference's elements, or the values of a sparse block.
  let other = PinnedBytes(count: 8 * Codec.blockCount)
  let gaps = PinnedBytes(count: Gaps.largest(Codec.blockCount))
  lazy var groups = GroupReader()
}

/// The seek table while frames are appended; touched by one thread at a time, in a turnstile.
private final class GrowingTable: @unchecked Sendable {
  private var table = SeekTable()
  private var checksums = FrameChecksums()

  /// - Returns: where the frame goes.
  func append(_ size: Int, _ content: Int, _ checksum: UInt32) -> Int {
    table.append(frame: size, content: content)
    checksums.append(checksum)
    return table[table.count - 1].lowerBound
  }

  var end: Int { table.starts.last! }

  /// What follows the last frame.
  var ending: [UInt8] {
    var whole = table
    whole.append(frame: checksums.bytes.count, content: 0)
    return checksums.bytes + whole.bytes
  }
}
