@testable import Checkpoints

/// Whatever the child that reads an HDF5 file answers is an inventory, an error, or refused;
/// nothing traps.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzInventory(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
  // libFuzzer lends the bytes for the length of the call.
  let bytes = Array(UnsafeBufferPointer(start: start, count: count))
  guard let answer = HDF5Message.decode(bytes, file: "") else { return 0 }
  // What has been understood is the same when it is said again.
  let again = HDF5Message.encode(answer)
  precondition(HDF5Message.decode(again, file: "").map(HDF5Message.encode) == again)
  guard case .success(let inventory) = answer else { return 0 }
  do { _ = try HDF5.Contents(proving: inventory, of: file) } catch {}
  return 0
}

/// Any file will do: an inventory's places are compared with its size.
private let file = try! MappedFile("/proc/self/exe")
