// How each codec's blocks are decoded.
extension BundleFile {
  /// Decodes a whole block of a tensor.
  func decode(
    _ block: Int, of index: Int, into bytes: UnsafeMutableRawBufferPointer, _ reader: BlockReader
  ) throws(CheckpointError) {
    let stored = tensors[index]
    switch stored.codec {
    case .raw:
      let part = contents.parts[stored.parts[0]]
      let first = block * (stored.blockSize >> 20)
      for begin in stride(from: 0, to: bytes.count, by: ZstdFrame.contentSize) {
        let end = min(begin + ZstdFrame.contentSize, bytes.count)
        try frames.decode(
          part.frame(first + begin >> 20, of: 0), of: stored.tensor, reader,
          into: UnsafeMutableRawBufferPointer(rebasing: bytes[begin..<end]))
      }
    case .planes:
      try decodePlanes(block, of: stored, part: 0, rotation: stored.rotation, into: bytes, reader)
    case .ulp, .xor:
      // The other tensor first: what decodes it may need the reader's buffers for itself.
      try decodeReference(block, of: stored, into: bytes, reader)
      let width = stored.tensor.dtype.byteWidth
      if stored.codec == .ulp && Steps.splits(width) {
        let count = bytes.count / width
        try readPlanes(block, of: stored, part: 0, count: count, reader)
        let planes = UnsafePointer(reader.planes.octets)
        Steps.add(
          (planes, planes + ZstdFrame.contentSize), count: count, to: bytes.baseAddress!,
          reader.elements, reader.scratch)
        break
      }
      let codes = reader.elements.part(0..<bytes.count)
      try decodePlanes(block, of: stored, part: 0, rotation: 0, into: codes, reader)
      let start = UnsafeRawPointer(codes.baseAddress!)
      if stored.codec == .xor {
        exclusiveOr(bytes.baseAddress!, with: start, count: bytes.count)
      } else {
        Steps.add(start, count: bytes.count / width, width: width, to: bytes.baseAddress!)
      }
    case .sparse: try decodeSparse(block, of: stored, into: bytes, reader)
    case .sparseULP:
      try decodeReference(block, of: stored, into: bytes, reader)
      // Where the planes were, from which the values have been joined by then.
      let codes = reader.planes.part(0..<bytes.count)
      try decodeSparse(block, of: stored, into: codes, reader)
      let width = stored.tensor.dtype.byteWidth
      Steps.add(
        UnsafeRawPointer(codes.baseAddress!), count: bytes.count / width, width: width,
        to: bytes.baseAddress!)
    case .int8, .int4, .sign1: try dequantise(block, of: stored, into: bytes, reader)
    case .lowrank: try multiply(block, of: stored, into: bytes, reader)
    }
  }

  /// Reads the planes' frames of a block into the reader, 1 MiB apart.
  private func readPlanes(
    _ block: Int, of stored: Bundle.Stored, part: Int, count: Int, _ reader: BlockReader
  ) throws(CheckpointError) {
    let part = contents.parts[stored.parts[part]]
    for plane in 0..<part.streams {
      try frames.decode(
        part.frame(block, of: plane), of: stored.tensor, reader,
        into: reader.planes.part(plane << 20..<plane << 20 + count))
    }
  }

  private func decodePlanes(
    _ block: Int, of stored: Bundle.Stored, part: Int, rotation: Int,
    into bytes: UnsafeMutableRawBufferPointer, _ reader: BlockReader
  ) throws(CheckpointError) {
    let width = stored.tensor.dtype.byteWidth
    try readPlanes(block, of: stored, part: part, count: bytes.count / width, reader)
    Planes.join(
      reader.planes.octets, stride: 1 << 20, count: bytes.count / width, width: width,
      rotation: rotation, into: bytes.baseAddress!)
  }

  private func decodeSparse(
    _ block: Int, of stored: Bundle.Stored, into bytes: UnsafeMutableRawBufferPointer,
    _ reader: BlockReader
  ) throws(CheckpointError) {
    let (gaps, values) = (contents.parts[stored.parts[0]], contents.parts[stored.parts[1]])
    let width = stored.tensor.dtype.byteWidth
    let gapCount = frames.table.contentSizes[gaps.frame(block, of: 0)]
    let valueCount = frames.table.contentSizes[values.frame(block, of: 0)]
    reader.octetsFrame = nil
    try frames.decode(
      gaps.frame(block, of: 0), of: stored.tensor, reader, into: reader.octets.part(0..<gapCount))
    let target = reader.elements.part(0..<valueCount * width)
    if valueCount > 0 {
      try decodePlanes(block, of: stored, part: 1, rotation: stored.rotation, into: target, reader)
    }
    let fits = Gaps.read(
      UnsafeBufferPointer(start: reader.octets.octets, count: gapCount),
      values: UnsafeRawPointer(reader.elements.start), valueCount: valueCount, width: width,
      into: bytes.baseAddress!, count: bytes.count / width)
    guard fits else {
      throw CheckpointError(
        file: path, tensor: stored.tensor.name, "has gaps that do not fit its values",
        remedy: "the bundle was not made as its format says")
    }
  }

