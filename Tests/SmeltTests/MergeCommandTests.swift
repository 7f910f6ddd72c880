import Checkpoints
import Foundation
import TestSupport
import Testing

/// `smelt merge` and `smelt methods`, run as a user runs them.
struct MergeCommandTests {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  /// A model's folder of two layers, with a configuration and a tokenizer.
  private func makeModel(_ name: String, seed: Int, layers: Int = 2) throws {
    try FileManager.default.createDirectory(
      atPath: folder(name), withIntermediateDirectories: true)
    var tensors = [try SmallTensor("model.embed_tokens.weight", [6, 4], values(24, seed))]
    for layer in 0..<layers {
      tensors.append(
        try SmallTensor(
          "model.layers.\(layer).mlp.up_proj.weight", [4, 4], values(16, seed + 10 + layer)))
    }
    tensors.append(try SmallTensor("model.norm.weight", [4], values(4, seed + 5)))
    try Checkpoint.write(tensors, to: folder("\(name)/model.safetensors"))
    try Data(
      "{\n  \"model_type\": \"llama\",\n  \"num_hidden_layers\":  \(layers),\n  \"torch_dtype\": \"float32\"\n}"
        .utf8
    ).write(to: URL(filePath: folder("\(name)/config.json")))
    try Data("tokens of \(name)".utf8).write(to: URL(filePath: folder("\(name)/vocab.txt")))
  }

  private func values(_ count: Int, _ seed: Int) -> [Float] {
    filler(seed, count: count).map { Float($0) }
  }

  private func write(_ recipe: String) throws -> String {
    let text = recipe.replacingOccurrences(of: "@", with: folder.path + "/")
    try Data(text.utf8).write(to: URL(filePath: folder("recipe.yml")))
    return folder("recipe.yml")
  }

  private func text(_ name: String) throws -> String {
    try String(contentsOfFile: folder(name), encoding: .utf8)
  }

  static let linear = """
    merge_method: linear
    models:
      - model: @a
        parameters: {weight: 0.25}
      - model: @b
        parameters: {weight: 0.75}
    """

  @Test func `a folder has weights, configuration, tokenizer, recipe and model card`() throws {
    try makeModel("a", seed: 1)
    try makeModel("b", seed: 2)
    let recipe = try write(Self.linear)
    let result = try smelt("merge", recipe, folder("out"))
    #expect(result.code == 0, "\(result.errors)")
    #expect(result.output.contains("4 tensors, 240 B in "))
    #expect(result.output.contains("peak memory"))
    let merged = try Checkpoint.open(folder("out"))
    let parents = try ["a", "b"].map { try Checkpoint.open(folder($0)) }
    for tensor in parents[0].manifest.tensors {
      let values = try parents.map { try $0.floats(of: tensor.name) }
      let expected = values[0].indices.map {
        Float(0).addingProduct(values[0][$0], 0.25).addingProduct(values[1][$0], 0.75)
      }
      #expect(try merged.floats(of: tensor.name) == expected)
    }
    #expect(try text("out/config.json") == text("a/config.json"))
    #expect(try text("out/vocab.txt") == "tokens of a")
    #expect(try text("out/smelt_recipe.yml") == text("recipe.yml"))
    let card = try text("out/README.md")
    #expect(card.contains("by the method `linear`"))
    #expect(card.contains("- \(folder("b"))"))
  }

