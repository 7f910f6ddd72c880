import Synchronization

// Every tensor has its checksum in the header, which comes first. Small tensors are hashed before
// they are packed. Large ones are hashed while they are coded, so that they are read once, and the
// header is written at the end into the place that was left for it: it cannot be compressed then.
extension Packing {
  /// Tensors are hashed in such pieces, which stay in a core's own cache.
  static let hashedPiece = 1 << 18
  /// From this average size on, an uncompressed header is no loss.
  private static let large = 1 << 19

  /// Whether checksums are missing that coding has to find.
  var hashesWhileCoding: Bool {
    tensors.contains { $0.needsOwnHash || $0.needsBaseHash }
  }

  /// Finds the checksums that are needed before: by which tensors of the same bytes are recognised,
  /// and all if the tensors are small.
  mutating func hash(workers: Int) throws {
    let isLarge = tensors.reduce(0) { $0 + $1.tensor.byteCount } / Self.large >= tensors.count
    let shared = Dictionary(grouping: tensors) { Sample(of: $0) }.filter { $0.value.count > 1 }
    let tensors = tensors
    let found = Mutex(self.tensors)
    try forEachStep(count: tensors.count, workers: workers) {
      PinnedBytes(count: Self.hashedPiece)
    } body: { index, piece in
      let planned = tensors[index]
      let (tensor, finding) = (planned.tensor, planned.finding)
      if finding.checksum == nil,
        !isLarge || tensor.byteCount == 0 || shared[Sample(of: planned)] != nil
      {
        let checksum = try planned.source.checksum(of: tensor, through: piece)
        found.withLock { $0[index].finding.checksum = checksum }
      }
      let outside = finding.differences.indices.filter {
        finding.differences[$0].candidate.isOutside
      }
      guard !isLarge, let first = outside.first else { return }
      let base = finding.differences[first].candidate
      let checksum = try base.source.checksum(of: base.tensor, through: piece)
      found.withLock {
        for place in outside { $0[index].finding.differences[place].candidate.checksum = checksum }
      }
    }
    self.tensors = found.withLock { $0 }
  }
}

extension Packing.Planned {
  fileprivate var needsOwnHash: Bool { finding.checksum == nil }

  fileprivate var needsBaseHash: Bool {
    guard twin == nil, let candidate = difference?.candidate else { return false }
    return candidate.isOutside && candidate.checksum == nil
  }
}

/// What tensors of the same bytes have in common, by the little that has been read of them.
private struct Sample: Hashable {
  let dtype: DType
  let byteCount: Int
  let hash: UInt64

  init(of planned: Packing.Planned) {
    dtype = planned.tensor.dtype
    byteCount = planned.tensor.byteCount
    hash = planned.finding.sample
  }
}

/// Hashes tensors while they are coded: finds checksums that are still missing, compares the others.
///
/// Tensors are read once for each stream, unless several streams are made from one reading. All
/// readings have to agree: a file's time of change does not tell of what is written through a
/// mapping of it.
///
/// A hash grows from a tensor's beginning to its end: a worker that comes with a later piece waits
/// until those before it have passed. Workers take pieces in order, so that is soon.
final class TensorHashes: @unchecked Sendable {
  /// A reading of a tensor's bytes, for a stream of one of the bundle's.
  struct Reading: Hashable {
    /// The position of the one that is coded.
    let tensor: Int
    let stream: Int
    /// Whether the bytes are those of what it is a difference from.
    var isOther = false
  }

  // Sound: what varies is touched only with the monitor's lock held, but for the hash whose next
  // piece one thread has.
  private let packing: Packing
  private let monitor = Monitor()
  private var underway: [Reading: Hash] = [:]
  private var checksums: [Reading: UInt64] = [:]
  private var isClosed = false

  private final class Hash {
    let checksum = Checksum()
    /// With the recorded checksum, if that has not been done before.
    let comparison: ChecksumComparison?
    var count = 0

