/// A source's tensors seen differently: some of them, under other names, as other types.
struct TensorView: TensorSource {
  let manifest: Manifest
  private let source: any TensorSource
  /// For each tensor of the manifest the source's own.
  private let originals: [TensorInfo]
  private let allowsOverflow: Bool

  var path: String { source.path }
  var warnings: [String] { source.warnings }
  var foreignChecksums: [String] { source.foreignChecksums }

  /// - Parameter tensors: what is seen, and what it is in the source.
  init(
    of source: any TensorSource, _ tensors: [(seen: TensorInfo, original: TensorInfo)],
    allowsOverflow: Bool = false
  ) throws(CheckpointError) {
    self.source = source
    self.allowsOverflow = allowsOverflow
    originals = tensors.map { $0.original }
    let isWhole =
      tensors.count == source.manifest.tensors.count
      && tensors.allSatisfy {
        $0.seen == $0.original && $0.seen.name.utf8.elementsEqual($0.original.name.utf8)
      }
    // A header kept as it is describes these tensors only if none has changed.
    manifest = try Manifest(
      proving: tensors.map { $0.seen }, source.manifest.metadata,
      isWhole ? source.manifest.safetensorsHeader : nil
    ) {
      CheckpointError(file: source.path, tensor: $0.name, "would be the name of two tensors")
    }
  }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    let original = originals[manifest.position(of: tensor.name)!]
    guard original.dtype != tensor.dtype else {
      return try source.read(original, at: offset, into: &buffer)
    }
    let width = tensor.dtype.bitWidth / 8
    precondition(offset.isMultiple(of: width) && buffer.byteCount.isMultiple(of: width))
    let count = buffer.byteCount / width
    var stored = Buffer(byteCount: min(count, Self.pieceSize) * original.dtype.bitWidth / 8)
    for begin in stride(from: 0, to: count, by: Self.pieceSize) {
      let piece = begin..<min(begin + Self.pieceSize, count)
      let first = offset / width + piece.lowerBound
      var bytes = stored.first(piece.count * original.dtype.bitWidth / 8)
      try source.read(original, at: first * original.dtype.bitWidth / 8, into: &bytes)
      let result = try cast(bytes.bytes, original, to: tensor, from: first)
      buffer.withUnsafeMutableBytes {
        UnsafeMutableRawBufferPointer(rebasing: $0[(piece.lowerBound * width)...])
          .copyBytes(from: result)
      }
    }
  }

  /// Compares what it reads with the source's checksums, also of tensors that are cast.
  func copy(_ tensors: [TensorInfo], into sink: any TensorSink, workers: Int) throws {
    let seen = try tensors.map { try tensor($0.name) }
    let stored = seen.map { originals[manifest.position(of: $0.name)!] }
    let comparison = ChecksumComparison(stored, of: source)
    // A power of two of whole blocks: of whole blocks also when it is cast.
    let pieces = Pieces(of: stored, size: 2 * TensorChecksum.blockSize)
    try forEachStep(count: pieces.count, workers: workers) {
      Buffer(byteCount: pieces.largest)
    } body: { step, buffer in
      let (original, range) = pieces[step]
      let position = pieces.position(ofTensorWith: step)
      var piece = buffer.first(range.count)
      try source.read(original, at: range.lowerBound, into: &piece)
      comparison.add(piece.bytes, ofTensorAt: position, from: range.lowerBound)
      source.forget(range, of: original)
      guard original.dtype != seen[position].dtype else {
        return try sink.write(piece.bytes, of: tensors[position], at: range.lowerBound)
      }
      let width = (stored: original.dtype.bitWidth / 8, cast: seen[position].dtype.bitWidth / 8)
      for begin in stride(from: 0, to: range.count, by: Self.pieceSize * width.stored) {
        let end = min(begin + Self.pieceSize * width.stored, range.count)
        let first = (range.lowerBound + begin) / width.stored
        let result = try cast(
          piece.bytes.extracting(begin..<end), original, to: seen[position], from: first)
        try sink.write(result.span.bytes, of: tensors[position], at: first * width.cast)
      }
    }
    try comparison.refuseDamage(in: path)
    try source.refuseDamage(of: comparison.unrecorded.map { stored[$0] }, workers: workers)
    try checkUnchanged()
  }

  /// The elements as the other type, checked for overflow.
  /// - Parameter first: the index of the first element in the tensor.
  private func cast(
    _ bytes: RawSpan, _ original: TensorInfo, to tensor: TensorInfo, from first: Int
  ) throws(CheckpointError) -> [UInt8] {
    let count = bytes.byteCount / (original.dtype.bitWidth / 8)
    let result = Self.cast(bytes, original.dtype, to: tensor.dtype, count: count)
    if !allowsOverflow {
      try refuseOverflow(bytes, original, result.span.bytes, tensor, from: first)
    }
    return result
  }

  private static func cast(_ bytes: RawSpan, _ dtype: DType, to target: DType, count: Int)
    -> [UInt8]
  {
    var values = [Float](repeating: 0, count: count)
    var span = values.mutableSpan
    dtype.decode(bytes, for: target, into: &span)
    var result = [UInt8](repeating: 0, count: count * target.bitWidth / 8)
    var resultSpan = result.mutableSpan
    var resultBytes = resultSpan.mutableBytes
    target.encode(values.span, into: &resultBytes)
    return result
  }

  private static let pieceSize = 1 << 16

  /// Refuses a finite number that has become infinite.
  private func refuseOverflow(
    _ before: RawSpan, _ original: TensorInfo, _ after: RawSpan, _ tensor: TensorInfo,
    from first: Int
  ) throws(CheckpointError) {
    let count = after.byteCount / (tensor.dtype.bitWidth / 8)
    for index in 0..<count where tensor.dtype.double(after, at: index).isInfinite {
      let value = original.dtype.double(before, at: index)
      guard value.isInfinite else {
        throw CheckpointError(
          file: path, tensor: original.name,
          "has the value \(value) at its element \(first + index), too large for \(tensor.dtype.rawValue)",
          remedy: "choose a type of more exponent bits, or allow infinities (--allow-overflow)")
      }
    }
  }

  func checkUnchanged() throws(CheckpointError) { try source.checkUnchanged() }

  func refuseDamage(of tensors: [TensorInfo], workers: Int) throws {
    try source.refuseDamage(
      of: tensors.map { originals[manifest.position(of: $0.name)!] }, workers: workers)
  }

  func recordedChecksum(of tensor: TensorInfo) -> TensorChecksum? {
    let original = originals[manifest.position(of: tensor.name)!]
    return original.dtype == tensor.dtype ? source.recordedChecksum(of: original) : nil
  }
}

