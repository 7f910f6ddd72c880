import TestSupport
import Testing

@testable import Checkpoints

struct ChunkGridTests {
  /// Where each byte of a tensor is, by the definition of chunks: element by element.
  func places(_ dimensions: [Int], _ chunk: [Int], _ size: Int) -> [(chunk: Int, byte: Int)] {
    let counts = zip(dimensions, chunk).map { ($0 + $1 - 1) / $1 }
    return (0..<dimensions.reduce(size, *)).map { byte in
      var rest = byte / size
      var number = 0
      var inChunk = 0
      var numberStride = 1
      var chunkStride = 1
      for d in dimensions.indices.reversed() {
        let index = rest % dimensions[d]
        rest /= dimensions[d]
        number += index / chunk[d] * numberStride
        inChunk += index % chunk[d] * chunkStride
        numberStride *= counts[d]
        chunkStride *= chunk[d]
      }
      return (number, inChunk * size + byte % size)
    }
  }

  @Test(arguments: 1...60 as ClosedRange<UInt64>)
  func `every byte of every range is found where chunks put it`(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    let rank = Int.random(in: 1...4, using: &random)
    let dimensions = (0..<rank).map { _ in Int.random(in: 1...7, using: &random) }
    let chunk = dimensions.map { Int.random(in: 1...$0 + 1, using: &random) }
    let size = [1, 2, 4].randomElement(using: &random)!
    let grid = try #require(ChunkGrid(dimensions: dimensions, chunk: chunk, elementSize: size))
    let places = places(dimensions, chunk, size)
    #expect(grid.chunkByteCount == chunk.reduce(size, *))
    #expect(grid.count == places.map { $0.chunk }.max()! + 1)
    for number in 0..<grid.count {
      #expect(grid.usedByteCount(of: number) == places.count { $0.chunk == number })
    }
    for _ in 0..<20 {
      let start = Int.random(in: 0...places.count, using: &random)
      let range = start..<Int.random(in: start...places.count, using: &random)
      var found = [(chunk: Int, byte: Int)?](repeating: nil, count: range.count)
      for (number, runs) in grid.runs(in: range) {
        for run in runs {
          for i in 0..<run.count {
            #expect(found[run.startInRange + i] == nil)
            found[run.startInRange + i] = (number, run.startInChunk + i)
          }
        }
      }
      #expect(
        zip(found, places[range]).allSatisfy { $0.0! == $0.1 }, "\(dimensions) \(chunk) \(range)")
    }
  }

  @Test func `chunks that cannot be counted are no grid`() {
    #expect(ChunkGrid(dimensions: [4], chunk: [0], elementSize: 1) == nil)
    #expect(ChunkGrid(dimensions: [4], chunk: [1, 1], elementSize: 1) == nil)
    #expect(ChunkGrid(dimensions: [], chunk: [], elementSize: 1) == nil)
    #expect(ChunkGrid(dimensions: [4, 4], chunk: [1 << 40, 1 << 40], elementSize: 1) == nil)
  }
}
