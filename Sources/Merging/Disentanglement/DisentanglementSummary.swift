import Checkpoints
import Glibc

/// What a cleaning did to a model: whole, by layer, by group and by tensor.
public struct DisentanglementSummary: Sendable {
  /// Something that was cleaned.
  public struct Part: Sendable {
    public let name: String
    public var report: DisentanglementReport
    /// a, where all of the part shares one redundant vector.
    public let coefficients: [Double]?
  }

  public let cleaning: Cleaning
  public let experts: [String]
  /// The groups and their coefficients; empty in row scope, where a tensor has one group a row.
  public private(set) var groups: [Part] = []
  /// The cleaned tensors in the order they were met.
  public private(set) var tensors: [Part] = []
  /// The task vectors of all floating-point tensors, cleaned or not, before cleaning.
  public private(set) var grams: TaskVectorGrams

  init(_ cleaning: Cleaning, experts: [String]) {
    self.cleaning = cleaning
    self.experts = experts
    grams = TaskVectorGrams(experts: experts)
  }

  /// The layers by their numbers; what is in no layer is left out.
  public var layers: [Part] {
    var layers: [Part] = []
    for tensor in tensors {
      guard let name = layerName(of: tensor.name) else { continue }
      if let position = layers.lastIndex(where: { $0.name == name }) {
        layers[position].report += tensor.report
      } else {
        layers.append(Part(name: name, report: tensor.report, coefficients: nil))
      }
    }
    return layers.sorted { isBefore($0.name, $1.name) }
  }

  /// Everything that was cleaned, together.
  public var whole: DisentanglementReport {
    (cleaning.method.scope == .row ? tensors : groups).reduce(
      into: DisentanglementReport(taskCount: experts.count)
    ) { $0 += $1.report }
  }

  mutating func sortGrams(like manifest: Manifest) { grams.sort(like: manifest) }

  mutating func add(_ group: Cleaning.Group, _ solution: AdaptiveWeightDisentanglement.Solution) {
    groups.append(
      Part(name: group.name, report: solution.report, coefficients: solution.coefficients))
  }

  /// Adds a tensor whose rows were cleaned, or that was cleaned with its group, or not at all.
  mutating func add(
    _ tensor: String, _ cleaning: TensorCleaning, _ rows: DisentanglementReport, _ gram: GramMatrix
  ) {
    grams.append(tensor, gram)
    switch cleaning {
    case .none: break
    case .rows: tensors.append(Part(name: tensor, report: rows, coefficients: nil))
    case .group(let coefficients):
      let report = DisentanglementReport(gram, coefficients, penalty: 0, threshold: 0)
      tensors.append(Part(name: tensor, report: report, coefficients: coefficients))
    }
  }
}

// MARK: - Warnings

extension DisentanglementSummary {
  /// What a user should know before using the result, as sentences.
  public var warnings: [String] {
    guard !tensors.isEmpty else { return ["nothing was cleaned: no tensor is selected"] }
    let whole = whole
    // What cannot be told apart cannot be cleaned, whatever the parameters.
    let isHopeless = experts.indices.allSatisfy { i in
      (0..<i).allSatisfy { j in
        whole.before[i, i] == 0 || whole.before[j, j] == 0 || isSame(i, j, whole)
      }
    }
    let progress = isHopeless ? [] : [idle(whole), slow(whole)]
    return (progress + [unsolvable(whole)]).compactMap { $0 } + degenerate(whole) + depleted(whole)
  }

  private func idle(_ whole: DisentanglementReport) -> String? {
    guard whole.idleGroups > 0 else { return nil }
    let share =
      whole.idleGroups == whole.groups
      ? "nothing was cleaned" : "\(whole.idleGroups) of \(whole.groups) \(noun) were not cleaned"
    let threshold = whole.thresholds
    let range =
      threshold.lowerBound == threshold.upperBound
      ? short(threshold.upperBound)
      : "\(short(threshold.lowerBound)) to \(short(threshold.upperBound))"
    guard whole.relativeRedundancy < 1e-9 else {
      let place =
        whole.idleGroups == whole.groups ? "" : " in \(whole.idleGroups) of \(whole.groups) \(noun)"
      return
        "there is nothing to gain\(place): the penalty \(short(cleaning.method.penalty.coefficient)) is at or above the threshold where the best redundant vector is 0 (here \(range)), and a descent only swings around it; lower the penalty"
    }
    return
      "\(share): the penalty \(short(cleaning.method.penalty.coefficient)) is at or above the threshold where the redundant vector stays 0 (here \(range)); lower the penalty"
  }

