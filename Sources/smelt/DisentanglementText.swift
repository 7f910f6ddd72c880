import Foundation
import Merging

/// The report of a disentanglement as a table for people and as JSON for programs.
struct DisentanglementText: CustomStringConvertible, Encodable {
  let summary: DisentanglementSummary

  init(_ summary: DisentanglementSummary) { self.summary = summary }

  var description: String {
    let isByRow = summary.cleaning.method.scope == .row
    let columns =
      ["", isByRow ? "rows" : "tensors", "|cos|", "cleaned"]
      + (isByRow ? ["by row", "cleaned"] : []) + ["redundant"] + summary.experts
    // Tensors of wider groups are reported one by one, and the whole group by group.
    func row(_ name: String, _ report: DisentanglementReport, _ count: Int) -> [String] {
      [name, "\(count)"]
        + [report.before.meanAbsoluteCosine, report.after.meanAbsoluteCosine].map { decimal($0) }
        + (isByRow ? [report.meanCosineBefore, report.meanCosineAfter].map { decimal($0) } : [])
        + [percent(report.relativeRedundancy)] + report.retainedNorms.map { percent($0) }
    }
    let whole = summary.whole
    let count = isByRow ? whole.groups : summary.tensors.count
    let rows =
      summary.layers.map { row($0.name, $0.report, $0.report.groups) }
      + [row("whole", whole, count)]
    let table = Table(
      columns: columns, rows: rows, rightAligned: Set(columns.indices.dropFirst()))
    let groups = isByRow ? "" : ", in \(whole.groups == 1 ? "one group" : "\(whole.groups) groups")"
    return """
      \(summary.cleaning)\(groups)
      Mean |cos| between task vectors before and after cleaning; the redundant vector's norm over \
      the task vectors' mean norm; the norm that each task keeps:
      \(table)
      """
  }

  private func percent(_ share: Double) -> String { decimal(100 * share, 1) + " %" }

  // MARK: JSON

  private enum Key: String, CodingKey {
    case cleaning, experts, whole, layers, groups, tensors, warnings
  }

  func encode(to encoder: any Encoder) throws {
    var container = encoder.container(keyedBy: Key.self)
    let experts = summary.experts
    func parts(_ parts: [DisentanglementSummary.Part]) -> [Part] {
      parts.map { Part($0.name, $0.report, $0.coefficients, experts) }
    }
    try container.encode(summary.cleaning.description, forKey: .cleaning)
    try container.encode(experts, forKey: .experts)
    try container.encode(Part(nil, summary.whole, nil, experts), forKey: .whole)
    try container.encode(parts(summary.layers), forKey: .layers)
    try container.encode(parts(summary.groups), forKey: .groups)
    try container.encode(parts(summary.tensors), forKey: .tensors)
    try container.encode(summary.warnings, forKey: .warnings)
  }

  private struct Part: Encodable {
    let name: String?
    let groups: Int
    let cosinesBefore: [[Double]]
    let cosinesAfter: [[Double]]
    let meanCosineBefore: Double
    let meanCosineAfter: Double
    let groupMeanCosineBefore: Double
    let groupMeanCosineAfter: Double
    let redundantNorm: Double
    let relativeRedundancy: Double
    let retainedNorms: [String: Double]
    let groupsBelowHealthyNorm: [String: Int]
    let thresholds: [Double]
    let idleGroups: Int
    let coefficients: [Double]?

    init(
      _ name: String?, _ report: DisentanglementReport, _ coefficients: [Double]?,
      _ experts: [String]
    ) {
      self.name = name
      groups = report.groups
      cosinesBefore = report.before.cosineRows
      cosinesAfter = report.after.cosineRows
      meanCosineBefore = report.before.meanAbsoluteCosine
      meanCosineAfter = report.after.meanAbsoluteCosine
      groupMeanCosineBefore = report.meanCosineBefore
      groupMeanCosineAfter = report.meanCosineAfter
      redundantNorm = report.squaredRedundantNorm.squareRoot()
      relativeRedundancy = report.relativeRedundancy
      retainedNorms = Dictionary(uniqueKeysWithValues: zip(experts, report.retainedNorms))
      groupsBelowHealthyNorm = Dictionary(
        uniqueKeysWithValues: zip(experts, report.depletedGroups))
      thresholds = [report.thresholds.lowerBound, report.thresholds.upperBound]
      idleGroups = report.idleGroups
      self.coefficients = coefficients
    }
  }
}

extension GramMatrix {
  /// The cosines as rows.
  var cosineRows: [[Double]] {
    let cosines = cosines
    return (0..<order).map { row in (0..<order).map { cosines[row, $0] } }
  }
}
