// What lossy coding makes of a tensor.
extension Bundle.Survey {
  /// - Returns: nil if the tensor cannot be coded so, and stays exact.
  func approximate(
    _ tensor: TensorInfo, _ source: any TensorSource, _ lossy: Bundle.Lossy,
    _ factors: FactorFile?
  ) throws -> Bundle.Finding? {
    switch lossy {
    case .int8: try quantise(tensor, source, .int8)
    case .int4: try quantise(tensor, source, .int4)
    case .sign1: try quantise(tensor, source, .sign1)
    case .lowRank(let rank, let factorisation):
      try factorise(tensor, source, rank, factorisation, factors!)
    }
  }

  private func quantise(_ tensor: TensorInfo, _ source: any TensorSource, _ codec: Codec)
    throws(CheckpointError) -> Bundle.Finding?
  {
    guard codec.suits(tensor.dtype), let group = Quantisation.group(of: tensor, codec),
      group <= Codec.blockCount
    else { return nil }
    let checksum = Checksum()
    var (errors, squares) = (0.0, 0.0)
    var isFinite = true
    try groups.forEachGroup(of: tensor, source, size: group, in: 0..<tensor.elementCount) {
      (index, values) in
      let scale = Quantisation.scale(of: values, codec)
      isFinite = isFinite && scale.isFinite
      guard isFinite else { return }
      let result = groups.lossy(values, codec, scale, tensor.dtype)
      checksum.update(result.bytes)
      for (value, approximation) in zip(values, result.values) {
        let error = Double(value) - Double(approximation)
        errors += error * error
        squares += Double(value) * Double(value)
      }
    }
    // Rounding up may also leave the type's range.
    guard isFinite, errors.isFinite, !groups.hasUnderflow else { return nil }
    let modes: [ZstdFrame.Mode] = [codec == .sign1 ? .stored : .literals, .stored]
    return Bundle.Finding(
      checksum: checksum.value, own: Bundle.Choice(codec: codec, modes: modes, cost: 0),
      group: group, error: squares == 0 ? 0 : (errors / squares).squareRoot())
  }

  private func factorise(
    _ tensor: TensorInfo, _ source: any TensorSource, _ rank: Int,
    _ factorisation: Bundle.Factorisation, _ file: FactorFile
  ) throws -> Bundle.Finding? {
    guard Codec.lowrank.suits(tensor.dtype), ThinProduct.suits(tensor, rank: rank) else {
      return nil
    }
    let columns = tensor.rowLength
    let elements = try [Float](unsafeUninitializedCapacity: tensor.elementCount) {
      (values, count) in
      try groups.forEachGroup(
        of: tensor, source, size: columns, in: 0..<tensor.elementCount
      ) { (row, elements) in
        _ = values[(row * columns)...].update(fromContentsOf: elements)
      }
      count = tensor.elementCount
    }
    guard elements.allSatisfy({ $0.isFinite }), !groups.hasUnderflow,
      let (left, right) = try factorisation.factors(elements, columns, rank),
      left.allSatisfy({ $0.isFinite }), right.allSatisfy({ $0.isFinite })
    else { return nil }
    precondition(left.count == elements.count / columns * rank && right.count == rank * columns)
    let checksum = Checksum()
    var (errors, squares) = (0.0, 0.0)
    for begin in stride(from: 0, to: elements.count, by: Codec.blockCount) {
      let block = begin..<min(begin + Codec.blockCount, elements.count)
      let rows = ThinProduct.rows(block, columns: columns)
      var values = [Float](repeating: 0, count: block.count)
      for index in 0..<rank {
        left.withUnsafeBufferPointer { left in
          right.withUnsafeBufferPointer { right in
            values.withUnsafeMutableBufferPointer { values in
              ThinProduct.add(
                right.baseAddress! + index * columns,
                times: left.baseAddress! + rows.lowerBound * rank + index, stride: rank,
                to: values.baseAddress!, block, columns: columns)
            }
          }
        }
      }
      var coded = [UInt8](repeating: 0, count: block.count * tensor.dtype.byteWidth)
      var codedSpan = coded.mutableSpan
      var codedBytes = codedSpan.mutableBytes
      tensor.dtype.encode(values.span, into: &codedBytes)
      checksum.update(coded.span.bytes)
      var span = values.mutableSpan
      tensor.dtype.decode(coded.span.bytes, into: &span)
      for (value, approximation) in zip(elements[block], values) {
        let error = Double(value) - Double(approximation)
        errors += error * error
        squares += Double(value) * Double(value)
      }
    }
    guard errors.isFinite else { return nil }
    return Bundle.Finding(
      checksum: checksum.value,
      own: Bundle.Choice(codec: .lowrank, modes: [.literals, .literals], cost: 0),
      factors: (try file.append(left), try file.append(right), rank),
      error: squares == 0 ? 0 : (errors / squares).squareRoot())
  }
}
