/// What a child process answers about a file: its inventory, or why there is none.
///
/// The parent trusts none of it: the child may have been misled by the file.
enum HDF5Message {
  static func encode(_ answer: Result<HDF5.Inventory, CheckpointError>) -> [UInt8] {
    var encoder = Encoder()
    switch answer {
    case .success(let inventory):
      encoder.put(0)
      encoder.put(inventory.datasets) { $0.put($1) }
      encoder.put(inventory.metadata) { encoder, pairs in
        encoder.put(pairs.sorted { $0.key < $1.key }) {
          $0.put($1.key)
          $0.put($1.value)
        }
      }
      encoder.put(inventory.header) { $0.put($1) }
      encoder.put(inventory.checksums) {
        $0.put($1.algorithm)
        $0.put($1.described)
        $0.put($1.range)
      }
      encoder.put(inventory.leftOut) {
        $0.put($1.path)
        $0.put($1.content)
      }
    case .failure(let error):
      encoder.put(1)
      encoder.put(error.tensor) { $0.put($1) }
      encoder.put(error.problem)
      encoder.put(error.remedy) { $0.put($1) }
    }
    return encoder.bytes
  }

  /// - Returns: nil if the message is not whole or not one.
  static func decode(_ bytes: [UInt8], file: String) -> Result<HDF5.Inventory, CheckpointError>? {
    var decoder = Decoder(bytes)
    do {
      let answer: Result<HDF5.Inventory, CheckpointError>
      switch try decoder.integer() {
      case 0:
        var inventory = HDF5.Inventory()
        inventory.datasets = try decoder.list { decoder throws(Malformed) in
          try decoder.dataset()
        }
        let pairs = try decoder.optional { decoder throws(Malformed) in
          try decoder.list { decoder throws(Malformed) in
            (try decoder.string(), try decoder.string())
          }
        }
        inventory.metadata = pairs.map { Dictionary($0, uniquingKeysWith: { $1 }) }
        inventory.header = try decoder.optional { decoder throws(Malformed) in
          try decoder.range()
        }
        inventory.checksums = try decoder.optional { decoder throws(Malformed) in
          HDF5.ChecksumRows(
            algorithm: try decoder.string(), described: try decoder.string(),
            range: try decoder.range())
        }
        inventory.leftOut = try decoder.list { decoder throws(Malformed) in
          .init(path: try decoder.string(), content: try decoder.string())
        }
        answer = .success(inventory)
      case 1:
        let tensor = try decoder.optional { decoder throws(Malformed) in try decoder.string() }
        let problem = try decoder.string()
        let remedy = try decoder.optional { decoder throws(Malformed) in try decoder.string() }
        answer = .failure(CheckpointError(file: file, tensor: tensor, problem, remedy: remedy))
      default: return nil
      }
      return decoder.isAtEnd ? answer : nil
    } catch { return nil }
  }

  private struct Malformed: Error {}

  // MARK: - Writing

  /// Integers are eight bytes, little-endian; lists and strings begin with their count.
  private struct Encoder {
    var bytes: [UInt8] = []

    mutating func put(_ value: Int) {
      withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }

    mutating func put(_ range: Range<Int>) {
      put(range.lowerBound)
      put(range.upperBound)
    }

    mutating func put(_ text: String) { put(Array(text.utf8)) }

    mutating func put(_ content: [UInt8]) {
      put(content.count)
      bytes.append(contentsOf: content)
    }

    mutating func put<Element>(_ list: [Element], _ element: (inout Encoder, Element) -> Void) {
      put(list.count)
      for item in list { element(&self, item) }
    }

    mutating func put<Wrapped>(_ value: Wrapped?, _ some: (inout Encoder, Wrapped) -> Void) {
      put(value == nil ? 0 : 1)
      if let value { some(&self, value) }
    }

