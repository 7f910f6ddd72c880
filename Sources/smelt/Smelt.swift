import ArgumentParser
import Checkpoints
import Dispatch
import Glibc
import Merging

/// The command. Each subcommand parses, calls the library and says what was done.
@main
struct Smelt: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "smelt",
    abstract: "Convert, merge, upscale and pack model checkpoints in bounded memory.",
    discussion: """
      Checkpoints are recognised by their first bytes and written in the format that the \
      output's ending names: \(Endings.all).

      Exit codes: 0 done, 1 refused or failed (nothing is left behind), 64 wrong usage.
      """,
    version: "0.1.0",
    subcommands: [
      Inspect.self, Convert.self, Verify.self, Diff.self, Merge.self, Methods.self, Upscale.self,
      Calibrate.self, CollapseCommand.self, RecordActivations.self, Disentangle.self, Gram.self,
      Pack.self, Unpack.self,
    ])

  static func main() {
    keepBLASToOneThread()
    returnFreedMemory()
    // A stranger's HDF5 file can crash libhdf5; it shall not crash the command.
    HDF5.isolateLibrary()
    cleanUpOnSignals()
    refuseNamesThatAreNoText()
    Self.main(nil)
  }

  /// Arguments are text to Swift: other bytes would become another name, that of no file.
  private static func refuseNamesThatAreNoText() {
    for index in 0..<Int(CommandLine.argc) {
      guard let argument = CommandLine.unsafeArgv[index],
        String(validatingCString: argument) == nil
      else { continue }
      exit(
        withError: CheckpointError(
          file: String(cString: argument), "has a name that is not UTF-8 text",
          remedy: "rename it, or link to it under another name"))
    }
  }

  /// INT, TERM and HUP (a terminal that is closed) remove what is being written before the process ends by that signal.
  private static func cleanUpOnSignals() {
    for number in [SIGINT, SIGTERM, SIGHUP] {
      let before = signal(number, SIG_IGN)
      // nohup means that the command should go on.
      let ignoring = unsafeBitCast(SIG_IGN, to: Int.self)
      if number == SIGHUP, unsafeBitCast(before, to: Int.self) == ignoring { continue }
      let source = DispatchSource.makeSignalSource(signal: number, queue: .global())
      source.setEventHandler {
        Checkpoint.abandonUnfinishedOutputs()
        signal(number, SIG_DFL)
        // Dispatch blocks signals in its threads, and a parent may have blocked them in ours.
        var mask = sigset_t()
        sigemptyset(&mask)
        sigaddset(&mask, number)
        pthread_sigmask(SIG_UNBLOCK, &mask, nil)
        raise(number)
      }
      source.resume()
      signalSources.append(source)
    }
  }

  /// Sources live as long as something holds them.
  nonisolated(unsafe) private static var signalSources: [any DispatchSourceSignal] = []
}

enum Endings {
  static var all: String {
    Checkpoint.formats.flatMap { $0.fileExtensions }.map { "." + $0 }.joined(separator: ", ")
  }
}
