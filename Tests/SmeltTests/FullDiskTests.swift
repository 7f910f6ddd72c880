import Checkpoints
import Foundation
import TestSupport
import Testing

/// Writing to a disk that is too small: a tmpfs of 1 MiB, where this machine lets us mount one.
@Suite(.enabled(if: SmallDisk.isPossible, "mounting a tmpfs needs root"))
struct FullDiskTests {
  @Test(arguments: [
    ["b.safetensors"], ["b.h5"], ["b.safetensors.zst"], ["b.npz"],
    ["b.npz", "--compress", "deflate"],
  ])
  func `a full disk is one sentence, exit code 1 and no output`(arguments: [String]) throws {
    let name = arguments[0]
    let folder = try TemporaryFolder()
    let disk = try SmallDisk(at: folder("disk"))
    // Noise, so that no format can make it smaller than the disk.
    var random = SystemRandomNumberGenerator()
    let values = (0..<1 << 19).map { _ in Float(bitPattern: random.next() & 0x3FFF_FFFF) }
    try Checkpoint.write([SmallTensor("a", [1 << 19], values)], to: folder("a.safetensors"))
    let result = try smelt(
      ["convert", folder("a.safetensors"), folder("disk/\(name)")] + arguments.dropFirst())
    #expect(result.code == 1)
    #expect(result.errors.hasPrefix("Error: \(folder("disk/\(name)")): "), "\(result.errors)")
    #expect(
      result.errors.hasSuffix(
        "No space left on device; free some space or write to another disk\n"), "\(result.errors)")
    #expect(result.errors.filter { $0 == "\n" }.count == 1)
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder("disk")) == [])
    _ = disk
  }
}

/// A file system of 1 MiB, unmounted with its owner.
private final class SmallDisk {
  private let path: String

  static var isPossible: Bool {
    guard geteuid() == 0, let folder = try? TemporaryFolder() else { return false }
    return (try? SmallDisk(at: folder("disk"))) != nil
  }

  init(at path: String) throws {
    self.path = path
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    guard mount("tmpfs", path, "tmpfs", 0, "size=1m") == 0 else {
      throw POSIXError(.init(rawValue: errno)!)
    }
  }

  deinit { umount(path) }
}
