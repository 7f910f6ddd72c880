extension Safetensors {
  /// A header that has been proven right: where every tensor lies, without hole or overlap.
  struct Layout: Sendable {
    let manifest: Manifest
    /// Where each tensor of the manifest begins in the file.
    let offsets: [Int]

    /// Of what kind the checksums of the manifest's tensors are and where in the file they stand,
    /// if it has any.
    let checksums: (algorithm: TensorChecksum.Algorithm, offset: Int)?

    /// The checksums that were read, in the manifest's order.
    let recorded: TensorChecksums?

    /// Whether there are checksums, but of other tensors. Such a header is not the manifest's:
    /// nobody is to write it again.
    let hasForeignChecksums: Bool

    /// Whether checksums were left out because the header would be too large with them.
    private(set) var lacksRoomForChecksums = false

    private let header: [UInt8]

    /// The length and the header: all bytes before the tensors.
    var prefix: [UInt8] {
      (0..<8).map { UInt8(truncatingIfNeeded: header.count >> (8 * $0)) } + header
    }

    var fileSize: Int { 8 + header.count + manifest.byteCount }
  }
}

// MARK: - Reading

extension Safetensors.Layout {
  private struct Entry {
    let tensor: TensorInfo
    let begin: Int
    let end: Int
  }

  /// The tensors of a header by where their bytes are, before anything of that has been proven.
  ///
  /// Two lists and not one of entries: the tensors become the manifest's without a copy, which
  /// for a million of them is worth it.
  private struct Entries {
    var tensors: [TensorInfo] = []
    var ranges: [(begin: Int, end: Int)] = []
    private var shapes: [[Int]: [Int]] = [:]

    mutating func append(_ entry: Entry) {
      tensors.append(entry.tensor)
      ranges.append((entry.begin, entry.end))
    }

    /// The same shape in the memory of an earlier tensor's, if there was one.
    mutating func shared(_ shape: [Int]) -> [Int] {
      if let known = shapes[shape] { return known }
      if shapes.count < 1000 { shapes[shape] = shape }
      return shape
    }

    /// Puts the entries into the order of their bytes.
    mutating func sort() {
      // Empty tensors sort before the tensor that begins where they lie.
      let isSorted = zip(ranges, ranges.dropFirst()).allSatisfy { $0 <= $1 }
      guard !isSorted else { return }
      let order = ranges.indices.sorted { ranges[$0] < ranges[$1] }
      tensors = order.map { tensors[$0] }
      ranges = order.map { ranges[$0] }
    }
  }

  /// - Parameter fileSize: nil if the file is as large as the header says.
  /// - Throws: what is wrong with the header, by name.
  init(parsing header: [UInt8], fileSize: Int?, path: String) throws(CheckpointError) {
    let (entries, metadata, checksums) = try Self.parse(header, path: path)
    let dataStart = 8 + header.count
    let (own, overflow) = dataStart.addingReportingOverflow(entries.ranges.last?.end ?? 0)
    let fileSize = fileSize ?? (overflow ? .max : own)
    let manifest = try Manifest(proving: entries.tensors, metadata) {
      CheckpointError(file: path, tensor: $0.name, "the header names it twice")
    }
    let end = try Self.prove(entries, dataSize: fileSize - dataStart, path: path)
    guard end == fileSize - dataStart else {
      throw CheckpointError(
        file: path, "has \(fileSize - dataStart - end) bytes after the last tensor",
        remedy: "they belong to nothing: the header or the file is damaged")
    }
    offsets = entries.ranges.map { dataStart + $0.begin }
    recorded = checksums?.checksums(of: manifest)
    hasForeignChecksums = checksums != nil && recorded == nil
    self.checksums = checksums.flatMap { [recorded] text in
      recorded.map { ($0.algorithm, text.offset) }
    }
    self.manifest = hasForeignChecksums ? manifest : manifest.keeping(header)
    self.header = header
  }

  /// The entries in the order of their bytes, and the metadata.
  private static func parse(_ header: [UInt8], path: String) throws(CheckpointError)
    -> (Entries, [String: String], ChecksumText?)
  {
    var entries = Entries()
    var metadata: [String: String]?
    var checksums: ChecksumText?
    var scanner = JSONScanner(header, file: path)
    try scanner.object("as the header") { (scanner, name) throws(CheckpointError) in
      if name == "__metadata__" {
        guard metadata == nil else { throw scanner.failure("the header has two __metadata__") }
        (metadata, checksums) = try parseMetadata(&scanner)
        return
      }
      let entry = try parseEntry(&scanner, name, &entries)
      entries.append(entry)
    }
    try scanner.expectEnd()
    entries.sort()
    return (entries, metadata ?? [:], checksums)
  }