  @Test func `cleaning is a step of a recipe, planned and reported`() throws {
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3)] { try makeModel(name, seed: seed) }
    let recipe = try write(
      """
      merge_method: task_arithmetic
      base_model: @a
      models: [{model: @b}, {model: @c}]
      parameters: {weight: 0.5}
      task_vectors: {clean: {scope: model, penalty: 0.001}}
      """)
    let plan = try smelt("merge", recipe, folder("out"), "--dry-run")
    #expect(plan.code == 0, "\(plan.errors)")
    #expect(
      plan.output.contains("cleans the task vectors of 4 tensors by awd-model scope=model"))
    #expect(plan.output.contains("3 inputs, cleaned, 2 passes"))
    let result = try smelt("merge", recipe, folder("out"))
    #expect(result.code == 0, "\(result.errors)")
    #expect(result.output.contains("mean |cos| of the task vectors: "))
    let merged = try Checkpoint.open(folder("out"))
    #expect(merged.manifest.metadata["cleaning"]?.hasPrefix("awd-model scope=model") == true)
    let none = try write(
      """
      merge_method: ties
      base_model: @a
      models: [{model: @b}, {model: @c}]
      parameters: {weight: 0.5}
      task_vectors: {clean: {scope: model, penalty: 99}}
      """)
    let idle = try smelt("merge", none, folder("other"))
    #expect(idle.code == 0)
    #expect(idle.errors.contains("smelt: there is nothing to gain: the penalty 99 is at or above"))
  }

  @Test func `slices change the number of layers in the configuration and nothing else`() throws {
    try makeModel("a", seed: 1)
    try makeModel("b", seed: 2)
    let recipe = try write(
      """
      merge_method: passthrough
      slices:
        - sources: [{model: @a, layer_range: [0, 2]}]
        - sources: [{model: @b, layer_range: [1, 2]}]
      """)
    let result = try smelt("merge", "--quiet", recipe, folder("out"))
    #expect(result.code == 0, "\(result.errors)")
    #expect(result.output == "")
    #expect(
      try text("out/config.json")
        == text("a/config.json").replacingOccurrences(
          of: "\"num_hidden_layers\":  2", with: "\"num_hidden_layers\":  3"))
    let merged = try Checkpoint.open(folder("out"))
    let other = try Checkpoint.open(folder("b"))
    let name = "model.layers.2.mlp.up_proj.weight"
    #expect(
      try merged.bytes(of: merged.tensor(name))
        == other.bytes(of: other.tensor("model.layers.1.mlp.up_proj.weight")))
  }

  @Test(arguments: ["out.safetensors", "out.h5", "out.npz"])
  func `a single file may be of any format`(name: String) throws {
    try makeModel("a", seed: 1)
    try makeModel("b", seed: 2)
    let recipe = try write(Self.linear)
    let result = try smelt("merge", "--quiet", recipe, folder(name))
    #expect(result.code == 0, "\(result.errors)")
    let reference = try smelt("merge", "--quiet", recipe, folder("reference"))
    #expect(reference.code == 0)
    let (merged, expected) = (
      try Checkpoint.open(folder(name)), try Checkpoint.open(folder("reference"))
    )
    #expect(try merged.manifest.metadata["recipe"] == text("recipe.yml"))
    for tensor in expected.manifest.tensors {
      #expect(try merged.bytes(of: merged.tensor(tensor.name)) == expected.bytes(of: tensor))
    }
  }

  @Test func `a dry run says what would be done and does nothing`() throws {
    try makeModel("a", seed: 1)
    try makeModel("b", seed: 2)
    let recipe = try write(Self.linear)
    let result = try smelt("merge", "--dry-run", recipe, folder("out"))
    #expect(result.code == 0)
    #expect(result.output.contains("2 inputs, 1 pass"))
    #expect(
      result.output.contains(
        "reads 480 B in up to 1 passes, each byte once from disk, writes 240 B"))
    #expect(result.output.contains("are free"))
    #expect(try folder.names == ["a", "b", "recipe.yml"])
  }

  @Test func `a dry run lists the tensors if they are few, or if asked`() throws {
    try makeModel("a", seed: 1, layers: 30)
    try makeModel("b", seed: 2, layers: 30)
    let recipe = try write(Self.linear)
    let short = try smelt("merge", "--dry-run", recipe, folder("out"))
    #expect(short.code == 0, "\(short.errors)")
    #expect(!short.output.contains("layers.7."))
    #expect(short.output.contains("  32 of the tensors: 2 inputs, 1 pass\n"))
    #expect(short.output.hasSuffix("if it is killed, --resume goes on with it\n"))
    let long = try smelt("merge", "--dry-run", "--verbose", recipe, folder("out.h5"))
    #expect(long.output.contains("\"model.layers.7.mlp.up_proj.weight\""))
    #expect(
      long.output.hasSuffix(
        "if it is killed, it begins anew: only folders and .safetensors files can be resumed\n"))
  }

  @Test(arguments: ["out.h5", "out.npz"])
  func `an output that cannot be resumed refuses --resume`(name: String) throws {
    try makeModel("a", seed: 1)
    try makeModel("b", seed: 2)
    let result = try smelt("merge", "--resume", try write(Self.linear), folder(name))
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: \(folder(name)): cannot be resumed: only folders and .safetensors files can; merge without --resume\n"
    )
  }

  @Test func `the tokenizer may come from another model of the same vocabulary`() throws {
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3)] { try makeModel(name, seed: seed) }
    try Data("tokens of a".utf8).write(to: URL(filePath: folder("c/vocab.txt")))
    try Data("{}".utf8).write(to: URL(filePath: folder("c/tokenizer_config.json")))
    let recipe = try write(Self.linear + "\ntokenizer_source: @c\nchat_template: '{{ m }}'")
    let result = try smelt("merge", "--quiet", recipe, folder("out"))
    #expect(result.code == 0, "\(result.errors)")
    #expect(result.errors == "")
    #expect(try text("out/vocab.txt") == "tokens of a")
    #expect(try text("out/tokenizer_config.json") == "{}")
    #expect(try text("out/chat_template.jinja") == "{{ m }}")

    let file = try smelt("merge", "--quiet", recipe, folder("out.safetensors"))
    #expect(file.code == 0)
    #expect(
      file.errors
        == "smelt: \(folder("out.safetensors")) is a file of tensors: the recipe's tokenizer and chat_template are left out\n"
    )
    let over = try smelt("merge", "--force", recipe, folder("c"))
    #expect(over.code == 1)
    #expect(over.errors.contains("is also an input"))
  }

  @Test func `chat_template auto takes the template that most models have`() throws {
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3)] { try makeModel(name, seed: seed) }
    let recipe = try write(
      """
      merge_method: linear
      models: [{model: @a}, {model: @b}, {model: @c}]
      parameters: {weight: 1}
      chat_template: auto
      """)
    let none = try smelt("merge", "--quiet", recipe, folder("none"))
    #expect(
      none.errors
        == "smelt: none of the models has a chat template: chat_template: auto chooses none\n")
    #expect(!FileManager.default.fileExists(atPath: folder("none/chat_template.jinja")))

    try Data("{{ a }}".utf8).write(to: URL(filePath: folder("a/chat_template.jinja")))
    try Data(#"{"chat_template": "{{ b }}\n"}"#.utf8)
      .write(to: URL(filePath: folder("b/tokenizer_config.json")))
    try Data(
      #"""
      {"chat_template": [{"name": "tools", "template": "{{ t }}"},
                         {"name": "default", "template": "{{ b }}"}]}
      """#.utf8
    ).write(to: URL(filePath: folder("c/tokenizer_config.json")))
    let result = try smelt("merge", "--quiet", recipe, folder("out"))
    #expect(result.code == 0, "\(result.errors)")
    #expect(try text("out/chat_template.jinja") == "{{ b }}")
  }

  @Test func `a tokenizer of another vocabulary is refused, and a folder without one`() throws {
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3)] { try makeModel(name, seed: seed) }
    let recipe = try write(Self.linear + "\ntokenizer_source: @c")
    for arguments in [[], ["--dry-run"]] {
      let result = try smelt(["merge"] + arguments + [recipe, folder("out")])
      #expect(result.code == 1)
      #expect(
        result.errors
          == "Error: \(folder("c/vocab.txt")): has another vocabulary than \(folder("a/vocab.txt")); only models of one vocabulary can be merged; use tokenizer_source: base\n"
      )
    }
    try FileManager.default.removeItem(atPath: folder("c/vocab.txt"))
    let none = try smelt("merge", recipe, folder("out"))
    #expect(none.code == 1)
    #expect(none.errors.contains("\(folder("c")): has no tokenizer that the recipe could take"))
  }

  @Test func `a folder with files in it is only replaced with --force`() throws {
    try makeModel("a", seed: 1)
    try makeModel("b", seed: 2)
    try makeModel("out", seed: 3)
    let recipe = try write(Self.linear)
    let refused = try smelt("merge", recipe, folder("out"))
    #expect(refused.code == 1)
    #expect(refused.errors.contains("is a folder with files in it"))
    let before = try text("out/vocab.txt")
    #expect(before == "tokens of out")
    let result = try smelt("merge", "--force", recipe, folder("out"))
    #expect(result.code == 0, "\(result.errors)")
    #expect(try text("out/vocab.txt") == "tokens of a")
  }

  @Test func `a mistyped key is refused with its line and the key that was meant`() throws {
    let recipe = try write("merge_method: linear\nmodles: []")
    let result = try smelt("merge", recipe, folder("out"))
    #expect(result.code == 1)
    #expect(
      result.errors
        == "Error: \(recipe), line 2: a recipe has no key \"modles\"; did you mean models?\n")
  }

  @Test func `NaN in the result is a warning, and an error if strict`() throws {
    try makeModel("b", seed: 2)
    try FileManager.default.createDirectory(
      atPath: folder("a"), withIntermediateDirectories: true)
    var tensors = [try SmallTensor("model.norm.weight", [4], [1, .nan, 2, 3])]
    try Checkpoint.write(tensors, to: folder("a/model.safetensors"))
    tensors = [try SmallTensor("model.norm.weight", [4], [1, 2, 2, 3])]
    try Checkpoint.write(tensors, to: folder("b/model.safetensors"))
    let recipe = try write(Self.linear)
    let result = try smelt("merge", "--quiet", recipe, folder("out"))
    #expect(result.code == 0)
    #expect(
      result.errors
        == "smelt: tensor \"model.norm.weight\" has 1 elements that are NaN or infinite\n")
    let strict = try smelt("merge", "--quiet", "--strict", recipe, folder("strict"))
    #expect(strict.code == 1)
    #expect(!(try folder.names.contains("strict")))
  }

  @Test func `every method is listed with its parameters`() throws {
    let result = try smelt("methods")
    #expect(result.code == 0)
    for method in [
      "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della",
      "della_linear", "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp",
      "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic", "ties",
    ] {
      #expect(result.output.contains("\n\(method): ") || result.output.hasPrefix("\(method): "))
    }
    #expect(result.output.contains("  epsilon, each: 0.15\n"))
  }

  /// Two models of 40 tensors of 50,000 bytes, each written as one piece.
  private func makeManyTensors() throws -> String {
    var random = SeededGenerator(seed: 3)
    for name in ["a", "b"] {
      try FileManager.default.createDirectory(
        atPath: folder(name), withIntermediateDirectories: true)
      let tensors = try (0..<40).map {
        let values = (0..<12_500).map { _ in Float(Int32(truncatingIfNeeded: random.next())) }
        return try SmallTensor("model.layers.\($0).mlp.up_proj.weight", [50, 250], values)
      }
      try Checkpoint.write(tensors, to: folder("\(name)/model.safetensors"))
    }
    return try write(Self.linear)
  }

  private func start(_ recipe: String, into output: String) throws -> Process {
    let process = Process()
    process.executableURL = builtCommand
    process.arguments = ["merge", "--quiet", "--jobs", "1", recipe, output]
    process.standardError = FileHandle.nullDevice
    try process.run()
    return process
  }

  /// The lines of the journal of a merge into this output; `nil` if there is none.
  private func journalLines(_ name: String) -> Int? {
    FileManager.default.contents(atPath: folder(".\(name).merge-journal"))?
      .count { $0 == UInt8(ascii: "\n") }
  }

  /// Kills a merge when its journal has a heading and `pieces` pieces, or some more.
  /// - Returns: how many it has, and the merge is dead.
  private func killMerge(_ recipe: String, into name: String, after pieces: Int) throws -> Int {
    // A merge that was done before we looked is no fault of it: another one may be met.
    while true {
      let process = try start(recipe, into: folder(name))
      while process.isRunning, journalLines(name) ?? 0 < pieces + 1 { usleep(200) }
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
      if process.terminationReason == .uncaughtSignal, let lines = journalLines(name) {
        return lines - 1
      }
      try FileManager.default.removeItem(atPath: folder(name))
    }
  }

  /// Goes on with a killed merge and compares what comes out with an undisturbed one.
  private func resume(_ recipe: String, into name: String, _ moment: Comment) throws -> String {
    let result = try smelt("merge", "--quiet", "--resume", "--force", recipe, folder(name))
    #expect(result.code == 0, "\(moment): \(result.errors)")
    let (merged, expected) = (
      try Checkpoint.open(folder(name)), try Checkpoint.open(folder("whole"))
    )
    for tensor in expected.manifest.tensors {
      #expect(try merged.bytes(of: merged.tensor(tensor.name)) == expected.bytes(of: tensor))
    }
    #expect(try folder.names.filter { $0.hasPrefix(".") } == [], moment)
    try FileManager.default.removeItem(atPath: folder(name))
    return result.errors
  }

  @Test(arguments: ["out", "out.safetensors"], [0, 1, 7, 20, 35])
  func `a killed merge is gone on with to the same bytes`(name: String, pieces: Int) throws {
    let recipe = try makeManyTensors()
    #expect(try smelt("merge", "--quiet", recipe, folder("whole")).code == 0)
    let finished = try killMerge(recipe, into: name, after: pieces)
    let size =
      finished < 20
      ? "\(finished * 50).0 KB" : String(format: "%.2f MB", Double(finished) / 20)
    let errors = try resume(recipe, into: name, "killed after \(finished) pieces")
    #expect(
      finished == 0
        || errors == "smelt: took over \(size) that the interrupted merge had finished\n",
      "\(finished) pieces: \(errors)")
  }

  @Test(arguments: ["out", "out.safetensors"])
  func `killed at any moment, a merge can be gone on with to the same bytes`(name: String) throws {
    let recipe = try makeManyTensors()
    #expect(try smelt("merge", "--quiet", recipe, folder("whole")).code == 0)
    var random = SeededGenerator(seed: 5)
    for round in 0..<6 {
      let process = try start(recipe, into: folder(name))
      usleep(UInt32.random(in: 5_000...200_000, using: &random))
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
      _ = try resume(recipe, into: name, "round \(round)")
    }
  }

  @Test(arguments: ["linear", "ties"])
  func `an input that is written to meanwhile is one sentence and nothing is left`(
    method: String
  ) throws {
    for name in ["a", "b"] {
      try FileManager.default.createDirectory(
        atPath: folder(name), withIntermediateDirectories: true)
      try Checkpoint.write(
        [
          try SmallTensor(
            "weight", [1000, 1000], Array(repeating: name == "a" ? 1 : 2, count: 1_000_000))
        ],
        to: folder("\(name)/model.safetensors"))
    }
    let recipe = try write(
      """
      merge_method: \(method)
      \(method == "ties" ? "base_model: @a" : "")
      models: [{model: @a}, {model: @b}]
      parameters: {weight: 0.5\(method == "ties" ? ", density: 0.5" : "")}
      """)
    let changed = folder("b/model.safetensors")
    let whole = try Data(contentsOf: URL(filePath: changed))
    let file = try #require(FileHandle(forWritingAtPath: changed))
    // A merge that has ended before the file was written to is no fault of it: up to fifty tries.
    for isTruncated in [false, true] {
      var errors = ""
      for _ in 0..<50 where errors.isEmpty {
        errors = try mergeWhile(recipe) { round in
          if isTruncated {
            try file.truncate(atOffset: 4096)
          } else {
            try file.seek(toOffset: UInt64(whole.count / 2))
            try file.write(contentsOf: Data(repeating: round, count: whole.count / 2))
          }
        }
        try whole.write(to: URL(filePath: changed))
        if errors.isEmpty { try FileManager.default.removeItem(atPath: folder("out")) }
      }
      #expect(errors.hasPrefix("Error: \(changed): "), "\(errors)")
      #expect(errors.count { $0 == "\n" } == 1, "\(errors)")
      #expect(try folder.names == ["a", "b", "errors", "recipe.yml"])
    }
  }

  /// Merges into `out` in little memory, and calls `disturb` again and again meanwhile.
  /// - Returns: what the command says of it; empty if it succeeds.
  private func mergeWhile(_ recipe: String, _ disturb: (UInt8) throws -> Void) throws -> String {
    let process = Process()
    process.executableURL = builtCommand
    process.arguments = ["merge", "--quiet", "--memory", "1MiB", recipe, folder("out")]
    try Data().write(to: URL(filePath: folder("errors")))
    process.standardError = FileHandle(forWritingAtPath: folder("errors"))
    try process.run()
    // The journal is made after the files are opened and before they are read.
    while process.isRunning, journalLines("out") == nil { usleep(100) }
    var round: UInt8 = 0
    while process.isRunning {
      try disturb(round)
      round &+= 1
      usleep(1000)
    }
    process.waitUntilExit()
    #expect(process.terminationReason == .exit)
    #expect(process.terminationStatus == (try text("errors").isEmpty ? 0 : 1))
    return try text("errors")
  }
}
