import Glibc

/// A file's bytes in the address space, unmapped when its owner lets go of them.
final class MappedFile: @unchecked Sendable {
  let path: String
  let size: Int
  private let file: File
  private let stamp: FileStamp
  private let base: UnsafeMutableRawPointer?

  convenience init(_ path: String) throws(CheckpointError) {
    try self.init(File(reading: path), path: path)
  }

  /// - Parameter path: what the file is called in errors.
  init(_ file: consuming File, path: String) throws(CheckpointError) {
    self.file = file
    self.path = path
    stamp = try FileStamp(self.file)
    size = try self.file.size()
    // An empty file cannot be mapped; there is nothing in it to read either.
    guard size > 0 else { base = nil; return }
    let address = mmap(nil, size, PROT_READ, MAP_PRIVATE, self.file.descriptor, 0)
    guard let address, address != MAP_FAILED else { throw .system(path, "cannot be mapped") }
    base = address
  }

  deinit { if let base { munmap(base, size) } }

  /// Copies bytes of the file.
  ///
  /// They are read and not copied out of the mapping: the kernel maps pages around those that
  /// are touched, so that a mapping becomes resident faster than it can be dropped behind.
  func read(at offset: Int, into buffer: inout MutableRawSpan) throws(CheckpointError) {
    precondition(offset >= 0 && offset + buffer.byteCount <= size)
    try file.read(at: offset, into: &buffer)
  }

  /// A copy of some bytes; for headers, not for tensors.
  func bytes(at offset: Int, count: Int) throws(CheckpointError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var span = bytes.mutableSpan
    var raw = span.mutableBytes
    try read(at: offset, into: &raw)
    return bytes
  }

  func checkUnchanged() throws(CheckpointError) { try file.checkUnchanged(since: stamp) }

  /// Whether the file seems to be in memory already: most of a sample of its pages are.
  var isCached: Bool {
    guard let base else { return true }
    let page = Int(getpagesize())
    let samples = 64
    let cached = (0..<samples).count { sample in
      var state: UInt8 = 0
      let address = base + size / samples * sample / page * page
      return mincore(address, page, &state) == 0 && state & 1 == 1
    }
    return cached > samples / 2
  }

  func dropCache(at offset: Int, count: Int) { file.dropCache(at: offset, count: count) }
}
