extension HDF5 {
  static let headerDataset = "header"
  static let nameAttribute = "safetensors_name"
  static let dtypeAttribute = "safetensors_dtype"
  static let shapeAttribute = "safetensors_shape"

  /// An inventory that has been proven right: tensors, and where in the file their bytes are.
  struct Contents: Sendable {
    let manifest: Manifest
    /// Where the bytes of each tensor of the manifest are.
    let places: [Place]
    /// The checksums of the manifest's tensors, if the file has them.
    let checksums: TensorChecksums?
    /// Whether it has checksums, but of other tensors.
    var hasForeignChecksums: Bool { recordsChecksums && checksums == nil }
    private let recordsChecksums: Bool
    /// What was left out of the file.
    let warnings: [String]
  }

  enum Place: Sendable {
    /// From this byte of the file on.
    case range(from: Int)
    case inline([UInt8])
    /// In these chunks, each within the file, at most one for every cell of the grid, in order;
    /// elsewhere is the fill value.
    case chunks(ChunkGrid, [Filter], [Chunk], fill: [UInt8])
    /// Nowhere: every element has these bytes.
    case fill([UInt8])
  }

  /// Chunks of others may be large, but a worker must hold one.
  static let largestChunk = 1 << 30
  /// What was never written costs its maker nothing: of a tensor with more bytes than this, and
  /// more than deflate could make of what was written, all must have been.
  static let largestUnwritten = 64 << 20
}

extension HDF5.Contents {
  /// - Throws: what is wrong with the inventory, by name.
  init(proving inventory: HDF5.Inventory, of file: MappedFile) throws(CheckpointError) {
    let path = file.path
    warnings = inventory.leftOut.isEmpty ? [] : [Self.warning(inventory.leftOut, path)]
    var names = Set<ExactName>()
    var tensors: [(tensor: TensorInfo, place: HDF5.Place)] = []
    for dataset in inventory.datasets {
      do throws(HDF5Failure) {
        let tensor = try dataset.tensor(isOurs: inventory.metadata != nil)
        guard names.insert(ExactName(tensor.name)).inserted else {
          throw HDF5Failure("has the name of another tensor, \(quoted(tensor.name))")
        }
        tensors.append((tensor, try dataset.prove(tensor, fileSize: file.size)))
      } catch { throw error.of(dataset.path).error(file: path) }
    }
    recordsChecksums = inventory.checksums?.isKnown ?? false
    let metadata = inventory.metadata ?? [:]
    let original = try inventory.header.flatMap { (range) throws(CheckpointError) in
      try Self.header(at: range, of: file, tensors.map { $0.tensor }, metadata)
    }
    guard let original else {
      manifest = Manifest(tensors.map { $0.tensor }, metadata: metadata)
      places = tensors.map { $0.place }
      checksums = try inventory.checksums?.read(for: manifest, from: path)
      return
    }
    let byName = Dictionary(
      uniqueKeysWithValues: tensors.map { (ExactName($0.tensor.name), $0.place) })
    manifest = original
    places = original.tensors.map { byName[ExactName($0.name)]! }
    checksums = try inventory.checksums?.read(for: manifest, from: path)
  }

  private static func warning(_ leftOut: [HDF5.Inventory.LeftOut], _ path: String) -> String {
    let shown = leftOut.prefix(5).map { "\(quoted($0.path)) (\($0.content))" }
    let more = leftOut.count > 5 ? " and \(leftOut.count - 5) more" : ""
    return "\(path): leaves out what is no tensor: \(shown.joined(separator: ", "))\(more)"
  }

  /// What the kept safetensors header says, if it still says what the file holds: someone may
  /// have edited the file since.
  private static func header(
    at range: Range<Int>, of file: MappedFile, _ tensors: [TensorInfo], _ metadata: [String: String]
  ) throws(CheckpointError) -> Manifest? {
    guard range.upperBound <= file.size, range.count <= Safetensors.largestHeader else {
      return nil
    }
    let header = try File(reading: file.path).bytes(at: range.lowerBound, count: range.count)
    var size = 8 + header.count
    for tensor in tensors {
      let sum = size.addingReportingOverflow(tensor.byteCount)
      guard !sum.overflow else { return nil }
      size = sum.partialValue
    }
    // A header that is wrong in itself is one that was damaged: the datasets are what counts.
    let layout = try? Safetensors.Layout(parsing: header, fileSize: size, path: file.path)
    guard let manifest = layout?.manifest, manifest.tensors.count == tensors.count,
      tensors.allSatisfy({ manifest[$0.name] == $0 }),
      manifest.metadata.filter({ HDF5.canName($0.key) }) == metadata
    else { return nil }
    return manifest
  }
}

