import CKernels

/// Task arithmetic and its relatives: each difference is sparsified, weighted, and added up,
/// with or without an election of the sign.
///
/// TIES (Yadav et al., arXiv 2306.01708), DARE (Yu et al., arXiv 2311.03099), DELLA (Deep et
/// al., arXiv 2406.11617), Model Breadcrumbs (Davari and Belilovsky, arXiv 2312.06795): all are
/// presets of this one.
struct SignConsensus: TensorMerge {
  /// Which elements of a difference are kept.
  enum Sparsifier {
    case magnitude
    case outliers
    case random
    case ranked
  }

  /// One method of the family.
  private struct Preset {
    let name: String
    let formula: String
    let sparsifier: Sparsifier?
    let electsSigns: Bool
    let normalizes: Bool
    let rescales: Bool
  }

  private static let presets = [
    Preset(
      name: "task_arithmetic", formula: "base + λ Σ wᵢdᵢ", sparsifier: nil, electsSigns: false,
      normalizes: false, rescales: false),
    Preset(
      name: "ties",
      formula: "base + λ Σ mᵢwᵢdᵢ / Σ mᵢwᵢ, the largest dᵢ that share the elected sign",
      sparsifier: .magnitude, electsSigns: true, normalizes: true, rescales: false),
    Preset(
      name: "dare_ties", formula: "ties of randomly kept, rescaled dᵢ", sparsifier: .random,
      electsSigns: true, normalizes: false, rescales: true),
    Preset(
      name: "dare_linear", formula: "base + λ Σ wᵢdᵢ of randomly kept, rescaled dᵢ",
      sparsifier: .random, electsSigns: false, normalizes: false, rescales: true),
    Preset(
      name: "della", formula: "ties of dᵢ kept at random, the larger the likelier",
      sparsifier: .ranked, electsSigns: true, normalizes: true, rescales: true),
    Preset(
      name: "della_linear",
      formula: "base + λ Σ wᵢdᵢ of dᵢ kept at random, the larger the likelier",
      sparsifier: .ranked, electsSigns: false, normalizes: false, rescales: true),
    Preset(
      name: "breadcrumbs", formula: "base + λ Σ wᵢdᵢ without the largest and the smallest",
      sparsifier: .outliers, electsSigns: false, normalizes: false, rescales: false),
    Preset(
      name: "breadcrumbs_ties", formula: "ties without the largest and the smallest dᵢ",
      sparsifier: .outliers, electsSigns: true, normalizes: false, rescales: false),
  ]

  static let methods = presets.map { preset in
    var parameters: [MethodParameter] = [
      .number("weight", .perModelButBase), .number("lambda", default: 1),
      .flag("normalize", preset.normalizes), .flag("rescale", preset.rescales),
      .int8Mask, .number("density", .perModelButBase, default: 1),
    ]
    if preset.sparsifier == .outliers {
      parameters.append(.number("gamma", .perModelButBase, default: 0.01))
    }
    if preset.sparsifier == .ranked {
      parameters.append(.number("epsilon", .perModelButBase, default: 0.15))
    }
    return MergeMethod(
      preset.name, preset.formula, operand: .differences, base: .required, parameters: parameters
    ) { try SignConsensus(preset, $0) }
  }

  /// What becomes of one model's difference before it is weighted.
  fileprivate enum Mask: Sendable {
    case all
    case none
    case band(RankBand)
    case random(Double)
    case ranked(Double, epsilon: Double)
  }

  private let name: String
  private let rowLength: Int
  private let rows: Range<Int>
  private let elementCount: Int
  private let givenGrain: Int
  private let weights: [Float]
  private let electsSigns: Bool
  private let normalizes: Bool
  private let lambda: Float
  private let randomness: Randomness
  /// Where each row's draws begin among the tensor's.
  private var drawStarts: [Int] = []
  private var masks: [Mask]
  /// What makes up for the elements that were dropped; `nil` while it is unknown.
  private var scales: [Float]?

