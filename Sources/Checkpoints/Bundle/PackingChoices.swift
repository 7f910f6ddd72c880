import Synchronization

extension Packing {
  /// Looks at all tensors, several at a time.
  mutating func survey(against base: (any TensorSource)?, _ lossy: Bundle.Lossy?, workers: Int)
    throws
  {
    let factors = factors
    let candidates = candidates(against: base)
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

  /// For each tensor those that it may resemble: the base's of the same name, and of those whose
  /// names differ from its own in the model's name or in one number (another expert's, another
  /// layer's) the first and the one just before it.
  private func candidates(against base: (any TensorSource)?) -> [[Bundle.Candidate]] {
    var seen: [String: (first: Int, last: Int)] = [:]
    return tensors.enumerated().map { index, planned in
      let tensor = planned.tensor
      var found: [Bundle.Candidate] = []
      func isLike(_ other: TensorInfo) -> Bool {
        other.dtype == tensor.dtype && other.shape == tensor.shape
      }
      if let base, let other = base.manifest[tensor.name], isLike(other) {
        found.append(Bundle.Candidate(tensor: other, source: base, position: nil))
      }
      for pattern in patterns(of: planned) {
        let earlier = seen[pattern]
        seen[pattern] = (earlier?.first ?? index, index)
        for position in earlier.map({ [$0.first, $0.last] }) ?? [] {
          let other = tensors[position]
          guard isLike(other.tensor), !found.contains(where: { $0.position == position }) else {
            continue
          }
          found.append(
            Bundle.Candidate(tensor: other.tensor, source: other.source, position: position))
        }
      }
      return Array(found.prefix(5))
    }
  }

  /// The tensor's name without its model's, and its full name with one number left out each, the
  /// last first: experts are counted within layers.
  private func patterns(of planned: Planned) -> [String] {
    let pieces = planned.fullName.split(separator: ".", omittingEmptySubsequences: false)
    let withoutNumber = pieces.indices.reversed().filter { Int(pieces[$0]) != nil }.map { place in
      pieces.enumerated().map { $0 == place ? "*" : String($1) }.joined(separator: ".")
    }
    let isOfMany = planned.fullName != planned.tensor.name
    return (isOfMany ? ["*/" + planned.tensor.name] : []) + withoutNumber
  }

  /// Decides what is kept as what, in order, so that no tensor refers to one that refers itself.
  mutating func settle() throws {
    var seen: [Likeness: Int] = [:]
    for index in tensors.indices {
      let finding = tensors[index].finding
      let tensor = tensors[index].tensor
      let lossy = finding.own.codec.isLossy ? finding.own.codec : nil
      func key(_ shape: [Int]?) -> Likeness {
        Likeness(dtype: tensor.dtype, shape: shape, checksum: finding.checksum, lossy: lossy)
      }
      if tensor.byteCount > 0, let twin = seen[key(tensor.shape)] ?? seen[key(nil)],
        // A checksum of 64 bits may collide.
        try isSame(index, twin)
      {
        tensors[index].twin = twin
        continue
      }
      tensors[index].difference = finding.differences.first { _, candidate in
        guard let position = candidate.position else { return true }
        let other = tensors[position]
        return other.difference == nil && other.twin == nil && !other.choice.codec.isLossy
      }
      seen[key(tensor.shape)] = seen[key(tensor.shape)] ?? index
      if lossy == nil, tensors[index].choice.codec != .raw { seen[key(nil)] = index }
    }
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
