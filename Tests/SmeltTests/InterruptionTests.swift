import Checkpoints
import Foundation
import TestSupport
import Testing

/// The command stopped at many moments of its work.
struct InterruptionTests {
  let folder: TemporaryFolder
  let input: String

  init() throws {
    folder = try TemporaryFolder()
    var random = SeededGenerator(seed: 7)
    let tensors = try (0..<40).map { number in
      try SmallTensor(
        "t\(number)", [1 << 16],
        (0..<1 << 16).map { _ in Float(Int32(truncatingIfNeeded: random.next())) })
    }
    input = try Checkpoint.write(tensors, to: folder("in.safetensors"))
  }

  @Test(arguments: ["out.safetensors", "out.h5", "out.safetensors.zst"])
  func `killed at any moment, it leaves the destination absent, old or complete`(
    name: String
  ) throws {
    let output = folder(name)
    #expect(try smelt("convert", input, output).code == 0)
    let complete = try Data(contentsOf: URL(filePath: output))
    let old = Data("what was there before".utf8)
    var random = SeededGenerator(seed: 11)
    var seen = Set<String>()
    for round in 0..<60 {
      let hadOld = round.isMultiple(of: 2)
      try? FileManager.default.removeItem(atPath: output)
      if hadOld { try old.write(to: URL(filePath: output)) }
      try start(["convert", input, output]).stop(
        SIGKILL, after: .random(in: 0...0.06, using: &random))
      switch FileManager.default.contents(atPath: output) {
      case nil:
        #expect(!hadOld, "round \(round): the old file is gone")
        seen.insert("absent")
      case old: seen.insert("old")
      case complete: seen.insert("complete")
      case let other?: Issue.record("round \(round): \(other.count) bytes of something else")
      }
    }
    #expect(seen.isSuperset(of: ["absent", "old"]), "killed too late to show anything: \(seen)")
  }

  @Test(arguments: [SIGINT, SIGTERM])
  func `told to stop, it removes what it was writing`(signal: Int32) throws {
    var random = SeededGenerator(seed: 13)
    var interrupted = 0
    for _ in 0..<30 {
      let output = folder("out.h5")
      try? FileManager.default.removeItem(atPath: output)
      let command = try start(["convert", input, output])
      // A busy machine may sleep for as long as the command runs: from here it has all to do.
      while command.isRunning, try folder.names.count == 1 { usleep(500) }
      if command.stop(signal, after: .random(in: 0...0.02, using: &random)) == signal {
        interrupted += 1
      }
      let left = try folder.names.filter { $0 != "in.safetensors" && $0 != "out.h5" }
      #expect(left == [])
    }
    #expect(interrupted > 0)
  }

  private func start(_ arguments: [String]) throws -> Process {
    let process = Process()
    process.executableURL = builtCommand
    process.arguments = arguments
    process.standardOutput = FileHandle.nullDevice
    process.standardError = FileHandle.nullDevice
    try process.run()
    return process
  }
}

extension Process {
  /// Sends a signal after some seconds and waits for the end.
  /// - Returns: the signal that ended the process, or 0 if it ended by itself.
  @discardableResult
  fileprivate func stop(_ signal: Int32, after seconds: TimeInterval) -> Int32 {
    Thread.sleep(forTimeInterval: seconds)
    kill(processIdentifier, signal)
    waitUntilExit()
    return terminationReason == .uncaughtSignal ? terminationStatus : 0
  }
}
