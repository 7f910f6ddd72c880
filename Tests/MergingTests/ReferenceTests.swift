import Checkpoints
import Foundation
import TestSupport
import Testing

@testable import Merging

/// Recipes and what mergekit made of them (`Fixtures/merges`), against what Smelt makes of them.
struct ReferenceTests {
  static let folder = fixtures("merges")

  /// How far apart the arithmetic of both may be, by method.
  static let tolerances: [(recipe: String, difference: Float)] = [
    ("linear", 0), ("linear-sum", 0), ("gradients", 0), ("task_arithmetic", 0), ("ties", 0),
    ("ties-sum", 0), ("breadcrumbs", 0), ("breadcrumbs_ties", 0), ("ram", 0), ("slices", 0),
    ("dare_ties", 6e-8), ("dare_linear", 6e-8), ("slerp", 6e-8), ("slerp-slices", 6e-8),
    ("nuslerp", 2.4e-7), ("nuslerp-base", 2.4e-7), ("nuslerp-rows", 2.4e-7),
    ("nuslerp-columns", 2.4e-7), ("multislerp", 2.4e-7), ("multislerp-base", 2.4e-7),
    ("model_stock", 2.4e-7), ("model_stock-filters", 2.4e-7), ("nearswap", 2.4e-7),
    ("ramplus_tl", 2.4e-7), ("karcher", 1e-6), ("sce", 1e-6), ("sce-all", 1e-6),
    ("arcee_fusion", 1e-6),
  ]

  @Test(arguments: tolerances)
  func `the result is mergekit's`(recipe: String, difference: Float) throws {
    let path = "\(Self.folder)/recipes/\(recipe).yml"
    let parsed = try Recipe(
      parsing: String(contentsOfFile: path, encoding: .utf8), file: path)
    let models = try parsed.models.map {
      try Checkpoint.open("\(Self.folder)/\($0).safetensors")
    }
    let plan = try MergePlan(
      parsed, models: models, seed: 7, imitatingDrawsOfMergekit: recipe.hasPrefix("dare"))
    let sink = MemorySink(plan.manifest.tensors)
    try plan.run(into: sink, memory: 1 << 24, workers: 2)
    let expected = try Checkpoint.open("\(Self.folder)/results/\(recipe).safetensors")
    #expect(
      Set(plan.manifest.tensors.map { $0.name }) == Set(expected.manifest.tensors.map { $0.name }))
    for tensor in plan.manifest.tensors {
      let (own, theirs) = (sink.floats(of: tensor), try expected.floats(of: tensor.name))
      let largest = zip(own, theirs).map { abs($0 - $1) }.max()!
      #expect(largest <= difference, "\(tensor.name)")
    }
  }
}
