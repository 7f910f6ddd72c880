@testable import Checkpoints

/// Any bytes are a pickle of tensors, or an array's header, or are refused; nothing traps.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzPickle(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
  // libFuzzer lends the bytes for the length of the call.
  let bytes = Array(UnsafeBufferPointer(start: start, count: count))
  do {
    var unpickler = Unpickler(bytes, file: "")
    let root = try unpickler.load()
    _ = try unpickler.named(root, file: "")
  } catch {}
  do { _ = try ArrayHeader(bytes, tensor: "", path: "") } catch {}
  return 0
}
