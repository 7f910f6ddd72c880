/// A zip file of these entries, uncompressed.
///
/// Only what readers look at is filled in: no times, no attributes.
public func zip(_ entries: [(name: String, bytes: [UInt8])]) -> [UInt8] {
  func number(_ value: Int, _ width: Int) -> [UInt8] {
    (0..<width).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) }
  }
  var file: [UInt8] = []
  var directory: [UInt8] = []
  for (name, bytes) in entries {
    let sizes = number(bytes.count, 4) + number(bytes.count, 4)
    // Flags, method, time, date and checksum are zero.
    let common = number(20, 2) + number(0, 12) + sizes + number(name.utf8.count, 2)
    let offset = file.count
    file += number(0x0403_4B50, 4) + common + number(0, 2) + Array(name.utf8) + bytes
    directory += number(0x0201_4B50, 4) + number(20, 2) + common + number(0, 12)
    directory += number(offset, 4) + Array(name.utf8)
  }
  let end =
    number(0x0605_4B50, 4) + number(0, 4) + number(entries.count, 2) + number(entries.count, 2)
    + number(directory.count, 4) + number(file.count, 4) + number(0, 2)
  return file + directory + end
}

/// A file that came with the repository.
public func fixture(_ name: String, file: String = #filePath) -> String {
  file.split(separator: "/").dropLast(3).reduce("") { $0 + "/" + $1 } + "/Fixtures/" + name
}
