internal import CHDF5
import Dispatch

/// An HDF5 file that is being laid out: every dataset gets its place, none its bytes.
struct HDF5Writer: ~Copyable {
  private let file: HDF5Handle
  private let attributes: HDF5Attributes
  private let linkCreation: HDF5Handle
  private let groupCreation: HDF5Handle
  private let contiguous: HDF5Handle
  private var groups: Set<ExactName> = []

  /// Truncates the file at `path`.
  init(_ path: String) throws(HDF5Failure) {
    let access = try HDF5Writer.access()
    let fileCreation = try HDF5Handle(H5Pcreate(smelt_h5_file_creation()))
    try keepOrder(fileCreation)
    let linkCreation = try HDF5Handle(H5Pcreate(smelt_h5_link_creation()))
    try HDF5Library.check(H5Pset_char_encoding(linkCreation.id, H5T_CSET_UTF8))
    let groupCreation = try HDF5Handle(H5Pcreate(smelt_h5_group_creation()))
    try keepOrder(groupCreation)
    let contiguous = try datasetCreation()
    // Room for the bytes at once, and nothing written there: Smelt writes them itself.
    try HDF5Library.check(H5Pset_layout(contiguous.id, H5D_CONTIGUOUS))
    try HDF5Library.check(H5Pset_alloc_time(contiguous.id, H5D_ALLOC_TIME_EARLY))
    try HDF5Library.check(H5Pset_fill_time(contiguous.id, H5D_FILL_TIME_NEVER))
    Unfinished.creation.wait()
    defer { Unfinished.creation.signal() }
    let file = try HDF5Handle(
      H5Fcreate(path, smelt_h5_truncate(), fileCreation.id, access.id))
    self.attributes = try HDF5Attributes()
    self.file = file
    self.linkCreation = linkCreation
    self.groupCreation = groupCreation
    self.contiguous = contiguous
  }

  /// How files are opened for writing.
  static func access() throws(HDF5Failure) -> HDF5Handle {
    let access = try HDF5Handle(H5Pcreate(smelt_h5_file_access()))
    // What h5py calls libver=("v108", "latest"): every reader since 2008 knows it, and any
    // number and size of attributes fits.
    try HDF5Library.check(H5Pset_libver_bounds(access.id, H5F_LIBVER_V18, H5F_LIBVER_V110))
    // Large tensors on page boundaries, for those who map the file; padding stays under 1 %.
    try HDF5Library.check(H5Pset_alignment(access.id, 512 << 10, 4096))
    // Nobody else knows the file yet.
    try HDF5Library.check(H5Pset_file_locking(access.id, false, true))
    return access
  }

  /// Writes what goes into the group for things that are no tensors.
  /// - Returns: where the checksums belong, if there are to be any.
  func writeMetadata(of manifest: Manifest, _ checksums: TensorChecksum.Algorithm?)
    throws(HDF5Failure) -> HDF5.ChecksumRows?
  {
    let group = try makeGroup(HDF5.metadataGroup)
    for (key, value) in manifest.metadata.sorted(by: { $0.key < $1.key }) {
      guard HDF5.canName(key) else {
        // The header has it too.
        if manifest.safetensorsHeader != nil { continue }
        throw HDF5Failure("cannot keep metadata under the key \(quoted(key)) in HDF5")
      }
      try attributes.write(value, as: key, to: group)
    }
    if let header = manifest.safetensorsHeader {
      let path = "\(HDF5.metadataGroup)/\(HDF5.headerDataset)"
      let dataset = try makeDataset(path, .u8, [header.count], contiguous)
      let result = header.withUnsafeBytes {
        H5Dwrite(
          dataset.id, smelt_h5_u8(), smelt_h5_all(), smelt_h5_all(), hid_t(H5P_DEFAULT),
          $0.baseAddress)
      }
      try HDF5Library.check(result)
      // Small datasets are written when they are closed.
      try dataset.close()
    }
    guard let checksums, !manifest.tensors.isEmpty else { return nil }
    let path = "\(HDF5.metadataGroup)/\(HDF5.checksumsDataset)"
    let shape = [manifest.tensors.count, checksums.width]
    let dataset = try makeDataset(path, .u8, shape, contiguous)
    let described = manifest.described(by: checksums, in: manifest.positionsByName).description
    try attributes.write(checksums.rawValue, as: HDF5.algorithmAttribute, to: dataset)
    try attributes.write(described, as: HDF5.describedAttribute, to: dataset)
    let begin = try offset(of: dataset)
    return HDF5.ChecksumRows(
      algorithm: checksums.rawValue, described: described,
      range: begin..<begin + shape[0] * shape[1])
  }

  /// Where the bytes of a contiguous dataset belong.
  private func offset(of dataset: borrowing HDF5Handle) throws(HDF5Failure) -> Int {
    guard let offset = Int(exactly: H5Dget_offset(dataset.id)) else {
      throw HDF5Library.failure()
    }
    return offset
  }

