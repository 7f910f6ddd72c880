import Synchronization

extension Packing {
  /// Looks at all tensors, several at a time.
  mutating func survey(against base: (any TensorSource)?, _ lossy: Bundle.Lossy?, workers: Int)
    throws
  {
    let factors = factors
    let candidates = try candidates(against: base, workers: workers)
    let tensors = tensors
    let findings = Mutex([Bundle.Finding?](repeating: nil, count: tensors.count))
    try forEachStep(count: tensors.count, workers: workers) {
      Bundle.Survey()
    } body: { step, survey in
      let finding = try survey.look(
        at: tensors[step].tensor, of: tensors[step].source, candidates[step], lossy, factors)
      findings.withLock { $0[step] = finding }
    }
    findings.withLock {
      for (index, finding) in $0.enumerated() { self.tensors[index].finding = finding! }
    }
  }

  /// How many workers have room in memory to look at tensors.
  func surveyors(_ lossy: Bundle.Lossy?, _ workers: Int, _ memory: Int) throws(CheckpointError)
    -> Int
  {
    let affordable = max(1, min(workers, memory / Bundle.Survey.memory))
    guard case .lowRank(let rank, let factorisation) = lossy else { return affordable }
    func need(_ planned: Planned) -> Int {
      let (rows, columns) = ThinProduct.shape(of: planned.tensor)
      return factorisation.memory(rows, columns)
    }
    let matrices = tensors.filter { ThinProduct.suits($0.tensor, rank: rank) }
    guard let largest = matrices.max(by: { need($0) < need($1) }) else { return affordable }
    guard need(largest) <= memory else {
      throw CheckpointError(
        file: largest.source.path, tensor: largest.tensor.name,
        "needs \(need(largest)) bytes for its factors; the budget is \(memory)",
        remedy: "give it more with --memory, or lose precision in another way")
    }
    return min(affordable, memory / need(largest))
  }

  /// Decides what is kept as what, in order, so that no row of differences gets too long.
  mutating func settle() throws {
    var seen: [Likeness: Int] = [:]
    for index in tensors.indices {
      let finding = tensors[index].finding
      let tensor = tensors[index].tensor
      let lossy = finding.own.codec.isLossy ? finding.own.codec : nil
      // Where no checksum is known yet, no other tensor has these bytes.
      let alike = finding.checksum.map { checksum in
        { Likeness(dtype: tensor.dtype, shape: $0, checksum: checksum, lossy: lossy) }
      }
      if tensor.byteCount > 0, let alike, let twin = seen[alike(tensor.shape)] ?? seen[alike(nil)],
        // A checksum of 64 bits may collide.
        try isSame(index, twin)
      {
        tensors[index].twin = twin
        continue
      }
      if let (difference, depth) = choose(among: finding.differences) {
        tensors[index].difference = difference
        tensors[index].depth = depth
      }
      guard let alike else { continue }
      seen[alike(tensor.shape)] = seen[alike(tensor.shape)] ?? index
      if lossy == nil, tensors[index].choice.codec != .raw { seen[alike(nil)] = index }
    }
  }

  /// The first of these differences, best first, that may be; a longer row of them has to save a
  /// twentieth for each tensor more that it makes a reader decode.
  private func choose(among differences: [Difference]) -> (difference: Difference, depth: Int)? {
    let possible = differences.compactMap { one -> (difference: Difference, depth: Int)? in
      var difference = one
      guard var position = difference.candidate.position else { return (difference, 0) }
      // Of two with the same bytes, the one that is there.
      position = tensors[position].twin ?? position
      difference.candidate.position = position
      let other = tensors[position]
      let depth = other.depth + 1
      guard !other.choice.codec.isLossy,
        depth <= Bundle.largestDepth(inVersion: Bundle.versions.upperBound)
      else { return nil }
      return (difference, depth)
    }
    func price(_ one: (difference: Difference, depth: Int)) -> Int {
      let cost = one.difference.choice.cost
      return cost + cost / 20 * max(0, one.depth - 1)
    }
    return possible.min { price($0) < price($1) }
  }

  private func isSame(_ index: Int, _ other: Int) throws -> Bool {
    let (one, two) = (tensors[index], tensors[other])
    let bytes = (PinnedBytes(count: 1 << 20), PinnedBytes(count: 1 << 20))
    for begin in stride(from: 0, to: one.tensor.byteCount, by: 1 << 20) {
      let count = min(1 << 20, one.tensor.byteCount - begin)
      try one.source.read(one.tensor, at: begin, into: bytes.0.part(0..<count))
      try two.source.read(two.tensor, at: begin, into: bytes.1.part(0..<count))
      guard bytes.0.first(count).elementsEqual(bytes.1.first(count)) else { return false }
    }
    return true
  }
}
