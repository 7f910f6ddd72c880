import Synchronization

extension Packing {
  /// Makes the frames, several at a time, and puts the file in place.
  ///
  /// - Parameter waiting: bytes of memory for frames that are made before it is their turn.
  func write(workers: Int, waiting: Int, synced isSynced: Bool) throws {
    let pending = try PendingFile(for: path, synced: isSynced)
    let file = try pending.open()
    let behind = isSynced ? WriteBehind() : nil
    let table = GrowingTable()
    let hashes = TensorHashes(of: self)
    let writing = Monitor()
    let turnstile = Turnstile()
    let early = EarlyFrames()
    let followers = followers(waiting)
    let isFollower = Set(followers.joined())
    do {
      try forEachStep(count: frames.count, workers: workers) {
        FrameMaker(width: widest, hashes: hashes)
      } body: { step, maker in
        do {
          let (stream, place, _) = frames[step]
          var made: Frame?
          if !isFollower.contains(stream) {
            made = try make(step, with: maker, into: early.blank(), isFirst: true)
          }
          for follower in followers[stream] {
            let step = firstFrames[follower] + place
            early.put(try make(step, with: maker, into: early.blank(), isFirst: false), for: step)
          }
          let passed = turnstile.pass(step) {
            let frame = made ?? early.take(step)
            return (frame: frame, offset: table.append(frame))
          }
          guard let (frame, offset) = passed else { return }
          // The file lets one writer in at a time, and a thread that waits there spins.
          do {
            writing.lock()
            defer { writing.unlock() }
            try file.write(frame.bytes.first(frame.size), at: offset)
          }
          behind?.add(offset..<offset + frame.size, of: file)
          early.giveBack(frame)
        } catch {
          hashes.close()
          turnstile.close()
          throw error
        }
      }
      let known = try hashes.settled()
      if hashesWhileCoding { try rewriteHeader(of: known, table, in: file) }
      try file.write(table.ending.span.bytes, at: table.end)
    } catch let error as CheckpointError where error.file == pending.temporaryPath {
      throw CheckpointError(
        file: path, tensor: error.tensor, error.problem, remedy: error.remedy)
    }
    for input in inputs { try input.checkUnchanged() }
    try pending.complete()
    do { _ = try BundleFile(pending.temporaryPath, base: nil) } catch {
      throw CheckpointError(
        file: path, tensor: error.tensor, "does not read back as it was written: \(error.problem)",
        remedy: "check the disk that it is on")
    }
    try pending.commit()
  }

  /// What a worker's buffers take, whichever codecs it meets.
  var memoryPerWorker: Int {
    let isQuantised = tensors.contains { $0.choice.codec.isQuantised }
    return FrameMaker.memory(width: widest, isQuantised: isQuantised)
  }

  /// Bytes of the widest elements.
  private var widest: Int { tensors.reduce(1) { max($0, $1.tensor.dtype.byteWidth) } }

  /// For each stream those whose frames are made along with its own, because it would take as
  /// long to code the block again, and which fit into so much memory until it is their turn.
  private func followers(_ waiting: Int) -> [[Int]] {
    var followers = [[Int]](repeating: [], count: streams.count)
    var leader: (stream: Int, tensor: Int, room: Int)?
    for (index, stream) in streams.enumerated() {
      guard case .coded(let tensor, _) = stream.content,
        [.ulp, .sparseULP, .xor, .sparse].contains(tensors[tensor].choice.codec)
      else { continue }
      let need = stream.sizes.count * ZstdFrame.largest
      if let first = leader, first.tensor == tensor, first.room >= need,
        streams[first.stream].sizes.count == stream.sizes.count
      {
        followers[first.stream].append(index)
        leader!.room -= need
      } else {
        leader = (index, tensor, waiting)
      }
    }
    return followers
  }

  /// Writes the header again, now that the checksums in it are known.
  private func rewriteHeader(of known: Packing, _ table: GrowingTable, in file: borrowing File)
    throws
  {
    var known = known
    try known.layOut()
    guard case .bytes(let header) = known.streams[0].content,
      known.streams[0].sizes == streams[0].sizes
    else { preconditionFailure("a checksum has as many digits as any other") }
    let maker = FrameMaker(width: 1, hashes: TensorHashes(of: self))
    for (step, size) in streams[0].sizes.enumerated() {
      let frame = Frame()
      let begin = step * ZstdFrame.contentSize
      header[begin..<begin + size].withUnsafeBytes { maker.encode($0, .fixed, into: frame) }
      try file.write(frame.bytes.first(frame.size), at: table.replace(step, by: frame))
    }
  }