  private static func parseMetadata(_ scanner: inout JSONScanner) throws(CheckpointError)
    -> ([String: String], ChecksumText?)
  {
    var metadata: [String: String] = [:]
    var checksums: ChecksumText?
    var keys = Set<ExactName>()
    // The reference reads null as no metadata.
    if scanner.peek() == UInt8(ascii: "n") {
      try scanner.skipValue("as __metadata__")
      return (metadata, nil)
    }
    try scanner.object("as __metadata__") { (scanner, key) throws(CheckpointError) in
      guard keys.insert(ExactName(key)).inserted else {
        throw scanner.failure("__metadata__ has the key \(quoted(key)) twice")
      }
      // `metadata` compares keys as Swift does; refusing is better than losing one of them.
      guard metadata[key] == nil else {
        throw scanner.failure("__metadata__ has two keys that look like \(quoted(key))")
      }
      guard scanner.peek() == UInt8(ascii: "\"") else {
        throw scanner.failure("__metadata__ has a value for \(quoted(key)) that is not a string")
      }
      let start = scanner.position
      let value = try scanner.string("in __metadata__")
      let characters = scanner.bytes(from: start).dropFirst().dropLast()
      if key == ChecksumText.key, let text = ChecksumText(characters, at: 8 + start + 1) {
        checksums = text
      } else {
        metadata[key] = value
      }
    }
    return (metadata, checksums)
  }

  private static func parseEntry(
    _ scanner: inout JSONScanner, _ name: String, _ entries: inout Entries
  ) throws(CheckpointError) -> Entry {
    var dtype: DType?
    var shape: [Int]?
    var dataOffsets: [Int]?
    var others = Set<ExactName>()
    scanner.tensor = name
    defer { scanner.tensor = nil }
    guard scanner.peek() == UInt8(ascii: "{") else {
      throw scanner.failure("is not described by a JSON object")
    }
    try scanner.object("in its entry") { (scanner, field) throws(CheckpointError) in
      switch field {
      case "dtype":
        guard dtype == nil else { throw scanner.failure("has two fields dtype") }
        guard scanner.peek() == UInt8(ascii: "\"") else {
          throw scanner.failure("has a dtype that is not a string")
        }
        let text = try scanner.string("as a dtype")
        guard let known = DType(rawValue: text) else {
          throw scanner.failure("has the unknown dtype \(quoted(text))")
        }
        dtype = known
      case "shape":
        guard shape == nil else { throw scanner.failure("has two fields shape") }
        shape = try parseNaturals(&scanner, "in its shape")
      case "data_offsets":
        guard dataOffsets == nil else {
          throw scanner.failure("has two fields data_offsets")
        }
        dataOffsets = try parseNaturals(&scanner, "in its data_offsets")
      default:
        guard others.insert(ExactName(field)).inserted else {
          throw scanner.failure("has two fields \(quoted(field))")
        }
        try scanner.skipValue("in its entry")
      }
    }
    guard let dtype else { throw scanner.failure("has no dtype") }
    guard let shape else { throw scanner.failure("has no shape") }
    guard let dataOffsets else { throw scanner.failure("has no data_offsets") }
    guard dataOffsets.count == 2 else {
      throw scanner.failure("has \(dataOffsets.count) data_offsets instead of 2")
    }
    do {
      let tensor = try TensorInfo(name: name, dtype: dtype, shape: entries.shared(shape))
      return Entry(tensor: tensor, begin: dataOffsets[0], end: dataOffsets[1])
    } catch .partialByte {
      throw scanner.failure(
        "has \(dtype.bitWidth)-bit elements that do not fill whole bytes")
    } catch {
      throw scanner.failure("has a shape too large to count its bytes")
    }
  }

  private static func parseNaturals(
    _ scanner: inout JSONScanner, _ context: String
  ) throws(CheckpointError) -> [Int] {
    var numbers: [Int] = []
    guard scanner.peek() == UInt8(ascii: "[") else {
      throw scanner.failure("has no list of numbers \(context)")
    }
    try scanner.array(context) { (scanner) throws(CheckpointError) in
      numbers.append(try scanner.natural(context))
    }
    return numbers
  }

  /// Checks that the entries cover the data from its start without hole or overlap.
  /// - Returns: where the last one ends.
  private static func prove(_ entries: Entries, dataSize: Int, path: String)
    throws(CheckpointError) -> Int
  {
    var expected = 0
    for (index, range) in entries.ranges.enumerated() {
      let tensor = entries.tensors[index]
      func malformed(_ problem: String, remedy: String? = nil) -> CheckpointError {
        CheckpointError(file: path, tensor: tensor.name, problem, remedy: remedy)
      }
      guard range.begin <= range.end else {
        throw malformed("begins at byte \(range.begin), after its end at \(range.end)")
      }
      guard range.end - range.begin == tensor.byteCount else {
        throw malformed(
          "takes \(range.end - range.begin) bytes but its shape \(tensor.shapeDescription) of \(tensor.dtype.rawValue) needs \(tensor.byteCount)"
        )
      }
      var previous: String { quoted(entries.tensors[index - 1].name) }
      guard range.begin >= expected else {
        guard range != entries.ranges[index - 1] else {
          throw malformed("has the same bytes as \(previous)")
        }
        guard range.end > expected else { throw malformed("lies within \(previous)") }
        throw malformed(
          "begins at byte \(range.begin), before the end of \(previous) at \(expected)")
      }
      guard range.begin == expected else {
        throw malformed(
          expected == 0
            ? "begins at byte \(range.begin), but no tensor has the bytes from 0 on"
            : "begins at byte \(range.begin), leaving a hole of \(range.begin - expected) bytes behind \(previous)"
        )
      }
      guard range.end <= dataSize else {
        throw malformed(
          "ends at byte \(range.end) of the data, which has only \(dataSize)",
          remedy: "the file is truncated: download it again")
      }
      expected = range.end
    }
    return expected
  }
}

