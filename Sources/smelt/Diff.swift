import ArgumentParser
import Checkpoints

struct Diff: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Say how two checkpoints differ, tensor by tensor.",
    discussion: """
      max |a−b| is the largest difference of an element, relative is ‖a−b‖/‖a‖, cosine that of \
      the angle between the two; types of 4 and 6 bits have none of these. The formats, the order \
      of the tensors and the metadata do not count.

      Exit codes: 0 the same, 1 different or unreadable, 64 wrong usage.
      """)

  @Argument(help: "A checkpoint.", completion: .file())
  var first: String

  @Argument(help: "The checkpoint to compare it with.", completion: .file())
  var second: String

  @Flag(help: "Print JSON for programs.")
  var json = false

  @OptionGroup var resources: Resources

  func run() throws {
    let difference = try Checkpoint.difference(
      Checkpoint.open(first), Checkpoint.open(second), workers: resources.jobs)
    if json {
      try print(json: Report(difference))
    } else {
      printTable(difference)
    }
    if !difference.isEmpty { throw ExitCode(1) }
  }

  private func printTable(_ difference: CheckpointDifference) {
    for tensor in difference.onlyInFirst { print("only in \(first): \(quoted(tensor.name))") }
    for tensor in difference.onlyInSecond { print("only in \(second): \(quoted(tensor.name))") }
    for failure in difference.common.compactMap({ $0.failure }) {
      print("not compared: \(failure)")
    }
    let different = difference.common.filter { !$0.isIdentical && $0.failure == nil }
    if !different.isEmpty {
      print(
        Table(
          columns: ["max |a−b|", "relative", "cosine", "tensor"], rows: different.map(row),
          rightAligned: [0, 1, 2]))
    }
    print(
      "\(difference.common.count { $0.isIdentical }) of \(difference.common.count) common tensors are the same, bit for bit"
    )
  }

  private func row(_ pair: TensorDifference) -> [String] {
    let name = quoted(pair.first.name)
    let kinds = [pair.first, pair.second].map { "\($0.dtype.rawValue) \($0.shapeDescription)" }
    let change = kinds[0] == kinds[1] ? "" : " (\(kinds[0]) and \(kinds[1]))"
    guard let numbers = pair.numbers else { return ["-", "-", "-", name + change] }
    return [
      scientific(numbers.maximum), scientific(numbers.relativeNorm),
      numbers.cosine.isNaN ? "-" : decimal(numbers.cosine, 8),
      name + change,
    ]
  }
}

/// The difference for programs. A number that is no number (NaN) is left out.
private struct Report: Encodable {
  struct Tensor: Encodable {
    let name: String
    let identical: Bool
    let dtypes: [String]
    let shapes: [[Int]]
    let maximum: Double?
    let relativeNorm: Double?
    let cosine: Double?
    /// Why the two were not compared.
    let error: String?

    init(_ pair: TensorDifference) {
      name = pair.first.name
      identical = pair.isIdentical
      error = pair.failure?.description
      dtypes = [pair.first.dtype.rawValue, pair.second.dtype.rawValue]
      shapes = [pair.first.shape, pair.second.shape]
      let numbers = pair.numbers
      maximum = numbers.flatMap { $0.maximum.isFinite ? $0.maximum : nil }
      relativeNorm = numbers.flatMap { $0.relativeNorm.isFinite ? $0.relativeNorm : nil }
      cosine = numbers.flatMap { $0.cosine.isFinite ? $0.cosine : nil }
    }
  }

  let same: Bool
  let onlyInFirst: [String]
  let onlyInSecond: [String]
  let tensors: [Tensor]

  init(_ difference: CheckpointDifference) {
    same = difference.isEmpty
    onlyInFirst = difference.onlyInFirst.map { $0.name }
    onlyInSecond = difference.onlyInSecond.map { $0.name }
    tensors = difference.common.map(Tensor.init)
  }
}
