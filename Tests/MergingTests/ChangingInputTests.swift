import Checkpoints
import Synchronization
import TestSupport
import Testing

@testable import Merging

/// Files that are written to while they are merged.
struct ChangingInputTests {
  /// A model that has other weights each time it is read from its beginning.
  private final class RestlessModel: TensorSource {
    let path: String
    let manifest: Manifest
    /// Whether the file shows that it was written to.
    let isFound: Bool
    private let reading = Mutex(0)

    init(_ path: String, isFound: Bool) throws {
      self.path = path
      self.isFound = isFound
      manifest = Manifest([try TensorInfo(name: "weight", dtype: .f32, shape: [384, 128])])
    }

    func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan) {
      let reading = reading.withLock { reading in
        if offset == 0 { reading += 1 }
        return reading
      }
      var generator = SeededGenerator(seed: UInt64(path.utf8.first!) + UInt64(offset))
      buffer.withUnsafeMutableBytes { bytes in
        for place in stride(from: 0, to: bytes.count, by: 4) {
          let value = Float(Int32(truncatingIfNeeded: generator.next())) * 0x1p-32
          bytes.storeBytes(
            of: value * (reading % 2 == 0 ? 1000 : 1), toByteOffset: place, as: Float.self)
        }
      }
    }

    func checkUnchanged() throws(CheckpointError) {
      if isFound { throw Self.error(path) }
    }

    static func error(_ path: String) -> CheckpointError {
      CheckpointError(file: path, "was changed while it was being read")
    }
  }

  private func merge(_ name: String, isFound: Bool) throws {
    let method = MergeMethod[name]!
    let others = ["b", "c", "d"].prefix(method.models.upperBound - 1)
    let parameters = [
      "weight": "weight: 0.5", "density": "density: 0.5", "t": "t: 0.4",
      "select_topk": "select_topk: 0.5",
    ].filter { name, _ in method.parameters.contains { $0.name == name } }.values
    let recipe = try Recipe(
      parsing: """
        merge_method: \(name)
        base_model: a
        models: [\((["a"] + others).map { "{model: \($0)}" }.joined(separator: ", "))]
        parameters: {\(parameters.sorted().joined(separator: ", "))}
        """, file: "r.yml")
    let models = try recipe.models.map { try RestlessModel($0, isFound: isFound && $0 == "b") }
    let plan = try MergePlan(recipe, models: models)
    // So little memory that no tensor is kept between the passes.
    try plan.run(into: MemorySink(plan.manifest.tensors), memory: 1 << 10, workers: 2)
  }

  private static let methods = MergeMethod.all.map { $0.name }.filter { $0 != "passthrough" }

  @Test(arguments: methods)
  func `a file that was written to meanwhile is named, whatever the method`(method: String) {
    #expect(throws: RestlessModel.error("b")) { try merge(method, isFound: true) }
  }

  @Test(arguments: methods)
  func `passes that cannot be over the same numbers are an error at most`(method: String)
    throws
  {
    let ranks = ["ties", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion"]
    do {
      try merge(method, isFound: false)
      #expect(!ranks.contains(method))
    } catch let error as CheckpointError {
      #expect(ranks.contains(method))
      #expect(
        error.description.hasSuffix(
          ": tensor \"weight\": was not the same each time it was read; try again when nothing writes to it"
        ))
    }
  }
}
