/// The arithmetic of one tensor's merge.
///
/// A value that learns: while it is not ready, every tile of the tensor is shown to `observe` and
/// what was observed is given to `learn`, which may ask for another pass. Then `merge` makes the
/// result tile by tile. Tiles come in any order and from several threads, but observations are
/// combined in the order of the tensor's elements, so a sum has one order.
///
/// Row 0 of a tile is the base if the method works on differences, and the other rows are then
/// differences to it; the pipeline subtracts the base and adds it to the result.
public protocol TensorMerge: Sendable {
  /// What was seen of some tiles in one pass.
  associatedtype Observation: Sendable = Void

  /// Elements that must stay together in a tile: 1, or the length of a row.
  var grain: Int { get }
  /// Rows of the output tile behind the first that `observe` and `merge` work in.
  var scratchRows: Int { get }
  /// Whether nothing more has to be seen before the result can be made.
  var isReady: Bool { get }
  /// The largest number of observing passes.
  var observingPasses: Int { get }
  /// Bytes of an observation, about, if that is more than a few.
  var observationBytes: Int { get }
  /// The rows' weights, if the result is their weighted sum and nothing else.
  var linearWeights: [Float]? { get }

  func makeObservation() -> Observation
  /// Looks at a tile whose first element is the tensor's element `position`.
  func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout Observation)
  /// Adds what was seen of the elements that follow.
  func combine(_ next: Observation, into total: inout Observation)
  /// Draws the conclusion of a whole pass.
  /// - Throws: `PassesDiffer` if the passes cannot have seen the same values.
  mutating func learn(_ total: Observation) throws(PassesDiffer)
  /// Makes row 0 of the output. Both tiles may be worked in.
  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile)
}

extension TensorMerge {
  public var grain: Int { 1 }
  public var scratchRows: Int { 0 }
  public var observationBytes: Int { 0 }
  public var linearWeights: [Float]? { nil }
  public var observingPasses: Int { isReady ? 0 : 1 }
}

extension TensorMerge where Observation == Void {
  public var isReady: Bool { true }
  public func makeObservation() {}
  public func observe(
    _ tile: inout Tile, at position: Int, scratch: inout Tile, into observation: inout Void
  ) {}
  public func combine(_ next: Void, into total: inout Void) {}
  public mutating func learn(_ total: Void) {}
}

extension Tile {
  /// The columns of a tile of a merge: few enough for the rows to stay in a core's cache, and the
  /// same for every budget, so that neither sums nor counts depend on it.
  static func width(grain: Int) -> Int { max(1, (16 << 10) / grain) * grain }
}