  private func dequantise(
    _ block: Int, of stored: Bundle.Stored, into bytes: UnsafeMutableRawBufferPointer,
    _ reader: BlockReader
  ) throws(CheckpointError) {
    let count = bytes.count / stored.tensor.dtype.byteWidth
    let first = block * Codec.blockCount
    let groups = first / stored.group...(first + count - 1) / stored.group
    try readStream(
      contents.parts[stored.parts[1]], of: stored.tensor,
      4 * groups.lowerBound..<4 * groups.upperBound + 4, into: reader.scales.start, reader)
    let begin = block * Quantisation.codedSize(Codec.blockCount, stored.codec)
    try readStream(
      contents.parts[stored.parts[0]], of: stored.tensor,
      begin..<begin + Quantisation.codedSize(count, stored.codec), into: reader.elements.start,
      reader)
    let scales = reader.scales.start.assumingMemoryBound(to: Float.self)
    let values = reader.values(count)
    Quantisation.decode(
      UnsafePointer(reader.elements.octets), stored.codec,
      scale: { scales[(first + $0) / stored.group - groups.lowerBound] }, into: values)
    var target = MutableRawSpan(_unsafeBytes: bytes)
    stored.tensor.dtype.encode(Span(_unsafeElements: UnsafeBufferPointer(values)), into: &target)
  }

  private func multiply(
    _ block: Int, of stored: Bundle.Stored, into bytes: UnsafeMutableRawBufferPointer,
    _ reader: BlockReader
  ) throws(CheckpointError) {
    let count = bytes.count / stored.tensor.dtype.byteWidth
    let elements = block * Codec.blockCount..<block * Codec.blockCount + count
    let (columns, rank) = (stored.tensor.rowLength, stored.rank)
    let rows = ThinProduct.rows(elements, columns: columns)
    try readStream(
      contents.parts[stored.parts[0]], of: stored.tensor,
      4 * rank * rows.lowerBound..<4 * rank * rows.upperBound, into: reader.left.start, reader)
    let left = reader.left.start.assumingMemoryBound(to: Float.self)
    let right = reader.row.start.assumingMemoryBound(to: Float.self)
    let values = reader.values(count)
    values.update(repeating: 0)
    for index in 0..<rank {
      try readStream(
        contents.parts[stored.parts[1]], of: stored.tensor,
        4 * columns * index..<4 * columns * (index + 1), into: reader.row.start, reader)
      ThinProduct.add(
        right, times: left + index, stride: rank, to: values.baseAddress!, elements,
        columns: columns)
    }
    var target = MutableRawSpan(_unsafeBytes: bytes)
    stored.tensor.dtype.encode(Span(_unsafeElements: UnsafeBufferPointer(values)), into: &target)
  }

  /// Reads some bytes of a part's only stream; a frame that was read just before is still there.
  private func readStream(
    _ part: Bundle.Part, of tensor: TensorInfo, _ range: Range<Int>,
    into bytes: UnsafeMutableRawPointer, _ reader: BlockReader
  ) throws(CheckpointError) {
    for index in range.lowerBound >> 20...(range.upperBound - 1) >> 20 {
      let frame = part.frame(index, of: 0)
      let size = frames.table.contentSizes[frame]
      let content = reader.octets.part(0..<size)
      if reader.octetsFrame != frame {
        reader.octetsFrame = nil
        try frames.decode(frame, of: tensor, reader, into: content)
        reader.octetsFrame = frame
      }
      let wanted = range.clamped(to: index << 20..<index << 20 + size)
      (bytes + (wanted.lowerBound - range.lowerBound)).copyMemory(
        from: content.baseAddress! + (wanted.lowerBound - index << 20), byteCount: wanted.count)
    }
  }

  /// Decodes the block of the tensor that `stored` differs from.
  private func decodeReference(
    _ block: Int, of stored: Bundle.Stored, into bytes: UnsafeMutableRawBufferPointer,
    _ reader: BlockReader
  ) throws(CheckpointError) {
    switch stored.reference! {
    case .inside(let position): try decode(block, of: position, into: bytes, reader)
    case .base:
      let base = try base.tensor(of: stored)
      try base.source.read(base.tensor, at: block * stored.blockSize, into: bytes)
    }
  }
}
