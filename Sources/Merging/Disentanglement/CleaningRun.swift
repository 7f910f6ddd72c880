import Checkpoints

extension Cleaning {
  /// Where tensors are read from, and the memory that is left for tiles.
  struct Inputs {
    let sources: [any TensorSource]
    let memory: Int
  }

  /// Cleans a family group by group: finds the redundant vectors and has the tensors written.
  ///
  /// Rows are solved on the way. A wider group has to be known before it can be cleaned: its
  /// tensors are read for their Gram matrices and held in memory to be cleaned or, where they do
  /// not fit, read again; see `CleaningWave`.
  /// - Parameters:
  ///   - known: Gram matrices that were found before. They spare the first reading.
  ///   - isKnownForSure: whether they are the models', which is else checked on the way.
  ///   - grain: elements that have to be in one tile.
  ///   - write: cleans and writes some tensors, and gives back what it found in each.
  func run(
    on family: ModelFamily, grams known: TaskVectorGrams?, isKnownForSure: Bool = false,
    memory: Int, workers: Int, grain: Int = 1,
    write: ([(tensor: TensorInfo, cleaning: TensorCleaning)], Inputs) throws -> [TensorFindings]
  ) throws -> DisentanglementSummary {
    try refuseTooFew(family)
    var summary = DisentanglementSummary(self, experts: family.experts.map { $0.name })
    let files = Inputs(sources: family.sources, memory: memory)
    let groups = groups(of: family.base.manifest)
    if method.scope == .row {
      let parts = groups.flatMap { $0.tensors }.map { (tensor: $0, cleaning: rowCleaning($0)) }
      for (part, findings) in zip(parts, try write(parts, files)) {
        summary.add(part.tensor.name, part.cleaning, findings.rows, findings.gram)
      }
      return summary
    }

    func clean(_ groups: ArraySlice<Group>, _ found: [GramMatrix], from inputs: Inputs) throws {
      var rest = found[...]
      var parts: [(tensor: TensorInfo, cleaning: TensorCleaning)] = []
      for group in groups {
        let cleaning = try solve(group, rest.prefix(group.tensors.count), into: &summary)
        rest = rest.dropFirst(group.tensors.count)
        parts += group.tensors.map { ($0, cleaning) }
      }
      let expected = isKnownForSure ? nil : known?.grams(of: parts.map { $0.tensor })
      for (index, (part, findings)) in zip(parts, try write(parts, inputs)).enumerated() {
        try expected?[index].check(isFoundAs: findings.gram, in: part.tensor)
        // What is not cleaned is not read beforehand.
        let gram = part.cleaning.isNone ? findings.gram : found[index]
        summary.add(part.tensor.name, part.cleaning, findings.rows, gram)
      }
    }

    let cleaned = groups.filter { $0.isCleaned }
    if let known {
      if !isKnownForSure { try known.check(against: family) }
      try clean(cleaned[...], known.grams(of: cleaned.flatMap { $0.tensors }), from: files)
    } else {
      let waves = CleaningWave.waves(
        of: cleaned.map { $0.byteCount(in: family) }, memory: memory,
        tiles: leastMemory(family, workers: workers, grain: grain))
      let held = HeldTensors(
        byteCount: waves.filter { $0.isHeld }.map { $0.byteCount }.max() ?? 0)
      for wave in waves {
        let groups = cleaned[wave.groups]
        let tensors = groups.flatMap { $0.tensors }
        if wave.isHeld {
          try held.fill(
            with: tensors.flatMap { family.places(of: $0) }.map { ($0.file, $0.tensor) },
            from: family.sources, workers: workers)
        }
        let inputs = Inputs(
          sources: wave.isHeld ? held.sources(over: family.sources) : family.sources,
          memory: memory - held.byteCount)
        let found = try TaskVectorGrams.measure(
          tensors, of: family, from: inputs.sources, memory: inputs.memory, workers: workers)
        try clean(groups, found, from: inputs)
      }
    }
    try clean(groups.filter { !$0.isCleaned }[...], [], from: files)
    summary.sortGrams(like: family.base.manifest)
    return summary
  }

  /// How often a run reads what it cleans, with no Gram matrices known before.
  func reads(
    of family: ModelFamily, memory: Int, workers: Int, grain: Int = 1
  ) -> CleaningReads {
    guard method.scope != .row else { return CleaningReads() }
    let sizes = groups(of: family.base.manifest).filter { $0.isCleaned }.map {
      $0.byteCount(in: family)
    }
    let tiles = leastMemory(family, workers: workers, grain: grain)
    let waves = CleaningWave.waves(of: sizes, memory: memory, tiles: tiles)
    return CleaningReads(sizes, waves, tiles: tiles)
  }

  /// What the workers' tiles need at the least.
  private func leastMemory(_ family: ModelFamily, workers: Int, grain: Int) -> Int {
    // The base, the experts, and both once more with their task vectors as they may come out.
    let rows = 2 + 3 * family.experts.count
    // Gram matrices take 1024 elements together.
    return workers * max(grain, 1024) * (4 * rows + 8)
  }

  func refuseTooFew(_ family: ModelFamily) throws(MergeError) {
    guard family.experts.count < 2 else { return }
    throw MergeError(
      "one expert alone has nothing redundant", remedy: "cleaning takes at least two experts")
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
}

extension Cleaning.Group {
  /// The bytes of its tensors in all models.
  fileprivate func byteCount(in family: ModelFamily) -> Int {
    tensors.flatMap { family.places(of: $0) }.reduce(0) { $0 + $1.tensor.byteCount }
  }
}
