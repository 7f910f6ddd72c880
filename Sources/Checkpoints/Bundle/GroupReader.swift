/// Reads a tensor in whole groups of elements that share a scale; a worker keeps one.
final class GroupReader {
  private let bytes = PinnedBytes(count: 8 * Codec.blockCount)
  private let floats = PinnedBytes(count: 4 * Codec.blockCount)
  private let codes = PinnedBytes(count: Codec.blockCount)
  private let results = PinnedBytes(count: 4 * Codec.blockCount)

  /// Whether elements of 64 bits of the last tensor were too small for the 32 that all is coded
  /// from.
  private(set) var hasUnderflow = false

  /// Bytes that the buffers take.
  static let memory = (8 + 4 + 1 + 4) * Codec.blockCount

  /// Calls `body` with every group that has elements in `range`, whole.
  /// - Precondition: `size` is at most `Codec.blockCount`.
  func forEachGroup(
    of tensor: TensorInfo, _ source: any TensorSource, size: Int, in range: Range<Int>,
    _ body: (_ group: Int, _ values: UnsafeBufferPointer<Float>) throws(CheckpointError) -> Void
  ) throws(CheckpointError) {
    hasUnderflow = false
    guard !range.isEmpty else { return }
    let width = tensor.dtype.byteWidth
    let last = (range.upperBound - 1) / size
    var first = range.lowerBound / size
    while first <= last {
      let next = min(first + Codec.blockCount / size, last + 1)
      let elements = first * size..<min(next * size, tensor.elementCount)
      let target = bytes.part(0..<elements.count * width)
      try source.read(tensor, at: elements.lowerBound * width, into: target)
      let values = UnsafeMutableBufferPointer(
        start: floats.start.assumingMemoryBound(to: Float.self), count: elements.count)
      var span = values.mutableSpan
      tensor.dtype.decode(RawSpan(_unsafeBytes: UnsafeRawBufferPointer(target)), into: &span)
      if tensor.dtype == .f64 {
        let originals = target.bindMemory(to: Double.self)
        hasUnderflow =
          hasUnderflow
          || originals.contains { $0 != 0 && abs($0) < Double(Float.leastNormalMagnitude) }
      }
      for group in first..<next {
        let begin = (group - first) * size
        try body(
          group, UnsafeBufferPointer(rebasing: values[begin..<min(begin + size, values.count)]))
      }
      first = next
    }
  }

  /// A group's elements after coding and decoding, in `dtype` and as they are then.
  /// - Precondition: called within `forEachGroup`, whose buffer for bytes it takes.
  func lossy(
    _ values: UnsafeBufferPointer<Float>, _ codec: Codec, _ scale: Float, _ dtype: DType
  ) -> (bytes: UnsafeRawBufferPointer, values: UnsafeBufferPointer<Float>) {
    codes.octets.update(repeating: 0, count: Quantisation.codedSize(values.count, codec))
    Quantisation.encode(values, codec, scale: scale, into: codes.octets, at: 0)
    let decoded = UnsafeMutableBufferPointer(
      start: results.start.assumingMemoryBound(to: Float.self), count: values.count)
    Quantisation.decode(UnsafePointer(codes.octets), codec, scale: { _ in scale }, into: decoded)
    let size = values.count * dtype.byteWidth
    var raw = MutableRawSpan(_unsafeBytes: bytes.part(0..<size))
    dtype.encode(Span(_unsafeElements: UnsafeBufferPointer(decoded)), into: &raw)
    var span = decoded.mutableSpan
    dtype.decode(raw.bytes, into: &span)
    return (bytes.first(size), UnsafeBufferPointer(decoded))
  }
}
