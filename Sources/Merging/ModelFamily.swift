public import Checkpoints

/// A base model and the experts that were fine-tuned from it, checked against each other.
///
/// The base's tensors are what is merged. Element types may differ. What an expert does not have
/// name for name is found by rule, and every use of a rule is told in `remarks`.
public struct ModelFamily: Sendable {
  public struct Expert: Sendable {
    public let name: String
    public let source: any TensorSource

    public init(name: String, source: any TensorSource) {
      self.name = name
      self.source = source
    }
  }

  /// How an expert's tensors were taken where they do not match the base's name for name.
  public struct Remark: Sendable, Equatable {
    public enum Rule: Sendable, Equatable {
      /// The expert's names have these words in front, or lack them.
      case prefix(String)
      /// Only the expert has them: they are left out.
      case leftOut
      /// The expert ties them to others, whose values count.
      case tied
      /// The expert does not have them: they count as unchanged.
      case absent
      /// The expert's head has another shape, for other classes: the base's counts.
      case otherHead
    }

    public let expert: String
    public let rule: Rule
    public let tensors: [String]
  }

  public let base: any TensorSource
  public let experts: [Expert]
  public let remarks: [Remark]
  /// For each expert, its tensor for each of the base's; `nil` where the base's counts.
  private let counterparts: [[TensorInfo?]]

  /// - Throws: `MergeError` for a bad list of experts, `CheckpointError` naming the file and the
  ///   tensor that does not fit the base.
  public init(base: any TensorSource, experts: [Expert]) throws {
    guard !experts.isEmpty else { throw MergeError("at least one expert is needed") }
    for (index, expert) in experts.enumerated() {
      guard !expert.name.isEmpty, !expert.name.contains("/") else {
        throw MergeError("the expert name \(quoted(expert.name)) is empty or contains a slash")
      }
      guard !experts[..<index].contains(where: { $0.name == expert.name }) else {
        throw MergeError("two experts are named \(quoted(expert.name))")
      }
    }
    self.base = base
    self.experts = experts
    let matches = try experts.map { try Correspondence(of: $0, to: base) }
    counterparts = matches.map { $0.tensors }
    remarks = matches.flatMap { $0.remarks }
  }

  /// Tensors that only experts have, which a merge leaves out.
  public var leftOut: [(expert: String, tensors: [String])] {
    remarks.filter { $0.rule == .leftOut }.map { ($0.expert, $0.tensors) }
  }

  /// The base first, then the experts: the order of a tile's rows.
  /// - Throws: if a model was written to since it was opened.
  public func checkUnchanged() throws(CheckpointError) {
    for source in sources { try source.checkUnchanged() }
  }

  var sources: [any TensorSource] { [base] + experts.map { $0.source } }

  /// The tensor of this name in the base and every expert; an expert without it has the base's.
  func places(of tensor: TensorInfo) -> [(file: Int, tensor: TensorInfo)] {
    let position = base.manifest.position(of: tensor.name)!
    let own = base.manifest.tensors[position]
    return [(0, own)]
      + counterparts.enumerated().map { expert, tensors in
        tensors[position].map { (expert + 1, $0) } ?? (0, own)
      }
  }

  /// The expert's own tensor for one of the base's, if it has one.
  func counterpart(of name: String, in expert: Int) -> TensorInfo? {
    base.manifest.position(of: name).flatMap { counterparts[expert][$0] }
  }
}

extension ModelFamily.Remark: CustomStringConvertible {
  public var description: String {
    let names =
      tensors.prefix(5).map(quoted).joined(separator: ", ") + (tensors.count > 5 ? ", …" : "")
    let count = tensors.count == 1 ? "1 tensor" : "\(tensors.count) tensors"
    switch rule {
    case .prefix(let prefix):
      return "\(expert) names \(count) with or without \(quoted(prefix)) in front, unlike the base"
    case .leftOut:
      return "\(expert) has \(count) that the base has not; they are left out: \(names)"
    case .tied:
      return "\(expert) ties \(count) to its embedding, which counts for both: \(names)"
    case .absent:
      return "\(expert) lacks \(count) of the base; they count as unchanged: \(names)"
    case .otherHead:
      return "\(expert) has a head of another shape in \(count); the base's counts: \(names)"
    }
  }
}

/// Which of an expert's tensors answers to each of the base's.
private struct Correspondence {
  var tensors: [TensorInfo?] = []
  var remarks: [ModelFamily.Remark] = []

