public import Foundation

/// What a run of the command printed and how it ended.
public struct CommandResult {
  public let code: Int32
  public let output: String
  public let errors: String
}

/// Runs the built `smelt` with these arguments.
public func smelt(_ arguments: String...) throws -> CommandResult { try smelt(arguments) }

public func smelt(_ arguments: [String]) throws -> CommandResult {
  let process = Process()
  process.executableURL = builtCommand
  process.arguments = arguments
  return try run(process)
}

/// The command that was built together with the tests.
public var builtCommand: URL {
  URL(filePath: CommandLine.arguments[0]).deletingLastPathComponent().appending(path: "smelt")
}

private func run(_ process: Process) throws -> CommandResult {
  // Files, not pipes: nobody has to empty them while the process runs.
  let folder = try TemporaryFolder()
  let paths = [folder("out"), folder("err")]
  for path in paths { try Data().write(to: URL(filePath: path)) }
  process.standardOutput = FileHandle(forWritingAtPath: paths[0])
  process.standardError = FileHandle(forWritingAtPath: paths[1])
  process.standardInput = FileHandle.nullDevice
  try process.run()
  process.waitUntilExit()
  let texts = try paths.map { try String(contentsOfFile: $0, encoding: .utf8) }
  let signalled = process.terminationReason == .uncaughtSignal
  return CommandResult(
    code: process.terminationStatus + (signalled ? 128 : 0), output: texts[0], errors: texts[1])
}
