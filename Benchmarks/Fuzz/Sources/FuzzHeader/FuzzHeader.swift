@testable import Checkpoints

/// Any bytes are a right safetensors header or are refused; nothing traps.
///
/// The first byte is the size of the data behind the header.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzHeader(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
  // libFuzzer lends the bytes for the length of the call.
  let bytes = UnsafeBufferPointer(start: start, count: count)
  guard let size = bytes.first else { return 0 }
  let header = Array(bytes.dropFirst())
  do {
    let fileSize = 8 + header.count + Int(size)
    let layout = try Safetensors.Layout(parsing: header, fileSize: fileSize, path: "")
    // What has been proven right can be written, and is itself again.
    let again = try Safetensors.Layout(writing: layout.manifest, path: "")
    // But a header with checksums of other tensors is not theirs.
    precondition(
      layout.hasForeignChecksums
        ? !again.hasForeignChecksums
        : again.fileSize == fileSize && again.prefix.dropFirst(8).elementsEqual(header))
  } catch {}
  return 0
}