extension TensorSource {
  /// The tensors for which `isIncluded` is true.
  public func selecting(_ isIncluded: (TensorInfo) -> Bool) -> any TensorSource {
    do {
      return try TensorView(of: self, manifest.tensors.filter(isIncluded).map { ($0, $0) })
    } catch { preconditionFailure("\(error)") }  // Names that were unique still are.
  }

  /// The same tensors under other names.
  /// - Throws: if two would have the same name.
  public func renaming(_ newName: (String) -> String) throws(CheckpointError) -> any TensorSource {
    try TensorView(of: self, manifest.tensors.map { ($0.renamed(newName($0.name)), $0) })
  }

  /// The same tensors, those of floating-point types of 16 bits and more as `dtype`, rounded to
  /// nearest even. Integers, booleans and smaller floats stay as they are.
  /// - Parameter allowsOverflow: whether a number too large for the type becomes infinite;
  ///   else reading it is an error.
  public func casting(to dtype: DType, allowsOverflow: Bool = false) throws(CheckpointError)
    -> any TensorSource
  {
    precondition(dtype.isArithmetic)
    var tensors: [(TensorInfo, TensorInfo)] = []
    for tensor in manifest.tensors {
      tensors.append(
        (tensor.dtype.isArithmetic ? try tensor.cast(to: dtype, path) : tensor, tensor))
    }
    return try TensorView(of: self, tensors, allowsOverflow: allowsOverflow)
  }
}

extension TensorInfo {
  fileprivate func cast(to dtype: DType, _ path: String) throws(CheckpointError) -> TensorInfo {
    do { return try TensorInfo(name: name, dtype: dtype, shape: shape) } catch {
      throw CheckpointError(file: path, tensor: name, "is too large for \(dtype.rawValue)")
    }
  }
}

