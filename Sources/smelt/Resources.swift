import ArgumentParser
import Checkpoints
import Foundation

/// What a command may use of the machine.
struct Resources: ParsableArguments {
  @Option(
    help: ArgumentHelp(
      "Memory for tiles, such as 512MB or 2GiB.",
      discussion:
        "Default: 1 GiB or a quarter of what the machine or its control group allows, whichever is less."
    ))
  var memory: ByteSize = .default

  @Option(help: "Worker threads. The result is the same for every number.")
  var jobs: Int = ProcessInfo.processInfo.activeProcessorCount

  func validate() throws {
    guard (1...1024).contains(jobs) else { throw ValidationError("--jobs is 1 to 1024.") }
    guard memory.bytes >= 1 << 20 else { throw ValidationError("--memory must be at least 1MiB.") }
  }
}

extension Resources {
  /// How outputs are written that are packed in their turn.
  var options: WritingOptions {
    var options = WritingOptions()
    (options.memory, options.workers) = (memory.bytes, jobs)
    return options
  }
}

/// A number of bytes as people write it.
struct ByteSize: ExpressibleByArgument, CustomStringConvertible {
  let bytes: Int

  static let `default` = ByteSize(bytes: min(1 << 30, availableMemory / 4))

  /// The machine's memory, or what control groups leave of it.
  private static var availableMemory: Int {
    let groups = (try? String(contentsOfFile: "/proc/self/cgroup", encoding: .utf8)) ?? ""
    let limits = groups.split(separator: "\n").flatMap { line -> [String] in
      let parts = line.split(separator: ":", maxSplits: 2, omittingEmptySubsequences: false)
      guard parts.count == 3 else { return [] }
      if parts[0] == "0" {
        return ["/sys/fs/cgroup\(parts[2])/memory.max", "/sys/fs/cgroup/memory.max"]
      }
      guard parts[1].split(separator: ",").contains("memory") else { return [] }
      let root = "/sys/fs/cgroup/memory"
      return ["\(root)\(parts[2])/memory.limit_in_bytes", "\(root)/memory.limit_in_bytes"]
    }.compactMap { path in
      // The files hold a number or the word "max"; in a container not all of them are there.
      (try? String(contentsOfFile: path, encoding: .utf8)).flatMap {
        Int($0.trimmingCharacters(in: .whitespacesAndNewlines))
      }
    }
    return limits.reduce(Int(clamping: ProcessInfo.processInfo.physicalMemory), min)
  }

  init(bytes: Int) { self.bytes = bytes }

  init?(argument: String) {
    let text = argument.trimmingCharacters(in: .whitespaces).lowercased()
    let digits = text.prefix { $0.isNumber || $0 == "." }
    let units: [String: Double] = [
      "": 1, "b": 1, "k": 1e3, "kb": 1e3, "kib": 0x1p10, "m": 1e6, "mb": 1e6, "mib": 0x1p20,
      "g": 1e9, "gb": 1e9, "gib": 0x1p30, "t": 1e12, "tb": 1e12, "tib": 0x1p40,
    ]
    let unit = text.dropFirst(digits.count).trimmingCharacters(in: .whitespaces)
    guard let number = Double(digits), let factor = units[unit], number * factor < 0x1p62 else {
      return nil
    }
    bytes = Int(number * factor)
  }

  var description: String {
    let units = ["B", "KB", "MB", "GB", "TB"]
    var value = Double(bytes)
    var unit = 0
    while value >= 999.5, unit < units.count - 1 {
      value /= 1000
      unit += 1
    }
    return unit == 0
      ? "\(bytes) B" : String(format: value < 10 ? "%.2f" : "%.1f", value) + " \(units[unit])"
  }
}
