import Synchronization

/// What came of reading all of a checkpoint's data and comparing it with its checksums.
public struct Verification: Sendable {
  /// Tensors that are not what was written, in the checkpoint's order.
  public let damaged: [TensorInfo]
  /// How many tensors were read and compared with a recorded checksum.
  public let checkedCount: Int
  /// Tensors that have no recorded checksum: they could be read, no more is known.
  public let unrecorded: [TensorInfo]

  /// Tensors that cannot be read, in the checkpoint's order, and why.
  public let unreadable: [UnreadableTensor]
  /// The files whose recorded checksums are of other tensors: nothing was compared with them.
  public let foreignChecksums: [String]

  public var isSound: Bool { damaged.isEmpty && unreadable.isEmpty && foreignChecksums.isEmpty }

  /// - Parameter tensors: all that were to be read.
  init(
    _ tensors: [TensorInfo], damaged: [TensorInfo] = [], unreadable: [UnreadableTensor] = [],
    unrecorded: [TensorInfo] = [], foreignChecksums: [String] = []
  ) {
    self.damaged = damaged
    self.unreadable = unreadable
    self.unrecorded = unrecorded
    self.foreignChecksums = foreignChecksums
    checkedCount = tensors.count - unreadable.count - unrecorded.count
  }
}

/// A tensor that cannot be read, though others of its checkpoint may be.
public struct UnreadableTensor: Sendable {
  public let tensor: TensorInfo
  public let cause: CheckpointError
}

/// Collects from several threads which tensors of a list cannot be read.
final class ReadingFailures: Sendable {
  private let failures = Mutex<[Int: (step: Int, cause: CheckpointError)]>([:])

  /// Takes note of a failed step; of several with one tensor, the first step's cause stays.
  func add(_ cause: CheckpointError, ofTensorAt position: Int, step: Int) {
    failures.withLock {
      if let known = $0[position], known.step < step { return }
      $0[position] = (step, cause)
    }
  }

  /// The causes by the tensors' positions.
  var causes: [Int: CheckpointError] { failures.withLock { $0.mapValues { $0.cause } } }

  /// Those of a list, in its order.
  func unreadable(of tensors: [TensorInfo]) -> [UnreadableTensor] {
    causes.sorted { $0.key < $1.key }.map {
      UnreadableTensor(tensor: tensors[$0.key], cause: $0.value)
    }
  }
}

/// What `foreignChecksums` means, for those who only read the file.
func warning(ofForeignChecksumsIn path: String) -> String {
  "\(path): its recorded checksums are of tensors of other names, types or shapes and are not compared; "
    + "'smelt verify --data' says what to do"
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
  /// - Throws: a failure that is not of one tensor, or if the source was changed meanwhile.
  public func verifyData(workers: Int) throws -> Verification {
    let tensors = manifest.tensors
    let comparison = ChecksumComparison(tensors, of: self)
    let failures = ReadingFailures()
    // Whole blocks, so that every block is hashed as it passes.
    let pieces = Pieces(of: tensors, size: 4 * TensorChecksum.blockSize)
    try forEachStep(count: pieces.count, workers: workers) {
      Buffer(byteCount: pieces.largest)
    } body: { step, buffer in
      let (tensor, range) = pieces[step]
      let position = pieces.position(ofTensorWith: step)
      var piece = buffer.first(range.count)
      do throws(CheckpointError) {
        try read(tensor, at: range.lowerBound, into: &piece)
      } catch {
        guard error.tensor != nil else { throw error }
        return failures.add(error, ofTensorAt: position, step: step)
      }
      comparison.add(piece.bytes, ofTensorAt: position, from: range.lowerBound)
    }
    try checkUnchanged()
    let causes = failures.causes
    return Verification(
      tensors, damaged: comparison.damaged.filter { causes[$0] == nil }.map { tensors[$0] },
      unreadable: failures.unreadable(of: tensors),
      unrecorded: comparison.unrecorded.filter { causes[$0] == nil }.map { tensors[$0] },
      foreignChecksums: foreignChecksums)
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

  /// The positions of tensors, of which all bytes have passed, that do not have their checksums.
  var damaged: [Int] {
    let found = recorders.map { $0.finishUnread() }
    return tensors.indices.filter { position in
      guard let checksum = recorded[position] else { return false }
      return found.first { $0.algorithm == checksum.algorithm }![position] != checksum
    }
  }

  /// The positions of tensors without a recorded checksum.
  var unrecorded: [Int] { tensors.indices.filter { recorded[$0] == nil } }

  /// - Throws: if a tensor does not have its checksum.
  func refuseDamage(in path: String) throws(CheckpointError) {
    try damaged.first.map { tensors[$0] }?.refuse(
      in: path,
      ", or if it was changed on purpose, save it without \"checksums\" in its metadata")
  }
}