  private init(_ preset: Preset, _ setting: TensorSetting) throws {
    name = setting.name
    rowLength = max(1, setting.rowLength)
    rows = setting.rows
    elementCount = setting.elementCount
    givenGrain = setting.grain
    weights = setting.numbers("weight").map { Float($0) }
    electsSigns = preset.electsSigns
    normalizes = setting.flag("normalize")
    lambda = Float(setting.number("lambda"))
    randomness = setting.randomness
    let densities = setting.numbers("density")
    let gammas = setting.perModel["gamma"] == nil ? [] : setting.numbers("gamma")
    let epsilons = setting.perModel["epsilon"] == nil ? [] : setting.numbers("epsilon")
    masks = try densities.indices.map { model in
      try SignConsensus.mask(
        preset.sparsifier, density: densities[model],
        gamma: gammas.isEmpty ? 0 : gammas[model],
        epsilon: epsilons.isEmpty ? 0 : epsilons[model], count: setting.elementCount)
    }
    var draws = 0
    for mask in masks {
      drawStarts.append(draws)
      draws += mask.draws ? elementCount : 0
    }
    let isSparse = masks.contains { !$0.isTrivial }
    scales = setting.flag("rescale") && isSparse ? nil : weights.map { _ in 1 }
  }

  private static func mask(
    _ sparsifier: Sparsifier?, density: Double, gamma: Double, epsilon: Double, count: Int
  ) throws -> Mask {
    guard let sparsifier, density < 1 else { return .all }
    guard density >= 0 else {
      throw MergeError("density is \(density); it must be between 0 and 1")
    }
    switch sparsifier {
    case .magnitude:
      guard density > 0, count > 0 else { return .none }
      return .band(RankBand(keeping: count - max(1, Int(density * Double(count)))..<count))
    case .outliers:
      guard (0...1).contains(gamma) else {
        throw MergeError("gamma is \(gamma); it must be between 0 and 1")
      }
      let kept = Int(density * Double(count))
      let bottom = max(0, count - kept - Int(gamma * Double(count)))
      return .band(RankBand(keeping: bottom..<bottom + kept))
    case .random: return density > 0 ? .random(density) : .random(0)
    case .ranked:
      guard density > 0 else { return .none }
      guard density - epsilon > 0, density + epsilon < 1 else {
        throw MergeError(
          "density \(density) and epsilon \(epsilon) give probabilities beyond 0 or 1",
          remedy: "choose them so that density − epsilon is above 0 and density + epsilon below 1")
      }
      return .ranked(density, epsilon: epsilon)
    }
  }

  /// How many of the rows are thinned at random.
  var drawingRows: Int { masks.count { $0.draws } }

  // MARK: Observing

  struct Observation: Sendable {
    fileprivate var bands: [RankBand.Observation]
    /// Σ|d| of each row, before and after it is masked.
    fileprivate var norms: [SIMD2<Double>]
  }

  var grain: Int {
    masks.contains { if case .ranked = $0 { true } else { false } } ? rowLength : givenGrain
  }
  /// Row 1 of the output holds the weights that agreed.
  var scratchRows: Int { electsSigns && normalizes ? 1 : 0 }
  private var bandsAreKnown: Bool { masks.allSatisfy { $0.isKnown } }
  var isReady: Bool { bandsAreKnown && scales != nil }

  var observingPasses: Int {
    (bandsAreKnown ? 0 : RankBand.largestNumberOfPasses) + (scales == nil ? 1 : 0)
  }

  var observationBytes: Int { masks.count { !$0.isKnown } * RankBand.observationBytes }

