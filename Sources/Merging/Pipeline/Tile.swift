import CKernels

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

  func buffer(_ index: Int) -> UnsafeMutableBufferPointer<Float> {
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

  /// self[row] ·= factor
  mutating func multiply(row: Int, by factor: Float) {
    let target = buffer(row)
    for i in 0..<columns { target[i] *= factor }
  }

  /// self[row] /= divisor
  mutating func divide(row: Int, by divisor: Float) {
    let target = buffer(row)
    for i in 0..<columns { target[i] /= divisor }
  }

  /// self[row] /= self[divisors], where a divisor of zero counts as one
  mutating func divide(row: Int, byRow divisors: Int) {
    precondition(row != divisors)
    let target = buffer(row)
    let divisors = buffer(divisors)
    for i in 0..<columns { target[i] /= divisors[i] == 0 ? 1 : divisors[i] }
  }

  /// self[0] = Σ weighted rows of the other tile, the first of them at `first`.
  mutating func weigh(_ other: borrowing Tile, from first: Int, weights: [Float]) {
    precondition(columns == other.columns && first + weights.count <= other.rowCount)
    smelt_weigh(
      other.elements + first * other.capacity, other.capacity, weights.count, weights, columns,
      elements)
  }

  /// self[0] = Σ weighted rows as far as they have the sign of all together, and self[agreed] =
  /// Σ of the weights of the rows that have it. The sign of zero is plus; a zero has none.
  /// - Parameter weighsVotes: whether the rows are weighted also where the sign is found.
  mutating func elect(
    _ other: borrowing Tile, from first: Int, weights: [Float], weighsVotes: Bool = true,
    agreed: Int?
  ) {
    precondition(columns == other.columns && first + weights.count <= other.rowCount)
    precondition(agreed.map { (1..<rowCount).contains($0) } ?? true)
    smelt_elect(
      other.elements + first * other.capacity, other.capacity, weights.count, weights, weighsVotes,
      columns, elements, agreed.map { elements + $0 * capacity })
  }

  /// self[row] = fma(other[otherRow], weight, self[row]), rounded once an element
  mutating func addFused(
    to row: Int, _ other: borrowing Tile, row otherRow: Int, times weight: Float
  ) {
    precondition(columns == other.columns)
    let target = buffer(row)
    let source = other.buffer(otherRow)
    guard columns > 0 else { return }
    smelt_accumulate(target.baseAddress!, source.baseAddress!, weight, columns)
  }

  /// self[row] /= self[divisors], where a divisor below `least` counts as that
  mutating func divide(row: Int, byRow divisors: Int, atLeast least: Float) {
    precondition(row != divisors)
    let target = buffer(row)
    let divisors = buffer(divisors)
    for i in 0..<columns { target[i] /= max(divisors[i], least) }
  }

  /// self[row] += (other[otherRow] − self[centre])²
  mutating func addSquaredDistance(
    to row: Int, _ other: borrowing Tile, row otherRow: Int, from centre: Int
  ) {
    precondition(columns == other.columns && row != centre)
    let (target, centre, source) = (buffer(row), buffer(centre), other.buffer(otherRow))
    for i in 0..<columns {
      let distance = source[i] - centre[i]
      target[i] += distance * distance
    }
  }

  /// Sets self[row] to zero wherever other[mask] is zero.
  mutating func clear(row: Int, where other: borrowing Tile, isZero mask: Int) {
    precondition(columns == other.columns)
    let (target, mask) = (buffer(row), other.buffer(mask))
    for i in 0..<columns { target[i] = mask[i] == 0 ? 0 : target[i] }
  }

  /// self[0] += other[row] − other[base] wherever self[1] is at least `threshold`
  mutating func addWhere(
    _ other: borrowing Tile, row: Int, minus base: Int, atLeast threshold: Float
  ) {
    precondition(columns == other.columns)
    let (target, mask, row, base) = (buffer(0), buffer(1), other.buffer(row), other.buffer(base))
    for i in 0..<columns { target[i] += mask[i] >= threshold ? row[i] - base[i] : 0 }
  }
}
