import Checkpoints

extension TensorInfo {
  /// Whether it has a row for each word of a vocabulary, or for each position, at the input.
  var isEmbedding: Bool {
    let words = name.split(separator: ".")
    return words.contains {
      $0.contains("embed") || $0 == "wte" || $0 == "wpe" || $0 == "tok_embeddings"
    }
  }

  /// Whether its numbers are codes whose scales are in other tensors.
  func isQuantized(in manifest: Manifest) -> Bool {
    switch dtype {
    case .f4, .f6E2M3, .f6E3M2, .f8E5M2, .f8E4M3, .f8E8M0, .f8E4M3FNUZ, .f8E5M2FNUZ: return true
    default: break
    }
    let last = name.split(separator: ".").last ?? ""
    if ["qweight", "qzeros", "g_idx", "weight_packed", "SCB"].contains(String(last)) {
      return true
    }
    let companions = ["_scale", "_scale_inv", ".absmax", ".quant_map", "_scales"]
    return companions.contains { manifest[name + $0] != nil }
  }
}
