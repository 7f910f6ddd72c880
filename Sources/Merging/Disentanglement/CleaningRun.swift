import Checkpoints

extension Cleaning {
  /// Cleans a family group by group: finds the redundant vectors and has the tensors written.
  ///
  /// In row scope everything is found on the way, in one pass over the files. A wider group has
  /// to be known before it can be cleaned: its tensors are read for their Gram matrices and,
  /// while they are still in the page cache, again to be cleaned. So only groups that are larger
  /// than the cache, such as a whole model, are read from the disk twice.
  /// - Parameters:
  ///   - grams: Gram matrices that were found before. They spare the first reading; that they
  ///     are the models' is checked on the way.
  ///   - write: cleans and writes some tensors, and gives back what it found in each.
  func run(
    on family: ModelFamily, grams: TaskVectorGrams?, memory: Int, workers: Int,
    write: ([(tensor: TensorInfo, cleaning: TensorCleaning)]) throws -> [TensorFindings]
  ) throws -> DisentanglementSummary {
    guard family.experts.count > 1 else {
      throw MergeError(
        "one expert alone has nothing redundant", remedy: "cleaning takes at least two experts")
    }
    var summary = DisentanglementSummary(self, experts: family.experts.map { $0.name })
    let groups = groups(of: family.base.manifest)
    if method.scope == .row {
      let parts = groups.flatMap { $0.tensors }.map { (tensor: $0, cleaning: rowCleaning($0)) }
      for (part, findings) in zip(parts, try write(parts)) {
        summary.add(part.tensor.name, part.cleaning, findings.rows, findings.gram)
      }
      return summary
    }
    try grams?.check(against: family)
    for wave in waves(of: groups, models: family.experts.count + 1, areKnown: grams != nil) {
      let tensors = wave.flatMap { $0.tensors }
      let found =
        try grams?.grams(of: tensors)
        ?? TaskVectorGrams.measure(tensors, of: family, memory: memory, workers: workers)
      var position = 0
      var parts: [(tensor: TensorInfo, cleaning: TensorCleaning)] = []
      for group in wave {
        let own = found[position..<position + group.tensors.count]
        position += group.tensors.count
        let cleaning = try solve(group, own, into: &summary)
        parts += group.tensors.map { ($0, cleaning) }
      }
      for (index, (part, findings)) in zip(parts, try write(parts)).enumerated() {
        try grams?.check(part.tensor.name, found[index], found: findings.gram)
        summary.add(part.tensor.name, part.cleaning, findings.rows, found[index])
      }
    }
    return summary
  }

  /// How the rows of a tensor are cleaned.
  func rowCleaning(_ tensor: TensorInfo) -> TensorCleaning {
    guard cleans(tensor) else { return .none }
    return .rows(
      method, length: tensor.rowLength, count: tensor.elementCount / tensor.rowLength)
  }

  /// The redundant vector of a group, from the Gram matrices of its tensors.
  func solve(
    _ group: Group, _ grams: ArraySlice<GramMatrix>, into summary: inout DisentanglementSummary
  ) throws(MergeError) -> TensorCleaning {
    guard group.isCleaned else { return .none }
    for (tensor, gram) in zip(group.tensors, grams) where !gram.isFinite {
      throw MergeError(
        "tensor \(quoted(tensor.name)) has weights that are not finite numbers, so \(quoted(group.name)) cannot be cleaned",
        remedy: "leave it out with --exclude")
    }
    var sum = grams.first!
    for gram in grams.dropFirst() { sum += gram }
    let solution = method.solve(sum)
    summary.add(group, solution)
    return .group(coefficients: solution.coefficients)
  }

  /// Groups that are read together: enough to keep all workers busy, little enough to stay in
  /// the page cache.
  private func waves(of groups: [Group], models: Int, areKnown: Bool) -> [[Group]] {
    guard !areKnown else { return [groups] }
    var waves: [[Group]] = []
    var size = 0
    for group in groups {
      let bytes = group.tensors.reduce(0) { $0 + $1.byteCount } * models
      if waves.isEmpty || size + bytes > 512 << 20 {
        waves.append([])
        size = 0
      }
      waves[waves.count - 1].append(group)
      size += bytes
    }
    return waves
  }
}

extension TaskVectorGrams {
  fileprivate func grams(of tensors: [TensorInfo]) -> [GramMatrix] {
    let known = Dictionary(uniqueKeysWithValues: self.tensors.map { ($0.name, $0.gram) })
    return tensors.map { known[$0.name]! }
  }
}
