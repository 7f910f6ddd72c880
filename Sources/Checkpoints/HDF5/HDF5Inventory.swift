internal import CHDF5

extension HDF5 {
  /// What libhdf5 says of a file: all that it is asked when reading, and nothing is proven yet.
  struct Inventory: Equatable, Sendable {
    struct Dataset: Equatable, Sendable {
      /// The names of the groups it is in and its own, joined by slashes.
      let path: String
      let storedType: DType
      let dimensions: [Int]
      /// The attributes that say what it is a tensor of, where there are such.
      let name: String?
      let dtype: String?
      let shape: [Int]?
      let storage: Storage
      /// The bytes of one element where none was written; all zero if empty.
      var fill: [UInt8] = []
    }

    enum Storage: Equatable, Sendable {
      /// No bytes, because there are no elements or none was ever written.
      case nothing
      /// All bytes in one place, from this byte of the file on.
      case contiguous(at: Int)
      /// In the dataset's own description: these.
      case inline([UInt8])
      /// Cut into boxes of these dimensions, which are stored one by one: those that were ever
      /// written, in order.
      case chunked(dimensions: [Int], filters: [Filter], chunks: [Chunk])
    }

    /// As they were made or, where that was not recorded, by name.
    var datasets: [Dataset] = []
    /// The attributes of `/__metadata__`; without that group, the file is not Smelt's.
    var metadata: [String: String]?
    /// Where the safetensors header lies.
    var header: Range<Int>?
    /// Where the checksums of the tensors lie.
    var checksums: HDF5.ChecksumRows?
    /// Datasets of strings and the like, which are no tensors, and what they hold.
    var leftOut: [LeftOut] = []

    struct LeftOut: Equatable, Sendable {
      let path: String
      let content: String
    }
  }
}

extension HDF5.Inventory {
  init(reading path: String) throws(CheckpointError) {
    do {
      self = try HDF5Library.withLock { () throws(HDF5Failure) in
        var reader = try HDF5Reader(path)
        try reader.readAll()
        return reader.inventory
      }
    } catch { throw error.error(file: path) }
  }
}

/// Walks through an open file.
private struct HDF5Reader: ~Copyable {
  private let file: HDF5Handle
  private let path: String
  /// Whether addresses and lengths in the file have 8 bytes, as they mostly do.
  private let hasWideAddresses: Bool
  /// The bytes before the file's own, which addresses in it do not count.
  private let userBlock: Int
  private let attributes: HDF5Attributes
  private var visits: [haddr_t: Int] = [:]
  /// The groups on the way to the one that is read.
  private var ancestors: [haddr_t] = []
  private(set) var inventory = HDF5.Inventory()

  /// Deeper than any model's layers; shallow enough for a thread's stack.
  private static let deepest = 200
  /// More often than anyone links to a group; seldom enough that links cannot multiply.
  private static let mostVisits = 16
  /// The library lists fewer than this in no time.
  private static let manyChunks = 1000

  init(_ path: String) throws(HDF5Failure) {
    let access = try HDF5Handle(H5Pcreate(smelt_h5_file_access()))
    // A file that someone is writing is refused, unless the file system cannot tell.
    try HDF5Library.check(H5Pset_file_locking(access.id, true, true))
    let file = try HDF5Handle(H5Fopen(path, smelt_h5_read_only(), access.id))
    let creation = try HDF5Handle(H5Fget_create_plist(file.id))
    var block: hsize_t = 0
    try HDF5Library.check(H5Pget_userblock(creation.id, &block))
    var (addressSize, lengthSize) = (0, 0)
    try HDF5Library.check(H5Pget_sizes(creation.id, &addressSize, &lengthSize))
    self.attributes = try HDF5Attributes()
    self.file = file
    self.path = path
    hasWideAddresses = addressSize == 8 && lengthSize == 8
    userBlock = Int(min(block, 1 << 40))
  }

