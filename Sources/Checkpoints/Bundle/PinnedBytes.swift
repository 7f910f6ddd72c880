/// Memory that stays where it is until its owner goes: what the codecs read, write and hand to C.
final class PinnedBytes {
  let bytes: UnsafeMutableRawBufferPointer

  init(count: Int) { bytes = .allocate(byteCount: count, alignment: 64) }

  deinit { bytes.deallocate() }

  var start: UnsafeMutableRawPointer { bytes.baseAddress! }

  var octets: UnsafeMutablePointer<UInt8> { start.assumingMemoryBound(to: UInt8.self) }

  func first(_ count: Int) -> UnsafeRawBufferPointer {
    UnsafeRawBufferPointer(rebasing: bytes[..<count])
  }

  func part(_ range: Range<Int>) -> UnsafeMutableRawBufferPointer {
    UnsafeMutableRawBufferPointer(rebasing: bytes[range])
  }
}

extension TensorSource {
  /// Reads into memory whose owner outlives the call.
  func read(_ tensor: TensorInfo, at offset: Int, into bytes: UnsafeMutableRawBufferPointer)
    throws(CheckpointError)
  {
    guard !bytes.isEmpty else { return }
    var span = MutableRawSpan(_unsafeBytes: bytes)
    try read(tensor, at: offset, into: &span)
  }
}

extension TensorSource {
  /// The XXH3 of a whole tensor, read through a worker's buffer.
  /// - Throws: also if the tensor does not have its recorded checksum.
  func checksum(of tensor: TensorInfo, through piece: PinnedBytes) throws(CheckpointError)
    -> UInt64
  {
    let checksum = Checksum()
    let comparison = ChecksumComparison([tensor], of: self)
    for begin in stride(from: 0, to: tensor.byteCount, by: piece.bytes.count) {
      let count = min(piece.bytes.count, tensor.byteCount - begin)
      try read(tensor, at: begin, into: piece.part(0..<count))
      checksum.update(piece.first(count))
      comparison.add(RawSpan(_unsafeBytes: piece.first(count)), ofTensorAt: 0, from: begin)
    }
    try comparison.refuseDamage(in: path)
    return checksum.value
  }
}

extension File {
  /// Writes from memory whose owner outlives the call.
  func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(CheckpointError) {
    try write(RawSpan(_unsafeBytes: bytes), at: offset)
  }
}