  /// Adds the dataset of a tensor.
  /// - Returns: where in the file its bytes belong, or nil if they go there as chunks.
  mutating func add(_ tensor: TensorInfo, at path: String, _ compression: HDF5.Compression?)
    throws(HDF5Failure) -> Int?
  {
    for group in HDF5.groups(above: path) where groups.insert(ExactName(group)).inserted {
      _ = try makeGroup(group)
    }
    let stored = tensor.dtype.hdf5StorageType
    let dimensions = tensor.hdf5Dimensions
    guard let compression, let chunk = HDF5.chunkDimensions(for: tensor) else {
      let dataset = try makeDataset(path, stored, dimensions, contiguous)
      try describe(tensor, path, dimensions, in: dataset)
      guard tensor.byteCount > 0 else { return 0 }
      return try offset(of: dataset)
    }
    let creation = try datasetCreation()
    let extent = chunk.map { hsize_t($0) }
    try HDF5Library.check(H5Pset_chunk(creation.id, Int32(extent.count), extent))
    if stored.bitWidth > 8 { try HDF5Library.check(H5Pset_shuffle(creation.id)) }
    switch compression {
    case .zstd(let level):
      // Optional, or the library would want to have the filter itself.
      var parameter = UInt32(level ?? 1)
      try HDF5Library.check(
        H5Pset_filter(creation.id, HDF5.zstdFilter, UInt32(H5Z_FLAG_OPTIONAL), 1, &parameter))
    case .deflate(let level):
      try HDF5Library.check(H5Pset_deflate(creation.id, UInt32(level ?? 1)))
    }
    let dataset = try makeDataset(path, stored, dimensions, creation)
    try describe(tensor, path, dimensions, in: dataset)
    return nil
  }

  /// Says in attributes what the dataset does not say itself.
  private func describe(
    _ tensor: TensorInfo, _ path: String, _ dimensions: [Int], in dataset: borrowing HDF5Handle
  ) throws(HDF5Failure) {
    try attributes.write(tensor.dtype.numpyName, as: "dtype", to: dataset)
    try attributes.write(tensor.dtype.rawValue, as: HDF5.dtypeAttribute, to: dataset)
    if dimensions != tensor.shape {
      let shape = tensor.shape.map(Int64.init)
      try attributes.write(shape, of: smelt_h5_i64(), as: HDF5.shapeAttribute, to: dataset)
    }
    if ExactName(path) != ExactName(tensor.name) {
      try attributes.write(tensor.name, as: HDF5.nameAttribute, to: dataset)
    }
  }

  consuming func close() throws(HDF5Failure) { try file.close() }

  private func makeGroup(_ path: String) throws(HDF5Failure) -> HDF5Handle {
    try HDF5Handle(
      H5Gcreate2(file.id, path, linkCreation.id, groupCreation.id, hid_t(H5P_DEFAULT)))
  }

  private func makeDataset(
    _ path: String, _ dtype: DType, _ dimensions: [Int], _ creation: borrowing HDF5Handle
  ) throws(HDF5Failure) -> HDF5Handle {
    let type = try dtype.hdf5Type()
    let extent = dimensions.map { hsize_t($0) }
    let space = try HDF5Handle(
      extent.isEmpty
        ? H5Screate(H5S_SCALAR) : H5Screate_simple(Int32(extent.count), extent, nil))
    return try HDF5Handle(
      H5Dcreate2(
        file.id, path, type.id, space.id, linkCreation.id, creation.id,
        hid_t(H5P_DEFAULT)))
  }
}

private func datasetCreation() throws(HDF5Failure) -> HDF5Handle {
  let creation = try HDF5Handle(H5Pcreate(smelt_h5_dataset_creation()))
  try HDF5Library.check(H5Pset_obj_track_times(creation.id, false))
  return creation
}

/// Members are listed in the order they were made in, and no clock shows in the file.
private func keepOrder(_ creation: borrowing HDF5Handle) throws(HDF5Failure) {
  let order = UInt32(H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED)
  try HDF5Library.check(H5Pset_link_creation_order(creation.id, order))
  try HDF5Library.check(H5Pset_obj_track_times(creation.id, false))
}

extension TensorInfo {
  /// The dimensions of its dataset: the shape, unless HDF5 cannot have that.
  var hdf5Dimensions: [Int] {
    let stored = dtype.hdf5StorageType
    let isRankFine = shape.count <= 32  // H5S_MAX_RANK
    if isRankFine, dtype.bitWidth == stored.bitWidth { return shape }
    let rowBits = rowLength.multipliedReportingOverflow(by: dtype.bitWidth)
    if isRankFine, !shape.isEmpty, !rowBits.overflow, rowBits.partialValue.isMultiple(of: 8) {
      return shape.dropLast() + [rowBits.partialValue / 8]
    }
    return [byteCount / (stored.bitWidth / 8)]
  }
}
