import Synchronization
import TestSupport
import Testing

@testable import Checkpoints

struct ChunkQueueTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  static func chunk(_ number: Int) -> PackedChunk {
    let memory = PinnedBytes(count: 100)
    for i in 0..<100 { memory.bytes[i] = UInt8(number) }
    return PackedChunk(memory: memory, count: 50 + number % 50, skippedFilters: UInt32(number))
  }

  @Test(arguments: [1, 2, 3, 4] as [UInt64], [1, 3, 100])
  func `chunks are stored in order, whatever order they come in`(seed: UInt64, capacity: Int) throws
  {
    var random = SeededGenerator(seed: seed)
    let order = Array(0..<200).shuffled(using: &random)
    let stored = Mutex<[Int]>([])
    let queue = ChunkQueue(besides: folder("a"), capacity: capacity) {
      (number, chunk) throws(CheckpointError) in
      let isRight =
        chunk.bytes.allSatisfy { $0 == UInt8(number) } && chunk.count == 50 + number % 50
        && chunk.skippedFilters == UInt32(number)
      stored.withLock { $0.append(isRight ? number : -1) }
    }
    try forEachStep(count: order.count, workers: 4) {
    } body: { step, _ in
      try queue.put(order[step], Self.chunk(order[step]))
    }
    #expect(stored.withLock { $0 } == Array(0..<200))
    #expect(try folder.names == [])
  }

  @Test func `what a chunk cannot be stored for, those after it are told too`() throws {
    let failure = CheckpointError(file: "a", "is full")
    let queue = ChunkQueue(besides: folder("a")) { (number, _) throws(CheckpointError) in
      if number == 2 { throw failure }
    }
    for number in [0, 3, 1] { try queue.put(number, Self.chunk(number)) }
    #expect(throws: failure) { try queue.put(2, Self.chunk(2)) }
    #expect(throws: failure) { try queue.put(4, Self.chunk(4)) }
  }
}
