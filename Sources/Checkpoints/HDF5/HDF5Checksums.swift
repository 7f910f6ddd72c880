extension HDF5 {
  /// The dataset of the tensors' checksums, [tensors, bytes of a checksum], in the metadata's
  /// group. Rows are in the order of the UTF-8 bytes of the tensors' names, which no layout
  /// changes; the attribute `algorithm` says of what kind they are, and `described` is the checksum
  /// of what describes these tensors, in hexadecimal digits: see `ChecksumText`.
  static let checksumsDataset = "checksums"
  static let algorithmAttribute = "algorithm"
  static let describedAttribute = "described"

  /// Where a file has its checksums.
  struct ChecksumRows: Equatable, Sendable {
    let algorithm: String
    let described: String
    let range: Range<Int>
  }
}

extension HDF5.ChecksumRows {
  /// Puts the checksums of the manifest's tensors into their rows.
  func write(_ checksums: TensorChecksums, of manifest: Manifest, to file: borrowing File)
    throws(CheckpointError)
  {
    let rows = checksums.rows(in: manifest.positionsByName)
    try file.write(rows.bytes.span.bytes, at: range.lowerBound)
  }

  /// Whether this code knows the algorithm: it may be a later version's.
  var isKnown: Bool { TensorChecksum.Algorithm(rawValue: algorithm) != nil }

  /// The checksums of the manifest's tensors, or nil where they are of others: someone may have
  /// edited the file since.
  func read(for manifest: Manifest, from path: String) throws(CheckpointError) -> TensorChecksums? {
    guard let algorithm = TensorChecksum.Algorithm(rawValue: algorithm),
      range.count == manifest.tensors.count * algorithm.width,
      range.upperBound <= (try fileSize(path))
    else { return nil }
    let order = manifest.positionsByName
    guard described == manifest.described(by: algorithm, in: order).description else { return nil }
    let rows = try File(reading: path).bytes(at: range.lowerBound, count: range.count)
    return TensorChecksums(algorithm, bytes: rows)?.positioned(by: order)
  }
}
