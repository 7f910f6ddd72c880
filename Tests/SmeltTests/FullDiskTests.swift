import Checkpoints
import Foundation
import TestSupport
import Testing

/// Writing to a disk that is too small: a tmpfs, where this machine lets us mount one.
@Suite(.enabled(if: SmallDisk.isPossible, "mounting a tmpfs needs root"))
struct FullDiskTests {
  /// Each is tried on disks of every number of MiB, and around what it takes within 16 KiB:
  /// where the tensors have room but not all that stands beside them.
  @Test(arguments: [
    ["b.safetensors"], ["b/"], ["b/", "--max-shard-size", "1MB"], ["b.h5"],
    ["b.h5", "--compress", "zstd"], ["b.h5", "--compress", "deflate"], ["b.safetensors.zst"],
    ["b.npz"], ["b.npz", "--compress", "deflate"],
  ])
  func `a full disk is one sentence, exit code 1 and no output`(arguments: [String]) throws {
    let folder = try TemporaryFolder()
    // Noise, so that no format can make it much smaller.
    var random = SeededGenerator(seed: 7)
    let tensors = try (0..<3).map { number in
      try SmallTensor(
        "t\(number)", [1 << 18],
        (0..<1 << 18).map { _ in Float(bitPattern: random.next() & 0x3FFF_FFFF) })
    }
    let input = folder("a.safetensors")
    try Checkpoint.write(tensors, to: input)
    let output = folder("disk/\(arguments[0])")
    var room = 0
    // Compressed arrays are staged beside the output, so that they take twice their room.
    for megabytes in 1...9 where room == 0 {
      if try fits(megabytes << 20, [input, output] + arguments.dropFirst(), folder) {
        room = megabytes << 20
      }
    }
    try #require(room > 1 << 20)
    // Between what was enough and what was not.
    var tooLittle = room - (1 << 20)
    while room - tooLittle > 16 << 10 {
      let middle = (room + tooLittle) / 2
      if try fits(middle, [input, output] + arguments.dropFirst(), folder) {
        room = middle
      } else {
        tooLittle = middle
      }
    }
    for less in 1...3 {
      #expect(
        try !fits(room - less * (16 << 10), [input, output] + arguments.dropFirst(), folder))
    }
  }

  /// Converts to a disk of so many bytes: to a whole output, or else to nothing and one sentence.
  private func fits(_ byteCount: Int, _ arguments: [String], _ folder: TemporaryFolder) throws
    -> Bool
  {
    let disk = try SmallDisk(at: folder("disk"), byteCount: byteCount)
    defer { _ = disk }
    let (input, output) = (arguments[0], arguments[1])
    let result = try smelt(["convert"] + arguments)
    if result.code == 0 {
      let check = try smelt("verify", output, "--data", "--against", input)
      #expect(check.code == 0, "\(byteCount): \(check.output)\(check.errors)")
      return true
    }
    #expect(result.code == 1, "\(byteCount)")
    #expect(result.errors.hasPrefix("Error: \(folder("disk/b"))"), "\(result.errors)")
    #expect(
      result.errors.hasSuffix(
        "No space left on device; free some space or write to another disk\n"),
      "\(byteCount): \(result.errors)")
    #expect(result.errors.filter { $0 == "\n" }.count == 1)
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder("disk")) == [])
    return false
  }
}

/// A file system of a few MiB, unmounted with its owner.
private final class SmallDisk {
  private let path: String

  static var isPossible: Bool {
    guard geteuid() == 0, let folder = try? TemporaryFolder() else { return false }
    return (try? SmallDisk(at: folder("disk"), byteCount: 1 << 20)) != nil
  }

  init(at path: String, byteCount: Int) throws {
    self.path = path
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    guard mount("tmpfs", path, "tmpfs", 0, "size=\(byteCount)") == 0 else {
      throw POSIXError(.init(rawValue: errno)!)
    }
  }

  deinit { umount(path) }
}
