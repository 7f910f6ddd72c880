extension Bundle {
  /// What a first look at a tensor has found.
  struct Finding: Sendable {
    /// The checksum of what unpacking gives back; nil until it is known.
    var checksum: UInt64?
    /// A hash of the sample, which tensors of the same bytes have in common.
    var sample: UInt64 = 0
    /// The best coding of the tensor by itself.
    var own = Choice(codec: .raw, modes: [.stored], cost: 0)
    /// Codings as a difference from another tensor that take less, best first.
    var differences: [(choice: Choice, candidate: Candidate)] = []
    /// For the quantised codecs.
    var group: Int?
    /// For `lowrank`: where its factors wait, and their rank.
    var factors: (left: Int, right: Int, rank: Int)?
    /// For the lossy codecs.
    var error: Double?
  }

  /// A codec and the way in which each stream's frames are compressed.
  struct Choice: Sendable {
    var codec: Codec
    var modes: [ZstdFrame.Mode]
    /// How far elements are rotated before they are split into planes.
    var rotation = 1
    /// For each block the lengths of its gaps and of its values, for `sparse` and `sparseULP`.
    var sparse: [(gaps: Int, values: Int)] = []
    /// Bytes that the sample takes.
    var cost: Int
  }

  /// Another tensor that one could be a difference from.
  struct Candidate: Sendable {
    let tensor: TensorInfo
    let source: any TensorSource
    /// Its position among the tensors of the bundle, unless it is the base's.
    var position: Int?
    /// The checksum of a base's tensor; nil until it is known.
    var checksum: UInt64?

    var isOutside: Bool { position == nil }
  }

  /// Looks at tensors before they are packed; a worker keeps one.
  final class Survey {
    private let encoder = FrameEncoder()
    private let sample = PinnedBytes(count: sampleCount * 8)
    private let other = PinnedBytes(count: sampleCount * 8)
    private let octets = PinnedBytes(count: Gaps.largest(sampleCount * 8))
    private let values = PinnedBytes(count: sampleCount * 8)
    private let frame = PinnedBytes(count: ZstdFrame.largest)
    /// What whole tensors are read through.
    private let piece = PinnedBytes(count: Packing.hashedPiece)
    private lazy var codes = PinnedBytes(count: Self.sampleCount * 8)
    private lazy var blockOther = PinnedBytes(count: 8 * Codec.blockCount)
    private lazy var blockCodes = PinnedBytes(count: 8 * Codec.blockCount)
    private let scratch = PinnedBytes(count: Steps.scratch)
    private lazy var block = PinnedBytes(count: 8 * Codec.blockCount)
    private lazy var blockValues = PinnedBytes(count: 8 * Codec.blockCount)
    private lazy var blockGaps = PinnedBytes(count: Gaps.largest(Codec.blockCount))
    lazy var groups = GroupReader()

    /// Most elements that are tried, in pieces from all over the tensor.
    private static let sampleCount = 1 << 16
    private static let smallestSampleCount = 1 << 13
    private static let samplePieces = 16
    private static let smallestRun = 1 << 11

    /// Bytes that the buffers take.
    static let memory =
      5 * sampleCount * 8 + ZstdFrame.largest + Packing.hashedPiece + 33 * Codec.blockCount
      + Steps.scratch + GroupReader.memory + FrameEncoder.memory
  }
}

extension Bundle.Survey {
  func look(
    at tensor: TensorInfo, of source: any TensorSource, _ candidates: [Bundle.Candidate],
    _ lossy: Bundle.Lossy?, _ factors: FactorFile?
  ) throws -> Bundle.Finding {
    if let lossy, let finding = try approximate(tensor, source, lossy, factors) {
      // Its checksum is of what it becomes; what it is has to be what was recorded.
      if source.recordedChecksum(of: tensor) != nil {
        _ = try source.checksum(of: tensor, through: piece)
      }
      return finding
    }
    var finding = Bundle.Finding()
    let size = try readSample(of: tensor, source, into: sample)
    finding.sample = xxh3(RawSpan(_unsafeBytes: sample.first(size)))
    finding.own.cost = .max
    var others = candidates[...]
    if let base = others.first, base.isOutside {
      others.removeFirst()
      finding.differences = try differences(of: tensor, source, size, from: base)
    }
    // A base outside is always there to refer to, so a close one leaves little to try. In models
    // of small tensors trying takes as long as packing.
    let hasCloseBase = finding.differences.contains { isClose($0.choice, size) }
    for codec in hasCloseBase ? [.sparse] : [Codec.raw, .planes, .sparse]
    where codec.suits(tensor.dtype) {
      var choice = tryOut(codec, tensor, size)
      // Simpler codecs come first and stay unless another gains a hundredth.
      guard choice != nil, finding.own.cost == .max || gains(choice!, over: finding.own) else {
        continue
      }
      if codec == .sparse {
        guard let counts = try countSparse(tensor, source) else { continue }
        choice!.sparse = counts
      }
      finding.own = choice!
    }
    for candidate in hasCloseBase ? [] : others {
      finding.differences += try differences(
        of: tensor, source, size, from: candidate, toBeat: finding.own)
    }
    finding.differences.removeAll { !gains($0.choice, over: finding.own) }
    finding.differences.sort { $0.choice.cost < $1.choice.cost }
    return finding
  }

