/// What a checkpoint holds: its tensors, in file order, and its metadata.
///
/// A manifest is complete before any data is read or written.
public struct Manifest: Sendable {
  public let tensors: [TensorInfo]
  /// Free text pairs, safetensors' `__metadata__`.
  public let metadata: [String: String]
  /// The exact bytes of the safetensors header these tensors came with, if they did:
  /// written again as it is, it makes the way through another format byte-identical.
  public let safetensorsHeader: [UInt8]?
  private let positions: [ExactName: Int]

  /// - Precondition: no two tensors share a name.
  public init(
    _ tensors: [TensorInfo], metadata: [String: String] = [:], safetensorsHeader: [UInt8]? = nil
  ) {
    self.init(proving: tensors, metadata, safetensorsHeader) { (tensor) -> Never in
      preconditionFailure("two tensors are named \(quoted(tensor.name))")
    }
  }

  /// The manifest of a stranger's file.
  /// - Throws: what `duplicate` makes of a tensor whose name an earlier one has.
  init<Failure: Error>(
    proving tensors: [TensorInfo], _ metadata: [String: String] = [:],
    _ safetensorsHeader: [UInt8]? = nil, duplicate: (TensorInfo) -> Failure
  ) throws(Failure) {
    var positions = [ExactName: Int](minimumCapacity: tensors.count)
    for (position, tensor) in tensors.enumerated() {
      guard positions.updateValue(position, forKey: ExactName(tensor.name)) == nil else {
        throw duplicate(tensor)
      }
    }
    self.tensors = tensors
    self.metadata = metadata
    self.safetensorsHeader = safetensorsHeader
    self.positions = positions
  }

  private init(_ other: Manifest, safetensorsHeader: [UInt8]) {
    tensors = other.tensors
    metadata = other.metadata
    positions = other.positions
    self.safetensorsHeader = safetensorsHeader
  }

  /// The same with the header that it was read from.
  func keeping(_ header: [UInt8]) -> Manifest { Manifest(self, safetensorsHeader: header) }

  /// Where the tensor of this name stands in `tensors`.
  public func position(of name: String) -> Int? { positions[ExactName(name)] }

  public subscript(name: String) -> TensorInfo? {
    position(of: name).map { tensors[$0] }
  }

  /// Bytes of all tensors together.
  public var byteCount: Int { tensors.reduce(0) { $0 + $1.byteCount } }
}

/// A name compared byte for byte. Swift's strings are equal when they look the same ("é" in
/// one code point or two), but to every other reader of checkpoints those are two names.
struct ExactName: Hashable {
  private let name: String

  init(_ name: String) { self.name = name }

  static func == (left: ExactName, right: ExactName) -> Bool {
    var (left, right) = (left.name, right.name)
    return left.withUTF8 { left in
      right.withUTF8 { left.count == $0.count && left.elementsEqual($0) }
    }
  }

  func hash(into hasher: inout Hasher) {
    var name = name
    name.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
  }
}
