/// The beginning of a `.npy` file: the type, order and shape of the array that follows.
///
/// https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html — its middle is a
/// literal of Python's, of which only what numpy writes is understood.
struct ArrayHeader {
  let descr: String
  let isFortranOrder: Bool
  let shape: [Int]
  /// Where the elements begin.
  let byteCount: Int

  /// More than numpy itself accepts.
  static let largest = 65_536

  /// - Parameter bytes: the file's beginning, `largest` bytes if it has so many.
  init(_ bytes: [UInt8], tensor: String, path: String) throws(CheckpointError) {
    func malformed(_ problem: String) -> CheckpointError {
      CheckpointError(file: path, tensor: tensor, problem)
    }
    guard bytes.count >= 12, bytes.starts(with: [0x93] + Array("NUMPY".utf8)) else {
      throw malformed("is not a numpy array")
    }
    guard (1...3).contains(bytes[6]) else {
      throw malformed("is a numpy array of the unknown version \(bytes[6])")
    }
    let start = bytes[6] == 1 ? 10 : 12
    let length = bytes[8..<start].reversed().reduce(0) { $0 << 8 | Int($1) }
    guard length <= bytes.count - start else {
      throw malformed("has a header of \(length) bytes, beyond its end or the limit")
    }
    byteCount = start + length

    var literal = PythonLiteral(bytes[start..<start + length])
    var descr: String?
    var order: Bool?
    var shape: [Int]?
    var isKnown = literal.take("{")
    while isKnown, !literal.take("}") {
      let key = literal.string()
      isKnown = key != nil && literal.take(":")
      guard isKnown else { break }
      switch key {
      case "descr" where descr == nil: descr = literal.string()
      case "fortran_order" where order == nil: order = literal.bool()
      case "shape" where shape == nil: shape = literal.naturals()
      default: isKnown = false
      }
      isKnown = isKnown && (literal.take(",") || literal.isAt("}"))
    }
    guard isKnown, let descr, let order, let shape, literal.isAtEnd else {
      throw malformed("has a header that is not one of a simple numpy array")
    }
    self.descr = descr
    isFortranOrder = order
    self.shape = shape
  }

  /// The bytes of the header of an array in C's order, padded as numpy does.
  static func describe(_ descr: String, shape: [Int]) -> [UInt8] {
    let numbers = shape.map(String.init).joined(separator: ", ") + (shape.count == 1 ? "," : "")
    let text = "{'descr': '\(descr)', 'fortran_order': False, 'shape': (\(numbers)), }"
    // A version 1 header has a length of two bytes, which rank 1000 does not fit.
    let version: UInt8 = text.utf8.count > 65_000 ? 2 : 1
    let start = version == 1 ? 10 : 12
    let length = (start + text.utf8.count + 1 + 63) / 64 * 64 - start
    var bytes = [0x93] + Array("NUMPY".utf8) + [version, 0]
    for shift in 0..<start - 8 { bytes.append(UInt8(truncatingIfNeeded: length >> (8 * shift))) }
    bytes += text.utf8
    bytes += [UInt8](repeating: 0x20, count: length - text.utf8.count - 1)
    return bytes + [0x0A]
  }
}

/// Takes the few kinds of Python's literals that numpy writes.
private struct PythonLiteral {
  private let bytes: ArraySlice<UInt8>
  private var position: Int

  init(_ bytes: ArraySlice<UInt8>) {
    self.bytes = bytes
    position = bytes.startIndex
  }

  private mutating func peek() -> UInt8? {
    while position < bytes.endIndex, [0x20, 0x0A].contains(bytes[position]) { position += 1 }
    return position < bytes.endIndex ? bytes[position] : nil
  }

  var isAtEnd: Bool { mutating get { peek() == nil } }

  mutating func isAt(_ character: Unicode.Scalar) -> Bool { peek() == UInt8(ascii: character) }

  mutating func take(_ character: Unicode.Scalar) -> Bool {
    guard isAt(character) else { return false }
    position += 1
    return true
  }

  /// Text in quotes, without escapes.
  mutating func string() -> String? {
    guard let quote = peek(), quote == UInt8(ascii: "'") || quote == UInt8(ascii: "\"") else {
      return nil
    }
    let start = position + 1
    guard let end = bytes[start...].firstIndex(of: quote),
      !bytes[start..<end].contains(UInt8(ascii: "\\"))
    else { return nil }
    position = end + 1
    return String(validating: bytes[start..<end], as: UTF8.self)
  }

  mutating func bool() -> Bool? {
    _ = peek()
    for (word, value) in [("True", true), ("False", false)]
    where bytes[position...].starts(with: word.utf8) {
      position += word.utf8.count
      return value
    }
    return nil
  }

  /// A tuple of natural numbers; Python 2 wrote some with an L behind.
  mutating func naturals() -> [Int]? {
    guard take("(") else { return nil }
    var numbers: [Int] = []
    while !take(")") {
      guard peek() != nil else { return nil }
      let digits = bytes[position...].prefix { (0x30...0x39).contains($0) }
      guard let number = Int(String(decoding: digits, as: UTF8.self)) else { return nil }
      position = digits.endIndex
      numbers.append(number)
      _ = take("L")
      guard take(",") || isAt(")") else { return nil }
    }
    return numbers
  }
}