  mutating func readAll() throws(HDF5Failure) {
    let root = try HDF5Handle(H5Gopen2(file.id, "/", hid_t(H5P_DEFAULT)))
    try read(root, path: "", depth: 0)
  }

  private mutating func read(_ group: borrowing HDF5Handle, path: String, depth: Int)
    throws(HDF5Failure)
  {
    guard depth <= HDF5Reader.deepest else {
      throw HDF5Failure("has groups more than \(HDF5Reader.deepest) levels deep")
    }
    var address: haddr_t = 0
    try HDF5Library.check(smelt_h5_address(group.id, &address))
    guard !ancestors.contains(address) else {
      throw HDF5Failure("has a group that holds itself, here as \(quoted(path))")
    }
    ancestors.append(address)
    defer { ancestors.removeLast() }
    visits[address, default: 0] += 1
    guard visits[address]! <= HDF5Reader.mostVisits else {
      throw HDF5Failure(
        "has a group that appears more than \(HDF5Reader.mostVisits) times, here as \(quoted(path))"
      )
    }
    for link in try links(of: group) {
      let member = path.isEmpty ? link.name : "\(path)/\(link.name)"
      guard link.isHard else {
        throw HDF5Failure(
          "has at \(quoted(member)) a soft or external link, which Smelt does not follow",
          remedy: "put the dataset itself there")
      }
      let object: HDF5Handle
      do throws(HDF5Failure) {
        object = try HDF5Handle(H5Oopen(group.id, link.name, hid_t(H5P_DEFAULT)))
      } catch { throw error.of(member) }
      switch H5Iget_type(object.id) {
      case H5I_GROUP where member == HDF5.metadataGroup: try readMetadata(object)
      case H5I_GROUP: try read(object, path: member, depth: depth + 1)
      case H5I_DATASET:
        do throws(HDF5Failure) {
          if let content = try contentWithoutTensor(of: object) {
            inventory.leftOut.append(.init(path: member, content: content))
          } else {
            inventory.datasets.append(try dataset(object, path: member))
          }
        } catch { throw error.of(member) }
      case H5I_DATATYPE: continue  // A type with a name: those who use it name it themselves.
      default: throw HDF5Failure("has at \(quoted(member)) an object of an unknown kind")
      }
    }
  }

  private func links(of group: borrowing HDF5Handle) throws(HDF5Failure)
    -> [(name: String, isHard: Bool)]
  {
    let creation = try HDF5Handle(H5Gget_create_plist(group.id))
    var flags: UInt32 = 0
    try HDF5Library.check(H5Pget_link_creation_order(creation.id, &flags))
    let isTracked = flags & UInt32(H5P_CRT_ORDER_TRACKED) != 0
    var links: [(name: String?, isHard: Bool)] = []
    let result = withUnsafeMutablePointer(to: &links) {
      smelt_h5_links(
        group.id, isTracked ? H5_INDEX_CRT_ORDER : H5_INDEX_NAME,
        { name, isHard, context in
          context!.assumingMemoryBound(to: [(name: String?, isHard: Bool)].self).pointee
            .append((String(validatingCString: name!), isHard != 0))
          return 0
        }, $0)
    }
    try HDF5Library.check(result)
    return try links.map { (link) throws(HDF5Failure) in
      guard let name = link.name else { throw HDF5Failure("has a name that is not UTF-8 text") }
      return (name, link.isHard)
    }
  }

  private mutating func readMetadata(_ group: borrowing HDF5Handle) throws(HDF5Failure) {
    var metadata: [String: String] = [:]
    for name in try attributes.names(of: group) {
      metadata[name] = try attributes.text(name, of: group)
    }
    inventory.metadata = metadata
    inventory.header = try bytes(HDF5.headerDataset, in: group) { (_) throws(HDF5Failure) in }?
      .range
    let rows = try bytes(HDF5.checksumsDataset, in: group) { (dataset) throws(HDF5Failure) in
      (
        algorithm: try attributes.text(HDF5.algorithmAttribute, of: dataset),
        described: try attributes.text(HDF5.describedAttribute, of: dataset)
      )
    }
    if let rows, let algorithm = rows.answer.algorithm {
      inventory.checksums = HDF5.ChecksumRows(
        algorithm: algorithm, described: rows.answer.described ?? "", range: rows.range)
    }
  }

