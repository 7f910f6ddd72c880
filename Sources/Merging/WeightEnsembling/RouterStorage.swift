import Checkpoints

extension Router {
  /// The tensors of a router as they are stored: always F32, because a calibrated router of
  /// depth 2 does not survive rounding to BF16.
  static func layout(depth: Int, width: Int, experts: Int, gate: String) -> [TensorInfo] {
    let shapes: [(String, [Int])] =
      switch depth {
      case 0: [("weight", [experts])]
      case 1: [("fc.weight", [experts, width]), ("fc.bias", [experts])]
      default:
        [
          ("fc1.weight", [width, width]), ("fc1.bias", [width]),
          ("fc2.weight", [experts, width]), ("fc2.bias", [experts]),
        ]
      }
    return shapes.map { try! TensorInfo(name: "\(gate).\($0)", dtype: .f32, shape: $1) }
  }

  /// Writes the router's tensors below the gate's name.
  func write(into sink: any TensorSink, gate: String) throws {
    for (name, _, values) in tensors {
      let tensor = sink.manifest["\(gate).\(name)"]!
      var buffer = Buffer(byteCount: tensor.byteCount)
      var bytes = buffer.first(tensor.byteCount)
      tensor.dtype.encode(values.span, into: &bytes)
      try sink.write(bytes.bytes, of: tensor, at: 0)
    }
  }

  /// The router that is stored below the gate's name.
  init(of source: any TensorSource, gate: String, depth: Int) throws {
    func dense(_ suffix: String) throws -> Dense {
      let weight = try source.tensor("\(gate).\(suffix).weight")
      let bias = try source.floats(of: "\(gate).\(suffix).bias")
      guard weight.shape.count == 2, weight.shape[0] == bias.count else {
        throw CheckpointError(
          file: source.path, tensor: weight.name,
          "has the shape \(weight.shapeDescription), but the gate's bias has \(bias.count) elements"
        )
      }
      return Dense(
        weight: Matrix(
          rowCount: bias.count, columnCount: weight.rowLength,
          elements: try source.floats(of: weight.name)),
        bias: bias)
    }
    switch depth {
    case 0: self = .constant(try source.floats(of: "\(gate).weight"))
    case 1: self = .linear(try dense("fc"))
    default: self = .hidden(try dense("fc1"), try dense("fc2"))
    }
  }
}

/// The values that routers have before calibration, written piece by piece: a router of depth 2
/// over a wide model is larger than a tile.
struct InitialRouters: Sendable {
  /// A gate as it is stored, and the name that its random numbers come from: gates that are
  /// copies of one share theirs.
  struct Gate: Sendable {
    let prefix: String
    let origin: String
    let tensors: [TensorInfo]
  }

  let gates: [Gate]
  let seed: UInt64
  /// Of the last bias.
  let mixture: Float

  /// 1 MiB, and of whole blocks of random numbers.
  private static let pieceLength = 1 << 18

  func write(into sink: any TensorSink, workers: Int) throws {
    let pieces = gates.flatMap { gate in
      gate.tensors.flatMap { tensor in
        stride(from: 0, to: tensor.elementCount, by: Self.pieceLength).map {
          (gate, tensor, $0..<min($0 + Self.pieceLength, tensor.elementCount))
        }
      }
    }
    try forEachStep(count: pieces.count, workers: workers) {
    } body: { step, _ in
      let (gate, tensor, range) = pieces[step]
      var values = [Float](repeating: 0, count: range.count)
      var span = values.mutableSpan
      fill(&span, of: tensor, in: gate, from: range.lowerBound)
      try sink.write(values, of: tensor, from: range.lowerBound)
    }
  }

  private func fill(
    _ values: inout MutableSpan<Float>, of tensor: TensorInfo, in gate: Gate, from first: Int
  ) {
    if tensor.shape.count == 2 {
      let suffix = tensor.name.dropFirst(gate.prefix.count)
      CounterRandom(seed: seed, tensor: gate.origin + suffix)
        .fill(&values, from: first, deviation: Router.initialDeviation)
    } else {
      let isLast = tensor.name == gate.tensors.last!.name
      for index in values.indices { values[index] = isLast ? mixture : 0 }
    }
  }
}
