import Synchronization

/// A file of zstd frames with a seek table.
final class FrameFile: Sendable {
  let path: String
  let table: SeekTable
  /// How many bytes have been read from the file.
  let bytesRead = Atomic<Int>(0)
  private let file: File

  init(_ path: String) throws(CheckpointError) {
    file = try File(reading: path)
    self.path = path
    table = try SeekTable(file)
  }

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
    if let problem = decoder.decode(scratch.first(range.count), into: content) {
      throw CheckpointError(
        file: path, tensor: tensor, problem, remedy: "the bundle is damaged: get it again")
    }
  }
}
