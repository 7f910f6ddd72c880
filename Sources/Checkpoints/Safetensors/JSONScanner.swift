/// Reads JSON from a stranger's bytes, one token at a time, and refuses whatever is not JSON.
///
/// Foundation's decoder keeps one of two duplicate keys without a word and knows no bound on
/// memory; a safetensors header needs neither to happen.
struct JSONScanner {
  private let bytes: [UInt8]
  private(set) var position = 0
  let file: String
  /// What the text is called in errors: "the header".
  private let subject: String
  /// The tensor whose description is being read, for errors.
  var tensor: String?

  /// Deeper nesting than any header has; serde_json's limit too.
  private static let deepest = 127

  init(_ bytes: [UInt8], file: String, subject: String = "the header") {
    self.bytes = bytes
    self.file = file
    self.subject = subject
  }

  func failure(_ problem: String, remedy: String? = nil) -> CheckpointError {
    CheckpointError(file: file, tensor: tensor, problem, remedy: remedy)
  }

  /// The text from a position to the present one.
  func text(from start: Int) -> String {
    let text = String(decoding: bytes[start..<position], as: UTF8.self)
    return String(text.drop { $0.isWhitespace })
  }

  /// The bytes from a position to the present one.
  func bytes(from start: Int) -> ArraySlice<UInt8> { bytes[start..<position] }

  /// The next byte that is not white space, without taking it.
  mutating func peek() -> UInt8? {
    while position < bytes.count {
      switch bytes[position] {
      case 0x20, 0x0A, 0x0D, 0x09: position += 1
      case let byte: return byte
      }
    }
    return nil
  }

  /// Takes the next byte if it is this one.
  mutating func take(_ character: Unicode.Scalar) -> Bool {
    guard peek() == UInt8(ascii: character) else { return false }
    position += 1
    return true
  }

  mutating func expect(_ character: Unicode.Scalar, _ context: String) throws(CheckpointError) {
    guard take(character) else { throw unexpected("\"\(character)\"", context) }
  }

  /// What was found where something else was due.
  mutating func unexpected(_ wanted: String, _ context: String) -> CheckpointError {
    guard let byte = peek() else {
      return failure("\(subject) ends where \(wanted) was expected \(context)")
    }
    let found: String
    switch byte {
    case 0: found = "a NUL byte"
    case 0xEF where bytes[position...].starts(with: [0xEF, 0xBB, 0xBF]): found = "a byte order mark"
    case 0x21..<0x7F: found = "\"\(Character(Unicode.Scalar(byte)))\""
    case 0x80...:
      return failure("\(subject) is not UTF-8 text at its byte \(position)")
    default: found = "byte 0x\(String(byte, radix: 16))"
    }
    return failure(
      "\(subject) has \(found) at its byte \(position) where \(wanted) was expected \(context)"
    )
  }

  /// A string, its escapes undone.
  mutating func string(_ context: String) throws(CheckpointError) -> String {
    guard take("\"") else { throw unexpected("a string", context) }
    let start = position
    var isPlain = true
    while position < bytes.count, bytes[position] != UInt8(ascii: "\"") {
      if bytes[position] < 0x20 {
        throw failure(
          "\(subject) has a raw control character in a string at its byte \(position)")
      }
      if bytes[position] == UInt8(ascii: "\\") {
        isPlain = false
        position += 1
      }
      position += 1
    }
    guard position < bytes.count else {
      throw failure("\(subject) ends inside the string that begins at its byte \(start - 1)")
    }
    let raw = bytes[start..<position]
    position += 1
    guard isPlain else { return try unescape(raw) }
    guard let text = String(validating: raw, as: UTF8.self) else {
      throw failure("\(subject) is not UTF-8 text in the string at its byte \(start)")
    }
    return text
  }

  private func unescape(_ raw: ArraySlice<UInt8>) throws(CheckpointError) -> String {
    var result: [UInt8] = []
    var at = raw.startIndex
    func hexUnit(_ start: Int) -> UInt16? {
      guard start + 4 <= raw.endIndex,
        raw[start..<start + 4].allSatisfy({ Character(Unicode.Scalar($0)).isHexDigit && $0 < 0x80 })
      else { return nil }
      return UInt16(String(decoding: raw[start..<start + 4], as: UTF8.self), radix: 16)
    }
    while at < raw.endIndex {
      guard raw[at] == UInt8(ascii: "\\") else {
        result.append(raw[at])
        at += 1
        continue
      }
      let simple: [UInt8: UInt8] = [
        0x22: 0x22, 0x5C: 0x5C, 0x2F: 0x2F, 0x62: 8, 0x66: 12, 0x6E: 10, 0x72: 13, 0x74: 9,
      ]
      if let byte = simple[raw[at + 1]] {
        result.append(byte)
        at += 2
        continue
      }
      guard raw[at + 1] == UInt8(ascii: "u"), let first = hexUnit(at + 2) else {
        throw failure("\(subject) has an unknown escape in a string at its byte \(at)")
      }
      let escape = at
      var units = [first]
      at += 6
      if UTF16.isLeadSurrogate(first), at + 1 < raw.endIndex, raw[at] == UInt8(ascii: "\\"),
        raw[at + 1] == UInt8(ascii: "u"), let second = hexUnit(at + 2)
      {
        units.append(second)
        at += 6
      }
      guard let text = String(validating: units, as: UTF16.self) else {
        throw failure("\(subject) has half a surrogate pair in a string at its byte \(escape)")
      }
      result.append(contentsOf: text.utf8)
    }
    guard let text = String(validating: result, as: UTF8.self) else {
      throw failure(
        "\(subject) is not UTF-8 text in the string at its byte \(raw.startIndex)")
    }
    return text
  }

