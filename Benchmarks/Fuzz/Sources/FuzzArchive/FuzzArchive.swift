@testable import Checkpoints
import Glibc

/// Any file that begins like a zip file is numpy's or PyTorch's, or is refused; so is each of its
/// tensors; nothing traps.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzArchive(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
  ftruncate(descriptor, 0)
  pwrite(descriptor, start, count, 0)
  do {
    let source = try PyTorch.open("/proc/self/fd/\(descriptor)")
    for tensor in source.manifest.tensors where tensor.byteCount <= 1 << 16 {
      do { _ = try source.bytes(of: tensor) } catch {}
    }
  } catch {}
  return 0
}

/// A file in memory without a name, which takes each input in turn.
private let descriptor = {
  var name = Array("/dev/shm/fuzz-XXXXXX".utf8CString)
  let descriptor = mkstemp(&name)
  precondition(descriptor >= 0 && unlink(name) == 0)
  return descriptor
}()
