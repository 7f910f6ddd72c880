import Checkpoints
import TestSupport
import Testing

@testable import Merging

/// Cleaning through the files, against the same arithmetic done plainly on whole vectors.
struct DisentanglingTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  static let shapes: [(name: String, shape: [Int])] = [
    ("embed.weight", [7, 12]),
    ("layers.0.attn.weight", [12, 12]),
    ("layers.0.mlp.weight", [40, 12]),
    ("layers.0.mlp.bias", [40]),
    ("layers.1.mlp.weight", [12, 40]),
    ("norm.weight", [12]),
  ]

  /// The base (number 0) or an expert: experts share a part of their task vectors.
  static func model(_ number: Int, dtype: DType, seed: UInt64) throws -> [SmallTensor] {
    try shapes.enumerated().map { index, tensor in
      let count = tensor.shape.reduce(1, *)
      func random(_ stream: Int, _ scale: Float) -> [Float] {
        var generator = SeededGenerator(seed: seed &* 1000 &+ UInt64(100 * stream + index))
        return (0..<count).map { _ in Float.random(in: -scale...scale, using: &generator) }
      }
      let base = random(0, 1)
      guard number > 0 else {
        return try SmallTensor(tensor.name, tensor.shape, dtype: dtype, base)
      }
      let shared = random(99, 0.1)
      let own = random(number, 0.1)
      return try SmallTensor(
        tensor.name, tensor.shape, dtype: dtype,
        base.indices.map { base[$0] + shared[$0] + own[$0] })
    }
  }

  private func family(experts: Int = 3, dtype: DType = .f32, seed: UInt64 = 1) throws
    -> ModelFamily
  {
    func open(_ number: Int) throws -> any TensorSource {
      let path = folder("model\(number)-\(dtype.rawValue).safetensors")
      return try Checkpoint.open(
        Checkpoint.write(Self.model(number, dtype: dtype, seed: seed), to: path))
    }
    return try ModelFamily(
      base: open(0),
      experts: (1...experts).map { try .init(name: "expert\($0)", source: open($0)) })
  }

  /// Three experts with a matrix of many tiles, whose rows are longer than a lane of any kernel.
  private func largeFamily(_ dtype: DType) throws -> ModelFamily {
    func open(_ number: Int) throws -> any TensorSource {
      var generator = SeededGenerator(seed: 7)
      let base = (0..<24_000).map { _ in Float.random(in: -1...1, using: &generator) }
      generator = SeededGenerator(seed: UInt64(number))
      let own = base.map {
        number == 0 ? $0 : $0 + Float.random(in: -0.1...0.15, using: &generator)
      }
      let path = folder("large\(number).safetensors")
      return try Checkpoint.open(
        Checkpoint.write(
          Self.model(number, dtype: dtype, seed: 2) + [
            SmallTensor("layers.2.mlp.weight", [600, 40], dtype: dtype, own)
          ], to: path))
    }
    return try ModelFamily(
      base: open(0), experts: (1...3).map { try .init(name: "expert\($0)", source: open($0)) })
  }

  private struct Outcome {
    var experts: [any TensorSource]
    var redundant: any TensorSource
    var summary: DisentanglementSummary
  }

  private func disentangle(
    _ family: ModelFamily, _ cleaning: Cleaning, form: Disentangling.Form = .vectors,
    dtype: DType? = .f32, grams: TaskVectorGrams? = nil, memory: Int = 1 << 24, workers: Int = 2,
    name: String = "out"
  ) throws -> Outcome {
    var options = Disentangling.Options()
    options.cleaning = cleaning
    options.form = form
    options.dtype = dtype
    let plan = try Disentangling(family, options)
    let paths = plan.manifests.indices.map { folder("\(name)\($0).safetensors") }
    let sinks = try zip(paths, plan.manifests).map { try Checkpoint.create($0, $1) }
    let redundantPath = folder("\(name)-redundant.safetensors")
    let redundant = try Checkpoint.create(redundantPath, plan.redundantManifest)
    let summary = try plan.run(
      into: sinks, redundant: redundant, grams: grams, memory: memory, workers: workers)
    for sink in sinks + [redundant] { try sink.finish() }
    return Outcome(
      experts: try paths.map { try Checkpoint.open($0) },
      redundant: try Checkpoint.open(redundantPath), summary: summary)
  }

  private func taskVector(_ name: String, _ expert: Int, of family: ModelFamily) throws -> [Double]
  {
    zip(
      try family.experts[expert].source.floats(of: name), try family.base.floats(of: name)
    ).map { Double($0 - $1) }
  }

  // MARK: The result

  /// Groups of one tensor's elements: its rows, or ranges of the concatenated group.
  private func expectedRedundancy(
    _ family: ModelFamily, _ cleaning: Cleaning
  ) throws -> [String: [Double]] {
    let method = cleaning.method
    var groups: [String: [(name: String, range: Range<Int>, rows: Int)]] = [:]
    for (name, shape) in Self.shapes {
      let count = shape.reduce(1, *)
      switch method.scope {
      case .row:
        guard shape.count == 2, !name.contains("embed") else { continue }
        for row in 0..<shape[0] {
          groups["\(name) \(row)"] = [(name, row * shape[1]..<(row + 1) * shape[1], shape[0])]
        }
      case .tensor:
        guard shape.count == 2, !name.contains("embed") else { continue }
        groups[name] = [(name, 0..<count, 1)]
      case .block:
        guard name.hasPrefix("layers.") else { continue }
        groups[String(name.prefix(8)), default: []].append((name, 0..<count, 1))
      case .model: groups["model", default: []].append((name, 0..<count, 1))
      }
    }
    var redundancy: [String: [Double]] = [:]
    for (name, shape) in Self.shapes {
      redundancy[name] = Array(repeating: 0, count: shape.reduce(1, *))
    }
    for parts in groups.values {
      let vectors = try family.experts.indices.map { expert in
        try parts.flatMap { try taskVector($0.name, expert, of: family)[$0.range] }
      }
      let gram = GramMatrix(
        order: vectors.count,
        elements: vectors.flatMap { left in
          vectors.map { right in zip(left, right).reduce(0) { $0 + $1.0 * $1.1 } }
        })
      let a = method.solve(gram, rowCount: parts[0].rows).coefficients
      var position = 0
      for part in parts {
        for element in part.range {
          redundancy[part.name]![element] = (0..<a.count).reduce(0) {
            $0 + a[$1] * vectors[$1][position]
          }
          position += 1
        }
      }
    }
    return redundancy
  }

  // Short of where |·| begins to chatter: there the last bits decide which way it goes.
  static let cleanings: [String] = [
    "awd-row,rate=0.02,iterations=30", "awd-row,optimizer=converged",
    "awd-model,iterations=60,rate=0.05",
    "awd-model,scope=tensor,iterations=60,rate=0.02",
    "awd-model,scope=block,objective=squared,rate=0.1",
    "awd-model,optimizer=converged", "awd-row,iterations=40,rate=0.1,objective=squared",
  ]

  @Test(arguments: cleanings, [DType.f32, .bf16])
  func `every scope takes out the vector that whole vectors give`(text: String, dtype: DType)
    throws
  {
    let family = try family(dtype: dtype)
    let cleaning = try Cleaning(text)
    let outcome = try disentangle(family, cleaning)
    let expected = try expectedRedundancy(family, cleaning)
    for (name, _) in Self.shapes {
      let redundant = try outcome.redundant.floats(of: name)
      for (found, expected) in zip(redundant, expected[name]!) {
        #expect(abs(Double(found) - expected) < 2e-6, "\(name)")
      }
      for expert in 0..<3 {
        let vector = try taskVector(name, expert, of: family)
        let cleaned = try outcome.experts[expert].floats(of: name)
        for index in cleaned.indices {
          #expect(cleaned[index] == Float(vector[index]) - redundant[index], "\(name)")
        }
      }
    }
    #expect(outcome.summary.whole.meanCosineAfter < outcome.summary.whole.meanCosineBefore)
  }

  @Test(arguments: ["awd-row,rate=0.02", "awd-model,scope=block,rate=0.05"])
  func `task arithmetic of cleaned vectors is that of plain ones with other weights`(
    text: String
  ) throws {
    let family = try family()
    let outcome = try disentangle(family, Cleaning(text))
    for (name, _) in Self.shapes {
      let plain = try (0..<3).map { try taskVector(name, $0, of: family) }
      let merged = try (0..<3).reduce(into: plain[0].map { _ in 0.0 }) { sum, expert in
        for (index, value) in try outcome.experts[expert].floats(of: name).enumerated() {
          sum[index] += 0.3 * Double(value)
        }
      }
      guard let part = outcome.summary.tensors.first(where: { $0.name == name }),
        let a = part.coefficients
      else { continue }
      let vectors = RedundantVectors(order: 3, length: merged.count, coefficients: a)
      let weights = vectors.weights([0.3, 0.3, 0.3], of: 0)
      #expect(zip(weights, a).allSatisfy { abs(Double($0) - 0.3 * (1 - 3 * $1)) < 1e-7 })
      for index in merged.indices {
        let sum = (0..<3).reduce(0.0) { $0 + Double(weights[$1]) * plain[$1][index] }
        #expect(abs(sum - merged[index]) < 1e-6)
      }
    }
  }

  @Test(arguments: [DType.f32, .bf16])
  func `as models they are the base plus the cleaned vector, and what is not cleaned the expert`(
    dtype: DType
  ) throws {
    let family = try family(dtype: dtype)
    let cleaning = try Cleaning("awd-row,rate=0.02")
    let vectors = try disentangle(family, cleaning)
    let models = try disentangle(family, cleaning, form: .models, dtype: nil, name: "model")
    for (expert, own) in family.experts.enumerated() {
      for tensor in models.experts[expert].manifest.tensors {
        #expect(tensor.dtype == dtype)
        let values = try models.experts[expert].floats(of: tensor.name)
        guard cleaning.cleans(tensor) else {
          #expect(try values == own.source.floats(of: tensor.name))
          continue
        }
        var sum = zip(
          try vectors.experts[expert].floats(of: tensor.name),
          try family.base.floats(of: tensor.name)
        ).map { $0 + $1 }
        var span = sum.mutableSpan
        dtype.round(&span)
        #expect(values == sum)
      }
    }
  }

  @Test(
    arguments: [
      "awd-row,rate=0.02", "awd-model,scope=tensor", "awd-model,scope=block", "awd-model",
    ],
    [(1, 1 << 24), (1, 50_000), (2, 1 << 18), (3, 1 << 17), (5, 1 << 20)])
  func `workers and memory do not change a byte`(text: String, resources: (Int, Int)) throws {
    let family = try largeFamily(resources.0 == 2 ? .f32 : .bf16)
    let cleaning = try Cleaning(text)
    let one = try disentangle(
      family, cleaning, dtype: nil, memory: 1 << 26, workers: 1, name: "one")
    let other = try disentangle(
      family, cleaning, dtype: nil, memory: resources.1, workers: resources.0, name: "other")
    for (left, right) in zip(one.experts + [one.redundant], other.experts + [other.redundant]) {
      for tensor in left.manifest.tensors {
        #expect(try left.bytes(of: tensor) == right.bytes(of: tensor), "\(tensor.name)")
      }
    }
    for (left, right) in zip(one.summary.grams.tensors, other.summary.grams.tensors) {
      #expect(left.gram == right.gram, "\(left.name)")
    }
  }

  // MARK: The kernel

  @Test(arguments: [2, 3, 4, 5, 8, 9, 20, 33])
  func `rows solved side by side are the rows solved one by one`(experts: Int) throws {
    var generator = SeededGenerator(seed: UInt64(experts))
    let (rows, length) = (19, 48)
    var tile = Tile(rows: experts, capacity: rows * length)
    tile.resize(columns: rows * length)
    for expert in 0..<experts {
      var row = tile.mutableRow(expert)
      for i in row.indices {
        row[i] = 0.05 * Float(i % 7) + Float.random(in: -1...1, using: &generator)
        // Adversaries: a zero row, a zero vector in a row, equal and opposite vectors.
        switch i / length {
        case 3: row[i] = 0
        case 5 where expert == 1: row[i] = 0
        case 7: row[i] = Float(i % 11)
        case 9: row[i] = Float(i % 11) * (expert % 2 == 0 ? 1 : -1)
        default: break
        }
      }
    }
    for text in ["awd-row,rate=0.1", "awd-row,objective=squared,rate=1,penalty=none,epsilon=0"] {
      let method = try Cleaning(text).method
      let cleaning = TensorCleaning.rows(method, length: length, count: rows)
      var findings = TensorFindings(experts: experts)
      let found = cleaning.redundantVectors(
        in: tile, from: 0, experts: experts, findings: &findings)
      #expect(found.groupCount == rows)
      var report = DisentanglementReport(taskCount: experts)
      for row in 0..<rows {
        var gram = GramMatrix(order: experts)
        gram.add(
          tile.rows(from: 0).extracting(droppingFirst: row * length), stride: tile.capacity,
          columns: length)
        let solution = method.solve(gram, rowCount: rows)
        #expect(Array(found.coefficients(of: row)) == solution.coefficients, "row \(row)")
        report += solution.report
      }
      let (one, other) = (findings.rows, report)
      #expect(one.groups == other.groups)
      #expect(abs(one.meanCosineAfter - other.meanCosineAfter) < 1e-12)
      #expect(one.depletedGroups == other.depletedGroups)
      #expect(
        abs(one.thresholds.upperBound - other.thresholds.upperBound)
          <= 1e-12 * other.thresholds.upperBound)
      for (a, b) in zip(one.retainedNorms, other.retainedNorms) { #expect(abs(a - b) < 1e-12) }
    }
  }

  // MARK: Gram matrices in a file

  @Test func `Gram matrices come back from their file as they went`() throws {
    let family = try family()
    let grams = try TaskVectorGrams(of: family, memory: 1 << 20, workers: 2)
    try grams.write(to: folder("gram.safetensors"))
    let read = try TaskVectorGrams(contentsOf: folder("gram.safetensors"))
    #expect(read.experts == ["expert1", "expert2", "expert3"])
    #expect(read.tensors.map { $0.name } == Self.shapes.map { $0.name })
    for (one, other) in zip(read.tensors, grams.tensors) { #expect(one.gram == other.gram) }
    #expect(read.layers.map { $0.name } == ["layers.0", "layers.1"])
    #expect(abs(read.layers[1].gram[0, 1] - grams.tensors[4].gram[0, 1]) == 0)
  }

  @Test func `Gram matrices from a run with rows serve a wider scope`() throws {
    let family = try family()
    let rows = try disentangle(family, .row, name: "rows")
    let cleaning = try Cleaning("awd-model,scope=block,rate=0.05")
    let plain = try disentangle(family, cleaning, name: "plain")
    let reused = try disentangle(family, cleaning, grams: rows.summary.grams, name: "reused")
    for (one, other) in zip(plain.summary.groups, reused.summary.groups) {
      #expect(one.name == other.name)
      for (a, b) in zip(one.coefficients!, other.coefficients!) { #expect(abs(a - b) < 1e-5) }
    }
    let measured = try TaskVectorGrams(of: family, memory: 1 << 20, workers: 1)
    let exact = try disentangle(family, cleaning, grams: measured, name: "exact")
    #expect(
      exact.summary.groups.map { $0.coefficients } == plain.summary.groups.map { $0.coefficients })
  }

  @Test func `Gram matrices of other models are refused`() throws {
    let grams = try TaskVectorGrams(of: family(seed: 1), memory: 1 << 20, workers: 1)
    #expect(
      throws: MergeError(
        "the Gram matrices are of other models: tensor \"embed.weight\" has changed since",
        remedy: "measure them again by leaving --gram out")
    ) { try disentangle(family(seed: 2), .model, grams: grams) }
    #expect(
      throws: MergeError(
        "the Gram matrices are of the experts expert1, expert2, expert3, not expert1, expert2",
        remedy: "give the same experts in the same order")
    ) { try disentangle(family(experts: 2), .model, grams: grams) }
  }

  @Test func `a file without Gram matrices is refused`() throws {
    let path = try Checkpoint.write([SmallTensor("a", [1], [1])], to: folder("a.safetensors"))
    #expect(
      throws: CheckpointError(
        file: path, "holds no Gram matrices of task vectors",
        remedy: "make them with 'smelt gram' or 'smelt disentangle'")
    ) { try TaskVectorGrams(contentsOf: path) }
  }

  @Test func `Gram matrices are in the order of the model whatever was left out`() throws {
    let family = try family()
    var cleaning = try Cleaning("awd-model,scope=block")
    cleaning.exclude = ["*.0.attn.weight"]
    let first = try disentangle(family, cleaning).summary.grams
    #expect(first.tensors.map { $0.name } == Self.shapes.map { $0.name })
    let measured = try TaskVectorGrams(of: family, memory: 1 << 20, workers: 2)
    #expect(first.tensors.map { $0.gram } == measured.tensors.map { $0.gram })
    _ = try disentangle(family, .model, grams: first, name: "again")
  }

  // MARK: What is read

  @Test(arguments: ["awd-row", "awd-model,scope=tensor", "awd-model,scope=block", "awd-model"])
  func `what fits is read once, and what does not as often as the plan says`(text: String) throws {
    let files = try largeFamily(.bf16)
    let sources = [CountingSource(files.base)] + files.experts.map { CountingSource($0.source) }
    let family = try ModelFamily(
      base: sources[0],
      experts: zip(files.experts, sources.dropFirst()).map { .init(name: $0.name, source: $1) })
    var options = Disentangling.Options()
    options.cleaning = try Cleaning(text)
    let plan = try Disentangling(family, options)
    func bytesRead(memory: Int, grams: TaskVectorGrams? = nil) throws -> Int {
      let before = sources.reduce(0) { $0 + $1.bytesRead }
      let sinks = plan.manifests.map { MemorySink($0.tensors) }
      try plan.run(into: sinks, grams: grams, memory: memory, workers: 2)
      return sources.reduce(0) { $0 + $1.bytesRead } - before
    }
    let once = sources.reduce(0) { $0 + $1.manifest.byteCount }
    let enough = plan.cost(memory: 1 << 20, workers: 2, hasGrams: false, hasRedundant: false)
    #expect(enough.bytesRead == once && enough.reads.groupsReadTwice == 0)
    #expect(try bytesRead(memory: 1 << 20) == once)
    let little = plan.cost(memory: 1 << 18, workers: 2, hasGrams: false, hasRedundant: false)
    #expect(try bytesRead(memory: 1 << 18) == little.bytesRead)
    #expect((little.bytesRead > once) == (text != "awd-row"))
    let grams = try TaskVectorGrams(of: files, memory: 1 << 20, workers: 2)
    #expect(try bytesRead(memory: 1 << 18, grams: grams) == once)
  }

  @Test func `waves hold what fits and keep the order`() {
    let waves = CleaningWave.waves(of: [10, 20, 70, 80, 5, 75], memory: 100, tiles: 0)
    #expect(
      waves == [
        CleaningWave(groups: 0..<2, byteCount: 30, isHeld: true),
        CleaningWave(groups: 2..<3, byteCount: 70, isHeld: true),
        CleaningWave(groups: 3..<4, byteCount: 80, isHeld: false),
        CleaningWave(groups: 4..<5, byteCount: 5, isHeld: true),
        CleaningWave(groups: 5..<6, byteCount: 75, isHeld: true),
      ])
    #expect(CleaningWave.waves(of: [10], memory: 100, tiles: 95).map { $0.isHeld } == [false])
    for (size, tiles) in [(75, 0), (10, 95), (1000, 7), (1, 1)] {
      let memory = CleaningWave.memory(holding: size, tiles: tiles)
      #expect(CleaningWave.waves(of: [size], memory: memory, tiles: tiles)[0].isHeld)
    }
  }

  // MARK: What an expert lacks

  @Test(arguments: [Cleaning.row, .model], Disentangling.Form.allCases)
  func `an expert without a tensor of the base has the base's, and its own names are not kept`(
    cleaning: Cleaning, form: Disentangling.Form
  ) throws {
    func steps(_ values: [Float]) throws -> SmallTensor {
      try SmallTensor("steps", [2], dtype: .u8, values)
    }
    let base = try Self.model(0, dtype: .f32, seed: 1) + [steps([1, 2])]
    let expert = try Self.model(1, dtype: .f32, seed: 1) + [steps([3, 4])]
    let lacking = expert.filter { !["steps", "layers.1.mlp.weight"].contains($0.info.name) }
    let prefixed = try expert.map {
      try SmallTensor("model." + $0.info.name, $0.info.shape, dtype: $0.info.dtype, $0.values)
    }
    let family = try ModelFamily(
      base: MemorySource(base),
      experts: [
        .init(name: "lacking", source: MemorySource(lacking)),
        .init(name: "prefixed", source: MemorySource(prefixed)),
      ])
    let outcome = try disentangle(family, cleaning, form: form)
    for expert in outcome.experts {
      #expect(expert.manifest["layers.1.mlp.weight"]?.shape == [12, 40])
      #expect((expert.manifest["steps"] != nil) == (form == .models))
    }
    guard form == .models else { return }
    let found = try outcome.experts.map { try $0.integers(of: $0.tensor("steps")) }
    #expect(found == [[1, 2], [3, 4]])
  }

  // MARK: What cannot be cleaned

  @Test(arguments: [Cleaning.row, .model])
  func `one expert alone is refused`(cleaning: Cleaning) throws {
    #expect(
      throws: MergeError(
        "one expert alone has nothing redundant", remedy: "cleaning takes at least two experts")
    ) { try disentangle(family(experts: 1), cleaning) }
  }

  @Test(arguments: [Cleaning.row, .model])
  func `identical experts are said to be so and stay numbers`(cleaning: Cleaning) throws {
    let one = try family().experts[0].source
    let family = try ModelFamily(
      base: family().base, experts: ["a", "b"].map { .init(name: $0, source: one) })
    let outcome = try disentangle(family, cleaning)
    #expect(
      outcome.summary.warnings == [
        "a and b have the same task vector: no redundant vector can tell them apart"
      ])
    for (name, _) in Self.shapes {
      #expect(try outcome.experts[0].floats(of: name).allSatisfy { $0.isFinite })
    }
  }

  @Test(arguments: [Cleaning.row, .model])
  func `an expert equal to the base is said to be so and stays zero`(cleaning: Cleaning) throws {
    let family = try family()
    let lazy = try ModelFamily(
      base: family.base, experts: family.experts + [.init(name: "lazy", source: family.base)])
    let outcome = try disentangle(lazy, cleaning)
    #expect(
      outcome.summary.warnings.contains("lazy equals the base in everything that was cleaned"))
    for (name, _) in Self.shapes {
      #expect(try outcome.experts.allSatisfy { try $0.floats(of: name).allSatisfy(\.isFinite) })
    }
  }

  @Test func `a penalty above the threshold is said to clean nothing`() throws {
    let outcome = try disentangle(family(), Cleaning("awd-model,penalty=5"))
    #expect(
      outcome.summary.warnings.first!.hasPrefix("there is nothing to gain: the penalty 5 is at"))
  }

  @Test func `weights that are not numbers are refused by tensor, or left as they are in rows`()
    throws
  {
    var tensors = try Self.model(1, dtype: .f32, seed: 1)
    var values = tensors[2].values
    values[13] = .nan
    tensors[2] = try SmallTensor(tensors[2].info.name, tensors[2].info.shape, values)
    let sick = try Checkpoint.open(Checkpoint.write(tensors, to: folder("sick.safetensors")))
    let healthy = try family()
    let family = try ModelFamily(
      base: healthy.base, experts: [.init(name: "sick", source: sick), healthy.experts[1]])
    #expect(
      throws: MergeError(
        "tensor \"layers.0.mlp.weight\" has weights that are not finite numbers, so \"model\" cannot be cleaned",
        remedy: "leave it out with --exclude")
    ) { try disentangle(family, .model) }
    let outcome = try disentangle(family, Cleaning("awd-row,rate=0.02"))
    #expect(outcome.summary.whole.unsolvableGroups == 1)
    let cleaned = try outcome.experts[1].floats(of: "layers.0.mlp.weight")
    let plain = try taskVector("layers.0.mlp.weight", 1, of: family).map { Float($0) }
    #expect(Array(cleaned[12..<24]) == Array(plain[12..<24]))
    #expect(Array(cleaned[0..<12]) != Array(plain[0..<12]))
    #expect(cleaned.allSatisfy { $0.isFinite })
    // A file of these matrices says so too.
    #expect(
      throws: MergeError(
        "tensor \"layers.0.mlp.weight\" has weights that are not finite numbers, so \"layers.0\" cannot be cleaned",
        remedy: "leave it out with --exclude")
    ) {
      try disentangle(
        family, Cleaning("awd-model,scope=block"), grams: outcome.summary.grams, name: "block")
    }
  }
}

