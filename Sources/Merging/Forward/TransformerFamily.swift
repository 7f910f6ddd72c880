import Checkpoints

/// Transformers whose layers have the same parts under the same names.
///
/// A family is a line of the table, found by a tensor that no other family has. All names are
/// relative to what stands in front of them in the checkpoint (`vision_model.`, `bert.`, `model.`).
struct TransformerFamily: Sendable {
  enum Embedding: Sendable { case clipImage, image, clipText, bertText, text }
  enum NormKind: Sendable { case layer, rootMeanSquare }

  let name: String
  /// `encoder.layers`, in front of a layer's number.
  let layers: String
  let query: String
  let key: String
  let value: String
  let output: String
  let attentionNorm: String
  let mlpNorm: String
  /// In front of the names of the MLP's linear maps.
  let mlp: String
  let gate: String?
  let up: String
  let down: String
  let finalNorm: String?
  /// Whether norms come before attention and MLP, or after they were added to what went in.
  let normsFirst: Bool
  let normKind: NormKind
  let isCausal: Bool
  let embedding: Embedding
  let tower: TransformerConfiguration.Tower
  let activation: Activation
  let normEpsilon: Float

  static let table = [
    clip("CLIP vision", .clipImage), clip("CLIP text", .clipText), vit, bert, llama,
  ]

  private static func clip(_ name: String, _ embedding: Embedding) -> TransformerFamily {
    TransformerFamily(
      name: name, layers: "encoder.layers",
      query: "self_attn.q_proj", key: "self_attn.k_proj", value: "self_attn.v_proj",
      output: "self_attn.out_proj", attentionNorm: "layer_norm1", mlpNorm: "layer_norm2",
      mlp: "mlp.", gate: nil, up: "fc1", down: "fc2",
      // CLIP's vision tower normalises only the class token, and that behind the encoder.
      finalNorm: embedding == .clipText ? "final_layer_norm" : nil,
      normsFirst: true, normKind: .layer, isCausal: embedding == .clipText,
      embedding: embedding, tower: embedding == .clipText ? .text : .vision,
      activation: .quickGELU, normEpsilon: 1e-5)
  }

  private static let vit = TransformerFamily(
    name: "ViT", layers: "encoder.layer",
    query: "attention.attention.query", key: "attention.attention.key",
    value: "attention.attention.value", output: "attention.output.dense",
    attentionNorm: "layernorm_before", mlpNorm: "layernorm_after",
    mlp: "", gate: nil, up: "intermediate.dense", down: "output.dense", finalNorm: "layernorm",
    normsFirst: true, normKind: .layer, isCausal: false, embedding: .image, tower: .vision,
    activation: .gelu, normEpsilon: 1e-12)

  private static let bert = TransformerFamily(
    name: "BERT", layers: "encoder.layer",
    query: "attention.self.query", key: "attention.self.key", value: "attention.self.value",
    output: "attention.output.dense",
    attentionNorm: "attention.output.LayerNorm", mlpNorm: "output.LayerNorm",
    mlp: "", gate: nil, up: "intermediate.dense", down: "output.dense", finalNorm: nil,
    normsFirst: false, normKind: .layer, isCausal: false, embedding: .bertText, tower: .text,
    activation: .gelu, normEpsilon: 1e-12)

  private static let llama = TransformerFamily(
    name: "Llama", layers: "layers",
    query: "self_attn.q_proj", key: "self_attn.k_proj", value: "self_attn.v_proj",
    output: "self_attn.o_proj",
    attentionNorm: "input_layernorm", mlpNorm: "post_attention_layernorm",
    mlp: "mlp.", gate: "gate_proj", up: "up_proj", down: "down_proj", finalNorm: "norm",
    normsFirst: true, normKind: .rootMeanSquare, isCausal: true, embedding: .text, tower: .text,
    activation: .silu, normEpsilon: 1e-6)

  /// The tensor by which an embedding is known.
  var landmark: String {
    switch embedding {
    case .clipImage: "embeddings.class_embedding"
    case .image: "embeddings.cls_token"
    case .clipText: "embeddings.token_embedding.weight"
    case .bertText: "embeddings.word_embeddings.weight"
    case .text: "embed_tokens.weight"
    }
  }

  /// A projection of a layer's attention; in a mixture it may be the base of a module.
  func projection(_ part: String, of layer: String, in manifest: Manifest) -> TensorInfo? {
    manifest["\(layer).\(part).weight"]
      ?? manifest["\(layer).\(attention).base_model.\(below(attention, part)).weight"]
  }

  /// The module of the layer that holds the attention.
  var attention: String { String(query.prefix { $0 != "." }) }

  /// The rest of a name below that module.
  func below(_ module: String, _ part: String) -> String {
    String(part.dropFirst(module.count + 1))
  }

  /// What stands in front of this family's names in a checkpoint, once for every such model in it.
  func stems(in manifest: Manifest) -> [String] {
    manifest.tensors.compactMap { tensor in
      let stem = tensor.name.hasSuffix(landmark) ? tensor.name.dropLast(landmark.count) : nil
      return stem.flatMap { stem in
        let isWhole = stem.isEmpty || stem.hasSuffix(".")
        let isThere = projection(query, of: "\(stem)\(layers).0", in: manifest) != nil
        return isWhole && isThere ? String(stem) : nil
      }
    }
  }
}
