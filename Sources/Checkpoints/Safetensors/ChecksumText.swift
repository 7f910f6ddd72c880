import Glibc

/// The checksums of a file's tensors as one of its metadata.
///
/// The text is the algorithm's name, then hexadecimal checksums with a space before each: first
/// that of the tensors' descriptions, then those of the tensors, in the order of the UTF-8 bytes
/// of their names, which nobody changes who saves the tensors in another order. The descriptions
/// are, in the same order, for each tensor its type, its shape, the length of its name in bytes
/// and its name: `F32 [2, 3] 6 a.bias` and a line feed. So names that were swapped, or a type or a
/// shape that is another one of the same size, do not pass for what was recorded.
///
///     import hashlib, json                             # or xxhash.xxh3_64 for xxh3-64/1MiB
///     def checksum(data, H=hashlib.sha256):
///         blocks = (data[i:i + 2**20] for i in range(0, len(data), 2**20))
///         return H(b"".join(H(block).digest() for block in blocks)).hexdigest()
///     tensors = [t for t in sorted(header.items()) if t[0] != "__metadata__"]
///     described = "".join(f"{t['dtype']} {t['shape']} {len(n.encode())} {n}\n" for n, t in tensors)
///     data = (body[slice(*t["data_offsets"])] for n, t in tensors)
///     " ".join(["sha256/1MiB", checksum(described.encode()), *map(checksum, data)])
struct ChecksumText: Sendable {
  static let key = "checksums"

  let algorithm: TensorChecksum.Algorithm
  /// The checksum of the descriptions, then those of the tensors by their names.
  private let values: [UInt8]
  /// Where in the file the text begins.
  let offset: Int

  /// The text for tensors whose checksums are not known yet: as long as it will be.
  init(_ algorithm: TensorChecksum.Algorithm, count: Int, at offset: Int) {
    self.algorithm = algorithm
    self.offset = offset
    values = [UInt8](repeating: 0, count: (count + 1) * algorithm.width)
  }

  /// - Parameter checksums: in the manifest's order.
  init(_ checksums: TensorChecksums, of manifest: Manifest, at offset: Int) {
    algorithm = checksums.algorithm
    self.offset = offset
    let order = manifest.positionsByName
    values =
      manifest.described(by: algorithm, in: order).bytes + checksums.rows(in: order).bytes
  }

  /// - Parameter text: the characters between the quotes, of which none is escaped.
  /// - Returns: nil if it is something else, whoever wrote it.
  init?(_ text: ArraySlice<UInt8>, at offset: Int) {
    let known = TensorChecksum.Algorithm.allCases.first {
      text.starts(with: "\($0.rawValue) ".utf8)
    }
    guard let known else { return nil }
    algorithm = known
    self.offset = offset
    // What cannot be checksums is kept as none: it fits no tensors.
    values = Self.values(text.dropFirst(known.rawValue.utf8.count), width: known.width) ?? []
  }

  private static func values(_ text: ArraySlice<UInt8>, width: Int) -> [UInt8]? {
    guard text.count.isMultiple(of: 2 * width + 1) else { return nil }
    var bytes: [UInt8] = []
    bytes.reserveCapacity(text.count / 2)
    var position = text.startIndex
    while position < text.endIndex {
      guard text[position] == UInt8(ascii: " ") else { return nil }
      for digits in stride(from: position + 1, to: position + 1 + 2 * width, by: 2) {
        guard let high = digit(text[digits]), let low = digit(text[digits + 1]) else { return nil }
        bytes.append(high << 4 | low)
      }
      position += 1 + 2 * width
    }
    return bytes
  }

  private static func digit(_ character: UInt8) -> UInt8? {
    switch character {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): character - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): character - UInt8(ascii: "a") + 10
    default: nil
    }
  }

  /// The checksums in the manifest's order; nil if these are of other tensors.
  func checksums(of manifest: Manifest) -> TensorChecksums? {
    let width = algorithm.width
    guard values.count == (manifest.tensors.count + 1) * width else { return nil }
    let order = manifest.positionsByName
    let described = manifest.described(by: algorithm, in: order)
    guard described.bytes.elementsEqual(values[..<width]) else { return nil }
    return TensorChecksums(algorithm, bytes: Array(values[width...]))!.positioned(by: order)
  }

  /// The text: its length depends only on the algorithm and the number of tensors.
  var bytes: [UInt8] {
    let digits = Array("0123456789abcdef".utf8)
    var text = Array(algorithm.rawValue.utf8)
    text.reserveCapacity(text.count + values.count * 5 / 2)
    for (index, byte) in values.enumerated() {
      if index.isMultiple(of: algorithm.width) { text.append(UInt8(ascii: " ")) }
      text.append(digits[Int(byte >> 4)])
      text.append(digits[Int(byte & 15)])
    }
    return text
  }
}

extension Manifest {
  /// Where the tensors stand, in the order of the UTF-8 bytes of their names.
  var positionsByName: [Int] {
    // Side by side, where comparing a million of them is quick.
    var names: [UInt8] = []
    var starts = [0]
    for tensor in tensors {
      names.append(contentsOf: tensor.name.utf8)
      starts.append(names.count)
    }
    return names.withUnsafeBytes { names in
      guard let base = names.baseAddress else { return Array(tensors.indices) }
      return tensors.indices.sorted {
        let (left, right) = (starts[$0]..<starts[$0 + 1], starts[$1]..<starts[$1 + 1])
        let order = memcmp(
          base + left.lowerBound, base + right.lowerBound, min(left.count, right.count))
        return order == 0 ? left.count < right.count : order < 0
      }
    }
  }

  /// The checksum of what describes the tensors, in this order: see `ChecksumText`.
  func described(by algorithm: TensorChecksum.Algorithm, in order: [Int]) -> TensorChecksum {
    TensorChecksum(algorithm, of: descriptions(in: order))
  }

  private func descriptions(in order: [Int]) -> [UInt8] {
    var text: [UInt8] = []
    func append(_ number: Int) {
      let start = text.count
      var rest = number
      repeat {
        text.append(UInt8(ascii: "0") + UInt8(rest % 10))
        rest /= 10
      } while rest > 0
      text[start...].reverse()
    }
    for position in order {
      let tensor = tensors[position]
      text.append(contentsOf: tensor.dtype.rawValue.utf8)
      text.append(contentsOf: " [".utf8)
      for (axis, dimension) in tensor.shape.enumerated() {
        if axis > 0 { text.append(contentsOf: ", ".utf8) }
        append(dimension)
      }
      text.append(contentsOf: "] ".utf8)
      append(tensor.name.utf8.count)
      text.append(UInt8(ascii: " "))
      text.append(contentsOf: tensor.name.utf8)
      text.append(UInt8(ascii: "\n"))
    }
    return text
  }
}
