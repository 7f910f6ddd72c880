import Checkpoints

/// Tensors as they are stored, read from their files once and kept for a second look.
///
/// The memory is taken once, for as much as is held at any time, and filled again and again.
final class HeldTensors: @unchecked Sendable {
  // Sound: only `fill` writes, each byte from one thread, and nobody reads meanwhile.
  private let memory: UnsafeMutableRawBufferPointer
  private var offsets: [InputTensor: Int] = [:]

  init(byteCount: Int) { memory = .allocate(byteCount: byteCount, alignment: 64) }

  deinit { memory.deallocate() }

  var byteCount: Int { memory.count }

  /// Holds these tensors in place of those that were held.
  /// - Parameter forgettable: tensors that nobody else will read.
  func fill(
    with places: [TensorTask.Place], from sources: [any TensorSource], workers: Int,
    forgettable: Set<InputTensor> = []
  ) throws {
    var offsets: [InputTensor: Int] = [:]
    var pieces: [(place: TensorTask.Place, bytes: Range<Int>, offset: Int)] = []
    var end = 0
    for place in places {
      let name = InputTensor(source: place.source, name: place.tensor.name)
      guard offsets[name] == nil else { continue }
      offsets[name] = end
      for begin in stride(from: 0, to: place.tensor.byteCount, by: 4 << 20) {
        let bytes = begin..<min(begin + (4 << 20), place.tensor.byteCount)
        pieces.append((place, bytes, end + begin))
      }
      end += place.tensor.byteCount
    }
    precondition(end <= memory.count)
    self.offsets = offsets
    let all = pieces
    try forEachStep(count: all.count, workers: workers) {
    } body: { step, _ in
      let (place, bytes, offset) = all[step]
      var piece = MutableRawSpan(
        _unsafeBytes: UnsafeMutableRawBufferPointer(
          rebasing: memory[offset..<offset + bytes.count]))
      let source = sources[place.source]
      try source.read(place.tensor, at: bytes.lowerBound, into: &piece)
      if forgettable.contains(InputTensor(source: place.source, name: place.tensor.name)) {
        source.forget(bytes, of: place.tensor)
      }
    }
  }

  /// The sources, reading what is held from memory.
  func sources(over sources: [any TensorSource]) -> [any TensorSource] {
    sources.enumerated().map { HeldSource(held: self, number: $0, source: $1) }
  }

  /// Copies what is held of a tensor; false if it is not.
  fileprivate func read(
    _ tensor: InputTensor, at offset: Int, into buffer: inout MutableRawSpan
  ) -> Bool {
    guard let start = offsets[tensor] else { return false }
    buffer.withUnsafeMutableBytes { bytes in
      bytes.copyMemory(
        from: UnsafeRawBufferPointer(
          rebasing: memory[start + offset..<start + offset + bytes.count]))
    }
    return true
  }
}

private struct HeldSource: TensorSource {
  let held: HeldTensors
  let number: Int
  let source: any TensorSource

  var path: String { source.path }
  var manifest: Manifest { source.manifest }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    let name = InputTensor(source: number, name: tensor.name)
    guard !held.read(name, at: offset, into: &buffer) else { return }
    try source.read(tensor, at: offset, into: &buffer)
  }

  func checkUnchanged() throws(CheckpointError) { try source.checkUnchanged() }
}
