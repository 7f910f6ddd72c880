/// What a file that is no checkpoint seems to be, from its first 16 bytes, and what to do.
///
/// A half-finished or mistaken download is what confuses people most, so it is named.
func likeness(of beginning: [UInt8]) -> (kind: String, remedy: String?)? {
  func starts(_ text: String) -> Bool { beginning.starts(with: text.utf8) }
  // A safetensors header of 640 bytes begins like a pickle; its brace, which white space may
  // precede, tells them apart.
  let brace = beginning.dropFirst(8).first { ![0x20, 0x0A, 0x0D, 0x09].contains($0) }
  if brace == UInt8(ascii: "{") { return nil }
  if starts("version http") {
    return ("a Git LFS pointer", "fetch the file itself with 'git lfs pull'")
  }
  if starts("<!DOCTYPE") || starts("<!doctype") || starts("<html") || starts("<HTML") {
    return ("an HTML page", "the download got a web page instead of the file")
  }
  if starts("PK\u{3}\u{4}") { return ("a zip archive", nil) }
  if starts("GGUF") { return ("a GGUF file", nil) }
  if beginning.starts(with: [0x89, 0x48, 0x44, 0x46]) { return ("an HDF5 file", nil) }
  if beginning.starts(with: [0x28, 0xB5, 0x2F, 0xFD]) { return ("a zstd file", nil) }
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
  if beginning.count >= 8, beginning.allSatisfy({ $0 == 0 }) {
    return ("zeros only", "the download did not finish: download it again")
  }
  return nil
}
