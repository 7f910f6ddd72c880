extension HDF5 {
  /// Where a dataset's chunks are, read from the file itself.
  ///
  /// libhdf5 1.10 finds the n-th chunk by walking over all before it, so listing 100,000 takes
  /// minutes. Only what it writes by default is understood here: 8-byte addresses, object
  /// headers of version 1 and 2, layout messages of version 3, B-trees of version 1 (HDF5 File
  /// Format Specification 3.0, III.A.1, IV.A.1 and IV.A.2.i).
  struct ChunkIndex {
    struct Entry: Equatable {
      /// The coordinates of its first element.
      let start: [UInt64]
      /// Bit i says that filter i was left out.
      let skippedFilters: UInt32
      let address: UInt64
      let byteCount: UInt64
    }

    /// By their coordinates, row by row.
    private(set) var entries: [Entry] = []
    private let rank: Int
    private let count: Int
    private let userBlock: Int
    private var visits = 0

    /// - Parameters:
    ///   - object: where the dataset's object header begins.
    ///   - count: how many chunks there must be.
    ///   - userBlock: how many bytes of the file the addresses in it do not count.
    /// - Returns: nil if the index is of another kind or anything about it is odd; then the
    ///   library is to be asked.
    init?(of object: UInt64, rank: Int, count: Int, in path: String, behind userBlock: Int = 0) {
      self.userBlock = userBlock
      self.rank = rank
      self.count = count
      do {
        let file = try File(reading: path)
        guard let root = try tree(of: object, in: file) else { return nil }
        try walk(root, level: nil, in: file)
      } catch { return nil }  // The library says what is wrong.
      guard entries.count == count else { return nil }
    }

    private struct Odd: Error {}

    /// The bytes of a node before its keys.
    private static let nodeHeader = 24

    /// Visits the nodes of a tree, which lead down to chunks.
    /// - Parameter level: what a node here must say of its height, if that is known.
    private mutating func walk(_ address: UInt64, level: UInt64?, in file: borrowing File) throws {
      visits += 1
      guard visits <= 2 * count + 64 else { throw Odd() }
      let start = try place(address)
      var header = Numbers(try file.bytes(at: start, count: ChunkIndex.nodeHeader))
      guard header.starts(with: "TREE") else { throw Odd() }
      header.position = 4
      let (kind, height, used) = try (header.next(1), header.next(1), header.next(2))
      guard kind == 1, level == nil || height == level else { throw Odd() }

      let width = 8 + 8 * (rank + 1) + 8
      var pairs = Numbers(
        try file.bytes(at: start + ChunkIndex.nodeHeader, count: Int(used) * width))
      for _ in 0..<used {
        let (byteCount, mask) = try (pairs.next(4), pairs.next(4))
        let coordinates = try (0..<rank).map { _ in try pairs.next(8) }
        _ = try pairs.next(8)  // Within the element: 0.
        let child = try pairs.next(8)
        if height > 0 {
          try walk(child, level: height - 1, in: file)
        } else {
          guard entries.count < count else { throw Odd() }
          entries.append(
            Entry(
              start: coordinates, skippedFilters: UInt32(truncatingIfNeeded: mask),
              address: UInt64(try place(child)), byteCount: byteCount))
        }
      }
    }

    /// Where the tree of a chunked dataset begins.
    /// - Returns: nil if its header or its layout is of another version.
    private func tree(of object: UInt64, in file: borrowing File) throws -> UInt64? {
      let start = try place(object)
      var prefix = Numbers(try file.bytes(at: start, count: 16))
      let isSecond = prefix.starts(with: "OHDR")
      var hasOrder = false
      var blocks: [Range<Int>] = []
      if isSecond {
        prefix.position = 4
        let (version, flags) = try (prefix.next(1), prefix.next(1))
        guard version == 2 else { return nil }
        hasOrder = flags & 4 != 0
        let size = start + 6 + (flags & 32 != 0 ? 16 : 0) + (flags & 16 != 0 ? 4 : 0)
        let width = 1 << Int(flags & 3)
        var length = Numbers(try file.bytes(at: size, count: width))
        let first = size + width
        blocks = [first..<first + (try Self.bounded(length.next(width)))]
      } else {
        guard try prefix.next(1) == 1 else { return nil }
        prefix.position = 8
        blocks = [start + 16..<start + 16 + (try Self.bounded(prefix.next(4)))]
      }
      // A header that is continued more often than this is a circle.
      for number in 0..<1000 where number < blocks.count {
        var messages = Numbers(
          try file.bytes(at: blocks[number].lowerBound, count: blocks[number].count))
        let headerSize = isSecond ? (hasOrder ? 6 : 4) : 8
        while messages.remaining >= headerSize {
          let kind = try messages.next(isSecond ? 1 : 2)
          let size = Int(try messages.next(2))
          messages.position += headerSize - (isSecond ? 3 : 4)
          let end = messages.position + size
          switch kind {
          case 8:
            let (version, storage, dimensions) = try (
              messages.next(1), messages.next(1), messages.next(1)
            )
            guard version == 3, storage == 2, dimensions == rank + 1 else { return nil }
            return try messages.next(8)
          case 16:
            let (offset, length) = try (place(messages.next(8)), Self.bounded(messages.next(8)))
            // The second version's blocks have a signature and a checksum around them.
            let around = isSecond ? 4 : 0
            guard length >= 2 * around else { return nil }
            blocks.append(offset + around..<offset + length - around)
          default: break
          }
          messages.position = end
        }
      }
      return nil
    }

    /// Where in the file an address is.
    private func place(_ address: UInt64) throws -> Int {
      guard let offset = Int(exactly: address), offset < Int.max / 2 else { throw Odd() }
      return userBlock + offset
    }

    /// The size of a part of an object header: real ones have some hundred bytes.
    private static func bounded(_ size: UInt64) throws -> Int {
      guard size <= 1 << 20 else { throw Odd() }
      return Int(size)
    }

    /// Little-endian numbers, taken in turn.
    private struct Numbers {
      private let bytes: [UInt8]
      var position = 0

      init(_ bytes: [UInt8]) { self.bytes = bytes }

      var remaining: Int { bytes.count - position }

      func starts(with signature: String) -> Bool { bytes.starts(with: signature.utf8) }

      mutating func next(_ width: Int) throws(Odd) -> UInt64 {
        guard width <= remaining else { throw Odd() }
        defer { position += width }
        return bytes[position..<position + width].reversed().reduce(0) { $0 << 8 | UInt64($1) }
      }
    }
  }
}