  /// Where a dataset of bytes lies, and what else is asked of it. Whatever is no plain dataset
  /// of bytes is not what Smelt wrote.
  private func bytes<Answer>(
    _ name: String, in group: borrowing HDF5Handle,
    _ ask: (borrowing HDF5Handle) throws(HDF5Failure) -> Answer
  ) throws(HDF5Failure) -> (range: Range<Int>, answer: Answer)? {
    guard try HDF5Library.check(H5Lexists(group.id, name, hid_t(H5P_DEFAULT))) > 0 else {
      return nil
    }
    let handle = try HDF5Handle(H5Dopen2(group.id, name, hid_t(H5P_DEFAULT)))
    let dataset = try dataset(handle, path: name)
    guard case .contiguous(let offset) = dataset.storage, dataset.storedType == .u8,
      let tensor = try? TensorInfo(name: name, dtype: .u8, shape: dataset.dimensions)
    else { return nil }
    let end = offset.addingReportingOverflow(tensor.byteCount)
    guard offset >= 0, !end.overflow else { return nil }
    return (offset..<end.partialValue, try ask(handle))
  }

  /// What a dataset holds that is by its kind no tensor; of Smelt's files all are tensors.
  private func contentWithoutTensor(of dataset: borrowing HDF5Handle) throws(HDF5Failure)
    -> String?
  {
    guard try HDF5Library.check(H5Lexists(file.id, HDF5.metadataGroup, hid_t(H5P_DEFAULT))) == 0
    else { return nil }
    let type = try HDF5Handle(H5Dget_type(dataset.id))
    switch H5Tget_class(type.id) {
    case H5T_STRING: return "strings"
    case H5T_REFERENCE: return "references"
    case H5T_VLEN: return "lists of varying length"
    case H5T_COMPOUND:
      // Numbers that are too wide are refused: they would be missed.
      return H5Tget_member_index(type.id, "r") == 0 && H5Tget_member_index(type.id, "i") == 1
        ? nil : "compounds of \(H5Tget_nmembers(type.id)) fields"
    default: return nil
    }
  }

  private func dataset(_ dataset: borrowing HDF5Handle, path: String) throws(HDF5Failure)
    -> HDF5.Inventory.Dataset
  {
    let type = try HDF5Handle(H5Dget_type(dataset.id))
    let storedType = try DType(hdf5Type: type.id)
    let dimensions = try dimensions(of: dataset)
    return HDF5.Inventory.Dataset(
      path: path, storedType: storedType, dimensions: dimensions,
      name: try attributes.text(HDF5.nameAttribute, of: dataset),
      dtype: try attributes.text(HDF5.dtypeAttribute, of: dataset),
      shape: try attributes.integers(HDF5.shapeAttribute, of: dataset)?.map(Int.init),
      storage: dimensions.contains(0) ? .nothing : try storage(of: dataset, storedType, dimensions),
      fill: try fill(of: dataset, storedType))
  }

  /// The bytes of an element that was never written; none if they are zero.
  private func fill(of dataset: borrowing HDF5Handle, _ type: DType) throws(HDF5Failure) -> [UInt8]
  {
    let creation = try HDF5Handle(H5Dget_create_plist(dataset.id))
    var defined = H5D_FILL_VALUE_ERROR
    try HDF5Library.check(H5Pfill_value_defined(creation.id, &defined))
    guard defined == H5D_FILL_VALUE_USER_DEFINED else { return [] }
    let memory = try type.hdf5Type()
    var bytes = [UInt8](repeating: 0, count: type.bitWidth / 8)
    try HDF5Library.check(
      bytes.withUnsafeMutableBytes { H5Pget_fill_value(creation.id, memory.id, $0.baseAddress) })
    return bytes
  }