  /// The sampled tensor as differences from another.
  /// - Parameter own: only if a quarter of the sample takes less than it would by this.
  private func differences(
    of tensor: TensorInfo, _ source: any TensorSource, _ size: Int,
    from candidate: Bundle.Candidate, toBeat own: Bundle.Choice? = nil
  ) throws -> [(choice: Bundle.Choice, candidate: Bundle.Candidate)] {
    _ = try readSample(of: candidate.tensor, candidate.source, into: other)
    var found: [(choice: Bundle.Choice, candidate: Bundle.Candidate)] = []
    for codec in [Codec.ulp, .xor] where codec.suits(tensor.dtype) {
      // Where floats are few steps apart, their bits differ as much.
      guard !found.contains(where: { isClose($0.choice, size) }) else { break }
      if let own, size >= Self.smallestSampleCount,
        let quick = tryOut(codec, tensor, size / 4 / 8 * 8), quick.cost > own.cost / 4
      {
        continue
      }
      guard let choice = tryOut(codec, tensor, size) else { continue }
      found.append((choice, candidate))
      // Where most elements are the other's very own.
      if codec == .ulp, var sparse = tryOut(.sparseULP, tensor, size),
        gains(sparse, over: choice), let counts = try countSparse(tensor, source, from: candidate)
      {
        sparse.sparse = counts
        found.append((sparse, candidate))
      }
    }
    return found
  }

  /// Whether a difference takes so little that nothing else need be tried.
  private func isClose(_ choice: Bundle.Choice, _ size: Int) -> Bool { choice.cost < size / 2 }

  private func gains(_ choice: Bundle.Choice, over other: Bundle.Choice) -> Bool {
    choice.cost < other.cost - other.cost / 100
  }

  /// - Returns: the bytes of the sample.
  private func readSample(
    of tensor: TensorInfo, _ source: any TensorSource, into sample: PinnedBytes
  ) throws(CheckpointError) -> Int {
    let width = tensor.dtype.byteWidth
    // So much is enough to tell codecs apart: each is tried on it in several ways, which together
    // should take little of the time that packing does.
    let share = tensor.elementCount / 32 / Self.samplePieces * Self.samplePieces
    let count = min(max(share, Self.smallestSampleCount), Self.sampleCount)
    let whole = min(tensor.byteCount, count * width)
    guard tensor.byteCount > whole else {
      try source.read(tensor, at: 0, into: sample.part(0..<whole))
      return whole
    }
    let size = whole / Self.samplePieces
    // The pieces lie evenly, the first at the start and the last at the end.
    let last = (tensor.byteCount - size) / width
    for index in 0..<Self.samplePieces {
      let offset = last / (Self.samplePieces - 1) * index * width
      // A quarter of the sample is from all over the tensor too.
      let place = index / 4 + index % 4 * (Self.samplePieces / 4)
      try source.read(tensor, at: offset, into: sample.part(place * size..<(place + 1) * size))
    }
    return whole
  }

