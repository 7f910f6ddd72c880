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

  /// Takes over the checksums that were found while coding.
  mutating func take(_ hashes: TensorHashes) {
    for index in tensors.indices {
      if tensors[index].needsOwnHash { tensors[index].finding.checksum = hashes[.own(index)] }
      if tensors[index].needsBaseHash {
        tensors[index].difference!.candidate.checksum = hashes[.base(index)]
      }
    }
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

/// Hashes tensors while they are coded, and compares them with their recorded checksums.
///
/// A hash grows from a tensor's beginning to its end: a worker that comes with a later piece waits
/// until those before it have passed. Workers take pieces in order, so that is soon.
final class TensorHashes: @unchecked Sendable {
  /// A tensor of the bundle by its position, or the base's that it is a difference from.
  enum Key: Hashable {
    case own(Int)
    case base(Int)
  }

  // Sound: all below is touched only with the monitor's lock held, but for the hash whose next
  // piece one thread has.
  private let monitor = Monitor()
  private var tensors: [Key: (tensor: TensorInfo, source: any TensorSource)] = [:]
  private var underway: [Key: Hash] = [:]
  private var checksums: [Key: UInt64] = [:]
  private var isClosed = false

  private final class Hash {
    let checksum = Checksum()
    let comparison: ChecksumComparison
    var count = 0

    init(_ tensor: TensorInfo, _ source: any TensorSource) {
      func compare(_ source: some TensorSource) -> ChecksumComparison {
        ChecksumComparison([tensor], of: source)
      }
      comparison = compare(source)
    }
  }

  /// For the tensors of which no checksum is known.
  init(of packing: Packing) {
    for (index, planned) in packing.tensors.enumerated() {
      if planned.needsOwnHash { tensors[.own(index)] = (planned.tensor, planned.source) }
      if planned.needsBaseHash, let candidate = planned.difference?.candidate {
        tensors[.base(index)] = (candidate.tensor, candidate.source)
      }
    }
  }

  /// The checksum of a tensor of which all pieces have passed.
  subscript(key: Key) -> UInt64 { checksums[key]! }

  /// Takes note of a tensor's bytes from `offset` on, unless its checksum is known.
  /// - Throws: at the end of a tensor that does not have its recorded checksum.
  func add(_ bytes: UnsafeRawBufferPointer, of key: Key, at offset: Int) throws(CheckpointError) {
    guard let (tensor, source) = tensors[key], let hash = hash(key, at: offset) else { return }
    hash.checksum.update(bytes)
    hash.comparison.add(RawSpan(_unsafeBytes: bytes), ofTensorAt: 0, from: offset)
    let isComplete = offset + bytes.count == tensor.byteCount
    monitor.lock()
    hash.count += bytes.count
    if isComplete {
      checksums[key] = hash.checksum.value
      underway[key] = nil
    }
    monitor.changed()
    monitor.unlock()
    if isComplete { try hash.comparison.refuseDamage(in: source.path) }
  }

  /// Waits until it is this piece's turn.
  private func hash(_ key: Key, at offset: Int) -> Hash? {
    monitor.lock()
    defer { monitor.unlock() }
    while !isClosed {
      if let hash = underway[key] {
        if hash.count == offset { return hash }
      } else if offset == 0 {
        let (tensor, source) = tensors[key]!
        let hash = Hash(tensor, source)
        underway[key] = hash
        return hash
      }
      monitor.wait()
    }
    return nil
  }

  /// Sends everyone away who waits or comes later; for a worker whose step failed.
  func close() {
    monitor.lock()
    isClosed = true
    monitor.changed()
    monitor.unlock()
  }
}