  private func dimensions(of dataset: borrowing HDF5Handle) throws(HDF5Failure) -> [Int] {
    let space = try HDF5Handle(H5Dget_space(dataset.id))
    guard H5Sget_simple_extent_type(space.id) != H5S_NULL else {
      throw HDF5Failure("has no shape (its dataspace is null)")
    }
    let rank = try HDF5Library.check(H5Sget_simple_extent_ndims(space.id))
    var extent = [hsize_t](repeating: 0, count: Int(rank))
    try HDF5Library.check(H5Sget_simple_extent_dims(space.id, &extent, nil))
    return try extent.map { (dimension) throws(HDF5Failure) in
      guard let dimension = Int(exactly: dimension) else {
        throw HDF5Failure("has a dimension of \(dimension)")
      }
      return dimension
    }
  }

  private func storage(of dataset: borrowing HDF5Handle, _ type: DType, _ dimensions: [Int])
    throws(HDF5Failure) -> HDF5.Inventory.Storage
  {
    let creation = try HDF5Handle(H5Dget_create_plist(dataset.id))
    guard try HDF5Library.check(H5Pget_external_count(creation.id)) == 0 else {
      throw HDF5Failure("has its bytes in another file, which Smelt does not follow")
    }
    switch H5Pget_layout(creation.id) {
    case H5D_CONTIGUOUS:
      // An address that is none is that of what was never written. The library adds the user block.
      guard let offset = Int(exactly: H5Dget_offset(dataset.id)) else { return .nothing }
      return .contiguous(at: offset)
    case H5D_COMPACT: return .inline(try compactBytes(of: dataset, type, dimensions))
    case H5D_CHUNKED: return try chunks(of: dataset, creation, dimensions)
    case H5D_VIRTUAL:
      throw HDF5Failure("is a view of other datasets, which Smelt does not follow")
    default: throw HDF5Failure("is stored in a way unknown to Smelt")
    }
  }

  private func compactBytes(
    of dataset: borrowing HDF5Handle, _ type: DType, _ dimensions: [Int]
  ) throws(HDF5Failure) -> [UInt8] {
    let size = H5Dget_storage_size(dataset.id)
    // What fits a dataset's description, by the format's specification.
    guard size < 1 << 16, let tensor = try? TensorInfo(name: "", dtype: type, shape: dimensions),
      size == tensor.byteCount
    else { throw HDF5Failure("holds \(size) bytes, which is not what its shape needs") }
    var bytes = [UInt8](repeating: 0, count: tensor.byteCount)
    let memory = try type.hdf5Type()
    try HDF5Library.check(
      bytes.withUnsafeMutableBytes {
        H5Dread(
          dataset.id, memory.id, smelt_h5_all(), smelt_h5_all(), hid_t(H5P_DEFAULT),
          $0.baseAddress)
      })
    return bytes
  }

