extension Bundle {
  /// How to get the models back from the bundle's inner tensors: the JSON text in its metadata.
  struct Recipe: Sendable {
    var models: [Model]
    var version = Bundle.versions.lowerBound

    /// One checkpoint in the bundle. A bundle of a single checkpoint has one without a name.
    struct Model: Sendable {
      var name: String
      /// The inner tensor that holds the checkpoint's safetensors header as it was, if it had one.
      var header: String?
      /// The checkpoint's metadata; empty where the header has it.
      var metadata: [String: String]
      var tensors: [Entry]

      /// The name of one of its tensors among those of all models.
      func fullName(_ tensor: String) -> String { name.isEmpty ? tensor : name + "/" + tensor }
    }

    /// A tensor: what it is, and how it is coded in which inner tensors.
    struct Entry: Sendable {
      var tensor: TensorInfo
      var codec: Codec
      var checksum: UInt64
      /// The inner tensors, if they are not named as the codec has it.
      var parts: [String] = []
      var reference: Reference?
      /// For `planes` and `sparse`: how far elements are rotated, if not by 1.
      var rotation: Int?
      /// For the quantised codecs: elements that share a scale.
      var group: Int?
      /// For the lossy codecs: the root mean square of the errors over that of the values.
      var error: String?
    }

    /// Another tensor that is needed.
    enum Reference: Sendable, Equatable {
      /// An earlier one of the bundle, by its full name.
      case inside(String)
      /// One of the base model, which is not in the bundle.
      case base(String, checksum: UInt64)
    }
  }
}

// MARK: - To JSON

extension Bundle.Recipe {
  var json: String {
    let models = models.map { $0.json }.joined(separator: ",")
    return "{\"version\":\(version),\"models\":[\(models)]}"
  }
}

extension Bundle.Recipe.Model {
  fileprivate var json: String {
    var members = ["\"name\":\(jsonString(name))"]
    if let header { members.append("\"header\":\(jsonString(header))") }
    if !metadata.isEmpty {
      let pairs = metadata.sorted { $0.key < $1.key }
        .map { "\(jsonString($0.key)):\(jsonString($0.value))" }
      members.append("\"metadata\":{\(pairs.joined(separator: ","))}")
    }
    let entries = tensors.map { $0.json }.joined(separator: ",")
    members.append("\"tensors\":[\(entries)]")
    return "{\(members.joined(separator: ","))}"
  }
}

extension Bundle.Recipe.Entry {
  fileprivate var json: String {
    let shape = tensor.shape.map(String.init).joined(separator: ",")
    var members = [
      "\"name\":\(jsonString(tensor.name))", "\"dtype\":\"\(tensor.dtype.rawValue)\"",
      "\"shape\":[\(shape)]", "\"codec\":\"\(codec.rawValue)\"",
      "\"xxh3\":\"\(hexadecimal(checksum))\"",
    ]
    if !parts.isEmpty {
      members.append("\"parts\":[\(parts.map(jsonString).joined(separator: ","))]")
    }
    switch reference {
    case .inside(let name): members.append("\"reference\":\(jsonString(name))")
    case .base(let name, let checksum):
      members.append(
        "\"base\":\(jsonString(name)),\"base_xxh3\":\"\(hexadecimal(checksum))\"")
    case nil: break
    }
    if let rotation { members.append("\"rotation\":\(rotation)") }
    if let group { members.append("\"group\":\(group)") }
    if let error { members.append("\"error\":\(jsonString(error))") }
    return "{\(members.joined(separator: ","))}"
  }
}

// MARK: - From JSON

extension Bundle.Recipe {
  /// - Throws: what is wrong with the text.
  init(parsing json: String, file: String) throws(CheckpointError) {
    var scanner = JSONScanner(Array(json.utf8), file: file)
    do {
      self = try Self.parse(&scanner)
    } catch {
      throw CheckpointError(
        file: file, tensor: error.tensor, "has a recipe that is malformed: \(error.problem)")
    }
  }

  private static func parse(_ scanner: inout JSONScanner) throws(CheckpointError) -> Self {
    var version: Int?
    var models: [Model]?
    try scanner.object("as the recipe") { (scanner, key) throws(CheckpointError) in
      switch key {
      case "version" where version == nil:
        version = try scanner.natural("as its version")
      case "models" where models == nil:
        var list: [Model] = []
        try scanner.array("as its models") { (scanner) throws(CheckpointError) in
          list.append(try Model(parsing: &scanner))
        }
        models = list
      default: throw scanner.failure("the field \(quoted(key)) is unknown or there twice")
      }
    }
    try scanner.expectEnd()
    guard let version, Bundle.versions.contains(version) else {
      throw scanner.failure(
        "its version is \(version.map(String.init) ?? "missing"), not one of \(Bundle.versions.map(String.init).joined(separator: ", "))"
      )
    }
    guard let models, !models.isEmpty else { throw scanner.failure("it has no models") }
    return Self(models: models, version: version)
  }
}

