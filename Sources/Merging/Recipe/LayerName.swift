import Checkpoints

/// A tensor's place in a stack of layers, found from its name: `model.layers.` + 3 +
/// `.mlp.up_proj.weight`.
struct LayerName: Hashable {
  /// The stack: everything up to the number.
  let stack: String
  let index: Int
  let rest: String

  /// What the parents of layer numbers are called: Llama and its many relatives, GPT-2, BERT, T5,
  /// BLOOM and MPT.
  private static let parents: Set<String> = ["layers", "layer", "h", "block", "blocks"]

  /// `nil` if the tensor belongs to no layer. The first number counts: experts come behind.
  init?(_ name: String) {
    let words = name.split(separator: ".", omittingEmptySubsequences: false)
    for place in words.indices.dropFirst()
    where LayerName.parents.contains(String(words[place - 1])) {
      guard let index = Int(words[place]), index >= 0, String(index) == words[place] else {
        continue
      }
      stack = words[..<place].joined(separator: ".") + "."
      self.index = index
      rest = words[(place + 1)...].map { "." + $0 }.joined()
      return
    }
    return nil
  }

  init(stack: String, index: Int, rest: String) {
    self.stack = stack
    self.index = index
    self.rest = rest
  }

  var name: String { "\(stack)\(index)\(rest)" }
}

/// The layers of a model.
struct LayerStacks {
  /// How many layers each stack has.
  let counts: [String: Int]

  init(_ manifest: Manifest) {
    var counts: [String: Int] = [:]
    for tensor in manifest.tensors {
      guard let layer = LayerName(tensor.name) else { continue }
      counts[layer.stack] = max(counts[layer.stack, default: 0], layer.index + 1)
    }
    self.counts = counts
  }

  /// Where a tensor stands between the first layer (0) and the last (1); tensors of no layer are
  /// at 0, the layer of a stack of one at 1.
  func position(of tensor: String) -> Double {
    guard let layer = LayerName(tensor), let count = counts[layer.stack] else { return 0 }
    return count > 1 ? Double(layer.index) / Double(count - 1) : 1
  }
}
