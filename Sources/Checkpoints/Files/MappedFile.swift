import Glibc

/// A file's bytes in the address space, unmapped when its owner lets go of them.
final class MappedFile: @unchecked Sendable {
  let path: String
  let size: Int
  private let file: File
  private let base: UnsafeMutableRawPointer?

  init(_ path: String) throws(CheckpointError) {
    file = try File(reading: path)
    self.path = path
    size = try file.size()
    // An empty file cannot be mapped; there is nothing in it to read either.
    guard size > 0 else { base = nil; return }
    let address = mmap(nil, size, PROT_READ, MAP_PRIVATE, file.descriptor, 0)
    guard let address, address != MAP_FAILED else { throw .system(path, "cannot be mapped") }
    base = address
  }

  deinit { if let base { munmap(base, size) } }

  /// Copies bytes out of the mapping, leaving none of it resident.
  func read(at offset: Int, into buffer: inout MutableRawSpan) throws(CheckpointError) {
    let count = buffer.byteCount
    guard count > 0 else { return }
    precondition(offset >= 0 && offset + count <= size)
    let page = Int(getpagesize())
    let start = base! + offset / page * page
    let length = offset % page + count
    // Populating first makes a file that was truncated meanwhile an error, not a SIGBUS.
    guard retrying({ madvise(start, length, Int32(MADV_POPULATE_READ)) }) == 0 else {
      // Kernels before 5.14 do not know this advice, and then reading is the safe way.
      return try file.read(at: offset, into: &buffer)
    }
    buffer.withUnsafeMutableBytes {
      $0.copyMemory(from: UnsafeRawBufferPointer(start: base! + offset, count: count))
    }
    madvise(start, length, Int32(MADV_DONTNEED))
  }

  func dropCache(at offset: Int, count: Int) { file.dropCache(at: offset, count: count) }
}