  /// An integer from 0 to 2⁶³ − 1, written with digits alone.
  mutating func natural(_ context: String) throws(CheckpointError) -> Int {
    guard let first = peek() else { throw unexpected("a whole number", context) }
    let start = position
    var value = 0
    var overflows = false
    while position < bytes.count, case let digit = bytes[position] &- 0x30, digit < 10 {
      let (tens, tooLarge) = value.multipliedReportingOverflow(by: 10)
      let (sum, stillTooLarge) = tens.addingReportingOverflow(Int(digit))
      overflows = overflows || tooLarge || stillTooLarge
      value = sum
      position += 1
    }
    let isNatural = position > start && (first != 0x30 || position == start + 1)
    while position < bytes.count, "+-.0123456789eE".utf8.contains(bytes[position]) { position += 1 }
    guard position > start else { throw unexpected("a whole number", context) }
    let text = bytes[start..<position]
    guard isNatural, text.allSatisfy({ (0x30...0x39).contains($0) }) else {
      throw failure(
        "has \(shown(text)) \(context); only whole numbers from 0 on are allowed")
    }
    guard !overflows else {
      throw failure("has \(shown(text)) \(context), which is too large")
    }
    return value
  }

  /// A number as it is written, or its beginning.
  private func shown(_ number: ArraySlice<UInt8>) -> String {
    String(decoding: number.prefix(40), as: UTF8.self) + (number.count > 40 ? "…" : "")
  }

  /// Passes over any value.
  mutating func skipValue(_ context: String, depth: Int = 0) throws(CheckpointError) {
    guard depth < JSONScanner.deepest else {
      throw failure("\(subject) is nested more than \(JSONScanner.deepest) levels deep")
    }
    switch peek() {
    case UInt8(ascii: "\""): _ = try string(context)
    case UInt8(ascii: "{"):
      try object(context) { (scanner, _) throws(CheckpointError) in
        try scanner.skipValue(context, depth: depth + 1)
      }
    case UInt8(ascii: "["):
      try array(context) { (scanner) throws(CheckpointError) in
        try scanner.skipValue(context, depth: depth + 1)
      }
    case let byte? where byte == UInt8(ascii: "-") || (0x30...0x39).contains(byte):
      try skipNumber(context)
    default:
      for word in ["true", "false", "null"] where bytes[position...].starts(with: word.utf8) {
        position += word.utf8.count
        return
      }
      throw unexpected("a value", context)
    }
  }

  /// Passes over a number of JSON's grammar: no leading zero, digits after a point.
  private mutating func skipNumber(_ context: String) throws(CheckpointError) {
    func digits(_ scanner: inout JSONScanner) -> Int {
      let start = scanner.position
      while scanner.position < scanner.bytes.count,
        (0x30...0x39).contains(scanner.bytes[scanner.position])
      { scanner.position += 1 }
      return scanner.position - start
    }
    func takes(_ characters: String, _ scanner: inout JSONScanner) -> Bool {
      guard scanner.position < scanner.bytes.count,
        characters.utf8.contains(scanner.bytes[scanner.position])
      else { return false }
      scanner.position += 1
      return true
    }
    _ = takes("-", &self)
    let leadingZero = position < bytes.count && bytes[position] == 0x30
    let whole = digits(&self)
    var isValid = whole > 0 && !(leadingZero && whole > 1)
    if takes(".", &self) { isValid = digits(&self) > 0 && isValid }
    if takes("eE", &self) {
      _ = takes("+-", &self)
      isValid = digits(&self) > 0 && isValid
    }
    guard isValid else { throw failure("\(subject) has a malformed number \(context)") }
  }

  /// The members of an object; `member` takes each one's value.
  mutating func object(
    _ context: String,
    _ member: (inout JSONScanner, _ key: String) throws(CheckpointError) -> Void
  ) throws(CheckpointError) {
    try expect("{", context)
    if take("}") { return }
    repeat {
      let key = try string(context)
      try expect(":", context)
      try member(&self, key)
    } while take(",")
    try expect("}", context)
  }

  /// The elements of an array; `element` takes each one.
  mutating func array(
    _ context: String, _ element: (inout JSONScanner) throws(CheckpointError) -> Void
  ) throws(CheckpointError) {
    try expect("[", context)
    if take("]") { return }
    repeat { try element(&self) } while take(",")
    try expect("]", context)
  }

  /// Nothing but white space may follow.
  mutating func expectEnd() throws(CheckpointError) {
    guard peek() == nil else { throw unexpected("nothing", "after the JSON") }
  }
}