  /// What the sample takes when it is coded so, with the best mode for each stream.
  private func tryOut(_ codec: Codec, _ tensor: TensorInfo, _ size: Int) -> Bundle.Choice? {
    let width = tensor.dtype.byteWidth
    let count = size / width
    var choice = Bundle.Choice(codec: codec, modes: [], cost: 0)
    func add(_ content: UnsafeRawBufferPointer, runs: Int? = nil) {
      let (cost, mode) = bestMode(for: content, runs: runs)
      choice.cost += cost
      choice.modes.append(mode)
    }
    func addPlanes(of elements: PinnedBytes, _ count: Int, rotation: Int, runs: Int? = nil) {
      for plane in 0..<width {
        Planes.extract(
          plane, of: count, width: width, rotation: rotation,
          from: UnsafeRawPointer(elements.start), into: octets.octets)
        add(octets.first(count), runs: runs)
      }
    }
    switch codec {
    case .raw: add(sample.first(size))
    case .planes: addPlanes(of: sample, count, rotation: 1)
    case .sparse:
      let lengths = Gaps.write(
        UnsafeRawPointer(sample.start), count: count, width: width, gaps: octets.octets,
        values: values.start)
      guard lengths.values < count / 2 else { return nil }
      add(octets.first(lengths.gaps))
      let gaps = choice
      // What is left of a pruned difference has few bits that vary, anywhere: the best split
      // has them in one plane.
      choice.cost = .max
      for rotation in width == 1 ? 1...1 : 1...7 {
        let best = choice
        choice = gaps
        choice.rotation = rotation
        addPlanes(of: values, lengths.values, rotation: rotation)
        if best.cost <= choice.cost { choice = best }
      }
    case .ulp:
      // As many runs as a block has, but not so short that their codes would cost too much.
      let blockRuns = min(tensor.elementCount, Codec.blockCount) / ZstdFrame.runSize
      let runs = max(1, min(blockRuns, count / Self.smallestRun))
      if Steps.splits(width) {
        values.part(0..<size).copyMemory(from: sample.first(size))
        Steps.split(
          values, count: count, from: other, into: (octets.octets, octets.octets + count), scratch)
        add(octets.first(count), runs: runs)
        add(UnsafeRawBufferPointer(octets.part(count..<2 * count)), runs: runs)
      } else {
        Steps.difference(
          of: count, width: width, UnsafeRawPointer(sample.start),
          from: UnsafeRawPointer(other.start), into: values.start)
        addPlanes(of: values, count, rotation: 0, runs: runs)
      }
    case .xor:
      values.part(0..<size).copyMemory(from: sample.first(size))
      exclusiveOr(values.start, with: UnsafeRawPointer(other.start), count: size)
      addPlanes(of: values, count, rotation: 0)
    case .sparseULP:
      let lengths = Gaps.writeSteps(
        of: sample, from: other, through: codes, count: count, width: width, gaps: octets.octets,
        values: values.start)
      guard lengths.values < count / 4 else { return nil }
      // Both are sorted as the codes are.
      let blockCount = min(tensor.elementCount, Codec.blockCount)
      func runs(_ length: Int) -> Int {
        max(1, min(length * blockCount / count / ZstdFrame.runSize, length / Self.smallestRun))
      }
      add(octets.first(lengths.gaps), runs: runs(lengths.gaps))
      choice.rotation = 0
      addPlanes(
        of: values, lengths.values, rotation: 0, runs: runs(lengths.values))
    case .int8, .int4, .sign1, .lowrank: preconditionFailure("lossy codecs are not tried out")
    }
    return choice
  }

  /// - Parameter runs: of sorted content, how many runs to take it for.
  private func bestMode(for content: UnsafeRawBufferPointer, runs: Int?) -> (
    cost: Int, ZstdFrame.Mode
  ) {
    var (literals, matches) = (0, 0)
    let length = max(1, (content.count + (runs ?? 1) - 1) / (runs ?? 1))
    for begin in stride(from: 0, to: max(1, content.count), by: length) {
      let run = UnsafeRawBufferPointer(
        rebasing: content[begin..<min(begin + length, content.count)])
      literals += encoder.encode(run, .literals, into: frame.bytes)
      matches += encoder.encode(run, .matches, into: frame.bytes)
    }
    let (cost, mode): (Int, ZstdFrame.Mode) =
      // What is stored is unpacked at the speed of memory, so a few bytes are no reason.
      min(literals, matches) >= content.count - content.count / 200
      ? (ZstdFrame.storedSize(content.count), .stored)
      : literals <= matches + matches / 200
        ? (literals, runs == nil ? .literals : .runs) : (matches, .matches)
    return (cost + SeekTable.costOfFrame, mode)
  }

  /// The lengths of every block's gaps and values, unless a block does not fit a frame.
  /// - Parameter candidate: count the steps from this.
  private func countSparse(
    _ tensor: TensorInfo, _ source: any TensorSource, from candidate: Bundle.Candidate? = nil
  ) throws(CheckpointError) -> [(gaps: Int, values: Int)]? {
    let width = tensor.dtype.byteWidth
    var counts: [(gaps: Int, values: Int)] = []
    for index in 0..<Codec.blocks(of: tensor) {
      let begin = index * Codec.blockCount
      let count = min(Codec.blockCount, tensor.elementCount - begin)
      try source.read(tensor, at: begin * width, into: block.part(0..<count * width))
      let lengths: (gaps: Int, values: Int)
      if let candidate {
        try candidate.source.read(
          candidate.tensor, at: begin * width, into: blockOther.part(0..<count * width))
        lengths = Gaps.writeSteps(
          of: block, from: blockOther, through: blockCodes, count: count, width: width,
          gaps: blockGaps.octets, values: blockValues.start)
      } else {
        lengths = Gaps.write(
          UnsafeRawPointer(block.start), count: count, width: width, gaps: blockGaps.octets,
          values: blockValues.start)
      }
      guard lengths.gaps <= ZstdFrame.contentSize else { return nil }
      counts.append(lengths)
    }
    return counts
  }
}
