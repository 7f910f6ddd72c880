import Checkpoints
import Foundation
import Glibc
import Merging

/// The journal of a merge, and what is left of an earlier one into the same output that was
/// killed: its journal and its unfinished files.
struct Interrupted {
  let output: String
  let identity: String
  private let folder: String
  private let name: String

  init(_ output: String, identity: String) throws {
    var path = output
    while path.count > 1, path.hasSuffix("/") { path.removeLast() }
    self.output = output
    self.identity = identity
    let slash = path.lastIndex(of: "/")
    folder = slash.map { $0 == path.startIndex ? "/" : String(path[..<$0]) } ?? "."
    name = slash.map { String(path[path.index(after: $0)...]) } ?? path
  }

  private var journalPath: String { "\(folder)/.\(name).merge-journal" }

  /// Unfinished outputs of this name whose writer is gone.
  var leftoverPaths: [String] {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
    // As long as unfinished outputs have it of a long name.
    let name = String(decoding: name.utf8.prefix(200), as: UTF8.self)
    return names.sorted().compactMap { entry in
      let words = entry.split(separator: ".", omittingEmptySubsequences: false)
      guard entry.hasPrefix(".\(name)."), words.last == "partial", words.count >= 4,
        let writer = Int32(words[words.count - 2]), writer > 0, writer != getpid(),
        kill(writer, 0) != 0, errno == ESRCH
      else { return nil }
      return "\(folder)/\(entry)"
    }
  }

  /// What the earlier merge has finished; nothing unless it is to be gone on with.
  func pieces(of plan: MergePlan, isResuming: Bool) throws -> [MergeJournal.Piece] {
    let isThere = FileManager.default.fileExists(atPath: journalPath)
    guard isResuming else {
      let leftovers = leftoverPaths
      if isThere, !leftovers.isEmpty {
        note(
          "an earlier merge into \(output) was interrupted; this one begins anew (--resume goes on with it). Its files are still there: \(leftovers.joined(separator: ", "))"
        )
      }
      return []
    }
    guard isThere else {
      note("there is no interrupted merge into \(output) to go on with; this one begins anew")
      return []
    }
    guard
      let pieces = try MergeJournal.pieces(journalPath, identity: identity, of: plan.manifest)
    else {
      throw CheckpointError(
        file: output,
        "the recipe, an option or an input has changed since the merge was interrupted",
        remedy: "merge without --resume")
    }
    return pieces
  }

  /// Begins this merge's journal in place of the earlier one.
  func begin() throws -> MergeJournal {
    unlink(journalPath)
    return try MergeJournal(journalPath, identity: identity)
  }

  /// The unfinished files, as far as they can be read.
  func leftovers() -> [any TensorSource] {
    leftoverPaths.flatMap { path -> [any TensorSource] in
      let files = (try? FileManager.default.contentsOfDirectory(atPath: path)) ?? []
      let paths = files.isEmpty ? [path] : files.map { "\(path)/\($0)" }
      // Files beside the weights, and a header that was not written, are no checkpoints.
      return paths.compactMap { try? Safetensors.open($0) }
    }
  }

  func removeLeftovers() {
    for path in leftoverPaths { try? FileManager.default.removeItem(atPath: path) }
  }

  /// The merge has ended: its journal goes.
  func end() { unlink(journalPath) }
}

/// Size and time of change of a model's files, which tell whether they are still the same.
func fileStates(_ model: String) -> [String] {
  var status = stat()
  guard stat(model, &status) == 0 else { return [] }
  if status.st_mode & S_IFMT == S_IFDIR {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: model)) ?? []
    return names.sorted().flatMap { name -> [String] in
      var status = stat()
      guard stat("\(model)/\(name)", &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
        return []
      }
      return [name] + fileStates("\(model)/\(name)")
    }
  }
  return ["\(status.st_size)", "\(status.st_mtim.tv_sec).\(status.st_mtim.tv_nsec)"]
}
