import ArgumentParser
import Checkpoints
import Foundation
import Merging

/// A base model and its experts, as every command that needs them takes them.
struct FamilyArguments: ParsableArguments {
  @Option(help: "The model that the experts were fine-tuned from.", completion: .file())
  var base: String

  @Option(
    name: .customLong("expert"),
    help: ArgumentHelp(
      "An expert and the name it goes by; give it once for each.", valueName: "name=path"))
  var experts: [NamedPath]

  var paths: [String] { [base] + experts.map { $0.path } }

  /// Opens all, checks them against each other and makes a plan of them. By which rules tensors were
  /// matched is told if the plan accepts that.
  func open<Plan>(for plan: (ModelFamily) throws -> Plan) throws -> Plan {
    let family = try ModelFamily(
      base: Checkpoint.open(base),
      experts: experts.map { .init(name: $0.name, source: try Checkpoint.open($0.path)) })
    let plan = try plan(family)
    for remark in family.remarks { note(remark.description) }
    return plan
  }
}

/// `NAME=PATH` on the command line.
struct NamedPath: ExpressibleByArgument {
  let name: String
  let path: String

  init?(argument: String) {
    guard let sign = argument.firstIndex(of: "=") else { return nil }
    name = String(argument[..<sign])
    path = String(argument[argument.index(after: sign)...])
    guard !name.isEmpty, !path.isEmpty else { return nil }
  }
}

/// Says what a process that was killed has left of this output; nothing of it is used again.
private func noteLeftovers(of output: String) throws {
  let leftovers = try Interrupted(output, identity: "").leftoverPaths
  guard !leftovers.isEmpty else { return }
  note(
    "an earlier run that wrote \(output) was killed; its unfinished files are still there and can be removed: \(leftovers.joined(separator: ", "))"
  )
}

/// - Parameter isMerge: whether unfinished files are dealt with elsewhere.
/// - Throws: if `output` is one of the files or folders that are read, or a folder that holds one.
func refuse(writing output: String, overInputs inputs: [String], isMerge: Bool = false) throws {
  if !isMerge { try noteLeftovers(of: output) }
  for input in inputs {
    for path in [input] + (try Checkpoint.files(of: input)) {
      if try isSameFile(output, path) {
        throw CheckpointError(file: output, "is also an input", remedy: "write to another name")
      }
      // Replacing a folder removes all that is in it; a link may lead there from elsewhere.
      var folder = URL(filePath: resolved(path) ?? path).deletingLastPathComponent()
      while folder.path != "/" {
        if try isSameFile(output, folder.path) {
          throw CheckpointError(
            file: output, "holds the input \(path)", remedy: "write to another folder")
        }
        folder.deleteLastPathComponent()
      }
    }
  }
}
