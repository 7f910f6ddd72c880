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
    self.tensors = tensors
    self.metadata = metadata
    self.safetensorsHeader = safetensorsHeader
    self.positions = Dictionary(
      uniqueKeysWithValues: tensors.enumerated().map { (ExactName($1.name), $0) })
  }

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
    left.name.utf8.elementsEqual(right.name.utf8)
  }

  func hash(into hasher: inout Hasher) {
    var name = name
    name.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
  }
}
