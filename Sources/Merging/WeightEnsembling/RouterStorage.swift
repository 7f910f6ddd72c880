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
}

extension Router {
  /// Reads the router below a gate's name; which tensors there are tells its depth.
  init(in source: any TensorSource, gate: String, width: Int) throws {
    let weights = TransformerWeights(source: source)
    if source.manifest["\(gate).fc1.weight"] != nil {
      let first = try weights.dense("\(gate).fc1", inputs: width)
      self = .hidden(first, try weights.dense("\(gate).fc2", inputs: first.bias.count))
    } else if source.manifest["\(gate).fc.weight"] != nil {
      self = .linear(try weights.dense("\(gate).fc", inputs: width))
    } else {
      self = .constant(try weights.vector("\(gate).weight"))
    }
  }
}
