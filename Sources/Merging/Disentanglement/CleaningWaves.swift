/// Groups that are cleaned together: their tensors are read for inner products, then once more to
/// be cleaned.
struct CleaningWave: Equatable {
  /// The groups by their numbers.
  var groups: Range<Int>
  var byteCount: Int
  /// Whether the tensors are held in memory in between. If not they are read twice, the second
  /// time from the page cache unless the wave is larger than that.
  let isHeld: Bool

  // Much enough to keep all workers busy. What is held should be little, as fresh memory is slow;
  // what is not should stay in the page cache.
  private static let (held, cached) = (256 << 20, 512 << 20)

  /// - Parameters:
  ///   - sizes: the bytes of each group's tensors in all models.
  ///   - tiles: what the workers need for their tiles at the least.
  static func waves(of sizes: [Int], memory: Int, tiles: Int) -> [CleaningWave] {
    let room = room(memory: memory, tiles: tiles)
    var waves: [CleaningWave] = []
    for (group, size) in sizes.enumerated() {
      let isHeld = size <= room
      if let last = waves.last, last.isHeld == isHeld,
        last.byteCount + size <= (isHeld ? min(room, held) : cached)
      {
        waves[waves.count - 1].groups = last.groups.lowerBound..<group + 1
        waves[waves.count - 1].byteCount += size
      } else {
        waves.append(CleaningWave(groups: group..<group + 1, byteCount: size, isHeld: isHeld))
      }
    }
    return waves
  }

  /// The bytes that can be held: a quarter of the memory at least is for tiles.
  private static func room(memory: Int, tiles: Int) -> Int { memory - max(memory / 4, tiles) }

  /// The memory that is enough to hold a group of this size.
  static func memory(holding size: Int, tiles: Int) -> Int {
    max(size + tiles, (size * 4 + 2) / 3 + 1)
  }
}

/// How often a cleaning reads what it cleans.
public struct CleaningReads: Sendable, Equatable {
  /// Groups of several rows that share a redundant vector.
  public var groups = 0
  /// Those of them that do not fit the memory beside the tiles, and are read twice.
  public var groupsReadTwice = 0
  /// What the second reading of them takes.
  public var bytesReadAgain = 0
  /// The memory that would be enough to read all of them once.
  public var sufficientMemory = 0
  /// The bytes that are held at any time.
  var held = 0

  init() {}

  init(_ sizes: [Int], _ waves: [CleaningWave], tiles: Int) {
    groups = sizes.count
    let twice = waves.filter { !$0.isHeld }
    groupsReadTwice = twice.reduce(0) { $0 + $1.groups.count }
    bytesReadAgain = twice.reduce(0) { $0 + $1.byteCount }
    held = waves.filter { $0.isHeld }.map { $0.byteCount }.max() ?? 0
    sufficientMemory = CleaningWave.memory(holding: sizes.max() ?? 0, tiles: tiles)
  }
}
