public import Checkpoints
import Synchronization

/// What a merge has written so far, in a file beside the output: a line for each piece with the
/// hash of its bytes, so that a later run can take over what an interrupted one left behind.
///
/// The first line identifies the merge (recipe, inputs, options). Lines are appended whole; one
/// that a crash has torn is ignored, and so is a piece whose bytes did not reach the disk.
public final class MergeJournal: Sendable {
  /// Some bytes of an output tensor that were written.
  public struct Piece: Sendable, Equatable {
    public let tensor: String
    public let bytes: Range<Int>
    public let hash: UInt64
  }

  private let file: File
  private let end: Mutex<Int>

  /// Begins a journal in a file that is not there yet.
  /// - Parameter identity: what must be the same for the results to be; one line.
  public init(_ path: String, identity: String) throws(CheckpointError) {
    file = try File(creating: path)
    end = Mutex(0)
    try append("\(MergeJournal.heading) \(identity)\n")
  }

  private static let heading = "smelt merge journal 1"

  func add(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    let name = quoted(tensor.name)
    try append("\(offset) \(bytes.byteCount) \(xxh3(bytes)) \(name)\n")
  }

  private func append(_ line: String) throws(CheckpointError) {
    let bytes = Array(line.utf8)
    let begin = end.withLock { end in
      defer { end += bytes.count }
      return end
    }
    try file.write(bytes.span.bytes, at: begin)
  }

  /// The pieces of an earlier run's journal, or `nil` if it is another merge's.
  public static func pieces(_ path: String, identity: String, of manifest: Manifest)
    throws(CheckpointError) -> [Piece]?
  {
    let file = try File(reading: path)
    let text = String(decoding: try file.bytes(at: 0, count: file.size()), as: UTF8.self)
    let lines = text.split(separator: "\n")
    guard lines.first == "\(heading) \(identity)" else { return nil }
    let names = Dictionary(
      manifest.tensors.map { (quoted($0.name), $0) }, uniquingKeysWith: { first, _ in first })
    return lines.dropFirst().compactMap { line in
      let words = line.split(separator: " ", maxSplits: 3)
      guard words.count == 4, let offset = Int(words[0]), let count = Int(words[1]),
        let hash = UInt64(words[2]), let tensor = names[String(words[3])],
        offset >= 0, count > 0, count <= tensor.byteCount, offset <= tensor.byteCount - count
      else { return nil }
      return Piece(tensor: tensor.name, bytes: offset..<offset + count, hash: hash)
    }
  }
}

/// A sink whose writes are kept account of.
struct JournaledSink: TensorSink {
  let sink: any TensorSink
  let journal: MergeJournal

  var manifest: Manifest { sink.manifest }

  func write(_ bytes: RawSpan, of tensor: TensorInfo, at offset: Int) throws(CheckpointError) {
    try sink.write(bytes, of: tensor, at: offset)
    try journal.add(bytes, of: tensor, at: offset)
  }

  func complete() throws(CheckpointError) { try sink.complete() }
  func finish() throws(CheckpointError) { try sink.finish() }
}

extension MergePlan {
  /// Copies the chunks that an interrupted run has finished from what it left behind, as far as
  /// the bytes there are the ones that it wrote.
  ///
  /// - Parameters:
  ///   - pieces: what the journal of that run says.
  ///   - leftovers: its unfinished files.
  /// - Returns: the chunks that need not be made again, and their bytes.
  public func salvage(
    _ pieces: [MergeJournal.Piece], from leftovers: [any TensorSource], into sink: any TensorSink,
    journal: MergeJournal
  ) throws -> (chunks: Set<Chunk>, bytes: Int) {
    let target = JournaledSink(sink: sink, journal: journal)
    let byTensor = Dictionary(grouping: pieces) { $0.tensor }
    let run = MergeRun(sources: [], sink: sink, tasks: tasks, memory: 0, workers: 1)
    var buffer = Buffer(byteCount: 1)
    var (chunks, bytes): (Set<Chunk>, Int) = ([], 0)
    for (index, task) in tasks.enumerated() {
      let tensor = task.output
      guard
        let pieces = byTensor[tensor.name]?.sorted(by: { $0.bytes.lowerBound < $1.bytes.lowerBound }
        ),
        let source = leftovers.first(where: { $0.manifest[tensor.name] == tensor })
      else { continue }
      for chunk in run.allChunks(of: index) {
        let bits = tensor.dtype.bitWidth
        let range =
          chunk.elements.lowerBound * bits / 8..<(chunk.elements.upperBound * bits + 7) / 8
        guard let cover = MergePlan.cover(range, by: pieces) else { continue }
        // Everything is looked at before anything is written: a chunk is taken whole or not.
        var isIntact = true
        for piece in cover where isIntact {
          if piece.bytes.count > buffer.byteCount { buffer = Buffer(byteCount: piece.bytes.count) }
          var span = buffer.first(piece.bytes.count)
          try source.read(tensor, at: piece.bytes.lowerBound, into: &span)
          isIntact = xxh3(span.bytes) == piece.hash
        }
        guard isIntact else { continue }
        for piece in cover {
          var span = buffer.first(piece.bytes.count)
          try source.read(tensor, at: piece.bytes.lowerBound, into: &span)
          try target.write(span.bytes, of: tensor, at: piece.bytes.lowerBound)
        }
        chunks.insert(chunk)
        bytes += range.count
      }
    }
    return (chunks, bytes)
  }

  /// Pieces that follow each other through the whole range.
  private static func cover(_ range: Range<Int>, by pieces: [MergeJournal.Piece])
    -> [MergeJournal.Piece]?
  {
    var cover: [MergeJournal.Piece] = []
    var end = range.lowerBound
    for piece in pieces where piece.bytes.lowerBound == end && end < range.upperBound {
      cover.append(piece)
      end = piece.bytes.upperBound
    }
    return end == range.upperBound ? cover : nil
  }
}