extension HDF5.Contents {
  /// Where each tensor begins, if all are byte ranges of the file.
  var offsets: [Int]? {
    var offsets: [Int] = []
    for (tensor, place) in zip(manifest.tensors, places) {
      if case .range(let start) = place {
        offsets.append(start)
      } else if tensor.byteCount == 0 {
        offsets.append(0)
      } else {
        return nil
      }
    }
    return offsets
  }
}

extension HDF5.Inventory.Dataset {
  /// The tensor that the dataset is.
  fileprivate func tensor(isOurs: Bool) throws(HDF5Failure) -> TensorInfo {
    let stored = try sized(storedType, dimensions)
    var dtype = storedType
    if let name = self.dtype {
      guard let known = DType(rawValue: name), known.hdf5StorageType == storedType else {
        throw HDF5Failure("is said to be of \(quoted(name)) but holds \(storedType.rawValue)")
      }
      dtype = known
    }
    let tensor = try sized(dtype, shape ?? dimensions)
    guard tensor.byteCount == stored.byteCount else {
      throw HDF5Failure(
        "takes \(stored.byteCount) bytes but its shape \(tensor.shapeDescription) of \(dtype.rawValue) needs \(tensor.byteCount)"
      )
    }
    return tensor.renamed(name ?? (isOurs ? path : path.replacing("/", with: ".")))
  }

  private func sized(_ dtype: DType, _ shape: [Int]) throws(HDF5Failure) -> TensorInfo {
    do { return try TensorInfo(name: path, dtype: dtype, shape: shape) } catch .partialByte {
      throw HDF5Failure("has \(dtype.bitWidth)-bit elements that do not fill whole bytes")
    } catch { throw HDF5Failure("has a shape too large to count its bytes") }
  }

  /// - Returns: where the bytes are, all of which lie in the file.
  fileprivate func prove(_ tensor: TensorInfo, fileSize: Int) throws(HDF5Failure) -> HDF5.Place {
    guard tensor.byteCount > 0 else { return .inline([]) }
    func prove(_ what: String, at offset: Int, _ byteCount: Int) throws(HDF5Failure) {
      let end = offset.addingReportingOverflow(byteCount)
      guard offset >= 0, byteCount >= 0, !end.overflow, end.partialValue <= fileSize else {
        throw HDF5Failure(
          "has \(what)\(byteCount) bytes from byte \(offset) on, beyond the file's \(fileSize)",
          remedy: "the file is truncated or damaged: get it again")
      }
    }
    switch storage {
    case .nothing:
      try proveUnwritten(tensor.byteCount, stored: 0)
      return .fill(try provenFill)
    case .contiguous(let offset):
      try prove("", at: offset, tensor.byteCount)
      return .range(from: offset)
    case .inline(let bytes):
      guard bytes.count == tensor.byteCount else {
        throw HDF5Failure("holds \(bytes.count) bytes instead of \(tensor.byteCount)")
      }
      return .inline(bytes)
    case .chunked(let lengths, let filters, let chunks):
      let grid = ChunkGrid(
        dimensions: dimensions, chunk: lengths, elementSize: storedType.bitWidth / 8)
      guard let grid, grid.chunkByteCount <= HDF5.largestChunk else {
        throw HDF5Failure("has chunks of more than \(HDF5.largestChunk) bytes")
      }
      var stored = 0
      for (index, chunk) in chunks.enumerated() {
        guard (0..<grid.count).contains(chunk.number) else {
          throw HDF5Failure("has a chunk outside its shape")
        }
        guard index == 0 || chunks[index - 1].number < chunk.number else {
          throw HDF5Failure("has a chunk twice")
        }
        try prove("a chunk of ", at: chunk.offset, chunk.byteCount)
        let sum = stored.addingReportingOverflow(chunk.byteCount)
        stored = sum.overflow ? .max : sum.partialValue
      }
      if chunks.count < grid.count { try proveUnwritten(tensor.byteCount, stored: stored) }
      return .chunks(grid, filters, chunks, fill: try provenFill)
    }
  }

  private func proveUnwritten(_ byteCount: Int, stored: Int) throws(HDF5Failure) {
    guard byteCount <= HDF5.largestUnwritten || byteCount / largestDeflateRatio <= stored else {
      throw HDF5Failure("has a shape of \(byteCount) bytes of which some were never written")
    }
  }

  private var provenFill: [UInt8] {
    get throws(HDF5Failure) {
      let width = storedType.bitWidth / 8
      if fill.isEmpty { return [UInt8](repeating: 0, count: width) }
      guard fill.count == width else { throw HDF5Failure("has a fill value of another type") }
      return fill
    }
  }
}
