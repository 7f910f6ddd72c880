/// Makes what the frames of a tensor's streams hold; a worker keeps one.
///
/// A block is read and coded once for all its streams that are wanted together.
final class BlockCoder {
  private let elements: PinnedBytes
  /// The other tensor's elements.
  private let other: PinnedBytes
  /// What is split into planes, if it is not the elements themselves.
  private let codes: PinnedBytes
  private let gaps = PinnedBytes(count: Gaps.largest(Codec.blockCount))
  let content = PinnedBytes(count: ZstdFrame.contentSize)
  private lazy var groups = GroupReader()
  private lazy var scratch = PinnedBytes(count: Steps.scratch)
  /// How the block that was read last becomes planes, and the length of its gaps.
  private var split = Split()
  private let hashes: TensorHashes

  private struct Split {
    var width = 1
    var count = 0
    var rotation = 0
    var isCoded = false
    /// Whether the codes are planes already, so far apart as a frame is long.
    var isSplit = false
    var gaps = 0
  }

  /// - Parameters:
  ///   - width: bytes of the widest elements that will come.
  ///   - hashes: takes note of all that is read.
  init(width: Int, hashes: TensorHashes) {
    self.hashes = hashes
    elements = PinnedBytes(count: width * Codec.blockCount)
    other = PinnedBytes(count: width * Codec.blockCount)
    codes = PinnedBytes(count: width * Codec.blockCount)
  }

  /// Bytes that the buffers take.
  static func memory(width: Int, isQuantised: Bool) -> Int {
    3 * width * Codec.blockCount + 3 << 20 + Steps.scratch + (isQuantised ? GroupReader.memory : 0)
  }

  /// Reads what frames `index` of the tensor's streams are made from, for `reading` first.
  func read(_ index: Int, of planned: Packing.Planned, for reading: TensorHashes.Reading)
    throws(CheckpointError)
  {
    let (tensor, codec) = (planned.tensor, planned.choice.codec)
    // These two are read frame by frame instead.
    guard codec != .raw, !codec.isQuantised else { return }
    let width = tensor.dtype.byteWidth
    let begin = index * Codec.blockCount
    let count = min(Codec.blockCount, tensor.elementCount - begin)
    let range = begin * width..<(begin + count) * width
    try read(range, of: tensor, planned.source, into: elements, for: reading)
    if let candidate = planned.difference?.candidate {
      var reading = reading
      reading.isOther = true
      try read(range, of: candidate.tensor, candidate.source, into: other, for: reading)
    }
    split = Split(width: width, count: count)
    switch codec {
    case .planes: split.rotation = planned.choice.rotation
    case .xor:
      exclusiveOr(
        elements.start, with: UnsafeRawPointer(other.start), count: count * width)
    case .ulp where Steps.splits(width):
      Steps.split(
        elements, count: count, from: other,
        into: (codes.octets, codes.octets + ZstdFrame.contentSize), scratch)
      split.isSplit = true
    case .ulp:
      Steps.difference(
        of: count, width: width, UnsafeRawPointer(elements.start),
        from: UnsafeRawPointer(other.start), into: codes.start)
      split.isCoded = true
    case .sparse:
      let lengths = Gaps.write(
        UnsafeRawPointer(elements.start), count: count, width: width, gaps: gaps.octets,
        values: codes.start)
      split = Split(
        width: width, count: lengths.values, rotation: planned.choice.rotation, isCoded: true,
        gaps: lengths.gaps)
    case .sparseULP:
      let lengths = Gaps.writeSteps(
        of: elements, from: other, through: codes, count: count, width: width, gaps: gaps.octets,
        values: elements.start)
      split = Split(
        width: width, count: lengths.values, rotation: planned.choice.rotation,
        gaps: lengths.gaps)
    case .raw, .int8, .int4, .sign1: preconditionFailure("read frame by frame")
    case .lowrank: preconditionFailure("its factors have been found already")
    }
  }

  /// Reads bytes of a tensor, in pieces that are at hand still when they are hashed.
  private func read(
    _ range: Range<Int>, of tensor: TensorInfo, _ source: any TensorSource, into bytes: PinnedBytes,
    for reading: TensorHashes.Reading
  ) throws(CheckpointError) {
    for begin in stride(from: 0, to: range.count, by: Packing.hashedPiece) {
      let piece = bytes.part(begin..<min(begin + Packing.hashedPiece, range.count))
      try source.read(tensor, at: range.lowerBound + begin, into: piece)
      try hashes.add(UnsafeRawBufferPointer(piece), of: reading, at: range.lowerBound + begin)
    }
  }

  /// What frame `index` of a stream holds: of the block that was read last, unless the stream is
  /// not cut by block.
  /// - Parameter size: what the frame should hold; another size comes back only if the tensor has
  ///   changed.
  func stream(
    _ stream: Int, _ index: Int, of planned: Packing.Planned, for reading: TensorHashes.Reading,
    _ size: Int
  ) throws(CheckpointError) -> UnsafeRawBufferPointer {
    let codec = planned.choice.codec
    if codec == .raw {
      let begin = index * ZstdFrame.contentSize
      try planned.source.read(planned.tensor, at: begin, into: content.part(0..<size))
      try hashes.add(content.first(size), of: reading, at: begin)
      return content.first(size)
    }
    if codec.isQuantised {
      try quantise(index, of: planned, isScale: stream == 1, size)
      return content.first(size)
    }
    if codec.isSparse && stream == 0 { return gaps.first(split.gaps) }
    if split.isSplit {
      let begin = stream * ZstdFrame.contentSize
      return UnsafeRawBufferPointer(rebasing: codes.bytes[begin..<begin + split.count])
    }
    Planes.extract(
      codec.isSparse ? stream - 1 : stream, of: split.count, width: split.width,
      rotation: split.rotation,
      from: UnsafeRawPointer(split.isCoded ? codes.start : elements.start), into: content.octets)
    return content.first(split.count)
  }

  private func quantise(
    _ index: Int, of planned: Packing.Planned, isScale: Bool, _ size: Int
  ) throws(CheckpointError) {
    let (group, codec) = (planned.finding.group!, planned.choice.codec)
    if isScale {
      let first = index * ZstdFrame.contentSize / 4
      let scales = content.start.assumingMemoryBound(to: Float.self)
      let elements =
        first * group..<min((first + size / 4) * group, planned.tensor.elementCount)
      try groups.forEachGroup(
        of: planned.tensor, planned.source, size: group, in: elements
      ) { (number, values) in scales[number - first] = Quantisation.scale(of: values, codec) }
      return
    }
    // Elements in a frame: as many as it takes to fill it.
    let perFrame = ZstdFrame.contentSize / Quantisation.codedSize(8, codec) * 8
    let begin = index * perFrame
    let elements = begin..<min(begin + perFrame, planned.tensor.elementCount)
    content.octets.update(repeating: 0, count: size)
    try groups.forEachGroup(
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
