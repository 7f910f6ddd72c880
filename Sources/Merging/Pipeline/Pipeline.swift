public import Checkpoints

/// What is computed from a tile of inputs: the arithmetic of a method, without any file.
public protocol TileOperation: Sendable {
  /// What is learnt about the tensor on the way; `Void` if nothing.
  associatedtype Summary: Sendable

  /// Elements that must stay together in a tile: 1, or the length of a row.
  var grain: Int { get }
  func makeSummary() -> Summary
  /// Computes every output row from the input rows; both tiles have the same columns.
  /// The input may be worked in: it is filled anew for the next tile.
  func apply(_ input: inout Tile, into output: inout Tile, summary: inout Summary)
}

/// The same range of elements of some input tensors, and where its results go.
public struct Step<Operation: TileOperation>: Sendable {
  /// A tensor of the source or sink with this number.
  public typealias Place = (file: Int, tensor: TensorInfo)

  public let operation: Operation
  public let inputs: [Place]
  public let outputs: [Place]
  /// Rows of the output tile behind those that are written, to work in.
  let scratchRows: Int
  public let elements: Range<Int>

  /// One step that covers whole tensors, for a worker that must see them in order.
  init(
    whole inputs: [Place], outputs: [Place], scratchRows: Int = 0, with operation: Operation
  ) {
    self.init(
      operation: operation, inputs: inputs, outputs: outputs, scratchRows: scratchRows,
      elements: 0..<inputs[0].tensor.elementCount)
  }

  /// Steps of about 4 Mi elements that together cover whole tensors.
  ///
  /// The cuts are fixed, so that neither workers nor budget show in a sum over a step.
  static func covering(
    _ inputs: [Place], outputs: [Place], scratchRows: Int = 0, with operation: Operation
  ) -> [Step] {
    let count = inputs[0].tensor.elementCount
    guard count > 0 else { return [] }
    let stride = max(1, (4 << 20) / operation.grain) * operation.grain
    return Swift.stride(from: 0, to: count, by: stride).map { begin in
      Step(
        operation: operation, inputs: inputs, outputs: outputs, scratchRows: scratchRows,
        elements: begin..<min(begin + stride, count))
    }
  }

  private init(
    operation: Operation, inputs: [Place], outputs: [Place], scratchRows: Int,
    elements: Range<Int>
  ) {
    self.operation = operation
    self.inputs = inputs
    self.outputs = outputs
    self.scratchRows = scratchRows
    self.elements = elements
  }
}

/// Runs steps side by side: read, decode, compute, encode, write, tile by tile.
///
/// A worker owns a step from its first tile to its last, so nothing is locked and every sum has
/// one order. Each worker holds one set of tiles, sized so that it fits the caches and all of them
/// fit `memory` bytes.
public struct Pipeline: Sendable {
  public let sources: [any TensorSource]
  public let sinks: [any TensorSink]
  public let memory: Int
  public let workers: Int

  public init(
    from sources: [any TensorSource], into sinks: [any TensorSink], memory: Int, workers: Int
  ) {
    self.sources = sources
    self.sinks = sinks
    self.memory = memory
    self.workers = workers
  }

  /// Bytes of a worker's tiles: small enough for a cache of the second or third level, large enough
  /// for a read.
  private static let cachedBytes = 4 << 20

  /// - Returns: the summary of each step.
  /// - Throws: what a file refuses; `MergeError` if a grain does not fit the memory.
  @discardableResult
  public func run<Operation>(_ steps: [Step<Operation>]) throws -> [Operation.Summary] {
    guard !steps.isEmpty else { return [] }
    let inputRows = steps.map { $0.inputs.count }.max()!
    let outputRows = steps.map { $0.outputs.count + $0.scratchRows }.max()!
    let bytesPerColumn = 4 * (inputRows + outputRows) + 8
    let largestStep = steps.map { $0.elements.count }.max()!
    let largestGrain = steps.map { $0.operation.grain }.max()!
    // More than the caches hold makes every pass over a tile wait for memory.
    let useful = max(Self.cachedBytes / bytesPerColumn, 16 * largestGrain)
    let capacity = min(
      memory / max(workers, 1) / bytesPerColumn, max(largestStep, largestGrain), useful)
    for step in steps where step.operation.grain > max(capacity, 1) {
      throw MergeError(
        "tensor \(quoted((step.outputs.first ?? step.inputs[0]).tensor.name)) needs \(step.operation.grain * bytesPerColumn) bytes for a row of \(step.operation.grain) elements of every model; a worker's share of the budget is \(memory / workers)",
        remedy: "give it more with --memory or use fewer --jobs")
    }
    let summaries = StepResults<Operation.Summary>(count: steps.count)
    try forEachStep(count: steps.count, workers: workers) {
      Workspace(inputRows: inputRows, outputRows: outputRows, capacity: max(capacity, 1))
    } body: { index, workspace in
      summaries[index] = try run(steps[index], in: &workspace)
    }
    return summaries.all
  }

  private func run<Operation>(_ step: Step<Operation>, in workspace: inout Workspace) throws
    -> Operation.Summary
  {
    var summary = step.operation.makeSummary()
    let grain = step.operation.grain
    let stride = workspace.capacity / grain * grain
    var begin = step.elements.lowerBound
    while begin < step.elements.upperBound {
      let range = begin..<min(begin + stride, step.elements.upperBound)
      try read(step.inputs, range, into: &workspace.input, through: &workspace.bytes)
      workspace.output.resize(columns: range.count)
      step.operation.apply(&workspace.input, into: &workspace.output, summary: &summary)
      try write(step.outputs, range, from: workspace.output, through: &workspace.bytes)
      begin = range.upperBound
    }
    return summary
  }

  private func read(
    _ inputs: [(file: Int, tensor: TensorInfo)], _ range: Range<Int>,
    into tile: inout Tile, through buffer: inout Buffer
  ) throws {
    tile.resize(columns: range.count)
    for (row, input) in inputs.enumerated() {
      let width = input.tensor.dtype.bitWidth / 8
      var bytes = buffer.first(range.count * width)
      try sources[input.file].read(input.tensor, at: range.lowerBound * width, into: &bytes)
      var values = tile.mutableRow(row)
      input.tensor.dtype.decode(bytes.bytes, into: &values)
    }
  }

  private func write(
    _ outputs: [(file: Int, tensor: TensorInfo)], _ range: Range<Int>,
    from tile: borrowing Tile, through buffer: inout Buffer
  ) throws {
    for (row, output) in outputs.enumerated() {
      let width = output.tensor.dtype.bitWidth / 8
      var bytes = buffer.first(range.count * width)
      output.tensor.dtype.encode(tile[row], into: &bytes)
      try sinks[output.file].write(bytes.bytes, of: output.tensor, at: range.lowerBound * width)
    }
  }
}

/// One worker's memory.
private struct Workspace: ~Copyable {
  let capacity: Int
  var input: Tile
  var output: Tile
  /// A row as it is in a file; 8 bytes for the widest type.
  var bytes: Buffer

  init(inputRows: Int, outputRows: Int, capacity: Int) {
    self.capacity = capacity
    input = Tile(rows: inputRows, capacity: capacity)
    output = Tile(rows: outputRows, capacity: capacity)
    bytes = Buffer(byteCount: 8 * capacity)
  }
}
