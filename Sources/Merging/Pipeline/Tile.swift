/// A matrix of models × elements: one row a model, the same range of one tensor in each.
///
/// Its memory is taken once, for as many columns as the budget allows, and filled again and
/// again. Methods read rows as spans and write spans.
public struct Tile: ~Copyable {
  public let rowCount: Int
  public let capacity: Int
  /// How many elements each row holds at present.
  public private(set) var columns = 0
  private let elements: UnsafeMutablePointer<Float>

  public init(rows: Int, capacity: Int) {
    rowCount = rows
    self.capacity = capacity
    elements = .allocate(capacity: rows * capacity)
    elements.initialize(repeating: 0, count: rows * capacity)
  }

  deinit { elements.deallocate() }

  public mutating func resize(columns: Int) {
    precondition(columns <= capacity)
    self.columns = columns
  }

  public subscript(row: Int) -> Span<Float> {
    @_lifetime(borrow self)
    get {
      // Sound: the span borrows the tile, which owns the memory and stays alive.
      _overrideLifetime(Span(_unsafeElements: buffer(row)), borrowing: self)
    }
  }

  /// Several rows at once, from `row` to the last; each begins `capacity` after the one before.
  @_lifetime(borrow self)
  func rows(from row: Int) -> Span<Float> {
    precondition(row < rowCount)
    let block = UnsafeBufferPointer(
      start: elements + row * capacity, count: (rowCount - 1 - row) * capacity + columns)
    return _overrideLifetime(Span(_unsafeElements: block), borrowing: self)
  }

  /// A row to be written.
  @_lifetime(&self)
  public mutating func mutableRow(_ index: Int) -> MutableSpan<Float> {
    // Sound: the span borrows the tile exclusively.
    _overrideLifetime(MutableSpan(_unsafeElements: buffer(index)), mutating: &self)
  }

  private func buffer(_ index: Int) -> UnsafeMutableBufferPointer<Float> {
    precondition(index < rowCount)
    return UnsafeMutableBufferPointer(start: elements + index * capacity, count: columns)
  }
}

// MARK: - Arithmetic between rows

// Pointers, because the compiler cannot see that two rows of one tile are disjoint; every
// function checks that they are.
extension Tile {
  /// self[row] = 0
  mutating func clear(row: Int) {
    buffer(row).update(repeating: 0)
  }

  /// self[row] = other[otherRow]
  mutating func copyRow(_ row: Int, from other: borrowing Tile, _ otherRow: Int) {
    precondition(columns == other.columns)
    _ = buffer(row).update(from: other.buffer(otherRow))
  }

  /// self[row] = self[other]
  mutating func copyRow(_ row: Int, fromRow other: Int) {
    precondition(row != other)
    _ = buffer(row).update(from: buffer(other))
  }

  /// self[row] −= self[other]
  mutating func subtract(row other: Int, from row: Int) {
    precondition(row != other)
    let target = buffer(row)
    let source = buffer(other)
    for i in 0..<columns { target[i] -= source[i] }
  }

  /// self[row] −= other[otherRow], in some columns only
  mutating func subtract(
    _ other: borrowing Tile, row otherRow: Int, from row: Int, columns: Range<Int>
  ) {
    let target = buffer(row)
    let source = other.buffer(otherRow)
    for i in columns { target[i] -= source[i] }
  }

  /// self[row] += other[otherRow]
  mutating func add(_ other: borrowing Tile, row otherRow: Int, to row: Int) {
    precondition(columns == other.columns)
    let target = buffer(row)
    let source = other.buffer(otherRow)
    for i in 0..<columns { target[i] += source[i] }
  }

  /// self[row] += weight · other[otherRow], in some columns only
  mutating func add(
    _ other: borrowing Tile, row otherRow: Int, to row: Int, times weight: Float,
    columns: Range<Int>
  ) {
    let target = buffer(row)
    let source = other.buffer(otherRow)
    for i in columns { target[i] += weight * source[i] }
  }
}
