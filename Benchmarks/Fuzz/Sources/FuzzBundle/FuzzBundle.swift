@testable import Checkpoints
import Glibc

/// Any bytes are a bundle's recipe, its seek table, its frame checksums, or are refused; nothing
/// traps.
///
/// The first byte says which of them the others are to be.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzBundle(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
  // libFuzzer lends the bytes for the length of the call.
  let input = UnsafeBufferPointer(start: start, count: count)
  guard let kind = input.first else { return 0 }
  let bytes = Array(input.dropFirst())
  do {
    switch kind % 4 {
    case 0:
      ftruncate(descriptor, 0)
      _ = bytes.withUnsafeBytes { pwrite(descriptor, $0.baseAddress, $0.count, 0) }
      let table = try SeekTable(File(reading: "/proc/self/fd/\(descriptor)"))
      precondition(bytes.suffix(table.bytes.count).elementsEqual(table.bytes))
    case 1:
      _ = FrameChecksums(bytes, count: max(0, bytes.count / 4 - 2))
    default:
      let recipe = try Bundle.Recipe(parsing: String(decoding: bytes, as: UTF8.self), file: "")
      // What has been understood is the same when it is written again.
      let again = try! Bundle.Recipe(parsing: recipe.json, file: "")
      precondition(again.json == recipe.json)
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
