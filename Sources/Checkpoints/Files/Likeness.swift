/// What a file that is no checkpoint seems to be, from its first 512 bytes, and what to do.
///
/// A half-finished or mistaken download is what confuses people most, so it is named.
func likeness(of beginning: [UInt8]) -> (kind: String, remedy: String?)? {
  func starts(_ text: String) -> Bool { beginning.starts(with: text.utf8) }
  // A safetensors header of 640 bytes begins like a pickle; its brace, which white space may
  // precede, tells them apart. Text has no such length before it: that would be of petabytes.
  let isLength = beginning.count > 8 && beginning[4..<8].allSatisfy { $0 == 0 }
  if isLength, beginning.dropFirst(8).first(where: { !isWhiteSpace($0) }) == UInt8(ascii: "{") {
    return nil
  }
  if starts("version http") {
    return ("a Git LFS pointer", "fetch the file itself with 'git lfs pull'")
  }
  if let text = likeness(ofText: beginning) { return text }
  if starts("PK\u{3}\u{4}") { return ("a zip archive", nil) }
  if starts("GGUF") { return ("a GGUF file", nil) }
  if beginning.starts(with: [0x89, 0x48, 0x44, 0x46]) { return ("an HDF5 file", nil) }
  if beginning.starts(with: [0x28, 0xB5, 0x2F, 0xFD]) { return ("a zstd file", nil) }
  if beginning.starts(with: [0x1F, 0x8B]) {
    return ("a gzip file", "unpack it first, with 'gunzip', or 'tar -xzf' if it is an archive")
  }
  if beginning.dropFirst(257).starts(with: "ustar".utf8) {
    return ("a tar archive", "take the checkpoint out of it first, with 'tar -xf'")
  }
  // The number that PyTorch's files began with as a pickle, before they were zip files.
  if beginning.starts(with: [0x80, 0x02, 0x8A, 0x0A, 0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A]) {
    return (
      "a PyTorch file of before 1.6",
      "in Python: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)"
    )
  }
  if beginning.count > 1, beginning[0] == 0x80, (2...5).contains(beginning[1]) {
    return ("a Python pickle", nil)
  }
  if beginning.count >= 8, beginning.prefix(16).allSatisfy({ $0 == 0 }) {
    return ("zeros only", "the download did not finish: download it again")
  }
  return nil
}

/// What a server sends instead of a file.
private func likeness(ofText beginning: [UInt8]) -> (kind: String, remedy: String?)? {
  let mark: [UInt8] = [0xEF, 0xBB, 0xBF]
  let bytes = beginning.dropFirst(beginning.starts(with: mark) ? 3 : 0).drop(while: isWhiteSpace)
  let text = String(decoding: bytes, as: UTF8.self).lowercased()
  if ["<!doctype html", "<html", "<head", "<body"].contains(where: text.hasPrefix)
    || (text.hasPrefix("<") && text.contains("<html"))
  {
    return ("an HTML page", "the download got a web page instead of the file")
  }
  if text.hasPrefix("<?xml") || text.hasPrefix("<error>") {
    return (
      "an XML document",
      "the download got a server's message instead of the file: read it, it says why"
    )
  }
  let second = bytes.dropFirst().first { !isWhiteSpace($0) }
  if text.hasPrefix("{"), second == UInt8(ascii: "\"") {
    return (
      "JSON text",
      "name the file with the tensors; if this should be it, the download got a server's message instead: read it"
    )
  }
  return nil
}

private func isWhiteSpace(_ byte: UInt8) -> Bool { [0x20, 0x0A, 0x0D, 0x09].contains(byte) }