extension Bundle.Recipe.Model {
  fileprivate init(parsing scanner: inout JSONScanner) throws(CheckpointError) {
    var fields = Set<String>()
    var name = ""
    var header: String?
    var metadata: [String: String] = [:]
    var tensors: [Bundle.Recipe.Entry] = []
    try scanner.object("as a model") { (scanner, key) throws(CheckpointError) in
      guard fields.insert(key).inserted else {
        throw scanner.failure("a model has the field \(quoted(key)) twice")
      }
      switch key {
      case "name": name = try scanner.string("as a model's name")
      case "header": header = try scanner.string("as a header's tensor")
      case "metadata":
        try scanner.object("as metadata") { (scanner, key) throws(CheckpointError) in
          guard metadata.updateValue(try scanner.string("in metadata"), forKey: key) == nil else {
            throw scanner.failure("metadata has the key \(quoted(key)) twice")
          }
        }
      case "tensors":
        try scanner.array("as a model's tensors") { (scanner) throws(CheckpointError) in
          tensors.append(try Bundle.Recipe.Entry(parsing: &scanner))
        }
      default: throw scanner.failure("a model has the unknown field \(quoted(key))")
      }
    }
    guard fields.isSuperset(of: ["name", "tensors"]) else {
      throw scanner.failure("a model has no name or no tensors")
    }
    self.init(name: name, header: header, metadata: metadata, tensors: tensors)
  }
}

extension Bundle.Recipe.Entry {
  fileprivate init(parsing scanner: inout JSONScanner) throws(CheckpointError) {
    var texts: [String: String] = [:]
    var shape: [Int]?
    var parts: [String] = []
    var rotation: Int?
    var group: Int?
    var seen = Set<String>()
    defer { scanner.tensor = nil }
    try scanner.object("as a tensor") { (scanner, key) throws(CheckpointError) in
      scanner.tensor = texts["name"]
      guard seen.insert(key).inserted else {
        throw scanner.failure("has the field \(quoted(key)) twice")
      }
      switch key {
      case "name", "dtype", "codec", "xxh3", "reference", "base", "base_xxh3", "error":
        texts[key] = try scanner.string("as a tensor's \(key)")
      case "shape":
        var list: [Int] = []
        try scanner.array("as a shape") { (scanner) throws(CheckpointError) in
          list.append(try scanner.natural("in its shape"))
        }
        shape = list
      case "rotation": rotation = try scanner.natural("as its rotation")
      case "group": group = try scanner.natural("as its group")
      case "parts":
        try scanner.array("as parts") { (scanner) throws(CheckpointError) in
          parts.append(try scanner.string("as a part"))
        }
      default: throw scanner.failure("has the unknown field \(quoted(key))")
      }
    }
    guard let name = texts["name"] else { throw scanner.failure("a tensor has no name") }
    scanner.tensor = name
    guard let dtype = texts["dtype"].flatMap(DType.init), let shape,
      let codec = texts["codec"].flatMap(Codec.init),
      let checksum = texts["xxh3"].flatMap(number(hexadecimal:))
    else {
      throw scanner.failure(
        "its dtype, shape, codec or xxh3 is missing or unknown")
    }
    guard let tensor = try? TensorInfo(name: name, dtype: dtype, shape: shape) else {
      throw scanner.failure("its shape is too large or not of whole bytes")
    }
    guard texts["error"].map({ Double($0)?.isFinite == true }) ?? true else {
      throw scanner.failure("its error is not a number")
    }
    guard texts["error"] == nil || codec.isLossy else {
      throw scanner.failure("has an error though its codec has none")
    }
    self.init(
      tensor: tensor, codec: codec, checksum: checksum, parts: parts, rotation: rotation,
      group: group, error: texts["error"])
    switch (texts["reference"], texts["base"], texts["base_xxh3"].map(number(hexadecimal:))) {
    case (nil, nil, nil): reference = nil
    case (let name?, nil, nil): reference = .inside(name)
    case (nil, let name?, let checksum??): reference = .base(name, checksum: checksum)
    default: throw scanner.failure("its reference is incomplete or there twice")
    }
  }
}

/// The 16 digits of a checksum.
func hexadecimal(_ value: UInt64) -> String {
  let digits = String(value, radix: 16)
  return String(repeating: "0", count: 16 - digits.count) + digits
}

private func number(hexadecimal digits: String) -> UInt64? {
  guard digits.utf8.count == 16, digits.utf8.allSatisfy({ "0123456789abcdef".utf8.contains($0) })
  else { return nil }
  return UInt64(digits, radix: 16)
}