    mutating func put(_ dataset: HDF5.Inventory.Dataset) {
      put(dataset.path)
      put(dataset.storedType.rawValue)
      put(dataset.dimensions) { $0.put($1) }
      put(dataset.name) { $0.put($1) }
      put(dataset.dtype) { $0.put($1) }
      put(dataset.shape) { $0.put($1) { $0.put($1) } }
      switch dataset.storage {
      case .nothing: put(0)
      case .contiguous(let offset):
        put(1)
        put(offset)
      case .inline(let content):
        put(2)
        put(content)
      case .chunked(let dimensions, let filters, let chunks):
        put(3)
        put(dimensions) { $0.put($1) }
        put(filters) { $0.put($1) }
        put(chunks) {
          $0.put($1.number)
          $0.put($1.offset)
          $0.put($1.byteCount)
          $0.put(Int($1.skippedFilters))
        }
      }
      put(dataset.fill)
    }

    mutating func put(_ filter: HDF5.Filter) {
      switch filter {
      case .shuffle(let width):
        put(0)
        put(width)
      case .deflate: put(1)
      case .lzf: put(2)
      case .fletcher32: put(3)
      case .zstd: put(4)
      }
    }
  }

  // MARK: - Reading

  private struct Decoder {
    private let bytes: [UInt8]
    private var position = 0

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    var isAtEnd: Bool { position == bytes.count }

    mutating func integer() throws(Malformed) -> Int {
      guard bytes.count - position >= 8 else { throw Malformed() }
      let value = bytes[position..<position + 8].reversed().reduce(UInt64(0)) {
        $0 << 8 | UInt64($1)
      }
      position += 8
      return Int(truncatingIfNeeded: value)
    }

    mutating func content() throws(Malformed) -> [UInt8] {
      let count = try integer()
      guard count >= 0, count <= bytes.count - position else { throw Malformed() }
      position += count
      return Array(bytes[position - count..<position])
    }

    mutating func range() throws(Malformed) -> Range<Int> {
      let start = try integer()
      let end = try integer()
      guard 0 <= start, start <= end else { throw Malformed() }
      return start..<end
    }

    mutating func string() throws(Malformed) -> String {
      guard let text = String(validating: try content(), as: UTF8.self) else { throw Malformed() }
      return text
    }

    mutating func list<Element>(_ element: (inout Decoder) throws(Malformed) -> Element)
      throws(Malformed) -> [Element]
    {
      let count = try integer()
      // No element is shorter than an integer.
      guard count >= 0, count <= (bytes.count - position) / 8 else { throw Malformed() }
      var list: [Element] = []
      for _ in 0..<count { list.append(try element(&self)) }
      return list
    }

    mutating func optional<Wrapped>(_ some: (inout Decoder) throws(Malformed) -> Wrapped)
      throws(Malformed) -> Wrapped?
    {
      try integer() == 0 ? nil : some(&self)
    }

    private mutating func integers() throws(Malformed) -> [Int] {
      try list { decoder throws(Malformed) in try decoder.integer() }
    }

    mutating func dataset() throws(Malformed) -> HDF5.Inventory.Dataset {
      let path = try string()
      guard let storedType = DType(rawValue: try string()),
        storedType.hdf5StorageType == storedType
      else { throw Malformed() }
      return HDF5.Inventory.Dataset(
        path: path, storedType: storedType, dimensions: try integers(),
        name: try optional { decoder throws(Malformed) in try decoder.string() },
        dtype: try optional { decoder throws(Malformed) in try decoder.string() },
        shape: try optional { decoder throws(Malformed) in try decoder.integers() },
        storage: try storage(), fill: try content())
    }

    private mutating func storage() throws(Malformed) -> HDF5.Inventory.Storage {
      switch try integer() {
      case 0: return .nothing
      case 1: return .contiguous(at: try integer())
      case 2: return .inline(try content())
      case 3:
        return .chunked(
          dimensions: try integers(),
          filters: try list { decoder throws(Malformed) in try decoder.filter() },
          chunks: try list { decoder throws(Malformed) in try decoder.chunk() })
      default: throw Malformed()
      }
    }

    private mutating func filter() throws(Malformed) -> HDF5.Filter {
      switch try integer() {
      case 0: return .shuffle(width: try integer())
      case 1: return .deflate
      case 2: return .lzf
      case 3: return .fletcher32
      case 4: return .zstd
      default: throw Malformed()
      }
    }

    private mutating func chunk() throws(Malformed) -> HDF5.Chunk {
      HDF5.Chunk(
        number: try integer(), offset: try integer(), byteCount: try integer(),
        skippedFilters: UInt32(truncatingIfNeeded: try integer()))
    }
  }
}
