extension Packing {
  /// Names the parts, writes the recipe and puts the streams into the order of the file.
  mutating func layOut() throws {
    var recipe = Bundle.Recipe(models: [])
    let needsSecond = tensors.contains {
      $0.depth > Bundle.largestDepth(inVersion: 1) || $0.choice.codec == .sparseULP
    }
    recipe.version = needsSecond ? 2 : 1
    var names = PartNames(taken: Set(tensors.map { ExactName($0.fullName) }))
    var parts: [TensorInfo] = []
    var streamsOfPart: [ExactName: [Stream]] = [:]
    var partsOfTensor: [[String]] = []
    var index = 0
    for (name, source) in models {
      let manifest = source.manifest
      var model = Bundle.Recipe.Model(
        name: name, metadata: manifest.safetensorsHeader == nil ? manifest.metadata : [:],
        tensors: [])
      if let header = manifest.safetensorsHeader {
        let name = names.new(model.fullName("#header"))
        model.header = name
        parts.append(try TensorInfo(name: name, dtype: .u8, shape: [header.count]))
        streamsOfPart[ExactName(name)] = [Stream(.bytes(header), .text, length: header.count)]
      }
      for tensor in manifest.tensors {
        let planned = tensors[index]
        var partNames: [String] = []
        if let twin = planned.twin {
          partNames = partsOfTensor[twin]
        } else {
          for (shape, streams) in codedStreams(of: index) {
            let name =
              shape.suffix.isEmpty ? planned.fullName : names.new(planned.fullName + shape.suffix)
            partNames.append(name)
            parts.append(try TensorInfo(name: name, dtype: shape.dtype, shape: shape.shape))
            streamsOfPart[ExactName(name)] = streams
          }
        }
        partsOfTensor.append(partNames)
        model.tensors.append(entry(of: tensor, index, parts: partNames))
        index += 1
      }
      recipe.models.append(model)
    }
    let headerSize = models.reduce(0) { $0 + ($1.source.manifest.safetensorsHeader?.count ?? 0) }
    guard headerSize <= Safetensors.largestHeader else {
      throw CheckpointError(
        file: path,
        "would hold \(headerSize) bytes of headers; the limit is \(Safetensors.largestHeader)",
        remedy: "pack fewer models together")
    }
    let inner = try Safetensors.Layout(
      writing: Manifest(parts, metadata: ["bundle": recipe.json]), path: path)
    let mode: ZstdFrame.Mode = hashesWhileCoding ? .fixed : .text
    streams = [Stream(.bytes(inner.prefix), mode, length: inner.prefix.count)]
    for part in inner.manifest.tensors { streams += streamsOfPart[ExactName(part.name)]! }
    (firstFrames, frames) = ([], [])
    for (index, stream) in streams.enumerated() {
      firstFrames.append(frames.count)
      for (place, size) in stream.sizes.enumerated() { frames.append((index, place, size)) }
    }
  }

  /// The parts of a tensor, each with its streams.
  private func codedStreams(of index: Int) -> [(PartShape, [Stream])] {
    let planned = tensors[index]
    let (finding, choice) = (planned.finding, planned.choice)
    let lengths = choice.sparse.reduce(into: (gaps: 0, values: 0)) {
      $0.gaps += $1.gaps
      $0.values += $1.values
    }
    let shapes = choice.codec.parts(
      of: planned.tensor, sparse: lengths, group: finding.group ?? 1,
      rank: finding.factors?.rank ?? 1)
    var next = 0
    return shapes.map { shape in
      let part = try! TensorInfo(name: "", dtype: shape.dtype, shape: shape.shape)
      let streams = (0..<shape.streams).map { _ in
        defer { next += 1 }
        let content = Content.coded(index, stream: next)
        guard shape.isCutByBlock else {
          return Stream(content, choice.modes[next], length: part.byteCount / shape.streams)
        }
        return Stream(
          content, choice.modes[next],
          sizes: choice.sparse.map { next == 0 ? $0.gaps : $0.values })
      }
      return (shape, streams)
    }
  }

  private func entry(of tensor: TensorInfo, _ index: Int, parts: [String]) -> Bundle.Recipe.Entry {
    let planned = tensors[index]
    // A twin is coded as its elder, in the same parts.
    let coded = tensors[planned.twin ?? index]
    let defaults = coded.choice.codec.suffixes.map { planned.fullName + $0 }
    var entry = Bundle.Recipe.Entry(
      tensor: tensor, codec: coded.choice.codec, checksum: planned.finding.checksum ?? 0,
      parts: parts == defaults ? [] : parts, group: coded.finding.group,
      error: coded.finding.error.map { "\($0)" })
    if coded.choice.rotation != 1 { entry.rotation = coded.choice.rotation }
    if let candidate = coded.difference?.candidate {
      entry.reference =
        candidate.position.map { .inside(tensors[$0].fullName) }
        ?? .base(candidate.tensor.name, checksum: candidate.checksum ?? 0)
    }
    return entry
  }
}

/// Names for inner tensors that no tensor has.
private struct PartNames {
  var taken: Set<ExactName>

  /// The wanted name, or one like it.
  mutating func new(_ wanted: String) -> String {
    var name = wanted
    while !taken.insert(ExactName(name)).inserted { name += "#" }
    return name
  }
}
