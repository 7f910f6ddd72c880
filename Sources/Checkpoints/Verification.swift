/// What came of reading all of a checkpoint's data and comparing it with its checksums.
public struct Verification: Sendable {
  /// Tensors that are not what was written, in the checkpoint's order.
  public let damaged: [TensorInfo]
  /// How many tensors were compared with a recorded checksum.
  public let checkedCount: Int
  /// Tensors that have no recorded checksum: they could be read, no more is known.
  public let unrecorded: [TensorInfo]

  public var isSound: Bool { damaged.isEmpty }
}

extension Checkpoint {
  /// Opens a checkpoint, which proves its structure, and reads all its data to compare it with
  /// the recorded checksums, if that is wanted.
  /// - Returns: what came of the data; nil if it was not looked at.
  public static func verify(_ path: String, data: Bool, workers: Int = 2) throws -> Verification? {
    let source = try open(path)
    return data ? try source.verifyData(workers: workers) : nil
  }
}

extension TensorSource {
  /// Reads every tensor and compares it with its recorded checksum.
  ///
  /// Memory is `workers` pieces of 4 MiB, whatever the tensors' sizes.
  /// - Throws: what cannot be read, or if the source was changed meanwhile.
  public func verifyData(workers: Int) throws -> Verification {
    let tensors = manifest.tensors
    let comparison = ChecksumComparison(tensors, of: self)
    // Whole blocks, so that every block is hashed as it passes.
    let pieces = Pieces(of: tensors, size: 4 * TensorChecksum.blockSize)
    try forEachStep(count: pieces.count, workers: workers) {
      Buffer(byteCount: pieces.largest)
    } body: { step, buffer in
      let (tensor, range) = pieces[step]
      var piece = buffer.first(range.count)
      try read(tensor, at: range.lowerBound, into: &piece)
      comparison.add(
        piece.bytes, ofTensorAt: pieces.position(ofTensorWith: step), from: range.lowerBound)
    }
    try checkUnchanged()
    let unrecorded = comparison.unrecorded
    return Verification(
      damaged: comparison.damaged, checkedCount: tensors.count - unrecorded.count,
      unrecorded: unrecorded)
  }
}

extension TensorSource {
  /// The tensors without a recorded checksum of their own.
  var unrecorded: [TensorInfo] { manifest.tensors.filter { recordedChecksum(of: $0) == nil } }
}

/// Compares tensors with their recorded checksums while they pass by in whole blocks.
struct ChecksumComparison: Sendable {
  private let tensors: [TensorInfo]
  private let recorded: [TensorChecksum?]
  /// One for each algorithm that was used.
  private let recorders: [ChecksumRecorder]

  init(_ tensors: [TensorInfo], of source: some TensorSource) {
    let recorded = tensors.map { source.recordedChecksum(of: $0) }
    self.tensors = tensors
    self.recorded = recorded
    recorders = TensorChecksum.Algorithm.allCases.filter { algorithm in
      recorded.contains { $0?.algorithm == algorithm }
    }.map { ChecksumRecorder(tensors, $0) }
  }

  /// Takes note of bytes: whole blocks in any order, or a tensor's pieces in order.
  func add(_ bytes: RawSpan, ofTensorAt position: Int, from offset: Int) {
    for recorder in recorders where recorder.algorithm == recorded[position]?.algorithm {
      recorder.add(bytes, ofTensorAt: position, from: offset)
    }
  }

  /// The tensors, of which all bytes have passed, that do not have their checksums.
  var damaged: [TensorInfo] {
    let found = recorders.map { $0.finishUnread() }
    return tensors.indices.filter { position in
      guard let checksum = recorded[position] else { return false }
      return found.first { $0.algorithm == checksum.algorithm }![position] != checksum
    }.map { tensors[$0] }
  }

  /// The tensors without a recorded checksum.
  var unrecorded: [TensorInfo] {
    tensors.indices.filter { recorded[$0] == nil }.map { tensors[$0] }
  }
}
