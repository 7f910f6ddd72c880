import Synchronization

extension Packing {
  /// For each tensor those that it may be a difference from: the base's of the same name, and of
  /// the earlier ones whose names differ from its own in the model's name or in one number
  /// (another expert's, another layer's) the nearest.
  func candidates(against base: (any TensorSource)?, workers: Int) throws -> [[Bundle.Candidate]] {
    let groups = groups()
    let prints = try prints(of: groups, workers: workers)
    let nearest = Mutex([[Int]](repeating: [], count: tensors.count))
    try forEachStep(count: tensors.count, workers: workers) {
    } body: { (index, _: inout Void) in
      let chosen = self.nearest(to: index, among: groups.earlier(than: index), prints)
      nearest.withLock { $0[index] = chosen }
    }
    let positions = nearest.withLock { $0 }
    return tensors.enumerated().map { index, planned in
      let tensor = planned.tensor
      var found: [Bundle.Candidate] = []
      if let base, let other = base.manifest[tensor.name], other.dtype == tensor.dtype,
        other.shape == tensor.shape
      {
        found.append(Bundle.Candidate(tensor: other, source: base, position: nil))
      }
      return found
        + positions[index].map {
          Bundle.Candidate(
            tensor: tensors[$0].tensor, source: tensors[$0].source, position: $0)
        }
    }
  }

  /// The two nearest of some earlier tensors, and the very first, which leads no row of differences.
  private func nearest(to index: Int, among earlier: [Int], _ prints: [Print?]) -> [Int] {
    guard earlier.count > 3 else { return earlier }
    let ranked = earlier.map { other -> (distance: Int, position: Int) in
      guard let mine = prints[index], let print = prints[other] else { return (.max, other) }
      return (mine.distance(to: print), other)
    }
    let two = ranked.sorted { $0 < $1 }.prefix(2).map { $0.position }
    return two.contains(earlier[0]) ? two : two + [earlier[0]]
  }
}

// MARK: - By name

/// Tensors of one type and shape whose names differ in one place.
private struct Groups {
  /// The positions of each group's tensors, in order.
  var members: [[Int]] = []
  /// For each tensor the groups that it is in, and its place in each.
  var places: [[(group: Int, place: Int)]] = []

  /// Of a group, no more than so many are compared with a tensor, the last before it; and the first.
  private static let reach = 256

  /// The tensors before this one in its groups.
  func earlier(than index: Int) -> [Int] {
    var positions = Set<Int>()
    for (group, place) in places[index] where place > 0 {
      positions.insert(members[group][0])
      positions.formUnion(members[group][max(0, place - Self.reach)..<place])
    }
    return positions.sorted()
  }
}

extension Packing {
  private func groups() -> Groups {
    var groups = Groups()
    var known: [String: Int] = [:]
    for (index, planned) in tensors.enumerated() {
      let (tensor, kind) = (planned.tensor, planned.tensor.dtype.rawValue)
      groups.places.append(
        patterns(of: planned).map { pattern in
          let key = "\(kind) \(tensor.shapeDescription) \(pattern)"
          let group = known[key] ?? groups.members.count
          if known.updateValue(group, forKey: key) == nil { groups.members.append([]) }
          groups.members[group].append(index)
          return (group, groups.members[group].count - 1)
        })
    }
    return groups
  }

  /// The tensor's name without its model's, and its full name with one number left out each, the
  /// last first: experts are counted within layers.
  private func patterns(of planned: Planned) -> [String] {
    let pieces = planned.fullName.split(separator: ".", omittingEmptySubsequences: false)
    let withoutNumber = pieces.indices.reversed().filter { Int(pieces[$0]) != nil }.map { place in
      pieces.enumerated().map { $0 == place ? "*" : String($1) }.joined(separator: ".")
    }
    let isOfMany = planned.fullName != planned.tensor.name
    return (isOfMany ? ["*/" + planned.tensor.name] : []) + withoutNumber
  }
}

// MARK: - By content

/// Some elements of a tensor from four places: enough to tell which others are near.
private struct Print: Sendable {
  static let pieces = 4
  static let pieceCount = 16

  /// The upper bits of each element, of floats as integers that grow with them.
  private let elements: [UInt32]
  private let isFloat: Bool

  init(_ tensor: TensorInfo, of source: any TensorSource, through bytes: PinnedBytes)
    throws(CheckpointError)
  {
    let width = tensor.dtype.byteWidth
    let total = tensor.byteCount / width
    let count = min(Self.pieceCount, total / Self.pieces)
    var elements: [UInt32] = []
    for piece in 0..<Self.pieces where count > 0 {
      let begin = (total - count) / (Self.pieces - 1) * piece
      try source.read(tensor, at: begin * width, into: bytes.part(0..<count * width))
      for element in 0..<count {
        // Little-endian: the last bytes are the highest.
        var bits: UInt64 = 0
        for byte in 0..<width {
          bits |= UInt64(bytes.bytes[element * width + byte]) << UInt64(8 * (8 - width + byte))
        }
        if tensor.dtype.isFloat { bits = bits >> 63 == 1 ? ~bits : bits | 1 << 63 }
        elements.append(UInt32(bits >> 32))
      }
    }
    self.elements = elements
    isFloat = tensor.dtype.isFloat
  }

  /// About how many bits the differences take.
  func distance(to other: Print) -> Int {
    zip(elements, other.elements).reduce(0) { sum, pair in
      let (a, b) = pair
      let difference = !isFloat ? a ^ b : a > b ? a - b : b - a
      return sum + 32 - difference.leadingZeroBitCount
    }
  }
}

extension Packing {
  /// Prints of the tensors that are in groups where there is something to choose.
  private func prints(of groups: Groups, workers: Int) throws -> [Print?] {
    let wanted = tensors.indices.filter { index in
      groups.places[index].contains { groups.members[$0.group].count > 2 }
    }
    let prints = Mutex([Print?](repeating: nil, count: tensors.count))
    try forEachStep(count: wanted.count, workers: workers) {
      PinnedBytes(count: 8 * Print.pieceCount)
    } body: { step, bytes in
      let index = wanted[step]
      let print = try Print(tensors[index].tensor, of: tensors[index].source, through: bytes)
      prints.withLock { $0[index] = print }
    }
    return prints.withLock { $0 }
  }
}
