import CCrypto
import CXXHash
import Synchronization

/// A short name for a tensor's bytes, recorded when they are written, by which damage shows.
///
/// The bytes are cut into blocks of 1 MiB, the last one shorter. Each block is hashed, and the
/// hash of those hashes, one behind the other, is the checksum: so the pieces of a tensor can
/// be hashed in any order and side by side. Type, shape and name do not enter it.
public struct TensorChecksum: Hashable, Sendable, CustomStringConvertible {
  public enum Algorithm: String, CaseIterable, Sendable {
    /// XXH3 of 64 bits, big-endian (its canonical form): finds accidents.
    case xxh3 = "xxh3-64/1MiB"
    /// SHA-256: finds forgeries too.
    case sha256 = "sha256/1MiB"

    /// Bytes of one hash.
    public var width: Int { self == .xxh3 ? 8 : 32 }
  }

  static let blockSize = 1 << 20

  public let algorithm: Algorithm
  /// As many bytes as the algorithm is wide.
  public let bytes: [UInt8]

  public init?(_ algorithm: Algorithm, bytes: [UInt8]) {
    guard bytes.count == algorithm.width else { return nil }
    self.algorithm = algorithm
    self.bytes = bytes
  }

  /// The checksum of bytes that are all there.
  init(_ algorithm: Algorithm, of bytes: [UInt8]) {
    var all = BlockHash(algorithm)
    for begin in stride(from: 0, to: bytes.count, by: Self.blockSize) {
      var block = BlockHash(algorithm)
      bytes[begin..<min(begin + Self.blockSize, bytes.count)].withUnsafeBytes { block.update($0) }
      block.finish().withUnsafeBytes { all.update($0) }
    }
    self.algorithm = algorithm
    self.bytes = all.finish()
  }

  /// The checksum in hexadecimal digits.
  public var description: String { hexadecimal(bytes) }
}

/// The checksums of some tensors in their order, one behind the other.
public struct TensorChecksums: Equatable, Sendable {
  public let algorithm: TensorChecksum.Algorithm
  /// `count` times as many bytes as the algorithm is wide.
  public let bytes: [UInt8]
  public var count: Int { bytes.count / algorithm.width }

  public init?(_ algorithm: TensorChecksum.Algorithm, bytes: [UInt8]) {
    guard bytes.count.isMultiple(of: algorithm.width) else { return nil }
    self.algorithm = algorithm
    self.bytes = bytes
  }

  public subscript(position: Int) -> TensorChecksum {
    let range = position * algorithm.width..<(position + 1) * algorithm.width
    return TensorChecksum(algorithm, bytes: Array(bytes[range]))!
  }

  /// Those at these positions, one behind the other.
  func rows(in order: [Int]) -> TensorChecksums {
    var rows = bytes
    for (row, position) in order.enumerated() {
      for byte in 0..<algorithm.width {
        rows[row * algorithm.width + byte] = bytes[position * algorithm.width + byte]
      }
    }
    return TensorChecksums(algorithm, bytes: rows)!
  }

  /// Each at the position that its row has in this order: what `rows(in:)` was made of.
  func positioned(by order: [Int]) -> TensorChecksums {
    var ranks = order
    for (row, position) in order.enumerated() { ranks[position] = row }
    return rows(in: ranks)
  }
}

func hexadecimal(_ bytes: some Sequence<UInt8>) -> String {
  let digits = Array("0123456789abcdef".utf8)
  let text = bytes.flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] }
  return String(decoding: text, as: UTF8.self)
}

extension TensorSource {
  /// Computes the checksum of a tensor from its bytes.
  public func computeChecksum(
    of tensor: TensorInfo, _ algorithm: TensorChecksum.Algorithm, through buffer: inout Buffer
  ) throws(CheckpointError) -> TensorChecksum {
    let recorder = ChecksumRecorder([tensor], algorithm)
    var offset = 0
    while offset < tensor.byteCount {
      var piece = buffer.first(min(buffer.byteCount, tensor.byteCount - offset))
      try read(tensor, at: offset, into: &piece)
      recorder.add(piece.bytes, ofTensorAt: 0, from: offset)
      offset += piece.byteCount
    }
    return recorder.finishUnread()[0]
  }
}

/// Hashes tensors while their pieces pass by, in any order and from several threads.
///
/// A block that comes whole, or in pieces in order, is hashed on the way; the few others are
/// read again at the end.
public final class ChecksumRecorder: Sendable {
  public let algorithm: TensorChecksum.Algorithm
  private let tensors: [TensorInfo]
  /// The number of the first block of each tensor, and at the end of all.
  private let starts: [Int]
  private let state: Mutex<State>

  private struct State: ~Copyable {
    var hashes: [UInt8]
    var isKnown: [Bool]
    /// Blocks of which a beginning has been hashed.
    var begun: [Int: BlockHash] = [:]

    mutating func set(_ hash: [UInt8], ofBlock block: Int) {
      hashes.replaceSubrange(block * hash.count..<(block + 1) * hash.count, with: hash)
      isKnown[block] = true
    }
  }

  public init(_ tensors: [TensorInfo], _ algorithm: TensorChecksum.Algorithm) {
    self.tensors = tensors
    self.algorithm = algorithm
    starts = tensors.reduce(into: [0]) { starts, tensor in
      let size = TensorChecksum.blockSize
      starts.append(starts.last! + tensor.byteCount / size + (tensor.byteCount % size).signum())
    }
    state = Mutex(
      State(
        hashes: .init(repeating: 0, count: starts.last! * algorithm.width),
        isKnown: .init(repeating: false, count: starts.last!)))
  }

