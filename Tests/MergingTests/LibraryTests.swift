import Checkpoints
import Foundation
import Merging
import TestSupport
import Testing

/// The library as somebody who depends on it sees it: public names only.
struct LibraryTests {
  /// README shows this, as it stands here.
  func convertAndMerge(_ path: (String) -> String, recipe text: String) throws {
    // A checkpoint of any format; a small tensor of it as Float.
    let model = try Checkpoint.open(path("a.h5"))
    print(try model.floats(of: "model.norm.weight"))

    // The same tensors in another format; the ending says which.
    try Checkpoint.write(model, to: path("copy.safetensors"))

    // A merge: parse, plan (what can fail by inspection fails here), run, finish.
    let recipe = try Recipe(parsing: text, file: "recipe.yml")
    let plan = try MergePlan(recipe, models: recipe.models.map { try Checkpoint.open($0) })
    let merged = try Checkpoint.create(path("merged.safetensors"), plan.manifest)
    try plan.run(into: merged, memory: 256 << 20, workers: 2)
    try merged.finish()
  }

  @Test func `what README shows of the library works`() throws {
    let folder = try TemporaryFolder()
    let tensors = try ["a.h5": Float(1), "b.h5": 3].mapValues {
      try SmallTensor("model.norm.weight", [2], [$0, 2 * $0])
    }
    for (name, tensor) in tensors { try Checkpoint.write([tensor], to: folder(name)) }
    let recipe = """
      merge_method: linear
      models:
        - {model: \(folder("a.h5")), parameters: {weight: 0.5}}
        - {model: \(folder("b.h5")), parameters: {weight: 0.5}}
      """
    try convertAndMerge({ folder($0) }, recipe: recipe)
    #expect(
      try Checkpoint.open(folder("copy.safetensors")).floats(of: "model.norm.weight") == [1, 2])
    #expect(
      try Checkpoint.open(folder("merged.safetensors")).floats(of: "model.norm.weight") == [2, 4])
  }

  @Test func `README shows it as it stands here`() throws {
    let lines = try String(contentsOfFile: #filePath, encoding: .utf8).split(
      separator: "\n", omittingEmptySubsequences: false)
    let begin = try #require(lines.firstIndex { $0.contains("// A checkpoint of any format") })
    let end = try #require(lines.firstIndex { $0.contains("try merged.finish()") })
    let example = lines[begin...end].map { $0.dropFirst(4) }.joined(separator: "\n")
    let root = fixtures("..")
    let readme = try String(contentsOfFile: "\(root)/README.md", encoding: .utf8)
    #expect(readme.contains("\n\(example)\n```\n"))
  }
}
