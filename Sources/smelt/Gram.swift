import ArgumentParser
import Checkpoints
import Merging

struct Gram: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show how much the task vectors of experts point the same way.",
    discussion: """
      Prints the cosines between the experts' task vectors (expert − base) and their norms, for \
      the whole model and for each layer.
      """)

  @OptionGroup var family: FamilyArguments

  @Option(
    name: .shortAndLong,
    help: "Also write the inner products, tensor by tensor, for 'smelt disentangle --gram'.")
  var output: String?

  @Flag(help: "Print JSON for programs.")
  var json = false

  @OptionGroup var resources: Resources

  func run() throws {
    if let output { try refuse(writing: output, overInputs: family.paths) }
    let grams = try TaskVectorGrams(
      of: family.open { $0 }, memory: resources.memory.bytes, workers: resources.jobs)
    try output.map { try grams.write(to: $0) }
    if json {
      let parts = [("whole", grams.whole)] + grams.layers.map { ($0.name, $0.gram) }
      try print(json: parts.map { Part(name: $0, gram: $1, experts: grams.experts) })
    } else {
      print("whole model\n\(table(grams.whole, grams.experts))")
      for layer in grams.layers { print("\n\(layer.name)\n\(table(layer.gram, grams.experts))") }
    }
  }

  private func table(_ gram: GramMatrix, _ experts: [String]) -> Table {
    let rows = zip(experts, gram.cosineRows).enumerated().map { index, row in
      [row.0] + row.1.map { decimal($0) } + [decimal(gram[index, index].squareRoot())]
    }
    let columns = [""] + experts + ["norm"]
    return Table(columns: columns, rows: rows, rightAligned: Set(columns.indices.dropFirst()))
  }

  private struct Part: Encodable {
    let name: String
    let experts: [String]
    let cosines: [[Double]]
    let norms: [Double]
    let meanAbsoluteCosine: Double

    init(name: String, gram: GramMatrix, experts: [String]) {
      self.name = name
      self.experts = experts
      cosines = gram.cosineRows
      norms = experts.indices.map { gram[$0, $0].squareRoot() }
      meanAbsoluteCosine = gram.meanAbsoluteCosine
    }
  }
}
