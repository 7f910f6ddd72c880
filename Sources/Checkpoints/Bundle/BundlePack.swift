import Synchronization

extension Bundle {
  /// Packs a checkpoint. The same input gives the same bytes whatever `workers` and `memory` are.
  ///
  /// - Parameter memory: bytes that the workers' buffers may take; fewer workers run if it is
  ///   too little for all.
  public static func pack(
    _ source: any TensorSource, to path: String, workers: Int = 2, memory: Int = 1 << 30
  ) throws {
    let packing = try Packing([("", source)], path, workers: workers)
    try packing.write(workers: min(workers, max(1, memory / packing.memoryPerWorker)))
  }
}

/// A bundle before it is written: every tensor has been looked at and the layout is known.
struct Packing: Sendable {
  private let path: String
  private let tensors: [Planned]
  /// All streams, in the order of the file.
  private var streams: [Stream] = []
  /// All frames: which stream each is of, and which of its bytes it holds.
  private var frames: [(stream: Int, range: Range<Int>)] = []

  private struct Planned: Sendable {
    let tensor: TensorInfo
    let source: any TensorSource
    let finding: Bundle.Finding
  }

  private struct Stream: Sendable {
    let content: Content
    let length: Int
    let mode: ZstdFrame.Mode
  }

  private enum Content: Sendable {
    case bytes([UInt8])
    case plane(Int, ofTensor: Int)
  }

  init(
    _ models: [(name: String, source: any TensorSource)], _ path: String, workers: Int
  ) throws {
    self.path = path
    let all = models.flatMap { model in model.source.manifest.tensors.map { ($0, model.source) } }
    let findings = try Self.survey(all, workers: workers)
    tensors = zip(all, findings).map { Planned(tensor: $0.0, source: $0.1, finding: $1) }
    try layOut(models)
  }

  /// Looks at all tensors, several at a time.
  private static func survey(_ tensors: [(TensorInfo, any TensorSource)], workers: Int) throws
    -> [Bundle.Finding]
  {
    let findings = Mutex([Bundle.Finding?](repeating: nil, count: tensors.count))
    try forEachStep(count: tensors.count, workers: workers) {
      Bundle.Survey()
    } body: { step, survey in
      let finding = try survey.look(at: tensors[step].0, of: tensors[step].1)
      findings.withLock { $0[step] = finding }
    }
    return findings.withLock { $0.map { $0! } }
  }

  /// Names the parts, writes the recipe and puts the streams into the order of the file.
  private mutating func layOut(_ models: [(name: String, source: any TensorSource)]) throws {
    var recipe = Bundle.Recipe(models: [])
    var names = PartNames()
    var parts: [TensorInfo] = []
    var streamsOfPart: [ExactName: [Stream]] = [:]
    func add(_ name: String, _ dtype: DType, _ shape: [Int], _ streams: [Stream]) throws {
      parts.append(try TensorInfo(name: name, dtype: dtype, shape: shape))
      streamsOfPart[ExactName(name)] = streams
    }
    var index = 0
    for (name, source) in models {
      let manifest = source.manifest
      var model = Bundle.Recipe.Model(
        name: name, metadata: manifest.safetensorsHeader == nil ? manifest.metadata : [:],
        tensors: [])
      for tensor in manifest.tensors { names.reserve(model.fullName(tensor.name)) }
      if let header = manifest.safetensorsHeader {
        let name = names.new(model.fullName("#header"))
        model.header = name
        try add(
          name, .u8, [header.count],
          [Stream(content: .bytes(header), length: header.count, mode: .text)])
      }
      for tensor in manifest.tensors {
        let finding = tensors[index].finding
        let name = model.fullName(tensor.name)
        let count = finding.modes.count
        let streams = finding.modes.enumerated().map { plane, mode in
          Stream(
            content: .plane(plane, ofTensor: index), length: tensor.byteCount / count, mode: mode)
        }
        switch finding.codec {
        case .raw: try add(name, tensor.dtype, tensor.shape, streams)
        case .planes: try add(name, .u8, [count, tensor.elementCount], streams)
        }
        model.tensors.append(
          Bundle.Recipe.Entry(
            tensor: tensor, codec: finding.codec, checksum: finding.checksum, parts: [name]))
        index += 1
      }
      recipe.models.append(model)
    }
    let inner = try Safetensors.Layout(
      writing: Manifest(parts, metadata: ["bundle": recipe.json]), path: path)
    streams = [
      Stream(content: .bytes(inner.prefix), length: inner.prefix.count, mode: .text)
    ]
    for part in inner.manifest.tensors { streams += streamsOfPart[ExactName(part.name)]! }
    for (index, stream) in streams.enumerated() {
      for begin in stride(from: 0, to: stream.length, by: ZstdFrame.contentSize) {
        frames.append((index, begin..<min(begin + ZstdFrame.contentSize, stream.length)))
      }
    }
  }
}

