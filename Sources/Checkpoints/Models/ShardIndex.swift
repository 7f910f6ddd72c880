/// The list of which tensor is in which file of a sharded model:
/// `model.safetensors.index.json` or `pytorch_model.bin.index.json`.
struct ShardIndex {
  let path: String
  /// Tensors by the file they are in, in the order of the index.
  private(set) var tensors: [String: [String]] = [:]
  /// The bytes of all tensors, as the index has it; files in the wild have other numbers.
  private(set) var totalSize: Int?

  /// Far more than a header, with which it shares the number of tensors.
  private static let largest = 400_000_000

  /// The files, sorted by name: their order in the model.
  var files: [String] { tensors.keys.sorted() }

  init(reading path: String) throws(CheckpointError) {
    self.path = path
    let file = try File(reading: path)
    let size = try file.size()
    guard size <= Self.largest else {
      throw CheckpointError(file: path, "has \(size) bytes, too many for an index of shards")
    }
    var scanner = JSONScanner(
      try file.bytes(at: 0, count: size), file: path, subject: "the index")
    var seen = Set<ExactName>()
    try scanner.object("as the index") { (scanner, field) throws(CheckpointError) in
      guard seen.insert(ExactName(field)).inserted else {
        throw scanner.failure("the index has two fields \(quoted(field))")
      }
      switch field {
      case "weight_map": try parseWeightMap(&scanner)
      case "metadata": try parseMetadata(&scanner)
      default: try scanner.skipValue("in the index")
      }
    }
    try scanner.expectEnd()
    guard seen.contains(ExactName("weight_map")) else {
      throw scanner.failure("has no weight_map", remedy: "it may not be an index of shards")
    }
  }

  private mutating func parseWeightMap(_ scanner: inout JSONScanner) throws(CheckpointError) {
    var names = Set<ExactName>()
    try scanner.object("as weight_map") { (scanner, tensor) throws(CheckpointError) in
      scanner.tensor = tensor
      defer { scanner.tensor = nil }
      guard names.insert(ExactName(tensor)).inserted else {
        throw scanner.failure("the index names it twice")
      }
      guard scanner.peek() == UInt8(ascii: "\"") else {
        throw scanner.failure("has a file in the index that is not a string")
      }
      let file = try scanner.string("as a file name")
      guard !file.isEmpty, file != ".", file != "..", !file.contains("/"),
        !file.unicodeScalars.contains("\0")
      else {
        throw scanner.failure(
          "is said to be in \(quoted(file)), which is not the name of a file in the same folder")
      }
      tensors[file, default: []].append(tensor)
    }
  }

  private mutating func parseMetadata(_ scanner: inout JSONScanner) throws(CheckpointError) {
    guard scanner.peek() == UInt8(ascii: "{") else { return try scanner.skipValue("as metadata") }
    var seen = Set<ExactName>()
    try scanner.object("as metadata") { (scanner, field) throws(CheckpointError) in
      guard seen.insert(ExactName(field)).inserted else {
        throw scanner.failure("the index has two metadata \(quoted(field))")
      }
      let start = scanner.position
      try scanner.skipValue("in metadata")
      if field == "total_size" {
        // Some writers put the number as 1.0e9; only its value counts.
        totalSize = Double(scanner.text(from: start)).flatMap { Int(exactly: $0) }
      }
    }
  }

  /// The bytes of an index.
  static func describe(_ shards: [(file: String, tensors: [TensorInfo])]) -> [UInt8] {
    let size = shards.reduce(0) { $0 + $1.tensors.reduce(0) { $0 + $1.byteCount } }
    let lines = shards.flatMap { shard in
      shard.tensors.map { "    \(jsonString($0.name)): \(jsonString(shard.file))" }
    }
    let text = """
      {
        "metadata": {
          "total_size": \(size)
        },
        "weight_map": {
      \(lines.joined(separator: ",\n"))
        }
      }

      """
    return Array(text.utf8)
  }
}