// MARK: - Writing

extension Safetensors.Layout {
  /// Lays tensors out: the same manifest always gives the same bytes.
  ///
  /// Wider types come first, as the reference writer has it, so that every tensor is aligned;
  /// within a width the manifest's order stays.
  init(
    writing manifest: Manifest, checksums algorithm: TensorChecksum.Algorithm? = nil,
    keepsHeader: Bool = true, path: String
  ) throws(CheckpointError) {
    if let header = manifest.safetensorsHeader,
      let original = try? Safetensors.Layout(
        parsing: header, fileSize: 8 + header.count + manifest.byteCount, path: path),
      original.manifest.describesTheSame(as: manifest), !original.hasForeignChecksums,
      keepsHeader || original.checksums?.algorithm == algorithm
    {
      self = original
      return
    }
    let widths = [64, 32, 16, 8, 6, 4]
    let tensors = widths.flatMap { width in manifest.tensors.filter { $0.dtype.bitWidth == width } }
    var header = Array("{".utf8)
    func append(_ text: String) { header.append(contentsOf: text.utf8) }
    var metadata = manifest.metadata
    if algorithm != nil {
      metadata[ChecksumText.key] = nil
      // transformers refuses a file that has metadata but does not say whose shapes these are.
      if metadata["format"] == nil { metadata["format"] = "pt" }
    }
    var checksums: (TensorChecksum.Algorithm, Int)?
    if !metadata.isEmpty {
      append("\"__metadata__\":{")
      if let algorithm {
        append("\"\(ChecksumText.key)\":\"")
        let text = ChecksumText(algorithm, count: tensors.count, at: 8 + header.count)
        header += text.bytes
        append("\"")
        checksums = (algorithm, text.offset)
      }
      for (key, value) in metadata.sorted(by: { $0.key < $1.key }) {
        append((header.last == UInt8(ascii: "{") ? "" : ",") + jsonString(key) + ":")
        append(jsonString(value))
      }
      append("}")
    }
    var begins: [Int] = []
    var begin = 0
    for tensor in tensors {
      guard tensor.name != "__metadata__" else {
        throw CheckpointError(
          file: path, tensor: tensor.name, "has a name that safetensors keeps for itself")
      }
      let shape = tensor.shape.map(String.init).joined(separator: ",")
      append(
        (header.count == 1 ? "" : ",") + jsonString(tensor.name)
          + ":{\"dtype\":\"\(tensor.dtype.rawValue)\",\"shape\":[\(shape)],"
          + "\"data_offsets\":[\(begin),\(begin + tensor.byteCount)]}")
      begins.append(begin)
      begin += tensor.byteCount
    }
    append("}")
    while header.count % 8 != 0 { append(" ") }
    if header.count > Safetensors.largestHeader, algorithm != nil, keepsHeader {
      self = try Self(writing: manifest, path: path)
      lacksRoomForChecksums = true
      return
    }
    guard header.count <= Safetensors.largestHeader else {
      throw CheckpointError(
        file: path,
        "would have a header of \(header.count) bytes; the format's limit is \(Safetensors.largestHeader)",
        remedy: algorithm == .sha256
          ? "leave out --sha256 or write HDF5 instead" : "write HDF5 instead")
    }
    offsets = begins.map { [start = 8 + header.count] in start + $0 }
    self.manifest = Manifest(tensors, metadata: metadata, safetensorsHeader: header)
    self.header = header
    self.checksums = checksums
    recorded = nil
    hasForeignChecksums = false
  }
}

extension Manifest {
  /// Whether both hold the same tensors, whatever their order, and the same metadata.
  fileprivate func describesTheSame(as other: Manifest) -> Bool {
    metadata == other.metadata && tensors.count == other.tensors.count
      && tensors.allSatisfy { other[$0.name] == $0 }
  }
}

/// Text as a JSON string, quotes included.
func jsonString(_ text: String) -> String {
  // Nearly every name.
  let isPlain = text.utf8.allSatisfy {
    $0 >= 0x20 && $0 != UInt8(ascii: "\"") && $0 != UInt8(ascii: "\\")
  }
  if isPlain { return "\"\(text)\"" }
  var result = "\""
  for scalar in text.unicodeScalars {
    switch scalar {
    case "\"": result += "\\\""
    case "\\": result += "\\\\"
    case _ where scalar.value < 0x20:
      let digits = String(scalar.value, radix: 16)
      result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
    default: result.unicodeScalars.append(scalar)
    }
  }
  return result + "\""
}
