import Checkpoints
import TestSupport
import Testing

@testable import Merging

/// Going on with a merge that was interrupted, from its journal and what it had written.
struct MergeJournalTests {
  let folder: TemporaryFolder
  let plan: MergePlan

  init() throws {
    folder = try TemporaryFolder()
    let models = try (0..<2).map { number in
      MemorySource(
        try (0..<5).map {
          let values = filler(number + $0, count: 300).map { Float($0) }
          return try SmallTensor("layers.\($0).weight", [300], values)
        })
    }
    plan = try MergePlan(
      Recipe(
        parsing: """
          merge_method: linear
          models: [{model: a}, {model: b}]
          parameters: {weight: [0.2, 0.7]}
          """, file: "r.yml"), models: models)
  }

  private struct Stopped: Error {}

  /// Merges until `count` chunks are finished.
  private func interrupt(after count: Int, into sink: MemorySink, identity: String = "1") throws {
    let journal = try MergeJournal(folder("journal"), identity: identity)
    let seen = Counter()
    #expect(throws: Stopped.self) {
      try plan.run(into: sink, memory: 1 << 20, workers: 1, journal: journal) { _ in
        if seen.next() == count { throw Stopped() }
      }
    }
  }

  @Test(arguments: 1...4)
  func `what was finished is taken over, the rest is made`(count: Int) throws {
    let whole = MemorySink(plan.manifest.tensors)
    try plan.run(into: whole, memory: 1 << 20, workers: 1)
    let stopped = MemorySink(plan.manifest.tensors)
    try interrupt(after: count, into: stopped)

    let pieces = try #require(
      try MergeJournal.pieces(folder("journal"), identity: "1", of: plan.manifest))
    #expect(pieces.count == count)
    let resumed = MemorySink(plan.manifest.tensors)
    let journal = try MergeJournal(folder("second"), identity: "1")
    let (finished, bytes) = try plan.salvage(
      pieces, from: [stopped], into: resumed, journal: journal)
    #expect(finished.count == count)
    #expect(bytes == 1200 * count)
    let made = Counter()
    try plan.run(
      into: resumed, memory: 1 << 20, workers: 1, journal: journal, finished: finished
    ) { _ in _ = made.next() }
    #expect(made.value == 5 - count)
    for tensor in plan.manifest.tensors {
      #expect(resumed.bytes(of: tensor) == whole.bytes(of: tensor))
    }
    #expect(
      try MergeJournal.pieces(folder("second"), identity: "1", of: plan.manifest)?.count == 5)
  }

  @Test func `bytes that did not reach the disk are made again`() throws {
    let stopped = MemorySink(plan.manifest.tensors)
    try interrupt(after: 3, into: stopped)
    let tensor = plan.manifest.tensors[1]
    let zeros = [UInt8](repeating: 0, count: 4)
    try stopped.write(zeros.span.bytes, of: tensor, at: 8)
    let pieces = try #require(
      try MergeJournal.pieces(folder("journal"), identity: "1", of: plan.manifest))
    let (finished, _) = try plan.salvage(
      pieces, from: [stopped], into: MemorySink(plan.manifest.tensors),
      journal: MergeJournal(folder("second"), identity: "1"))
    #expect(finished.map { $0.task }.sorted() == [0, 2])
  }

  @Test func `another merge's journal is not taken`() throws {
    try interrupt(after: 1, into: MemorySink(plan.manifest.tensors), identity: "1")
    #expect(
      try MergeJournal.pieces(folder("journal"), identity: "2", of: plan.manifest) == nil)
  }
}
