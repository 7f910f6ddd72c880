/// Memory that stays where it is until its owner goes: what the codecs read, write and hand to C.
final class PinnedBytes {
  let bytes: UnsafeMutableRawBufferPointer

  init(count: Int) { bytes = .allocate(byteCount: count, alignment: 64) }

  deinit { bytes.deallocate() }

  var start: UnsafeMutableRawPointer { bytes.baseAddress! }

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

extension File {
  /// Writes from memory whose owner outlives the call.
  func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(CheckpointError) {
    try write(RawSpan(_unsafeBytes: bytes), at: offset)
  }
}
