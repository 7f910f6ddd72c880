import Checkpoints
import Foundation

/// How a conversation becomes text: a Jinja template that goes beside a tokenizer.
enum ChatTemplate {
  /// - Parameter template: what the recipe says: a template, `chatml`, or `auto`.
  /// - Returns: the template; `nil` if it is `auto` and none of the models has one.
  static func text(_ template: String, of models: [String]) throws -> String? {
    switch template {
    case "auto": try mostCommon(of: models)
    case "chatml": chatML
    default: template
    }
  }

  private static let chatML = """
    {% for message in messages %}<|im_start|>{{ message['role'] }}
    {{ message['content'] }}<|im_end|>
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
    {% endif %}
    """

  /// The template that most of the models have; of several the one that is met first.
  private static func mostCommon(of models: [String]) throws -> String? {
    var counts: [(template: String, count: Int)] = []
    for template in try models.compactMap(own) {
      if let known = counts.firstIndex(where: { $0.template == template }) {
        counts[known].count += 1
      } else {
        counts.append((template, 1))
      }
    }
    let most = counts.map { $0.count }.max()
    return counts.first { $0.count == most }?.template
  }

  /// The template of a model's folder, from a file of its own or the tokenizer's configuration,
  /// where it may be one of several by name.
  private static func own(of model: String) throws -> String? {
    let file = "\(model)/chat_template.jinja"
    if FileManager.default.fileExists(atPath: file) { return try trimmed(readText(file)) }
    let path = "\(model)/tokenizer_config.json"
    guard FileManager.default.fileExists(atPath: path) else { return nil }
    let json = try? JSONSerialization.jsonObject(with: Data(readText(path).utf8))
    guard let configuration = json as? [String: Any] else {
      throw CheckpointError(
        file: path, "is not a JSON object, so its chat template cannot be found",
        remedy: "mend it, or leave out chat_template: auto")
    }
    let named = configuration["chat_template"] as? [[String: Any]]
    let template =
      configuration["chat_template"] as? String
      ?? named?.first { $0["name"] as? String == "default" }?["template"] as? String
    return template.flatMap(trimmed)
  }

  /// - Returns: `nil` if nothing is left.
  private static func trimmed(_ template: String) -> String? {
    let text = template.trimmingCharacters(in: .whitespacesAndNewlines)
    return text.isEmpty ? nil : text
  }
}
