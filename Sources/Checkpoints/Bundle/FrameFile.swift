import Synchronization

/// A file of zstd frames with their checksums and a seek table.
final class FrameFile: Sendable {
  let path: String
  /// The frames that hold something.
  let table: SeekTable
  private let checksums: FrameChecksums
  /// How many bytes have been read from the file.
  let bytesRead = Atomic<Int>(0)
  private let file: File
  private let stamp: FileStamp

  init(_ path: String) throws(CheckpointError) {
    file = try File(reading: path)
    stamp = try FileStamp(file)
    self.path = path
    var table = try SeekTable(file)
    let last = table.count > 0 ? table.removeLast() : (range: 0..<0, content: 0)
    guard last.content == 0, last.range.count == 8 + 4 * table.count,
      let checksums = FrameChecksums(
        try file.bytes(at: last.range.lowerBound, count: last.range.count), count: table.count)
    else {
      throw CheckpointError(
        file: path, "has no checksums of its frames before its seek table",
        remedy: "it is not a bundle, or damaged: get it again")
    }
    self.table = table
    self.checksums = checksums
  }

  func checkUnchanged() throws(CheckpointError) { try file.checkUnchanged(since: stamp) }

  /// Fills `content` with what frame `index` holds, verified.
  /// - Precondition: `scratch` has room for `ZstdFrame.largest` bytes.
  func decode(
    _ index: Int, of tensor: String?, using decoder: borrowing FrameDecoder, _ scratch: PinnedBytes,
    into content: UnsafeMutableRawBufferPointer
  ) throws(CheckpointError) {
    let range = table[index]
    do {
      var bytes = MutableRawSpan(
        _unsafeBytes: UnsafeMutableRawBufferPointer(
          rebasing: scratch.bytes[..<range.count]))
      try file.read(at: range.lowerBound, into: &bytes)
    } catch {
      throw CheckpointError(
        file: path, tensor: tensor, error.problem, remedy: error.remedy)
    }
    bytesRead.wrappingAdd(range.count, ordering: .relaxed)
    guard FrameChecksums.of(scratch.first(range.count)) == checksums[index] else {
      throw CheckpointError(
        file: path, tensor: tensor, "has a damaged \(tensor == nil ? "header" : "frame")",
        remedy: "the bundle is damaged: get it again")
    }
    if let problem = decoder.decode(scratch.first(range.count), into: content) {
      throw CheckpointError(
        file: path, tensor: tensor, tensor == nil ? "has a damaged header: it \(problem)" : problem,
        remedy: "the bundle is damaged: get it again")
    }
  }
}
