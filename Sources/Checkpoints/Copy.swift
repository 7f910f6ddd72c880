extension TensorSource {
  /// Writes tensors of `sink` from the tensors of the same names here, byte for byte.
  /// - Parameter tensors: those to copy; every tensor of the sink if not given.
  public func copy(
    _ tensors: [TensorInfo]? = nil, into sink: any TensorSink, workers: Int = 2
  ) throws {
    try copy(tensors ?? sink.manifest.tensors, into: sink, workers: workers)
  }

  /// Memory is `workers` pieces of 2 MiB, whatever the tensors' sizes.
  /// - Throws: before the sink has been finished, if a tensor does not have its recorded checksum
  ///   or the source was changed meanwhile.
  public func copy(_ tensors: [TensorInfo], into sink: any TensorSink, workers: Int) throws {
    let originals = try tensors.map { try tensor($0.name) }
    let comparison = ChecksumComparison(originals, of: self)
    // What a processor has at hand between reading and writing it.
    let pieces = Pieces(of: tensors, size: 2 * TensorChecksum.blockSize)
    try forEachStep(count: pieces.count, workers: workers) {
      Buffer(byteCount: pieces.largest)
    } body: { step, buffer in
      let (tensor, range) = pieces[step]
      var piece = buffer.first(range.count)
      let position = pieces.position(ofTensorWith: step)
      try read(originals[position], at: range.lowerBound, into: &piece)
      comparison.add(piece.bytes, ofTensorAt: position, from: range.lowerBound)
      try sink.write(piece.bytes, of: tensor, at: range.lowerBound)
      forget(range, of: originals[position])
    }
    try comparison.refuseDamage(in: path)
    try refuseDamage(of: comparison.unrecorded.map { originals[$0] }, workers: workers)
    try checkUnchanged()
  }
}

extension Verification {
  /// - Throws: if a tensor is not what was written.
  func refuseDamage(in path: String) throws(CheckpointError) {
    if let first = unreadable.first { throw first.cause }
    try damaged.first?.refuse(in: path)
  }
}

extension TensorInfo {
  /// - Throws: that it is damaged.
  func refuse(in path: String, _ otherRemedy: String = "") throws(CheckpointError) {
    throw CheckpointError(
      file: path, tensor: name, "is not what was written: its checksum differs",
      remedy: "get it again ('smelt verify --data' lists what is damaged)" + otherRemedy)
  }
}

/// Tensors cut into pieces of at most `size` bytes, in order.
struct Pieces: Sendable {
  private let tensors: [TensorInfo]
  private let size: Int
  /// The number of the first piece of each tensor, and at the end of all.
  private var starts = [0]

  init(of tensors: [TensorInfo], size: Int) {
    self.tensors = tensors
    self.size = size
    for tensor in tensors {
      starts.append(starts.last! + (tensor.byteCount + size - 1) / size)
    }
  }

  var count: Int { starts.last! }
  var largest: Int { min(size, tensors.map { $0.byteCount }.max() ?? 0) }

  subscript(piece: Int) -> (tensor: TensorInfo, range: Range<Int>) {
    let position = position(ofTensorWith: piece)
    let begin = (piece - starts[position]) * size
    return (tensors[position], begin..<min(begin + size, tensors[position].byteCount))
  }

  /// Where the tensor that this is a piece of stands in the list.
  func position(ofTensorWith piece: Int) -> Int {
    // The last tensor that starts at or before the piece; empty tensors have no piece.
    starts.partitioningIndex { $0 > piece } - 1
  }
}
