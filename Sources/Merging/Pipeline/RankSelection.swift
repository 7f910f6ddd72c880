/// Finds the values at given ranks among non-negative numbers, exactly and in bounded memory.
///
/// Two passes count bit patterns, which order non-negative Floats as their values do: the first
/// by the upper 16 bits, the second by the lower 16 of those whose upper bits hold a wanted rank.
/// Signs are ignored, so a rank is one of magnitudes.
struct RankSelection: Sendable {
  /// A value that was found.
  struct Found: Sendable, Equatable {
    var bits: UInt32
    /// How many elements are smaller.
    var below: Int
    /// How many elements are equal.
    var equal: Int

    var value: Float { Float(bitPattern: bits) }
  }

  /// Counts of bit patterns, one array for each group of patterns that is looked into.
  struct Histogram: Sendable {
    var counts: [[Int]]

    static func += (total: inout Histogram, next: Histogram) {
      for group in total.counts.indices {
        for bin in total.counts[group].indices {
          total.counts[group][bin] += next.counts[group][bin]
        }
      }
    }
  }

  private enum Stage: Sendable {
    case upper
    /// The upper halves to look into, and for each rank which of them and how many are below it.
    case lower(prefixes: [UInt32], ranks: [(rank: Int, prefix: Int, below: Int)])
    case known([Found])
  }
  private var stage = Stage.upper

  /// The values, in the order of the ranks; `nil` until two passes are over.
  var found: [Found]? { if case .known(let found) = stage { found } else { nil } }

  func makeHistogram() -> Histogram {
    switch stage {
    case .upper: Histogram(counts: [Array(repeating: 0, count: 1 << 15)])
    case .lower(let prefixes, _):
      Histogram(counts: prefixes.map { _ in Array(repeating: 0, count: 1 << 16) })
    case .known: Histogram(counts: [])
    }
  }

  func count(_ values: Span<Float>, into histogram: inout Histogram) {
    switch stage {
    case .upper:
      histogram.counts[0].withUnsafeMutableBufferPointer { counts in
        // Sound: 31 bits shifted by 16 are at most the last of the 2¹⁵ bins.
        for i in values.indices { counts[Int(values[i].magnitudeBits >> 16)] &+= 1 }
      }
    case .lower(let prefixes, _):
      for (group, prefix) in prefixes.enumerated() {
        histogram.counts[group].withUnsafeMutableBufferPointer { counts in
          for i in values.indices where values[i].magnitudeBits >> 16 == prefix {
            counts[Int(values[i].magnitudeBits & 0xFFFF)] &+= 1
          }
        }
      }
    case .known: break
    }
  }

  /// - Parameter ranks: counted from the smallest, 0 first; the same in both passes.
  mutating func learn(_ histogram: Histogram, ranks: [Int]) {
    switch stage {
    case .upper:
      var prefixes: [UInt32] = []
      let places = ranks.map { rank in
        let (bin, below) = RankSelection.bin(of: rank, in: histogram.counts[0])
        let prefix = prefixes.firstIndex(of: UInt32(bin)) ?? prefixes.count
        if prefix == prefixes.count { prefixes.append(UInt32(bin)) }
        return (rank: rank, prefix: prefix, below: below)
      }
      stage = .lower(prefixes: prefixes, ranks: places)
    case .lower(let prefixes, let ranks):
      stage = .known(
        ranks.map { rank, prefix, below in
          let counts = histogram.counts[prefix]
          let (bin, belowInPrefix) = RankSelection.bin(of: rank - below, in: counts)
          return Found(
            bits: prefixes[prefix] << 16 | UInt32(bin), below: below + belowInPrefix,
            equal: counts[bin])
        })
    case .known: break
    }
  }

  private static func bin(of rank: Int, in counts: [Int]) -> (bin: Int, below: Int) {
    var below = 0
    for (bin, count) in counts.enumerated() {
      guard rank >= below + count else { return (bin, below) }
      below += count
    }
    preconditionFailure("rank \(rank) of \(below) elements")
  }
}

extension Float {
  /// The bit pattern without the sign: ordered as the magnitudes are, NaN above infinity.
  var magnitudeBits: UInt32 { bitPattern & 0x7FFF_FFFF }
}
