import Checkpoints

// What a worker does with a chunk: read, decode, observe or compute, encode, write.

extension MergeRun {
  func copy(
    _ chunk: Chunk, from place: TensorTask.Place, in workspace: inout MergeWorkspace
  ) throws {
    let tensor = tasks[chunk.task].output
    let bits = tensor.dtype.bitWidth
    // Sub-byte types: a chunk is a multiple of eight elements, so its ends are whole bytes.
    let bytes = chunk.elements.lowerBound * bits / 8..<(chunk.elements.upperBound * bits + 7) / 8
    var begin = bytes.lowerBound
    while begin < bytes.upperBound {
      let count = min(workspace.arena.byteCount, 4 << 20, bytes.upperBound - begin)
      var piece = workspace.arena.first(count)
      try sources[place.source].read(place.tensor, at: begin, into: &piece)
      forget(begin..<begin + count, of: place)
      try sink.write(piece.bytes, of: tensor, at: begin)
      begin += count
    }
    try didFinish(
      FinishedChunk(
        chunk: chunk, tensor: tensor, bytesRead: bytes.count, bytesWritten: bytes.count,
        notFinite: 0))
  }

  func observe<Merge: TensorMerge>(
    _ merge: Merge, _ chunk: Chunk, in workspace: inout MergeWorkspace
  ) throws -> Merge.Observation {
    var observation = merge.makeObservation()
    try forEachTile(of: chunk, grain: merge.grain, isLast: false, in: &workspace) {
      position, input, output in
      merge.observe(&input, at: position, scratch: &output, into: &observation)
    }
    return observation
  }

  func apply<Merge: TensorMerge>(
    _ merge: Merge, to chunk: Chunk, in workspace: inout MergeWorkspace
  ) throws {
    let task = tasks[chunk.task]
    guard case .merge(_, _, let differences, _) = task.work else { return }
    let width = task.output.dtype.bitWidth / 8
    var notFinite = 0
    var written = chunk.elements.lowerBound
    var encoded = workspace.encoded.take()!
    try forEachTile(of: chunk, grain: merge.grain, isLast: true, in: &workspace) {
      position, input, output in
      merge.merge(&input, at: position, into: &output)
      if differences { output.add(input, row: 0, to: 0) }
      notFinite += task.output.dtype.notFinite(output[0])
      let end = position + output.columns
      let room = encoded.byteCount / width
      // A window's worth of tiles is written at once.
      var bytes = encoded.first((end - written) * width)
      var place = bytes._mutatingExtracting(droppingFirst: (position - written) * width)
      task.output.dtype.encode(output[0], into: &place)
      if end == chunk.elements.upperBound || end - written + output.columns > room {
        let full = encoded.first((end - written) * width)
        try sink.write(full.bytes, of: task.output, at: written * width)
        written = end
      }
    }
    workspace.encoded = consume encoded
    try didFinish(
      FinishedChunk(
        chunk: chunk, tensor: task.output,
        bytesRead: task.inputByteCount(of: chunk),
        bytesWritten: chunk.elements.count * width, notFinite: notFinite))
  }

