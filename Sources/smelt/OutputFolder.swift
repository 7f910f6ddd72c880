import Checkpoints
import Foundation
import Merging

/// The small files of a merged model: its configuration, tokenizer, recipe and model card.
struct OutputFolder {
  let plan: MergePlan
  let recipe: String

  /// The folder whose configuration and other small files the output takes over: the base's, or
  /// the first model's.
  var original: String? {
    let name = plan.recipe.baseModel ?? plan.recipe.models[0]
    return isFolder(name) ? name : nil
  }

  private static let tokenizerFiles = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
  ]

  /// What the folder gets beside the weights: the small files of `original`, but for those whose
  /// contents are given.
  struct Files {
    var original: String?
    var contents: [String: [UInt8]] = [:]
  }

  func files() throws -> Files { try Files(original: original, contents: contents()) }

  private func contents() throws -> [String: [UInt8]] {
    var files: [String: [UInt8]] = [:]
    files["smelt_recipe.yml"] = Array(recipe.utf8)
    files["README.md"] = Array(modelCard.utf8)
    if let original, exists("\(original)/config.json") {
      files["config.json"] = Array(try configuration(readText("\(original)/config.json")).utf8)
    }
    if case .model(let model)? = plan.recipe.tokenizer, model != original {
      guard Self.tokenizerFiles.contains(where: { exists("\(model)/\($0)") }) else {
        throw CheckpointError(
          file: model, "has no tokenizer that the recipe could take",
          remedy: "name a model's folder that has one, or leave out tokenizer_source")
      }
      try checkVocabularies(model)
      for name in Self.tokenizerFiles where exists("\(model)/\(name)") {
        files[name] = Array(try Data(contentsOf: URL(filePath: "\(model)/\(name)")))
      }
    }
    if let template = plan.recipe.chatTemplate {
      if let text = try ChatTemplate.text(template, of: plan.recipe.models) {
        files["chat_template.jinja"] = Array(text.utf8)
      } else {
        note("none of the models has a chat template: chat_template: auto chooses none")
      }
    }
    return files
  }

  // MARK: Configuration

  /// The configuration with the keys that the merge has changed; everything else byte for byte.
  private func configuration(_ text: String) throws -> String {
    var text = text
    if let layers = plan.layerCount {
      for key in ["num_hidden_layers", "n_layer", "num_layers", "n_layers"] {
        text = text.replacingJSONValue(of: key, by: String(layers))
      }
    }
    let type = plan.recipe.outputType ?? plan.recipe.dtype
    return type.map(text.withConfiguredType) ?? text
  }

  // MARK: Tokenizer

  /// Embeddings are merged row by row, which is right only if the rows mean the same words.
  private func checkVocabularies(_ model: String) throws {
    guard let original else { return }
    for name in ["tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"] {
      let paths = ["\(original)/\(name)", "\(model)/\(name)"]
      guard paths.allSatisfy({ exists($0) }) else { continue }
      let contents = try paths.map { try Data(contentsOf: URL(filePath: $0)) }
      guard vocabulary(contents[0], name) == vocabulary(contents[1], name) else {
        throw CheckpointError(
          file: paths[1], "has another vocabulary than \(paths[0])",
          remedy: "only models of one vocabulary can be merged; use tokenizer_source: base")
      }
    }
  }

  private func vocabulary(_ data: Data, _ name: String) -> Data {
    guard name == "tokenizer.json",
      let json = try? JSONSerialization.jsonObject(with: data) as? [String: Any],
      let model = json["model"] as? [String: Any], let words = model["vocab"],
      let canonical = try? JSONSerialization.data(withJSONObject: words, options: .sortedKeys)
    else { return data }
    return canonical
  }

  // MARK: Model card

  private var modelCard: String {
    let parents = plan.recipe.models.map {
      "- \($0)\($0 == plan.recipe.baseModel ? " (base)" : "")"
    }
    let front = plan.recipe.models.filter { !$0.hasPrefix("/") && !$0.hasPrefix(".") }
      .map { "- \($0)" }
    return """
      ---
      \(front.isEmpty ? "" : "base_model:\n\(front.joined(separator: "\n"))\n")library_name: transformers
      tags:
      - merge
      ---

      # Merged model

      Made with Smelt by the method `\(plan.recipe.method.name)`: \(plan.recipe.method.formula).

      ## Parents

      \(parents.joined(separator: "\n"))

      ## Recipe

      ```yaml
      \(recipe.trimmingCharacters(in: .newlines))
      ```

      """
  }

  private func exists(_ path: String) -> Bool { FileManager.default.fileExists(atPath: path) }
}

extension String {
  /// A model's configuration that says its weights are of this type, if it says a type at all.
  func withConfiguredType(_ type: DType) -> String {
    let names: [DType: String] = [
      .bf16: "bfloat16", .f16: "float16", .f32: "float32", .f64: "float64",
    ]
    return ["torch_dtype", "dtype"].reduce(self) {
      $0.replacingJSONValue(of: $1, by: "\"\(names[type]!)\"")
    }
  }

  /// Replaces a number or a string that a JSON text has under this key, wherever that is.
  fileprivate func replacingJSONValue(of key: String, by value: String) -> String {
    let pattern = "(\"\(key)\"\\s*:\\s*)(\"[^\"]*\"|[0-9]+)"
    guard let expression = try? NSRegularExpression(pattern: pattern) else { return self }
    return expression.stringByReplacingMatches(
      in: self, range: NSRange(startIndex..., in: self), withTemplate: "$1\(value)")
  }
}