  init(of expert: ModelFamily.Expert, to base: any TensorSource) throws {
    let (own, names) = (expert.source.manifest, base.manifest.tensors.map { $0.name })
    let (rename, prefix) = Self.renaming(names, own)
    var tied: [String] = []
    var absent: [String] = []
    var otherHead: [String] = []
    for tensor in base.manifest.tensors {
      var found = own[rename(tensor.name)]
      if found == nil, let embedding = Self.embedding(tiedTo: tensor, in: own, rename) {
        found = embedding
        tied.append(tensor.name)
      }
      if let candidate = found, candidate.shape != tensor.shape, Self.isHead(tensor.name) {
        found = nil
        otherHead.append(tensor.name)
      } else if let found {
        try Self.check(found, of: expert.source, against: tensor, of: base)
      } else {
        absent.append(tensor.name)
      }
      tensors.append(found)
    }
    guard tensors.contains(where: { $0 != nil }), absent.count <= names.count / 2 else {
      throw CheckpointError(
        file: expert.source.path, tensor: absent.first,
        "is missing, like \(absent.count - 1) others of the \(names.count) tensors in \(base.path)",
        remedy: "an expert must be fine-tuned from the base it is merged with")
    }
    let used = Set(tensors.compactMap { $0?.name } + otherHead.map(rename))
    let leftOut = own.tensors.map { $0.name }.filter { !used.contains($0) }
    if let prefix {
      remarks.append(
        .init(
          expert: expert.name, rule: .prefix(prefix),
          tensors: names.filter { own[rename($0)] != nil && rename($0) != $0 }))
    }
    let rules: [(ModelFamily.Remark.Rule, [String])] = [
      (.tied, tied), (.otherHead, otherHead), (.absent, absent), (.leftOut, leftOut),
    ]
    for (rule, names) in rules where !names.isEmpty {
      remarks.append(.init(expert: expert.name, rule: rule, tensors: names))
    }
  }

  /// How the base's names become the expert's: as they are, or with a first word that a library
  /// puts in front of a model with a head (`bert.`, `model.`) more or less.
  private static func renaming(
    _ names: [String], _ own: Manifest
  ) -> (rename: @Sendable (String) -> String, prefix: String?) {
    func count(_ rename: (String) -> String) -> Int {
      names.count { own[rename($0)] != nil }
    }
    func firstWords(_ names: [String]) -> [String] {
      Set(names.compactMap { $0.split(separator: ".").first.map { "\($0)." } }).sorted()
    }
    var best: (rename: @Sendable (String) -> String, prefix: String?) = ({ $0 }, nil)
    var most = count(best.rename)
    guard most < names.count else { return best }
    for prefix in firstWords(own.tensors.map { $0.name }) {
      let longer = { @Sendable (name: String) in own[prefix + name] != nil ? prefix + name : name }
      if count(longer) > most { (best, most) = ((longer, prefix), count(longer)) }
    }
    for prefix in firstWords(names) {
      let shorter = { @Sendable (name: String) in
        own[name] == nil && name.hasPrefix(prefix) ? String(name.dropFirst(prefix.count)) : name
      }
      if count(shorter) > most { (best, most) = ((shorter, prefix), count(shorter)) }
    }
    return best
  }

  /// The embedding whose values an output layer shares in models that are saved without one.
  private static func embedding(
    tiedTo tensor: TensorInfo, in own: Manifest, _ rename: (String) -> String
  ) -> TensorInfo? {
    let outputs = [
      "lm_head.weight", "embed_tokens.weight", "cls.predictions.decoder.weight",
      "lm_head.decoder.weight", "embed_out.weight",
    ]
    guard outputs.contains(where: { tensor.name == $0 || tensor.name.hasSuffix("." + $0) }) else {
      return nil
    }
    let embeddings = [
      "shared.weight", "model.embed_tokens.weight", "embed_tokens.weight",
      "transformer.wte.weight", "wte.weight", "bert.embeddings.word_embeddings.weight",
      "roberta.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight",
    ]
    return embeddings.compactMap { own[rename($0)] }.first { $0.shape == tensor.shape }
  }

  /// Whether a tensor belongs to what a task puts on top of the model.
  private static func isHead(_ name: String) -> Bool {
    let words = name.lowercased().split(separator: ".")
    let heads = ["head", "heads", "classifier", "score", "qa_outputs", "fc_norm"]
    return words.contains { heads.contains(String($0)) }
  }

  private static func check(
    _ own: TensorInfo, of expert: any TensorSource, against tensor: TensorInfo,
    of base: any TensorSource
  ) throws {
    guard own.shape == tensor.shape else {
      throw CheckpointError(
        file: expert.path, tensor: own.name,
        "has the shape \(own.shapeDescription) but \(tensor.shapeDescription) in \(base.path)",
        remedy: "an expert must be fine-tuned from the base it is merged with")
    }
    guard own.dtype.isArithmetic == tensor.dtype.isArithmetic else {
      throw CheckpointError(
        file: expert.path, tensor: own.name,
        "is \(own.dtype.rawValue) but \(tensor.dtype.rawValue) in \(base.path)")
    }
  }
}
