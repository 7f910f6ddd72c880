@testable import Checkpoints
import Glibc

/// Any bytes are a bundle's recipe, its seek table, its frame checksums, what all of it says
/// together, or are refused; nothing traps.
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
    case 2:
      try readContents(bytes)
    default:
      let recipe = try Bundle.Recipe(parsing: String(decoding: bytes, as: UTF8.self), file: "")
      // What has been understood is the same when it is written again.
      let again = try! Bundle.Recipe(parsing: recipe.json, file: "")
      precondition(again.json == recipe.json)
    }
  } catch {}
  return 0
}

/// The size of the tensors as a byte, the inner header, the recipe, and for each frame a byte, what
/// it holds; each of them ends in a byte that neither JSON nor UTF-8 can have.
private func readContents(_ bytes: [UInt8]) throws {
  let pieces = bytes.dropFirst().split(
    separator: 255, maxSplits: 2, omittingEmptySubsequences: false)
  guard let size = bytes.first, pieces.count == 3 else { return }
  let inner = try Safetensors.Layout(
    parsing: Array(pieces[0]), fileSize: 8 + pieces[0].count + Int(size), path: "")
  let recipe = try Bundle.Recipe(parsing: String(decoding: pieces[1], as: UTF8.self), file: "")
  var table = SeekTable()
  for content in pieces[2] { table.append(frame: 32, content: Int(content)) }
  let contents = try Bundle.Contents(recipe, inner, table, path: "")
  // What has been proven: every part is someone's, and frames are where readers look for them.
  for part in contents.parts {
    let end = part.firstFrame + part.streams * part.framesPerStream
    precondition(part.firstFrame >= 0 && end <= table.count)
    let held = table.contentSizes[part.firstFrame..<end].reduce(0, +)
    precondition(held == part.tensor.byteCount)
  }
  for (index, stored) in contents.tensors.enumerated() {
    if case .inside(let other) = stored.reference {
      precondition(other < index && contents.tensors[other].reference == nil)
    }
  }
}

/// A file in memory without a name, which takes each input in turn.
private let descriptor = {
  var name = Array("/dev/shm/fuzz-XXXXXX".utf8CString)
  let descriptor = mkstemp(&name)
  precondition(descriptor >= 0 && unlink(name) == 0)
  return descriptor
}()