  /// Reads a chunk window by window and hands it on tile by tile, as differences if those are
  /// what the task works on.
  /// - Parameter isLast: whether it will not be read again.
  private func forEachTile(
    of chunk: Chunk, grain: Int, isLast: Bool, in workspace: inout MergeWorkspace,
    _ body: (_ position: Int, _ input: inout Tile, _ output: inout Tile) throws -> Void
  ) throws {
    guard case .merge(_, let inputs, let differences, let rounding) = tasks[chunk.task].work else {
      return
    }
    let tileWidth = Tile.width(grain: grain)
    let bytesPerColumn = inputs.reduce(0) { $0 + $1.tensor.dtype.bitWidth / 8 }
    let room = min(workspace.arena.byteCount / bytesPerColumn, MergeRun.windowSize)
    let windowWidth = max(tileWidth, room / tileWidth * tileWidth)
    var begin = chunk.elements.lowerBound
    while begin < chunk.elements.upperBound {
      let window = begin..<min(begin + windowWidth, chunk.elements.upperBound)
      if !workspace.isHolding { try read(inputs, window, isLast: isLast, into: &workspace) }
      for position in stride(from: window.lowerBound, to: window.upperBound, by: tileWidth) {
        let columns = position..<min(position + tileWidth, window.upperBound)
        workspace.input.resize(columns: columns.count)
        workspace.output.resize(columns: columns.count)
        var start = 0
        for (row, input) in inputs.enumerated() {
          let width = input.tensor.dtype.bitWidth / 8
          let offset = workspace.isHolding ? 0 : window.lowerBound
          decode(
            input.tensor.dtype, &workspace.arena,
            at: start + (columns.lowerBound - offset) * width, rounding: rounding,
            into: &workspace.input, row: row)
          if differences, row > 0 { workspace.input.subtract(row: 0, from: row) }
          start += workspace.isHolding ? input.tensor.byteCount : window.count * width
        }
        try body(columns.lowerBound, &workspace.input, &workspace.output)
      }
      begin = window.upperBound
    }
  }

  /// Fills the arena with the same window of every input, one after the other.
  private func read(
    _ inputs: [TensorTask.Place], _ window: Range<Int>, isLast: Bool,
    into workspace: inout MergeWorkspace
  ) throws {
    var start = 0
    for input in inputs {
      let width = input.tensor.dtype.bitWidth / 8
      let count = window.count * width
      var arena = workspace.arena.first(start + count)
      var bytes = arena._mutatingExtracting(droppingFirst: start)
      try sources[input.source].read(input.tensor, at: window.lowerBound * width, into: &bytes)
      if isLast { forget(window.lowerBound * width..<window.upperBound * width, of: input) }
      start += count
    }
  }

  /// Fills the arena with all inputs, one after the other.
  func hold(_ inputs: [TensorTask.Place], in workspace: inout MergeWorkspace) throws {
    var start = 0
    for input in inputs {
      let count = input.tensor.byteCount
      for offset in stride(from: 0, to: count, by: 4 << 20) {
        let piece = min(4 << 20, count - offset)
        var arena = workspace.arena.first(start + offset + piece)
        var bytes = arena._mutatingExtracting(droppingFirst: start + offset)
        try sources[input.source].read(input.tensor, at: offset, into: &bytes)
        forget(offset..<offset + piece, of: input)
      }
      start += count
    }
    workspace.isHolding = true
  }

  private func forget(_ bytes: Range<Int>, of input: TensorTask.Place) {
    guard forgettable.contains(InputTensor(source: input.source, name: input.tensor.name)) else {
      return
    }
    sources[input.source].forget(bytes, of: input.tensor)
  }
}

/// Decodes what the arena holds from byte `start` on into a row of the tile.
private func decode(
  _ type: DType, _ arena: inout Buffer, at start: Int, rounding: DType?, into tile: inout Tile,
  row: Int
) {
  let held = arena.first(start + tile.columns * (type.bitWidth / 8))
  var values = tile.mutableRow(row)
  type.decode(held.bytes.extracting(droppingFirst: start), into: &values)
  if let rounding, type != rounding { rounding.round(&values) }
}

extension DType {
  /// How many values are NaN, infinite, or become infinite in this type.
  fileprivate func notFinite(_ values: Span<Float>) -> Int {
    // The largest magnitudes that do not round to infinity.
    let largest: UInt32 =
      switch self {
      case .f16: 0x477F_EFFF
      case .bf16: 0x7F7F_7FFF
      default: 0x7F7F_FFFF
      }
    var flags: UInt32 = 0
    for i in values.indices { flags |= largest &- values[i].magnitudeBits }
    guard flags >> 31 == 1 else { return 0 }
    var count = 0
    for i in values.indices where values[i].magnitudeBits > largest { count += 1 }
    return count
  }
}
