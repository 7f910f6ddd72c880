extension Bundle {
  /// What a first look at a tensor has found: how it is best coded, and its checksum.
  struct Finding: Sendable {
    var codec = Codec.raw
    /// How each stream's frames are compressed.
    var modes: [ZstdFrame.Mode] = [.stored]
    var checksum: UInt64 = 0
  }

  /// Looks at tensors before they are packed; a worker keeps one.
  final class Survey {
    private let encoder = FrameEncoder()
    private let sample = PinnedBytes(count: sampleCount * 8)
    private let stream = PinnedBytes(count: sampleCount * 8)
    private let frame = PinnedBytes(count: ZstdFrame.largest)
    private let piece = PinnedBytes(count: 1 << 20)

    /// Elements that are tried, in pieces from all over the tensor.
    private static let sampleCount = 1 << 16
    private static let samplePieces = 16

    /// Reads the whole tensor once.
    func look(at tensor: TensorInfo, of source: any TensorSource) throws(CheckpointError) -> Finding
    {
      var best = Finding()
      var leastCost = Int.max
      let sampleSize = try readSample(of: tensor, source)
      for codec in Codec.allCases where codec.suits(tensor.dtype) {
        let (cost, modes) = tryOut(codec, on: tensor.dtype, sampleSize)
        // Simpler codecs come first and stay unless another gains a hundredth.
        if leastCost == .max || cost < leastCost - leastCost / 100 {
          leastCost = cost
          best.codec = codec
          best.modes = modes
        }
      }
      best.checksum = try checksum(of: tensor, source)
      return best
    }

    private func checksum(of tensor: TensorInfo, _ source: any TensorSource)
      throws(CheckpointError) -> UInt64
    {
      let checksum = Checksum()
      for begin in stride(from: 0, to: tensor.byteCount, by: piece.bytes.count) {
        let count = min(piece.bytes.count, tensor.byteCount - begin)
        try source.read(tensor, at: begin, into: piece.part(0..<count))
        checksum.update(piece.first(count))
      }
      return checksum.value
    }

    /// - Returns: the bytes of the sample.
    private func readSample(of tensor: TensorInfo, _ source: any TensorSource)
      throws(CheckpointError) -> Int
    {
      let width = max(tensor.dtype.byteWidth, 1)
      let whole = min(tensor.byteCount, Self.sampleCount * width)
      guard tensor.byteCount > whole else {
        try source.read(tensor, at: 0, into: sample.part(0..<whole))
        return whole
      }
      let size = whole / Self.samplePieces
      // The pieces lie evenly, the first at the start and the last at the end.
      let last = (tensor.byteCount - size) / width
      for index in 0..<Self.samplePieces {
        let offset = last / (Self.samplePieces - 1) * index * width
        try source.read(tensor, at: offset, into: sample.part(index * size..<(index + 1) * size))
      }
      return whole
    }

    /// What the sample takes when it is coded so, with the best mode for each stream.
    private func tryOut(_ codec: Codec, on dtype: DType, _ sampleSize: Int)
      -> (cost: Int, modes: [ZstdFrame.Mode])
    {
      switch codec {
      case .raw:
        let (cost, mode) = bestMode(for: sample.first(sampleSize))
        return (cost, [mode])
      case .planes:
        let count = sampleSize / dtype.byteWidth
        var total = 0
        var modes: [ZstdFrame.Mode] = []
        for plane in 0..<dtype.byteWidth {
          Planes.extract(
            plane, of: count, width: dtype.byteWidth, rotated: true,
            from: UnsafeRawPointer(sample.start),
            into: stream.start.assumingMemoryBound(to: UInt8.self))
          let (cost, mode) = bestMode(for: stream.first(count))
          total += cost
          modes.append(mode)
        }
        return (total, modes)
      }
    }

    private func bestMode(for content: UnsafeRawBufferPointer) -> (cost: Int, ZstdFrame.Mode) {
      let literals = encoder.encode(content, .literals, into: frame.bytes)
      let matches = encoder.encode(content, .matches, into: frame.bytes)
      // What is stored is unpacked at the speed of memory, so a few bytes are no reason.
      if min(literals, matches) >= content.count - content.count / 200 {
        return (content.count, .stored)
      }
      return literals <= matches + matches / 200 ? (literals, .literals) : (matches, .matches)
    }
  }
}
