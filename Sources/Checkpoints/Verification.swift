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
  /// - Throws: what cannot be read.
  public func verifyData(workers: Int) throws -> Verification {
    let tensors = manifest.tensors
    let recorders = TensorChecksum.Algorithm.allCases.map { algorithm in
      (algorithm, ChecksumRecorder(tensors, algorithm))
    }
    let recorded = tensors.map { recordedChecksum(of: $0) }
    // Whole blocks, so that every block is hashed as it passes.
    let pieces = Pieces(of: tensors, size: 4 * TensorChecksum.blockSize)
    try forEachStep(count: pieces.count, workers: workers) {
      Buffer(byteCount: pieces.largest)
    } body: { step, buffer in
      let (tensor, range) = pieces[step]
      var piece = buffer.first(range.count)
      try read(tensor, at: range.lowerBound, into: &piece)
      let position = manifest.position(of: tensor.name)!
      for (algorithm, recorder) in recorders where recorded[position]?.algorithm == algorithm {
        recorder.add(piece.bytes, ofTensorAt: position, from: range.lowerBound)
      }
    }
    var damaged: [TensorInfo] = []
    for (algorithm, recorder) in recorders
    where recorded.contains(where: { $0?.algorithm == algorithm }) {
      let found = recorder.finishUnread()
      for (position, tensor) in tensors.enumerated()
      where recorded[position]?.algorithm == algorithm && recorded[position] != found[position] {
        damaged.append(tensor)
      }
    }
    let unrecorded = tensors.indices.filter { recorded[$0] == nil }.map { tensors[$0] }
    return Verification(
      damaged: damaged, checkedCount: tensors.count - unrecorded.count, unrecorded: unrecorded)
  }
}
