import ArgumentParser
import Merging

struct Methods: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "List the merge methods, their formulas and their parameters.",
    discussion: """
      xᵢ are the models, dᵢ their differences to the base, wᵢ their weights. A parameter with \
      “each” may differ between models; one without a default must be set.
      """)

  func run() {
    for method in MergeMethod.all.sorted(by: { $0.name < $1.name }) {
      print("\(method.name): \(method.formula)")
      let needs = method.base == .required ? "needs a base_model" : "base_model is optional"
      print("  \(needs)\(method.countOfModels)")
      for parameter in method.parameters {
        print(
          "  \(parameter.name)\(parameter.scope == .shared ? "" : ", each")\(parameter.defaultText)"
        )
      }
    }
  }
}

extension MergeMethod {
  fileprivate var countOfModels: String {
    if models == 1...Int.max { return "" }
    if models.upperBound == .max { return ", at least \(models.lowerBound) models with it" }
    if models.lowerBound == models.upperBound {
      return ", \(models.lowerBound) \(models.lowerBound == 1 ? "model" : "models with it")"
    }
    return ", \(models.lowerBound) to \(models.upperBound) models with it"
  }
}

extension MethodParameter {
  fileprivate var defaultText: String {
    switch fallback {
    case .required: ": required"
    case .absent: ": not set"
    case .value(.number(let number)): ": \(number)"
    case .value(.flag(let flag)): ": \(flag)"
    }
  }
}