  /// A descent that was too short to get anywhere: in row scope a loss is averaged over the
  /// rows, so a rate that does for a matrix of few rows is too small for one of many.
  private func slow(_ whole: DisentanglementReport) -> String? {
    guard whole.idleGroups < whole.groups, whole.meanCosineBefore > 1e-6,
      whole.meanCosineAfter > 0.9 * whole.meanCosineBefore
    else { return nil }
    guard whole.meanCosineAfter <= whole.meanCosineBefore else {
      return
        "the descent overshot: the mean |cos| rose from \(fixed(whole.meanCosineBefore)) to \(fixed(whole.meanCosineAfter)); lower the rate, or use optimizer=converged"
    }
    if whole.overshotGroups * 4 > whole.groups, case .descent = cleaning.method.optimizer {
      return
        "the descent overshot in \(whole.overshotGroups) of \(whole.groups) \(noun), whose mean |cos| rose; lower the rate, or use optimizer=converged"
    }
    return
      "little was cleaned: the mean |cos| went from \(fixed(whole.meanCosineBefore)) to \(fixed(whole.meanCosineAfter)); raise the rate or the iterations, or use optimizer=converged"
  }

  private func unsolvable(_ whole: DisentanglementReport) -> String? {
    guard whole.unsolvableGroups > 0 else { return nil }
    return
      "\(whole.unsolvableGroups) of \(whole.groups) \(noun) were left as they are: their weights are not all finite numbers"
  }

  private func degenerate(_ whole: DisentanglementReport) -> [String] {
    var sentences: [String] = []
    for (task, name) in experts.enumerated() where whole.before[task, task] == 0 {
      sentences.append("\(name) equals the base in everything that was cleaned")
    }
    for i in experts.indices {
      for j in 0..<i
      where whole.before[i, i] > 0 && whole.before[j, j] > 0 && isSame(i, j, whole) {
        sentences.append(
          "\(experts[j]) and \(experts[i]) have the same task vector: no redundant vector can tell them apart"
        )
      }
    }
    return sentences
  }

  private func isSame(_ i: Int, _ j: Int, _ whole: DisentanglementReport) -> Bool {
    let before = whole.before
    return before[i, i] + before[j, j] - 2 * before[i, j] <= before[i, i] * 1e-9
  }

  private func depleted(_ whole: DisentanglementReport) -> [String] {
    zip(experts, zip(whole.retainedNorms, whole.depletedGroups)).compactMap { name, loss in
      let (retained, groups) = loss
      if retained < DisentanglementReport.healthyNorm {
        return
          "\(name) keeps only \(fixed(retained)) of its norm: more than redundancy was taken out of it"
      }
      guard groups > 0 else { return nil }
      return "\(name) keeps less than 0.7 of its norm in \(groups) of \(whole.groups) \(noun)"
    }
  }

  /// What the groups are.
  private var noun: String { cleaning.method.scope == .row ? "rows" : "groups" }

  private func short(_ value: Double) -> String { shown(value, significant: 3) }
  private func fixed(_ value: Double) -> String { shown(value, significant: 4) }
}

/// A number in a sentence, with so many significant digits.
private func shown(_ value: Double, significant digits: Int) -> String {
  guard value.isFinite, value > 0 else { return "\(value)" }
  let scale = pow(10, Double(digits - 1) - log10(value).rounded(.down))
  let rounded = (value * scale).rounded() / scale
  return rounded == rounded.rounded() && rounded < 1e6 ? "\(Int(rounded))" : "\(Float(rounded))"
}