    init(_ comparison: ChecksumComparison?) { self.comparison = comparison }
  }

  init(of packing: Packing) { self.packing = packing }

  /// Takes note of a tensor's bytes from `offset` on.
  /// - Throws: at the end of a tensor that does not have its recorded checksum.
  func add(_ bytes: UnsafeRawBufferPointer, of reading: Reading, at offset: Int)
    throws(CheckpointError)
  {
    guard let hash = hash(reading, at: offset) else { return }
    hash.checksum.update(bytes)
    hash.comparison?.add(RawSpan(_unsafeBytes: bytes), ofTensorAt: 0, from: offset)
    let (tensor, source) = subject(of: reading)
    let isComplete = offset + bytes.count == tensor.byteCount
    monitor.lock()
    hash.count += bytes.count
    if isComplete {
      checksums[reading] = hash.checksum.value
      underway[reading] = nil
    }
    monitor.changed()
    monitor.unlock()
    if isComplete { try hash.comparison?.refuseDamage(in: source.path) }
  }

  /// Waits until it is this piece's turn.
  private func hash(_ reading: Reading, at offset: Int) -> Hash? {
    monitor.lock()
    defer { monitor.unlock() }
    while !isClosed {
      if let hash = underway[reading] {
        if hash.count == offset { return hash }
      } else if offset == 0 {
        let hash = Hash(comparison(for: reading))
        underway[reading] = hash
        return hash
      }
      monitor.wait()
    }
    return nil
  }

  private func comparison(for reading: Reading) -> ChecksumComparison? {
    let planned = packing.tensors[reading.tensor]
    guard reading.stream == 0, reading.isOther ? planned.needsBaseHash : planned.needsOwnHash else {
      return nil
    }
    let (tensor, source) = subject(of: reading)
    func compare(_ source: some TensorSource) -> ChecksumComparison {
      ChecksumComparison([tensor], of: source)
    }
    return compare(source)
  }

  /// The tensor whose bytes are read, and where it is.
  private func subject(of reading: Reading) -> (TensorInfo, any TensorSource) {
    let planned = packing.tensors[reading.tensor]
    guard reading.isOther, let other = planned.difference?.candidate else {
      return (planned.tensor, planned.source)
    }
    return (other.tensor, other.source)
  }

  /// Sends everyone away who waits or comes later; for a worker whose step failed.
  func close() {
    monitor.lock()
    isClosed = true
    monitor.changed()
    monitor.unlock()
  }

  /// The packing with all its checksums, after all has been coded.
  /// - Throws: which tensor was not the same at every reading.
  func settled() throws(CheckpointError) -> Packing {
    var known = packing
    for index in known.tensors.indices {
      let planned = known.tensors[index]
      if planned.needsOwnHash {
        known.tensors[index].finding.checksum = checksums[Reading(tensor: index, stream: 0)]
      }
      if planned.needsBaseHash {
        known.tensors[index].difference!.candidate.checksum =
          checksums[Reading(tensor: index, stream: 0, isOther: true)]
      }
    }
    let order = checksums.sorted { ($0.key.tensor, $0.key.stream) < ($1.key.tensor, $1.key.stream) }
    for (reading, checksum) in order where checksum != known.checksum(of: reading) {
      let (tensor, source) = subject(of: reading)
      throw .changed(tensor, source)
    }
    return known
  }
}

extension Packing {
  fileprivate func checksum(of reading: TensorHashes.Reading) -> UInt64? {
    let planned = tensors[reading.tensor]
    guard reading.isOther, let other = planned.difference?.candidate else {
      return planned.finding.checksum
    }
    return other.position.map { tensors[$0].finding.checksum } ?? other.checksum
  }
}

extension CheckpointError {
  /// A tensor that is not what it was a moment ago.
  static func changed(_ tensor: TensorInfo, _ source: any TensorSource) -> CheckpointError {
    CheckpointError(
      file: source.path, tensor: tensor.name, "changed while it was being read",
      remedy: "pack it again")
  }
}