/// What a user asks for, and the tensors it means.
struct CleaningTests {
  private func tensors(_ names: [(String, [Int])]) throws -> [TensorInfo] {
    try names.map { try TensorInfo(name: $0.0, dtype: .f32, shape: $0.1) }
  }

  private func cleaned(_ text: String, include: [String] = [], exclude: [String] = []) throws
    -> [String]
  {
    var cleaning = try Cleaning(text)
    cleaning.include = include
    cleaning.exclude = exclude
    return try tensors(DisentanglingTests.shapes).filter(cleaning.cleans).map { $0.name }
  }

  @Test func `each scope has its tensors`() throws {
    let matrices = ["layers.0.attn.weight", "layers.0.mlp.weight", "layers.1.mlp.weight"]
    #expect(try cleaned("awd-row") == matrices)
    #expect(try cleaned("awd-model,scope=tensor") == matrices)
    #expect(
      try cleaned("awd-model,scope=block")
        == DisentanglingTests.shapes.map { $0.name }.filter { $0.hasPrefix("layers") })
    #expect(try cleaned("awd-model") == DisentanglingTests.shapes.map { $0.name })
  }

  @Test func `patterns include and exclude`() throws {
    #expect(
      try cleaned("awd-row", include: ["*.mlp.*"], exclude: ["*.bias"])
        == ["layers.0.mlp.weight", "layers.1.mlp.weight"])
    #expect(
      try cleaned("awd-model", exclude: ["layers.?.*"]) == ["embed.weight", "norm.weight"])
  }

  @Test func `blocks are gathered wherever their tensors are`() throws {
    let cleaning = try Cleaning("awd-model,scope=block")
    let manifest = Manifest(
      try tensors([
        ("h.1.a", [2]), ("wte", [2, 2]), ("h.0.a", [2]), ("h.1.b", [2]), ("h.10.x.3.y", [2]),
      ]))
    let groups = cleaning.groups(of: manifest)
    #expect(groups.map { $0.name } == ["h.1", "wte", "h.0", "h.10"])
    #expect(groups.map { $0.isCleaned } == [true, false, true, true])
    #expect(groups[0].tensors.map { $0.name } == ["h.1.a", "h.1.b"])
  }

  @Test func `layers are in the order of their numbers`() {
    #expect(
      ["h.10", "g.3", "h.2", "h.1"].sorted(by: isBefore) == ["g.3", "h.1", "h.2", "h.10"])
  }

  @Test func `a description names the preset and everything that was changed`() throws {
    var cleaning = try Cleaning("awd-model,scope=block,penalty=0.01,optimizer=sgd,rate=0.5")
    cleaning.exclude = ["*.bias"]
    #expect(
      cleaning.description
        == "awd-model scope=block objective=abs optimizer=descent rate=0.5 momentum=0.9 weight_decay=0.0001 penalty=0.01 iterations=300 epsilon=0.0 exclude=*.bias"
    )
    #expect(
      try Cleaning("awd-row,optimizer=converged,penalty=none").description
        == "awd-row scope=row objective=squared optimizer=converged iterations=5")
  }

  @Test(arguments: [
    (
      "awd", "there is no cleaning preset \"awd\"; known are awd-model, awd-row"
    ),
    ("awd-row,scope=all", "scope is one of row, tensor, block, model, not \"all\""),
    ("awd-row,penalty=-1", "penalty is a number of at least 0, not \"-1\""),
    ("awd-row,penalty=nan", "penalty is a number of at least 0, not \"nan\""),
    ("awd-row,iterations=1.5", "iterations is a whole number up to 1000000, not \"1.5\""),
    ("awd-row,optimizer=adam", "optimizer is one of gd, sgd, converged, not \"adam\""),
    ("awd-row,optimizer=converged,rate=1", "the converged optimizer has no rate"),
    ("awd-row,rate=1,optimizer=converged", "the converged optimizer has no rate"),
    (
      "awd-model,penalty=0.1,optimizer=converged",
      "the converged optimizer has no penalty; it stops at the nearest redundant vector by itself; a descent (gd, sgd) takes a penalty"
    ),
    ("awd-row,optimizer=converged,epsilon=1", "the converged optimizer has no epsilon"),
    (
      "awd-row,optimizer=converged,objective=abs",
      "the converged optimizer makes the squares of the cosines small, not abs"
    ),
    ("awd-row,block", "\"block\" is not of the form name=value"),
    (
      "awd-row,gamma=1",
      "cleaning has no parameter \"gamma\"; it has scope, objective, penalty, optimizer, rate, momentum, weight_decay, iterations, epsilon"
    ),
  ])
  func `what is not understood is refused by name`(text: String, message: String) {
    do throws(MergeError) {
      _ = try Cleaning(text)
      Issue.record("\(text) was accepted")
    } catch {
      #expect(error.description == message)
    }
  }
}
