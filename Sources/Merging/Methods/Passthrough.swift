/// One model's tensor, times a factor if one is given.
///
/// Without a factor and a change of type the plan copies the bytes and this is never asked.
struct Passthrough: TensorMerge {
  private let scale: Float?

  init(_ setting: TensorSetting) {
    scale = setting.perModel["scale"] == nil ? nil : Float(setting.numbers("scale")[0])
  }

  func merge(_ tile: inout Tile, at position: Int, into output: inout Tile) {
    output.copyRow(0, from: tile, 0)
    if let scale { output.multiply(row: 0, by: scale) }
  }
}

extension MergeMethod {
  static let passthrough = MergeMethod(
    "passthrough", "x, times scale if given", operand: .weights, base: .optional, models: 1...1,
    parameters: [.optionalNumber("scale", .perModel)]
  ) { Passthrough($0) }
}