/// Names for inner tensors that no tensor has.
private struct PartNames {
  private var taken = Set<ExactName>()

  mutating func reserve(_ name: String) { taken.insert(ExactName(name)) }

  /// The wanted name, or one like it.
  mutating func new(_ wanted: String) -> String {
    var name = wanted
    while !taken.insert(ExactName(name)).inserted { name += "#" }
    return name
  }
}

// MARK: - Writing

extension Packing {
  private var widest: Int { tensors.map { max($0.tensor.dtype.byteWidth, 1) }.max() ?? 1 }

  var memoryPerWorker: Int { (widest + 1) * ZstdFrame.contentSize + ZstdFrame.largest }

  /// Makes the frames, several at a time, and puts the file in place.
  func write(workers: Int) throws {
    let pending = try PendingFile(for: path)
    let file = try pending.open()
    let table = GrowingTable()
    let turnstile = Turnstile()
    do {
      try forEachStep(count: frames.count, workers: workers) {
        Workbench(widest: widest)
      } body: { step, workbench in
        do {
          let (index, range) = frames[step]
          let stream = streams[index]
          let content = try content(of: stream, range, workbench)
          let size = workbench.encoder.encode(content, stream.mode, into: workbench.frame.bytes)
          guard let place = turnstile.pass(step, { table.append(size, content.count) }) else {
            return
          }
          try file.write(workbench.frame.first(size), at: place)
          file.startFlush(at: place, count: size)
        } catch {
          turnstile.close()
          throw error
        }
      }
      try file.write(table.table.bytes.span.bytes, at: table.table.starts.last!)
    } catch let error as CheckpointError where error.file == pending.temporaryPath {
      throw CheckpointError(
        file: path, tensor: error.tensor, error.problem, remedy: error.remedy)
    }
    try pending.commit()
  }

  /// The bytes that a frame will hold.
  private func content(of stream: Stream, _ range: Range<Int>, _ workbench: Workbench)
    throws(CheckpointError) -> UnsafeRawBufferPointer
  {
    switch stream.content {
    case .bytes(let bytes):
      workbench.content.part(0..<range.count).copyBytes(from: bytes[range])
    case .plane(let plane, let index):
      let planned = tensors[index]
      let width = planned.finding.modes.count
      try planned.source.read(
        planned.tensor, at: range.lowerBound * width,
        into: workbench.elements.part(0..<range.count * width))
      guard width > 1 else { return workbench.elements.first(range.count) }
      Planes.extract(
        plane, of: range.count, width: width, rotated: true,
        from: UnsafeRawPointer(workbench.elements.start),
        into: workbench.content.start.assumingMemoryBound(to: UInt8.self))
    }
    return workbench.content.first(range.count)
  }
}

/// What one worker makes frames with.
private final class Workbench {
  let encoder = FrameEncoder()
  let elements: PinnedBytes
  let content = PinnedBytes(count: ZstdFrame.contentSize)
  let frame = PinnedBytes(count: ZstdFrame.largest)

  init(widest: Int) { elements = PinnedBytes(count: widest * ZstdFrame.contentSize) }
}

/// The seek table while frames are appended; touched by one thread at a time, in a turnstile.
private final class GrowingTable: @unchecked Sendable {
  private(set) var table = SeekTable()

  /// - Returns: where the frame goes.
  func append(_ size: Int, _ content: Int) -> Int {
    table.append(frame: size, content: content)
    return table.starts[table.count - 1]
  }
}