  /// Takes note of the bytes of the tensor at `position` of the list from byte `offset` on.
  public func add(_ bytes: RawSpan, ofTensorAt position: Int, from offset: Int) {
    let end = offset + bytes.byteCount
    var begin = offset
    while begin < end {
      let number = begin / TensorChecksum.blockSize
      let range = block(number, of: tensors[position])
      let piece = begin..<min(end, range.upperBound)
      bytes.extracting(piece.lowerBound - offset..<piece.upperBound - offset).withUnsafeBytes {
        add(
          $0, from: piece.lowerBound - range.lowerBound, toBlock: starts[position] + number, range)
      }
      begin = piece.upperBound
    }
  }

  private func block(_ number: Int, of tensor: TensorInfo) -> Range<Int> {
    let begin = number * TensorChecksum.blockSize
    return begin..<min(begin + TensorChecksum.blockSize, tensor.byteCount)
  }

  private func add(
    _ piece: UnsafeRawBufferPointer, from offset: Int, toBlock block: Int, _ range: Range<Int>
  ) {
    // Taken out while it is updated, so that the hashing itself holds no lock.
    let begun = offset == 0 ? nil : state.withLock { $0.begun.removeValue(forKey: block) }
    var hash = begun ?? BlockHash(algorithm)
    guard hash.count == offset else { return }  // Out of order: read again at the end.
    hash.update(piece)
    let isComplete = hash.count == range.count
    let result = isComplete ? hash.finish() : []
    state.withLock {
      if isComplete { $0.set(result, ofBlock: block) } else { $0.begun[block] = hash }
    }
  }

  /// The checksums of all tensors in the order of the list.
  /// - Parameter read: fills a buffer with bytes of a tensor, for blocks that came out of order.
  public func finish(
    reading read: (TensorInfo, Int, inout MutableRawSpan) throws(CheckpointError) -> Void
  ) throws(CheckpointError) -> TensorChecksums {
    var buffer: [UInt8] = []
    for (position, tensor) in tensors.enumerated() {
      for block in starts[position]..<starts[position + 1] {
        guard state.withLock({ !$0.isKnown[block] }) else { continue }
        let range = self.block(block - starts[position], of: tensor)
        buffer = .init(repeating: 0, count: range.count)
        var span = buffer.mutableSpan
        var bytes = span.mutableBytes
        try read(tensor, range.lowerBound, &bytes)
        var hash = BlockHash(algorithm)
        buffer.withUnsafeBytes { hash.update($0) }
        let result = hash.finish()
        state.withLock { $0.set(result, ofBlock: block) }
      }
    }
    return finishUnread()
  }

  /// The checksums of all tensors, without reading again; those of which a block did not come
  /// whole mean nothing.
  func finishUnread() -> TensorChecksums {
    let hashes = state.withLock { $0.hashes }
    var bytes: [UInt8] = []
    for (begin, end) in zip(starts, starts.dropFirst()) {
      var hash = BlockHash(algorithm)
      hashes[begin * algorithm.width..<end * algorithm.width].withUnsafeBytes { hash.update($0) }
      bytes += hash.finish()
    }
    return TensorChecksums(algorithm, bytes: bytes)!
  }
}

/// A hash that grows with the bytes it is shown.
private struct BlockHash: @unchecked Sendable {
  /// Owns the C library's state. Sound to send: one thread at a time holds a block.
  private final class Handle {
    let state: OpaquePointer
    let algorithm: TensorChecksum.Algorithm

    init(_ algorithm: TensorChecksum.Algorithm) {
      self.algorithm = algorithm
      switch algorithm {
      case .xxh3:
        state = XXH3_createState()
        XXH3_64bits_reset(state)
      case .sha256:
        state = EVP_MD_CTX_new()
        EVP_DigestInit_ex(state, EVP_sha256(), nil)
      }
    }

    deinit {
      switch algorithm {
      case .xxh3: XXH3_freeState(state)
      case .sha256: EVP_MD_CTX_free(state)
      }
    }
  }

  private let handle: Handle
  private(set) var count = 0

  init(_ algorithm: TensorChecksum.Algorithm) { handle = Handle(algorithm) }

  mutating func update(_ bytes: UnsafeRawBufferPointer) {
    count += bytes.count
    guard let base = bytes.baseAddress else { return }
    switch handle.algorithm {
    case .xxh3: smelt_xxh3_update(handle.state, base, bytes.count)
    case .sha256: EVP_DigestUpdate(handle.state, base, bytes.count)
    }
  }

  func finish() -> [UInt8] {
    switch handle.algorithm {
    case .xxh3:
      return withUnsafeBytes(of: XXH3_64bits_digest(handle.state).bigEndian) { Array($0) }
    case .sha256:
      var hash = [UInt8](repeating: 0, count: 32)
      EVP_DigestFinal_ex(handle.state, &hash, nil)
      return hash
    }
  }
}

/// The 64-bit XXH3 hash of some bytes: finds accidents, not intent.
public func xxh3(_ bytes: RawSpan) -> UInt64 {
  bytes.withUnsafeBytes { smelt_xxh3($0.baseAddress, $0.count) }
}
