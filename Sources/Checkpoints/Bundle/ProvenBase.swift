import Synchronization

/// The model outside a bundle from which its tensors are differences: none, or one that is found
/// to be the one that the bundle was packed against.
final class ProvenBase: Sendable {
  /// The bundle.
  private let path: String
  private let source: (any TensorSource)?
  /// The checksums of the tensors that have been compared.
  private let proven = Mutex<[ExactName: UInt64]>([:])

  /// - Throws: if this is plainly another model: a tensor is missing or of another size, or the
  ///   smallest one differs. The others are compared before they are used.
  init(_ source: (any TensorSource)?, of tensors: [Bundle.Stored], path: String)
    throws(CheckpointError)
  {
    self.source = source
    self.path = path
    guard source != nil else { return }
    var smallest: Bundle.Stored?
    for stored in tensors {
      guard case .base(let name, _) = stored.reference else { continue }
      _ = try like(stored, name)
      if stored.tensor.byteCount < smallest?.tensor.byteCount ?? .max { smallest = stored }
    }
    if let smallest { _ = try tensor(of: smallest) }
  }

  /// Compares all tensors of the base that these need with what they were when the bundle was
  /// packed, several at a time.
  func prove(for tensors: [Bundle.Stored], workers: Int) throws {
    let needing = tensors.filter { if case .base = $0.reference { true } else { false } }
    try forEachStep(count: needing.count, workers: workers) {
      PinnedBytes(count: 1 << 20)
    } body: { step, piece in
      _ = try tensor(of: needing[step], through: piece)
    }
  }

  /// The base's tensor that this one is a difference from, proven.
  /// - Precondition: it is a difference from one of the base.
  func tensor(
    of stored: Bundle.Stored,
    through piece: @autoclosure () -> PinnedBytes = PinnedBytes(count: 1 << 20)
  ) throws(CheckpointError) -> (
    source: any TensorSource, tensor: TensorInfo
  ) {
    guard case .base(let name, let checksum) = stored.reference else { preconditionFailure() }
    let (source, tensor) = try like(stored, name)
    let found: UInt64
    if let known = proven.withLock({ $0[ExactName(name)] }) {
      found = known
    } else {
      found = try source.checksum(of: tensor, through: piece())
      proven.withLock { $0[ExactName(name)] = found }
    }
    guard found == checksum else { throw isAnother(source, name) }
    return (source, tensor)
  }

  /// The base's tensor of this name, which must be like the one that needs it.
  private func like(_ stored: Bundle.Stored, _ name: String) throws(CheckpointError) -> (
    source: any TensorSource, tensor: TensorInfo
  ) {
    guard let source else {
      throw CheckpointError(
        file: path, tensor: stored.tensor.name,
        "is kept as a difference from a base model that is not in the bundle",
        remedy: "name the base after an @, as in \(split(path).name)@BASE")
    }
    guard let tensor = source.manifest[name], tensor.dtype == stored.tensor.dtype,
      tensor.elementCount == stored.tensor.elementCount
    else { throw isAnother(source, name) }
    return (source, tensor)
  }

  private func isAnother(_ source: any TensorSource, _ name: String) -> CheckpointError {
    CheckpointError(
      file: source.path, tensor: name, "is not what \(path) was packed against",
      remedy: "name the base that it was packed with")
  }
}
