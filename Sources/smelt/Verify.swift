import ArgumentParser
import Checkpoints

struct Verify: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Check that a checkpoint is whole.",
    discussion: """
      Opening proves the structure: every tensor lies where the file says, and nothing else. \
      --data also reads every byte and compares it with the checksums recorded on writing, and \
      goes on behind a tensor that cannot be read; \
      --against compares every tensor with another checkpoint, of any format, bit for bit.

      Exit codes: 0 valid, 1 damaged, different or unreadable, 64 wrong usage.
      """)

  @Argument(help: "The checkpoint to check.", completion: .file())
  var path: String

  @Flag(help: "Read all data and compare it with the recorded checksums.")
  var data = false

  @Option(help: "A checkpoint that must hold the same tensors.", completion: .file())
  var against: String?

  @OptionGroup var resources: Resources

  func run() throws {
    let source = try Checkpoint.open(path)
    source.warnings.forEach(note)
    print("structure: valid, \(summary(of: source.manifest))")
    var isSound = true
    if data { isSound = try verifyData(of: source) }
    if let against { isSound = try compare(source, with: against) && isSound }
    if !data && against == nil {
      print("not checked: the tensors' data (--data, --against)")
    }
    if !isSound { throw ExitCode(1) }
  }

  private func verifyData(of source: any TensorSource) throws -> Bool {
    let verification = try source.verifyData(workers: resources.jobs)
    for file in verification.foreignChecksums {
      print(
        "data: the names, types or shapes in \(file) are not those that its checksums were recorded "
          + "for: its header is damaged, or another program saved it with other tensors and has to "
          + "save it without \"checksums\" in its metadata")
    }
    for tensor in verification.damaged {
      print("data: tensor \(quoted(tensor.name)) is not what was written: its checksum differs")
    }
    if verification.damaged.contains(where: { source.recordedChecksum(of: $0) != nil }) {
      print(
        "a file that was changed on purpose has to be saved without \"checksums\" in its metadata")
    }
    for failure in verification.unreadable {
      print("data: tensor \(quoted(failure.tensor.name)) cannot be read: \(failure.cause)")
    }
    print(
      "data: \(verification.checkedCount - verification.damaged.count) of "
        + "\(source.manifest.tensors.count) tensors have the checksum they were written with")
    if !verification.unrecorded.isEmpty {
      print(
        "not checked: \(verification.unrecorded.count) tensors have no recorded checksum"
          + (verification.foreignChecksums.isEmpty ? "" : " of their own")
          + "; their data can be read")
    }
    return verification.isSound
  }

  private func compare(_ source: any TensorSource, with other: String) throws -> Bool {
    let difference = try Checkpoint.difference(
      source, Checkpoint.open(other), workers: resources.jobs)
    for tensor in difference.onlyInFirst { print("only in \(path): \(quoted(tensor.name))") }
    for tensor in difference.onlyInSecond { print("only in \(other): \(quoted(tensor.name))") }
    for pair in difference.common where !pair.isIdentical {
      print(
        pair.failure.map { "not compared with \(other): \($0)" }
          ?? "differs from \(other): \(quoted(pair.first.name))")
    }
    if difference.isEmpty {
      print("against \(other): \(difference.common.count) tensors are the same, bit for bit")
    }
    return difference.isEmpty
  }
}