  /// Makes the frame of a step.
  /// - Parameter isFirst: whether no other stream's frame has been made from the same block
  ///   just before.
  private func make(_ step: Int, with maker: FrameMaker, into frame: Frame, isFirst: Bool)
    throws(CheckpointError) -> Frame
  {
    let (index, place, size) = frames[step]
    let stream = streams[index]
    switch stream.content {
    case .bytes(let bytes):
      let begin = place * ZstdFrame.contentSize
      bytes[begin..<begin + size].withUnsafeBytes { maker.encode($0, stream.mode, into: frame) }
    case .coded(let position, let number) where tensors[position].finding.factors != nil:
      let (left, right, _) = tensors[position].finding.factors!
      let content = maker.coder.content.part(0..<size)
      try factors!.read(
        at: (number == 0 ? left : right) + place * ZstdFrame.contentSize, into: content)
      maker.encode(UnsafeRawBufferPointer(content), stream.mode, into: frame)
    case .coded(let position, let number):
      let planned = tensors[position]
      let reading = TensorHashes.Reading(tensor: position, stream: number)
      if isFirst { try maker.coder.read(place, of: planned, for: reading) }
      let content = try maker.coder.stream(number, place, of: planned, for: reading, size)
      guard content.count == size else { throw .changed(planned.tensor, planned.source) }
      maker.encode(content, stream.mode, into: frame)
    }
    return frame
  }
}

/// A frame that has been made, with what the tables say of it.
private final class Frame: @unchecked Sendable {
  // Sound: it waits in a locked list or is with one worker.
  let bytes = PinnedBytes(count: ZstdFrame.largest)
  var size = 0
  var contentSize = 0
  var checksum: UInt32 = 0
}

/// What one worker makes frames with.
private final class FrameMaker {
  let encoder = FrameEncoder()
  let coder: BlockCoder
  /// Pieces from all over a frame's content.
  private let probe = PinnedBytes(count: probePieces * probePieceSize)
  private static let probePieces = 8
  private static let probePieceSize = 8 << 10

  init(width: Int, hashes: TensorHashes) { coder = BlockCoder(width: width, hashes: hashes) }

  /// Bytes that it takes, with a frame in hand.
  static func memory(width: Int, isQuantised: Bool) -> Int {
    BlockCoder.memory(width: width, isQuantised: isQuantised) + FrameEncoder.memory
      + ZstdFrame.largest + probePieces * probePieceSize
  }

  func encode(_ content: UnsafeRawBufferPointer, _ mode: ZstdFrame.Mode, into frame: Frame) {
    let isUneven = mode == .stored && gains(content, frame.bytes)
    frame.size = encoder.encode(content, isUneven ? .literals : mode, into: frame.bytes.bytes)
    frame.contentSize = content.count
    frame.checksum = FrameChecksums.of(frame.bytes.first(frame.size))
  }
}

extension FrameMaker {
  /// Whether this frame of a stream that is stored as a whole gains from Huffman codes: the rows of
  /// tokens that no text has are less random than an embedding's others.
  private func gains(_ content: UnsafeRawBufferPointer, _ scratch: PinnedBytes) -> Bool {
    var sample = content
    if content.count > probe.bytes.count {
      let (count, size) = (Self.probePieces, Self.probePieceSize)
      for index in 0..<count {
        let begin = content.count / count * index
        probe.part(index * size..<(index + 1) * size).copyMemory(
          from: UnsafeRawBufferPointer(rebasing: content[begin..<begin + size]))
      }
      sample = probe.first(count * size)
    }
    let size = encoder.encode(sample, .literals, into: scratch.bytes)
    return size < sample.count - sample.count / 200
  }
}

/// Frames that wait for their turn, and those that have been written and may be used again.
private final class EarlyFrames: Sendable {
  private let waiting = Mutex<[Int: Frame]>([:])
  private let idle = Mutex<[Frame]>([])

  func blank() -> Frame { idle.withLock { $0.popLast() } ?? Frame() }

  func giveBack(_ frame: Frame) { idle.withLock { $0.append(frame) } }

  func put(_ frame: Frame, for step: Int) { waiting.withLock { $0[step] = frame } }

  /// The frame that has been put here for a step.
  func take(_ step: Int) -> Frame { waiting.withLock { $0.removeValue(forKey: step)! } }
}

/// The seek table while frames are appended; touched by one thread at a time, in a turnstile.
private final class GrowingTable: @unchecked Sendable {
  private var table = SeekTable()
  private var checksums = FrameChecksums()

  /// - Returns: where the frame goes.
  func append(_ frame: Frame) -> Int {
    table.append(frame: frame.size, content: frame.contentSize)
    checksums.append(frame.checksum)
    return table[table.count - 1].lowerBound
  }

  /// Takes another frame of the same size for one of the table's.
  /// - Returns: where it goes.
  func replace(_ index: Int, by frame: Frame) -> Int {
    precondition(table[index].count == frame.size)
    checksums[index] = frame.checksum
    return table[index].lowerBound
  }

  var end: Int { table.starts.last! }

  /// What follows the last frame.
  var ending: [UInt8] {
    var whole = table
    whole.append(frame: checksums.bytes.count, content: 0)
    return checksums.bytes + whole.bytes
  }
}
