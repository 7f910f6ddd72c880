public import Checkpoints

/// What a merge is to make, as its user wrote it: mergekit's recipe language.
///
/// A recipe is checked as far as it can be without its models; `MergePlan` does the rest.
public struct Recipe: Sendable {
  /// A model among the inputs of the whole merge or of a slice.
  public struct Source: Sendable {
    public var model: String
    /// The layers that are taken, in a slice.
    public var layers: Range<Int>?
    public var parameters: Parameters
    public var line: Int
  }

  /// Layers that are merged of the same number of layers of each source.
  public struct Slice: Sendable {
    public var sources: [Source]
    public var baseModel: String?
    public var parameters: Parameters
    public var line: Int
  }

  public enum Inputs: Sendable {
    case models([Source])
    case slices([Slice])
  }

  /// Where the output's tokenizer comes from.
  public enum Tokenizer: Sendable, Equatable {
    case base
    case model(String)
  }

  public var file: String
  public var method: MergeMethod
  public var inputs: Inputs
  public var baseModel: String?
  public var parameters: Parameters
  /// How task vectors are cleaned before the method sees them.
  public var cleaning: Cleaning?
  /// Where the recipe asks for that.
  var cleaningLine = 0
  /// Inputs are rounded to it before the arithmetic.
  public var dtype: DType?
  public var outputType: DType?
  public var tokenizer: Tokenizer?
  /// A template, or the name of one: `chatml`, or `auto` for the one that most models have.
  public var chatTemplate: String?

  /// Every model that occurs, each once, in the order of its first mention; the base last if it
  /// is mentioned nowhere else.
  public var models: [String] {
    var models: [String] = []
    let sources: [Source] =
      switch inputs {
      case .models(let sources): sources
      case .slices(let slices): slices.flatMap { $0.sources }
      }
    var bases = [baseModel]
    if case .slices(let slices) = inputs { bases += slices.map { $0.baseModel } }
    for model in sources.map({ $0.model }) + bases.compactMap({ $0 })
    where !models.contains(model) {
      models.append(model)
    }
    return models
  }
}

// MARK: - Reading

extension Recipe {
  private static let keys = [
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "task_vectors",
    "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template",
  ]

  /// - Throws: `RecipeError` with the line of what is wrong.
  public init(_ root: RecipeNode, file: String) throws {
    let reader = RecipeReader(file: file)
    let keys = try reader.mapping(root, "a recipe", keys: Recipe.keys)
    self.file = file
    guard let methodNode = keys["merge_method"] else {
      throw reader.error(root, "the recipe has no merge_method")
    }
    let name = try reader.text(methodNode, "merge_method")
    guard let method = MergeMethod[name] else {
      throw reader.error(
        methodNode, "there is no method \(quoted(name))",
        remedy: nearest(name, among: MergeMethod.all.map { $0.name }).map { "did you mean \($0)?" }
          ?? "'smelt methods' lists them")
    }
    self.method = method
    if let modules = keys["modules"] {
      throw reader.error(
        modules, "models of several parts (modules) are not supported",
        remedy: "merge each part by a recipe of its own")
    }
    inputs = try Recipe.inputs(keys, root, reader, method)
    baseModel = try keys["base_model"].map { node in try reader.model(node) }
    parameters =
      try keys["parameters"].map { node in try reader.parameters(node, of: method) } ?? Parameters()
    cleaning = try keys["task_vectors"].map { node in try reader.cleaning(node) }
    cleaningLine = keys["task_vectors"]?.line ?? 0
    if let node = keys["task_vectors"], method.operand == .weights {
      let cleanable = MergeMethod.all.filter { $0.operand != .weights }.map { $0.name }
      throw reader.error(
        node, "\(method.name) works on whole weights and has no task vectors to clean",
        remedy: "methods that have them are \(cleanable.joined(separator: ", "))")
    }
    dtype = try keys["dtype"].map { node in try reader.dtype(node) }
    outputType = try keys["out_dtype"].map { node in try reader.dtype(node) }
    tokenizer = try Recipe.tokenizer(keys, reader)
    chatTemplate = try keys["chat_template"].map { node in try reader.chatTemplate(node) }
    if method.base == .required, baseModel == nil {
      let slicesHaveBases =
        if case .slices(let slices) = inputs { slices.allSatisfy { $0.baseModel != nil } } else {
          false
        }
      guard slicesHaveBases else {
        throw reader.error(
          methodNode, "\(method.name) needs a base_model",
          remedy: "name the model the others were fine-tuned from")
      }
    }
  }

  private static func inputs(
    _ keys: [String: RecipeNode], _ root: RecipeNode, _ reader: RecipeReader, _ method: MergeMethod
  ) throws -> Inputs {
    switch (keys["models"], keys["slices"]) {
    case (let models?, nil):
      let sources = try reader.sequence(models, "models").map {
        try reader.source($0, of: method, inSlice: false)
      }
      guard !sources.isEmpty else { throw reader.error(models, "models is empty") }
      return .models(sources)
    case (nil, let slices?):
      let slices = try reader.sequence(slices, "slices").map {
        try reader.slice($0, of: method)
      }
      guard !slices.isEmpty else { throw reader.error(root, "slices is empty") }
      return .slices(slices)
    case (.some, let slices?):
      throw reader.error(slices, "the recipe has models and slices", remedy: "keep one of them")
    case (nil, nil): throw reader.error(root, "the recipe has neither models nor slices")
    }
  }