  func makeObservation() -> Observation {
    Observation(
      bands: masks.map {
        if case .band(let band) = $0 { band.makeObservation() } else { .nothing }
      },
      norms: Array(repeating: .zero, count: masks.count))
  }

  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout Observation
  ) {
    let isForBands = !bandsAreKnown
    for (model, row) in rows.enumerated() {
      if isForBands {
        if case .band(let band) = masks[model] {
          band.observe(tile[row], into: &observation.bands[model])
        }
      } else if !masks[model].isTrivial {
        observation.norms[model] += magnitudes(&tile, row: row, model: model, at: position)
      }
    }
  }

  /// Σ|d| of a row, before and after it is sparsified; the row may be worked in.
  private func magnitudes(_ tile: inout Tile, row: Int, model: Int, at position: Int)
    -> SIMD2<Double>
  {
    if case .random(let p) = masks[model] {
      return randomness.magnitudes(
        tile[row], keeping: p, tensor: name, model: model, position: position,
        rowStart: drawStarts[model])
    }
    let before = sumOfMagnitudes(tile[row])
    sparsify(&tile, row: row, model: model, at: position, scale: 1)
    return SIMD2(before, sumOfMagnitudes(tile[row]))
  }

  func combine(_ next: Observation, into total: inout Observation) {
    for model in masks.indices {
      if case .band(let band) = masks[model] {
        band.combine(next.bands[model], into: &total.bands[model])
      }
      total.norms[model] += next.norms[model]
    }
  }

  mutating func learn(_ total: Observation) throws(PassesDiffer) {
    guard bandsAreKnown else {
      for model in masks.indices {
        guard case .band(var band) = masks[model] else { continue }
        try band.learn(total.bands[model])
        masks[model] = .band(band)
      }
      return
    }
    scales = masks.indices.map { model in
      let (before, after) = (total.norms[model].x, total.norms[model].y)
      guard !masks[model].isTrivial, before >= 1e-7, after >= 1e-7 else { return 1 }
      return Float(before) / Float(after)
    }
  }

  // MARK: Merging

  var linearWeights: [Float]? {
    guard !electsSigns, scales == weights.map({ _ in 1 }), masks.allSatisfy({ $0.isTrivial }) else {
      return nil
    }
    let sum = weights.reduce(0, +)
    let factor = normalizes && abs(sum) >= 1e-8 ? lambda / sum : lambda
    return weights.map { $0 * factor }
  }

  /// Sets to zero what a row loses, and multiplies the rest by `scale`.
  private func sparsify(
    _ tile: inout Tile, row: Int, model: Int, at position: Int, scale: Float
  ) {
    switch masks[model] {
    case .all: break
    case .none: tile.clear(row: row)
    case .band(let band):
      var values = tile.mutableRow(row)
      band.restrict(&values, tile: position / Tile.width(grain: grain))
    case .random(let p):
      var values = tile.mutableRow(row)
      return randomness.thin(
        &values, keeping: p, scale: scale, tensor: name, model: model, position: position,
        rowStart: drawStarts[model])
    case .ranked(let density, let epsilon):
      thinByRank(
        &tile, row: row, density: density, epsilon: epsilon, model: model, at: position)
    }
    if scale != 1 { tile.multiply(row: row, by: scale) }
  }

  /// DELLA's choice: the keep-probability rises linearly with the rank within the row.
  private func thinByRank(
    _ tile: inout Tile, row: Int, density: Double, epsilon: Double, model: Int, at position: Int
  ) {
    var values = tile.mutableRow(row)
    var uniforms = [Float](repeating: 0, count: values.count)
    var span = uniforms.mutableSpan
    randomness.uniforms(
      &span, tensor: name, model: model, position: position, rowStart: drawStarts[model])
    var scratch = [UInt64](repeating: 0, count: 2 * rowLength)
    // Sound: the kernel works within the three arrays; scratch has room for two rows.
    values.withUnsafeMutableBufferPointer { values in
      uniforms.withUnsafeBufferPointer { uniforms in
        for start in stride(from: 0, to: values.count, by: rowLength) {
          smelt_thin_by_rank(
            values.baseAddress! + start, rowLength, uniforms.baseAddress! + start,
            Float(density), Float(density - epsilon), Float(epsilon), &scratch)
        }
      }
    }
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    guard let scales else { preconditionFailure("the scales have not been learnt") }
    for (model, row) in rows.enumerated() {
      sparsify(&tile, row: row, model: model, at: position, scale: scales[model])
    }
    let first = rows.lowerBound
    if electsSigns {
      output.elect(tile, from: first, weights: weights, agreed: normalizes ? 1 : nil)
      if normalizes { output.divide(row: 0, byRow: 1) }
    } else {
      output.weigh(tile, from: first, weights: weights)
      let sum = weights.reduce(0, +)
      if normalizes, abs(sum) >= 1e-8 { output.divide(row: 0, by: sum) }
    }
    if lambda != 1 { output.multiply(row: 0, by: lambda) }
  }
}

extension SignConsensus.Mask {
  fileprivate var isTrivial: Bool { if case .all = self { true } else { false } }
  fileprivate var isKnown: Bool { if case .band(let band) = self { band.isKnown } else { true } }
  fileprivate var draws: Bool {
    switch self {
    case .random, .ranked: true
    default: false
    }
  }
}

/// Σ|x|, in sixteen Float lanes over blocks of 1024 that are folded into Double.
func sumOfMagnitudes(_ values: Span<Float>) -> Double {
  // Sound: the kernel reads the span's elements and nothing else.
  values.withUnsafeBufferPointer {
    $0.baseAddress.map { smelt_sum_magnitudes($0, values.count) } ?? 0
  }
}