  private func chunks(
    of dataset: borrowing HDF5Handle, _ creation: borrowing HDF5Handle, _ dimensions: [Int]
  ) throws(HDF5Failure) -> HDF5.Inventory.Storage {
    let rank = Int32(dimensions.count)
    var extent = [hsize_t](repeating: 0, count: dimensions.count)
    guard try HDF5Library.check(H5Pget_chunk(creation.id, rank, &extent)) == rank,
      !extent.contains(0)
    else { throw HDF5Failure("has chunks of another rank than its own") }
    var options: UInt32 = 0
    try HDF5Library.check(H5Pget_chunk_opts(creation.id, &options))
    guard options == 0 else { throw HDF5Failure("keeps the chunks at its edges in another way") }
    let lengths = extent.map { Int(clamping: $0) }
    let counts = zip(dimensions, lengths).map { 1 + ($0 - 1) / $1 }

    let space = try HDF5Handle(H5Dget_space(dataset.id))
    var stored: hsize_t = 0
    try HDF5Library.check(H5Dget_num_chunks(dataset.id, space.id, &stored))
    var chunks: [HDF5.Chunk] = []
    func add(_ start: [UInt64], _ mask: UInt32, _ address: UInt64, _ size: UInt64)
      throws(HDF5Failure)
    {
      let cell = zip(start, lengths).map { Int(clamping: $0) / $1 }
      guard zip(cell, counts).allSatisfy({ $0 < $1 }), let offset = Int(exactly: address),
        let byteCount = Int(exactly: size)
      else { throw HDF5Failure("has a chunk outside its shape") }
      // Cannot overflow: there are no more chunks than elements.
      let number = zip(cell, counts).reduce(0) { $0 * $1.1 + $1.0 }
      chunks.append(
        HDF5.Chunk(number: number, offset: offset, byteCount: byteCount, skippedFilters: mask))
    }
    if let index = try index(of: dataset, rank: dimensions.count, count: Int(clamping: stored)) {
      for entry in index.entries {
        try add(entry.start, entry.skippedFilters, entry.address, entry.byteCount)
      }
    } else {
      // Versions of the library differ in whether they add the user block.
      guard userBlock == 0 || stored == 0 else {
        throw HDF5Failure(
          "has chunks behind a user block, listed in a way that Smelt does not read there",
          remedy: "take the block off with 'h5unjam --delete -i FILE -o NEW.h5'")
      }
      var start = extent
      for number in 0..<stored {
        var mask: UInt32 = 0
        var address: haddr_t = 0
        var size: hsize_t = 0
        try HDF5Library.check(
          H5Dget_chunk_info(dataset.id, space.id, number, &start, &mask, &address, &size))
        try add(start.map { UInt64($0) }, mask, UInt64(address), UInt64(size))
      }
    }
    chunks.sort { $0.number < $1.number }
    return .chunked(dimensions: lengths, filters: try filters(creation), chunks: chunks)
  }

  /// The chunks as the file lists them, where there are so many that asking the library for each
  /// takes long, or which are behind a user block; if the list is of the usual kind.
  private func index(of dataset: borrowing HDF5Handle, rank: Int, count: Int) throws(HDF5Failure)
    -> HDF5.ChunkIndex?
  {
    guard count >= HDF5Reader.manyChunks || userBlock > 0, hasWideAddresses else { return nil }
    var address: haddr_t = 0
    try HDF5Library.check(smelt_h5_address(dataset.id, &address))
    return HDF5.ChunkIndex(
      of: UInt64(address), rank: rank, count: count, in: path, behind: userBlock)
  }

  private func filters(_ creation: borrowing HDF5Handle) throws(HDF5Failure) -> [HDF5.Filter] {
    let count = try HDF5Library.check(H5Pget_nfilters(creation.id))
    var filters: [HDF5.Filter] = []
    for index in 0..<UInt32(count) {
      var flags: UInt32 = 0
      var valueCount = 8
      var values = [UInt32](repeating: 0, count: valueCount)
      var name = [CChar](repeating: 0, count: 64)
      var configuration: UInt32 = 0
      let number = try HDF5Library.check(
        H5Pget_filter2(
          creation.id, index, &flags, &valueCount, &values, name.count - 1, &name,
          &configuration))
      switch number {
      case H5Z_FILTER_SHUFFLE where valueCount > 0:
        filters.append(.shuffle(width: Int(values[0])))
      case H5Z_FILTER_DEFLATE: filters.append(.deflate)
      case H5Z_FILTER_FLETCHER32: filters.append(.fletcher32)
      case HDF5.lzfFilter: filters.append(.lzf)
      case HDF5.zstdFilter: filters.append(.zstd)
      default:
        let name = String(
          decoding: name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        throw HDF5Failure(
          "is compressed by filter \(number)\(name.isEmpty ? "" : ", \(quoted(name))"), which Smelt does not know",
          remedy: "write it again with h5py without that filter")
      }
    }
    return filters
  }
}