  private static func tokenizer(_ keys: [String: RecipeNode], _ reader: RecipeReader) throws
    -> Tokenizer?
  {
    guard keys["tokenizer"] == nil || keys["tokenizer_source"] == nil else {
      throw reader.error(
        keys["tokenizer"]!, "the recipe has tokenizer and tokenizer_source",
        remedy: "keep one of them")
    }
    if let node = keys["tokenizer_source"] { return try reader.tokenizerSource(node) }
    guard let node = keys["tokenizer"] else { return nil }
    let parts = try reader.mapping(
      node, "tokenizer", keys: ["source", "tokens", "pad_to_multiple_of"])
    for unsupported in ["tokens", "pad_to_multiple_of"] {
      if let node = parts[unsupported] {
        throw reader.error(
          node, "tokenizer.\(unsupported) is not supported",
          remedy: "change the models' vocabularies before they are merged")
      }
    }
    return try parts["source"].map { node in try reader.tokenizerSource(node) }
  }
}

extension RecipeReader {
  fileprivate func source(_ node: RecipeNode, of method: MergeMethod, inSlice: Bool) throws
    -> Recipe.Source
  {
    let keys = try mapping(
      node, inSlice ? "a slice's source" : "a model of the recipe",
      keys: inSlice ? ["model", "layer_range", "parameters"] : ["model", "parameters"])
    guard let modelNode = keys["model"] else { throw error(node, "model is missing") }
    var layers: Range<Int>?
    if inSlice {
      guard let rangeNode = keys["layer_range"] else { throw error(node, "layer_range is missing") }
      let ends = try sequence(rangeNode, "layer_range").map { try integer($0, "a layer") }
      guard ends.count == 2, ends[0] >= 0, ends[0] < ends[1] else {
        throw error(
          rangeNode, "layer_range must be two rising layer numbers",
          remedy: "[0, 16] takes layers 0 to 15")
      }
      layers = ends[0]..<ends[1]
    }
    return Recipe.Source(
      model: try model(modelNode), layers: layers,
      parameters: try keys["parameters"].map {
        try parameters($0, of: method, isOfModel: true)
      } ?? Parameters(), line: node.line)
  }

  fileprivate func slice(_ node: RecipeNode, of method: MergeMethod) throws -> Recipe.Slice {
    let keys = try mapping(
      node, "a slice", keys: ["sources", "base_model", "parameters", "residual_weight"])
    if let node = keys["residual_weight"] {
      throw error(node, "residual_weight is not supported", remedy: "mergekit ignores it as well")
    }
    guard let sourcesNode = keys["sources"] else { throw error(node, "sources is missing") }
    let sources = try sequence(sourcesNode, "sources").map {
      try source($0, of: method, inSlice: true)
    }
    guard let count = sources.first?.layers?.count else {
      throw error(sourcesNode, "sources is empty")
    }
    guard sources.allSatisfy({ $0.layers?.count == count }) else {
      throw error(sourcesNode, "the layer ranges of one slice have different lengths")
    }
    return Recipe.Slice(
      sources: sources, baseModel: try keys["base_model"].map { try model($0) },
      parameters: try keys["parameters"].map { try parameters($0, of: method) } ?? Parameters(),
      line: node.line)
  }

  fileprivate func model(_ node: RecipeNode) throws -> String {
    guard case .mapping = node.content else {
      let text = try text(node, "a model")
      guard !text.contains("+") else {
        throw error(
          node, "\(quoted(text)) names a LoRA, which is not supported",
          remedy: "merge it into its base first")
      }
      return text
    }
    let keys = try mapping(node, "a model", keys: ["model", "lora", "override_architecture"])
    if let node = keys["lora"] {
      throw error(node, "lora is not supported", remedy: "merge it into its base first")
    }
    if let node = keys["override_architecture"] {
      throw error(
        node, "override_architecture is not supported",
        remedy: "leave it out: tensors are matched by their names")
    }
    guard let inner = keys["model"] else { throw error(node, "model is missing") }
    guard case .mapping = inner.content else { return try text(inner, "a model") }
    let parts = try mapping(inner, "a model", keys: ["path", "revision"])
    if let node = parts["revision"] {
      throw error(node, "a revision is not supported", remedy: "name the folder it is in")
    }
    guard let path = parts["path"] else { throw error(inner, "path is missing") }
    return try text(path, "a path")
  }

  fileprivate func dtype(_ node: RecipeNode) throws -> DType {
    let names: [String: DType] = [
      "bfloat16": .bf16, "float16": .f16, "float32": .f32, "float64": .f64, "bf16": .bf16,
      "fp16": .f16, "half": .f16, "float": .f32, "fp32": .f32, "double": .f64,
    ]
    let name = try text(node, "a dtype")
    let short = name.hasPrefix("torch.") ? String(name.dropFirst(6)) : name
    guard let type = names[short] else {
      throw error(
        node, "\(quoted(name)) is not a type that can be computed with",
        remedy: "known are bfloat16, float16, float32, float64")
    }
    return type
  }

  /// A template itself, which has braces, or the name of one.
  fileprivate func chatTemplate(_ node: RecipeNode) throws -> String {
    let template = try text(node, "chat_template")
    guard template.contains("{") || ["auto", "chatml"].contains(template) else {
      throw error(
        node, "chat_template \(quoted(template)) is not known",
        remedy:
          "write the template itself, auto, or chatml, or leave it out to keep the model's own")
    }
    return template
  }

  fileprivate func tokenizerSource(_ node: RecipeNode) throws -> Recipe.Tokenizer {
    if case .scalar("union", _) = node.content {
      throw error(
        node, "a tokenizer of the union of all vocabularies is not supported",
        remedy: "use base or the path of a model")
    }
    if case .scalar("base", _) = node.content { return .base }
    return .model(try model(node))
  }
}
