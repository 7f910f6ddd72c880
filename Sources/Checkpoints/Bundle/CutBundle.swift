/// A bundle without its seek table, which is at its end: most likely the rest is missing too.
///
/// Its frames are walked from the front to find out what is the first thing that is not there.
final class CutBundle {
  private let path: String
  private let file: File
  private let size: Int
  /// Where the next frame begins.
  private var place = 0
  /// Whether something was met that is no frame of a bundle: then it is not merely cut.
  private var isForeign = false
  /// Tiny ones, which a file may be made of, would take long.
  private static let mostFrames = 1 << 20
  /// Of a frame, which holds no more than 1 MiB.
  private static let mostBlocks = 1 << 10

  init(_ path: String) throws(CheckpointError) {
    self.path = path
    file = try File(reading: path)
    size = try file.size()
  }

  /// What is missing first, or nil if every frame is there or something else is wrong.
  func loss() throws(CheckpointError) -> CheckpointError? {
    func loss(of tensor: String?, _ what: String) -> CheckpointError {
      CheckpointError(
        file: path, tensor: tensor, "\(what) is cut off where the file ends, at byte \(size)",
        remedy: "copy or download it again")
    }
    guard let header = try header() else {
      return isForeign ? nil : loss(of: nil, "the header")
    }
    let inner = try Safetensors.Layout(parsing: header, fileSize: nil, path: path)
    let total = 8 + header.count + inner.manifest.byteCount
    var content = 8 + header.count
    var count = 0
    while content < total, count < Self.mostFrames, let more = try nextFrame() {
      content += more
      count += 1
    }
    guard content < total, !isForeign, count < Self.mostFrames else { return nil }
    // Frames are short of this byte of the inner file; it is one of a tensor's part.
    let part = inner.manifest.tensors[inner.offsets.lastIndex { $0 <= content }!]
    return loss(of: try owner(of: part, inner) ?? part.name, "it")
  }

  /// The tensor that a part is of.
  private func owner(of part: TensorInfo, _ inner: Safetensors.Layout) throws(CheckpointError)
    -> String?
  {
    guard let json = inner.manifest.metadata["bundle"] else { return nil }
    for model in try Bundle.Recipe(parsing: json, file: path).models {
      for entry in model.tensors {
        let name = model.fullName(entry.tensor.name)
        let parts = entry.parts.isEmpty ? entry.codec.suffixes.map { name + $0 } : entry.parts
        if parts.contains(where: { ExactName($0) == ExactName(part.name) }) { return name }
      }
    }
    return nil
  }

  /// The inner file's header, if all of it is there.
  private func header() throws(CheckpointError) -> [UInt8]? {
    let decoder = FrameDecoder()
    var bytes: [UInt8] = []
    var count = 8
    while bytes.count < count {
      let begin = place
      guard let size = try nextFrame() else { return nil }
      guard place - begin <= ZstdFrame.largest else { return foreign() }
      let compressed = try file.bytes(at: begin, count: place - begin)
      var content = [UInt8](repeating: 0, count: size)
      let problem = compressed.withUnsafeBytes { compressed in
        content.withUnsafeMutableBytes { decoder.decode(compressed, into: $0) }
      }
      guard problem == nil else { return foreign() }
      bytes += content
      if count == 8, bytes.count >= 8 {
        let length = bytes.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard length <= UInt64(Safetensors.largestHeader) else { return foreign() }
        count = 8 + Int(length)
      }
    }
    return bytes.count == count ? Array(bytes.dropFirst(8)) : foreign()
  }

  private func foreign<Found>() -> Found? {
    isForeign = true
    return nil
  }

  /// Passes over an ordinary frame, block by block (RFC 8878, 3.1.1).
  /// - Returns: how many bytes it holds, or nil if not all of it is there.
  private func nextFrame() throws(CheckpointError) -> Int? {
    // The longest header of a frame has 18 bytes.
    let beginning = try file.bytes(at: place, count: min(18, size - place))
    guard beginning.count > 6 else { return nil }
    guard beginning.starts(with: [0x28, 0xB5, 0x2F, 0xFD]), beginning[4] & 0b1_1111 == 0b100
    else { return foreign() }
    let isWhole = beginning[4] >> 5 & 1 == 1
    let width = [isWhole ? 1 : 0, 2, 4, 8][Int(beginning[4] >> 6)]
    let start = isWhole ? 5 : 6
    guard beginning.count >= start + width else { return nil }
    guard (1..<8).contains(width) else { return foreign() }
    var content = beginning[start..<start + width].reversed().reduce(0) { $0 << 8 | Int($1) }
    if width == 2 { content += 256 }
    guard (0...ZstdFrame.contentSize).contains(content) else { return foreign() }
    var end = place + start + width
    var isLast = false
    var blocks = 0
    while !isLast {
      blocks += 1
      guard blocks <= Self.mostBlocks else { return foreign() }
      guard end + 3 <= size else { return nil }
      let header = try file.bytes(at: end, count: 3).reversed().reduce(0) { $0 << 8 | Int($1) }
      isLast = header & 1 == 1
      // A block of one repeated byte is that byte.
      end += 3 + (header >> 1 & 3 == 1 ? 1 : header >> 3)
    }
    guard end + 4 <= size else { return nil }
    place = end + 4
    return content
  }
}