extension DType {
  /// Decodes elements to `Float` so that rounding them again to `target` is right.
  fileprivate func decode(
    _ bytes: RawSpan, for target: DType, into values: inout MutableSpan<Float>
  ) {
    guard self == .f64, target != .f32, target != .f64 else {
      return decode(bytes, into: &values)
    }
    for index in values.indices { values[index] = floatRoundedToOdd(double(bytes, at: index)) }
  }

  /// One element as `Double`, exactly.
  /// - Precondition: `isArithmetic`.
  fileprivate func double(_ bytes: RawSpan, at index: Int) -> Double {
    switch self {
    case .f64: bytes.unsafeLoadUnaligned(fromByteOffset: 8 * index, as: Double.self)
    case .f32: Double(bytes.unsafeLoadUnaligned(fromByteOffset: 4 * index, as: Float.self))
    case .f16:
      Double(
        floatFromHalf(bytes.unsafeLoadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)))
    default:
      Double(
        Float(
          bitPattern: UInt32(
            bytes.unsafeLoadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)) << 16))
    }
  }
}

/// Rounds so that rounding once more, to at most 22 bits, gives what rounding at once would:
/// what lies between two Floats becomes the one whose last bit is set.
///
/// Boldo and Melquiond, Emulation of FMA and correctly rounded sums: proved algorithms using
/// rounding to odd (2008).
func floatRoundedToOdd(_ value: Double) -> Float {
  let nearest = Float(value)
  guard Double(nearest) != value, value.isFinite else { return nearest }
  let down = Float(value, rounding: .towardZero)
  return Float(bitPattern: down.bitPattern | 1)
}

extension Float {
  fileprivate init(_ value: Double, rounding: FloatingPointRoundingRule) {
    let nearest = Float(value)
    // The only other candidate is the neighbour on zero's side.
    let isTooFar = abs(Double(nearest)) > abs(value)
    self = isTooFar ? Float(bitPattern: nearest.bitPattern - 1) : nearest
  }
}

/// A pattern of names: `*` stands for any text, `?` for any one character, all else for itself.
public struct NamePattern: Sendable {
  private let characters: [Unicode.Scalar]

  public init(_ pattern: String) { characters = Array(pattern.unicodeScalars) }

  public func matches(_ name: String) -> Bool {
    let name = Array(name.unicodeScalars)
    var (p, n) = (0, 0)
    // Where to try again with the last star taking one character more.
    var retry: (p: Int, n: Int)?
    while n < name.count {
      if p < characters.count, characters[p] == "*" {
        retry = (p, n)
        p += 1
      } else if p < characters.count, characters[p] == "?" || characters[p] == name[n] {
        (p, n) = (p + 1, n + 1)
      } else if let (star, start) = retry {
        retry = (star, start + 1)
        (p, n) = (star + 1, start + 1)
      } else {
        return false
      }
    }
    return characters[p...].allSatisfy { $0 == "*" }
  }
}

/// New names from old by a regular expression: `$1` in the replacement is the first group,
/// `$0` all that matched, `$$` a dollar.
public struct Renaming {
  private let pattern: Regex<AnyRegexOutput>
  private let replacement: String

  /// - Throws: what is wrong with the pattern.
  public init(_ pattern: String, to replacement: String) throws {
    self.pattern = try Regex(pattern).matchingSemantics(.unicodeScalar)
    self.replacement = replacement
  }

  /// The name with every match replaced.
  public func callAsFunction(_ name: String) -> String {
    name.replacing(pattern) { match in
      var result = ""
      var rest = replacement[...]
      while let dollar = rest.firstIndex(of: "$") {
        result += rest[..<dollar]
        rest = rest[rest.index(after: dollar)...]
        guard let next = rest.first else { return result + "$" }
        if let group = next.wholeNumberValue {
          result += group < match.count ? match[group].substring ?? "" : ""
        } else {
          result += next == "$" ? "$" : "$\(next)"
        }
        rest.removeFirst()
      }
      return result + rest
    }
  }
}
