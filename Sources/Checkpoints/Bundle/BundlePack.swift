extension Bundle {
  /// Packs a checkpoint; a bundle of a family becomes one again. The same input gives the same bytes whatever `workers` and `memory` are.
  ///
  /// - Parameters:
  ///   - base: a model that stays outside: tensors may be kept as differences from its own.
  ///   - lossy: how to code matrices if not exactly; other tensors stay exact.
  ///   - memory: bytes that buffers may take; fewer workers run if it is too little for all.
  ///     One runs however little it is.
  ///   - isSynced: as in `WritingOptions`.
  public static func pack(
    _ source: any TensorSource, against base: (any TensorSource)? = nil, to path: String,
    lossy: Lossy? = nil, workers: Int = 2, memory: Int = 1 << 30,
    synced isSynced: Bool = true
  ) throws {
    let models = (source as? BundleSource)?.family.map { $0.map { ($0.name, $0.source) } }
    try pack(
      models ?? [("", source)], against: base, to: path, lossy: lossy, workers, memory,
      synced: isSynced)
  }

  /// Packs a family of models, each under its name. Tensors may be kept as differences from
  /// those of the models before: put the base first.
  public static func pack(
    models: [(name: String, source: any TensorSource)], against base: (any TensorSource)? = nil,
    to path: String, lossy: Lossy? = nil, workers: Int = 2, memory: Int = 1 << 30,
    synced isSynced: Bool = true
  ) throws {
    for (index, model) in models.enumerated() {
      guard !model.name.isEmpty, !model.name.contains("/"),
        !models[..<index].contains(where: { ExactName($0.name) == ExactName(model.name) })
      else {
        throw CheckpointError(
          file: path, "cannot hold a model named \(quoted(model.name))",
          remedy: "give each model its own name, without slashes")
      }
    }
    try pack(models, against: base, to: path, lossy: lossy, workers, memory, synced: isSynced)
  }

  private static func pack(
    _ models: [(name: String, source: any TensorSource)], against base: (any TensorSource)?,
    to path: String, lossy: Lossy?, _ workers: Int, _ memory: Int, synced isSynced: Bool
  ) throws {
    let packing = try Packing(
      models, against: base, path, lossy: lossy, workers: workers, memory: memory)
    let affordable = max(1, min(workers, memory / packing.memoryPerWorker))
    // What has a checksum of its own was compared in the survey.
    for (_, source) in models {
      try source.refuseDamage(of: source.unrecorded, workers: workers)
    }
    try packing.write(
      workers: affordable, waiting: max(0, memory - affordable * packing.memoryPerWorker),
      synced: isSynced)
  }
}
