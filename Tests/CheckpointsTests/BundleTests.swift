import Foundation
import Synchronization
import TestSupport
import Testing

@testable import Checkpoints

typealias Bundle = Checkpoints.Bundle

@Suite struct `A bundle` {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  @Test func `gives back the very file that was packed`() throws {
    let source = try writeSafetensors(
      everyKind(), metadata: ["format": "pt", "bundle": "é\n\"\\"], to: folder("in.safetensors"))

    try Bundle.pack(source, to: folder("b.safetensors.zst"))
    let bundle = try Checkpoint.open(folder("b.safetensors.zst"))
    try Checkpoint.write(bundle, to: folder("out.safetensors"), workers: 3)

    #expect(bundle.manifest.metadata == source.manifest.metadata)
    #expect(
      try contents(of: folder("out.safetensors")) == contents(of: folder("in.safetensors")))
    try BundleSource(folder("b.safetensors.zst")).verify()
  }

  @Test(arguments: [2, 5])
  func `has the same bytes whatever the number of workers and the memory`(workers: Int) throws {
    let near = neighbours(1_100_000)
    let source = try writeSafetensors(
      [
        .weights("a", .bf16, [1_060_000], seed: 1), .weights("b", .f32, [3000], seed: 2),
        .noise("c", .u8, [1_500_000], seed: 3), .pruned("d", .bf16, [1_100_000], seed: 4),
        near.0, near.1,
      ], to: folder("in.safetensors"))
    // Without memory for frames that wait, each block is coded again for each of its planes.
    try Bundle.pack(source, to: folder("one.safetensors.zst"), workers: 1, memory: 0)
    try Bundle.pack(
      source, to: folder("many.safetensors.zst"), workers: workers, memory: 200 << 20)
    #expect(
      try contents(of: folder("one.safetensors.zst"))
        == contents(of: folder("many.safetensors.zst")))
    try expectUnpacks(folder("many.safetensors.zst"), as: source)
    let codecs = try BundleSource(folder("many.safetensors.zst")).recipe.models[0].tensors
      .map { "\($0.tensor.name) \($0.codec)" }
    #expect(Set(codecs).isSuperset(of: ["d sparse", "experts.1.w ulp"]))
  }

  /// They are hashed while they are coded: with the checksums that small ones get beforehand, and
  /// damage in the model or in the base outside is found.
  @Test(arguments: [1, 3])
  func `large tensors are read once`(workers: Int) throws {
    let (first, second) = neighbours(1_100_000)
    func write(_ name: String, _ samples: [Sample]) throws -> any TensorSource {
      let sink = try Checkpoint.create(folder(name), Manifest(samples.map { $0.tensor }))
      for sample in samples {
        try sink.write(sample.bytes.span.bytes, of: sample.tensor, at: 0)
      }
      try sink.finish()
      return try Checkpoint.open(folder(name))
    }
    let base = try write("base.safetensors", [Sample("w", .bf16, [1_100_000], first.bytes)])
    let samples = [
      Sample("w", .bf16, [1_100_000], second.bytes),
      .noise("x", .u8, [2_500_000], seed: 3), .noise("y", .u8, [2_500_000], seed: 3),
      .weights("z", .f32, [700_000], seed: 4),
    ]
    let source = try write("in.safetensors", samples)
    let path = folder("b.safetensors.zst")
    try Bundle.pack(source, against: base, to: path, workers: workers)
    try expectUnpacks(path, as: source, base: base)
    let recipe = try BundleSource(path, base: base).recipe
    for entry in recipe.models[0].tensors {
      let bytes = try source.bytes(of: entry.tensor)
      #expect(entry.checksum == xxh3(bytes.span.bytes))
    }
    #expect(
      recipe.models[0].tensors.map { "\($0.tensor.name) \($0.codec) \($0.parts)" }
        == ["z planes []", "w ulp []", "x raw []", "y raw [\"x\"]"])
    #expect(
      recipe.models[0].tensors[1].reference == .base("w", checksum: xxh3(first.bytes.span.bytes)))

    for name in ["in.safetensors", "base.safetensors"] {
      let whole = try Data(contentsOf: URL(filePath: folder(name)))
      var damaged = whole
      damaged[whole.count - 1] ^= 1
      try damaged.write(to: URL(filePath: folder(name)))
      let error = try #require(throws: CheckpointError.self) {
        try Bundle.pack(
          Checkpoint.open(folder("in.safetensors")),
          against: Checkpoint.open(folder("base.safetensors")), to: folder("c.safetensors.zst"),
          workers: workers)
      }
      #expect(error.file == folder(name) && error.tensor == (name == "in.safetensors" ? "y" : "w"))
      #expect(error.problem == "is not what was written: its checksum differs")
      try whole.write(to: URL(filePath: folder(name)))
    }
    #expect(try folder.names.contains { $0.contains("c.safetensors") } == false)
  }

  /// Its ninth byte, where a safetensors header begins, may be a brace.
  @Test func `is not taken for a safetensors file`() {
    let beginning: [UInt8] = [0x28, 0xB5, 0x2F, 0xFD, 0x64, 0x80, 0x80, 0x3D, 0x7B, 0x00]
    let formats = Checkpoint.formats.filter { $0.recognises(beginning) }
    #expect(formats.map { $0.name } == ["bundle"])
    #expect(Safetensors.recognises([2, 0, 0, 0, 0, 0, 0, 0, 0x7B, 0x7D]))
  }

  /// Its own bytes are read once for each plane; what the second reading finds is compared too.
  @Test(arguments: [3000, 1_100_000])
  func `a tensor that changes between two readings is refused`(count: Int) throws {
    let path = folder("in.safetensors")
    try writeSafetensors([.weights("w", .bf16, [count], seed: 1)], to: path)
    let source = try Restless(Safetensors.open(path))
    let error = try #require(throws: CheckpointError.self) {
      try Bundle.pack(source, to: folder("b.safetensors.zst"))
    }
    #expect(
      error.description
        == "\(path): tensor \"w\": changed while it was being read; pack it again")
    #expect(try folder.names == ["in.safetensors"])
  }

  /// What cannot be kept as 32-bit floats, or would leave its type's range, is kept exactly.
  @Test(arguments: [Bundle.Lossy.int8, .int4, .sign1])
  func `extremes stay exact in a lossy bundle`(lossy: Bundle.Lossy) throws {
    var generator = SeededGenerator(seed: 3)
    let tiny = (0..<4096).map { _ in Double(generator.normal(1)) * 1e-50 }
    let mask = (0..<64 * 64).map { $0 % 64 > $0 / 64 ? -Float.greatestFiniteMagnitude : 0 }
    let samples = [
      Sample("tiny", .f64, [64, 64], tiny.withUnsafeBytes { Array($0) }),
      Sample("mask", .f32, [64, 64], values: mask),
      .weights("w", .f32, [64, 64], seed: 1),
    ]
    let source = try writeSafetensors(samples, to: folder("in.safetensors"))
    let path = folder("b.safetensors.zst")
    try Bundle.pack(source, to: path, lossy: lossy)
    let bundle = try BundleSource(path)
    try bundle.verify()
    for sample in samples {
      let tensor = try bundle.tensor(sample.tensor.name)
      let isExact = try bundle.bytes(of: tensor) == sample.bytes
      let error = bundle.error(of: tensor)
      #expect(isExact == ((error ?? 0) == 0), "\(sample.tensor.name)")
      #expect(error ?? 0 < 1 && (sample.tensor.name != "tiny" || error == nil))
    }
    #expect(try bundle.error(of: bundle.tensor("w")) != nil)
  }

  @Test func `takes its tensors in any order as well`() throws {
    let samples = everyKind()
    let path = folder("b.safetensors.zst")
    let sink = try Checkpoint.create(
      path, Manifest(samples.map { $0.tensor }, metadata: ["a": "b"]))
    for sample in samples.reversed() {
      try sink.write(sample.bytes.span.bytes, of: sample.tensor, at: 0)
    }
    try sink.finish()
    let bundle = try Checkpoint.open(path)
    for sample in samples {
      #expect(try bundle.bytes(of: bundle.tensor(sample.tensor.name)) == sample.bytes)
    }
    #expect(bundle.manifest.metadata == ["a": "b", "format": "pt"])
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path).count == 1)
  }

  @Test func `reads any range of any tensor`() throws {
    let samples: [Sample] = [
      .weights("planes", .bf16, [1_060_000], seed: 1),
      .pruned("sparse", .f32, [1_060_000], seed: 2), .noise("raw", .u16, [700_000], seed: 3),
    ]
    let source = try writeSafetensors(samples, to: folder("in.safetensors"))
    try Bundle.pack(source, to: folder("b.safetensors.zst"))
    let bundle = try BundleSource(folder("b.safetensors.zst"))
    let seed = UInt64.random(in: 0...UInt64.max)
    var generator = SeededGenerator(seed: seed)
    for _ in 0..<30 {
      let sample = samples.randomElement(using: &generator)!
      let begin = Int.random(in: 0..<sample.bytes.count, using: &generator)
      let count = Int.random(
        in: 1...min(sample.bytes.count - begin, 300_000), using: &generator)
      var read = [UInt8](repeating: 0, count: count)
      var span = read.mutableSpan
      var raw = span.mutableBytes
      try bundle.read(bundle.tensor(sample.tensor.name), at: begin, into: &raw)
      #expect(
        read.elementsEqual(sample.bytes[begin..<begin + count]),
        "seed \(seed): \(sample.tensor.name) \(begin) \(count)")
    }
  }

  @Test func `reads one tensor by touching only its frames`() throws {
    let samples = (0..<20).map {
      Sample.weights("layer.\($0)", .bf16, [100, 500], seed: UInt64($0))
    }
    let source = try writeSafetensors(samples, to: folder("in.safetensors"))
    try Bundle.pack(source, to: folder("b.safetensors.zst"))
    let bundle = try BundleSource(folder("b.safetensors.zst"))
    let opening = bundle.bytesRead
    let bytes = try bundle.bytes(of: bundle.tensor("layer.7"))
    let read = bundle.bytesRead - opening
    #expect(bytes == samples[7].bytes)
    // Two thirds of 100 000 bytes, of a file of twenty such tensors.
    #expect(opening < 4000)
    #expect((60_000..<70_000).contains(read), "\(read) bytes read")
  }

  @Test func `stores tensors of the same bytes once`() throws {
    let tensor = Sample.noise("a", .f32, [50_000], seed: 1)
    let source = try writeSafetensors(
      [
        tensor, Sample("b", .f32, [50_000], tensor.bytes),
        Sample("c", .f32, [50_000], tensor.bytes),
      ], to: folder("in.safetensors"))
    try Bundle.pack(source, to: folder("b.safetensors.zst"))
    #expect(try contents(of: folder("b.safetensors.zst")).count < 210_000)
    try expectUnpacks(folder("b.safetensors.zst"), as: source)
  }

  @Test(arguments: [nil, Bundle.Lossy.int8, .sign1])
  func `stores tensors of the same bytes once, whatever their codec`(lossy: Bundle.Lossy?) throws {
    let tensor = Sample.weights("a", .bf16, [256, 128], seed: 1)
    let source = try writeSafetensors(
      [
        tensor, Sample("b", .bf16, [256, 128], tensor.bytes),
        // Another shape: what is lossy looks at rows.
        Sample("c", .bf16, lossy == nil ? [128, 256] : [256, 128], tensor.bytes),
      ], to: folder("in.safetensors"))
    try Bundle.pack(source, to: folder("b.safetensors.zst"), lossy: lossy)
    let bundle = try BundleSource(folder("b.safetensors.zst"))
    try bundle.verify()
    let tensors = bundle.recipe.models[0].tensors
    #expect(Set(tensors.dropFirst().map { $0.parts }).count == 1)
    #expect(tensors[1].parts.first?.hasPrefix("a") == true)
    let first = try bundle.bytes(of: bundle.tensor("a"))
    for name in ["b", "c"] { #expect(try bundle.bytes(of: bundle.tensor(name)) == first) }
    if lossy == nil { try expectUnpacks(folder("b.safetensors.zst"), as: source) }
  }

  @Test func `decodes a difference from a tensor that is mostly zeros`() throws {
    let pruned = Sample.pruned("a.0", .i32, [1_060_000], seed: 1)
    let near = pruned.bytes.indices.map { pruned.bytes[$0] ^ ($0 % 4000 == 0 ? 3 : 0) }
    let source = try writeSafetensors(
      [pruned, Sample("a.1", .i32, [1_060_000], near)], to: folder("in.safetensors"))
    try Bundle.pack(source, to: folder("b.safetensors.zst"))
    let bundle = try BundleSource(folder("b.safetensors.zst"))
    #expect(bundle.recipe.models[0].tensors.map { $0.codec } == [.sparse, .xor])
    try bundle.verify()
    try expectUnpacks(folder("b.safetensors.zst"), as: source)
  }

  @Test(arguments: [DType.bf16, .f16, .f32, .f64, .f8E4M3])
  func `keeps a model as its difference from another`(dtype: DType) throws {
    let (base, tuned) = try family(dtype)
    try Bundle.pack(
      models: [("base", base), ("tuned", tuned)], to: folder("b.safetensors.zst"))
    let bundle = try BundleSource(folder("b.safetensors.zst"))
    #expect(bundle.models == ["base", "tuned"])
    #expect(
      bundle.manifest.tensors.map { $0.name } == ["base/w", "base/odd", "tuned/w", "tuned/odd"])
    try bundle.verify()
    for (name, source) in [("base", base), ("tuned", tuned)] {
      try Checkpoint.write(bundle.model(name), to: folder("out.safetensors"))
      #expect(try contents(of: folder("out.safetensors")) == contents(of: source.path))
    }
    #expect(throws: CheckpointError.self) { try bundle.model("other") }
    let member = try Checkpoint.open(folder("b.safetensors.zst/tuned"))
    #expect(try member.bytes(of: member.tensor("w")) == tuned.bytes(of: tuned.tensor("w")))
    #expect(try Checkpoint.files(of: folder("b.safetensors.zst/tuned")) == [bundle.path])
    #expect(
      throws: CheckpointError(
        file: bundle.path, "holds no model \"other\"", remedy: "it holds \"base\", \"tuned\"")
    ) { try Checkpoint.open(folder("b.safetensors.zst/other")) }
  }

  @Test func `against a base outside names it and refuses another`() throws {
    let (base, tuned) = try family(.bf16)
    let path = folder("b.safetensors.zst")
    try Bundle.pack(tuned, against: base, to: path)
    #expect(try contents(of: path).count < contents(of: tuned.path).count / 2)

    try expectUnpacks(path, as: tuned, base: base)
    let alone = try BundleSource(path)
    #expect(
      throws: CheckpointError(
        file: path, tensor: "w",
        "is kept as a difference from a base model that is not in the bundle",
        remedy: "name the base after an @, as in b.safetensors.zst@BASE")
    ) { try alone.bytes(of: alone.tensor("w")) }
    let bare = try writeSafetensors(
      [.weights("v", .bf16, [200, 200], seed: 1)], to: folder("bare.safetensors"))
    for wrong in [tuned, bare] {
      #expect(
        throws: CheckpointError(
          file: wrong.path, tensor: "w", "is not what \(path) was packed against",
          remedy: "name the base that it was packed with")
      ) { try BundleSource(path, base: wrong) }
    }
  }

  @Test func `opens with the base after an at sign`() throws {
    let (base, tuned) = try family(.bf16)
    let path = folder("b.safetensors.zst")
    try Bundle.pack(tuned, against: base, to: path)
    let both = "\(path)@\(base.path)"
    let opened = try Checkpoint.open(both)
    #expect(try opened.bytes(of: opened.tensor("w")) == tuned.bytes(of: tuned.tensor("w")))
    #expect(try Checkpoint.files(of: both) == [path, base.path])
    // What another bundle holds may be the base too.
    let family = folder("family.safetensors.zst")
    try Bundle.pack(models: [("one", base), ("two", tuned)], to: family)
    let again = try Checkpoint.open("\(path)@\(family)/one")
    #expect(try again.bytes(of: again.tensor("w")) == tuned.bytes(of: tuned.tensor("w")))
    #expect(throws: CheckpointError.self) { try Checkpoint.open("\(path)@\(tuned.path)") }
    // A file of that name is itself.
    try FileManager.default.copyItem(atPath: base.path, toPath: folder("a.safetensors.zst@b"))
    #expect(try Checkpoint.open(folder("a.safetensors.zst@b")).manifest.tensors.count == 2)
  }

  @Test(arguments: [3, 4])
  func `keeps an expert as its difference from the nearest of all before it`(count: Int) throws {
    // The last is like the second, and no other like any.
    var samples = (0..<count).map { Sample.weights("w", .bf16, [150, 150], seed: UInt64($0)) }
    var generator = SeededGenerator(seed: 9)
    samples[count - 1] = Sample(
      "w", .bf16, [150, 150],
      values: Array(samples[1].values.map { $0 + generator.normal(0.0001) }))
    let path = folder("b.safetensors.zst")
    let models = try samples.enumerated().map {
      (
        name: "e\($0)",
        source: try writeSafetensors([$1], to: folder("e\($0).safetensors")) as any TensorSource
      )
    }
    try Bundle.pack(models: models, to: path)
    let bundle = try BundleSource(path)
    try bundle.verify()
    let references = bundle.recipe.models.map { $0.tensors[0].reference }
    #expect(references.dropLast().allSatisfy { $0 == nil })
    #expect(references.last == .inside("e1/w"))
    #expect(bundle.recipe.version == 1)
  }

  @Test func `finds the nearest among many experts`() throws {
    var samples = (0..<12).map {
      Sample.weights("layers.3.experts.\($0).w", .f32, [100, 90], seed: UInt64($0))
    }
    var generator = SeededGenerator(seed: 9)
    samples.append(
      Sample(
        "layers.3.experts.12.w", .f32, [100, 90],
        values: samples[7].values.map { $0 + generator.normal(0.00001) }))
    let source = try writeSafetensors(samples, to: folder("in.safetensors"))
    try Bundle.pack(source, to: folder("b.safetensors.zst"))
    let bundle = try BundleSource(folder("b.safetensors.zst"))
    let last = bundle.recipe.models[0].tensors.first { $0.tensor.name == samples[12].tensor.name }
    #expect(last?.reference == .inside(samples[7].tensor.name))
    try expectUnpacks(folder("b.safetensors.zst"), as: source)
  }

  @Test func `differences from differences are rows of three at most`() throws {
    var generator = SeededGenerator(seed: 3)
    var values = (0..<30_000).map { _ in generator.normal(0.02) }
    var models: [(name: String, source: any TensorSource)] = []
    for index in 0..<7 {
      let source = try writeSafetensors(
        [Sample("w", .bf16, [30_000], values: values)], to: folder("m\(index).safetensors"))
      models.append(("m\(index)", source))
      values = values.map { $0 + generator.normal(0.0002) }
    }
    let path = folder("b.safetensors.zst")
    try Bundle.pack(models: models, to: path)
    let bundle = try BundleSource(path)
    try bundle.verify()
    #expect(bundle.recipe.version == 2)
    let file = try BundleFile(path, base: nil)
    #expect(file.tensors.map { $0.depth }.max() == 3)
    for (name, source) in models {
      let model = try bundle.model(name)
      #expect(try model.bytes(of: model.tensor("w")) == source.bytes(of: source.tensor("w")))
    }
    // Outside the first, the same; the others need the base through a row.
    try Bundle.pack(models: Array(models.dropFirst()), against: models[0].source, to: path)
    let outside = try BundleSource(path, base: models[0].source)
    try outside.verify()
    let wrong = try BundleFile(path, base: nil)
    #expect(throws: CheckpointError.self) {
      try wrong.base.prove(for: wrong.withReferences([3]), workers: 1)
    }
  }

  @Test(arguments: [DType.bf16, .f32, .f64])
  func `keeps few changes as the places and sizes of steps`(dtype: DType) throws {
    var generator = SeededGenerator(seed: 4)
    let values = (0..<1_060_000).map { _ in generator.normal(0.02) }
    // Every twelfth is changed, and in the last block none.
    let changed = values.indices.map { i in
      i % 12 == 0 && i < 1 << 20 ? values[i] + generator.normal(0.002) : values[i]
    }
    let models = try [("base", values), ("tuned", changed)].map { name, values in
      (
        name: name,
        source: try writeSafetensors(
          [Sample("w", dtype, [1_060_000], values: values)], to: folder("\(name).safetensors"))
          as any TensorSource
      )
    }
    let path = folder("b.safetensors.zst")
    try Bundle.pack(models: models, to: path)
    let bundle = try BundleSource(path)
    try bundle.verify()
    #expect(bundle.recipe.models.map { $0.tensors[0].codec } == [.planes, .sparseULP])
    #expect(bundle.recipe.version == 2)
    try Checkpoint.write(bundle.model("tuned"), to: folder("out.safetensors"))
    #expect(try contents(of: folder("out.safetensors")) == contents(of: models[1].source.path))
    // Outside, it needs the base.
    try Bundle.pack(models[1].source, against: models[0].source, to: path)
    try expectUnpacks(path, as: models[1].source, base: models[0].source)
  }

  @Test func `of a family is packed as a family again`() throws {
    let (base, tuned) = try family(.bf16)
    let paths = [folder("b.safetensors.zst"), folder("again.safetensors.zst")]
    try Bundle.pack(models: [("base", base), ("tuned", tuned)], to: paths[0])
    try Bundle.pack(BundleSource(paths[0]), to: paths[1])
    #expect(try contents(of: paths[0]) == contents(of: paths[1]))
    // One model of it, or some tensors, are a checkpoint.
    for part in [
      try BundleSource(paths[0]).model("tuned"),
      try BundleSource(paths[0]).selecting { $0.name == "tuned/w" },
    ] {
      try Bundle.pack(part, to: paths[1])
      #expect(try BundleSource(paths[1]).models == [""])
    }
  }

  @Test(arguments: [DType.bf16, .f16], [1, 7, 8, 1000, 16_384, 100_003, 1 << 20])
  func `sorts steps by wide registers as by a plain loop`(dtype: DType, count: Int) throws {
    guard Steps.splits(2) else { return }
    // Weights, any bits at all, and few bits that repeat.
    var generator = SeededGenerator(seed: UInt64(count))
    let others = (0..<3).map { kind -> [UInt8] in
      switch kind {
      case 0: Sample.weights("w", dtype, [count], seed: 1).bytes
      case 1: (0..<2 * count).map { _ in UInt8.random(in: 0...255, using: &generator) }
      default: (0..<2 * count).map { _ in UInt8.random(in: 0...255, using: &generator) & 0x81 }
      }
    }
    let blank = { PinnedBytes(count: 2 * count + 64) }
    let scratch = PinnedBytes(count: Steps.scratch)
    for other in others {
      let mine = other.map { UInt8.random(in: 0..<4, using: &generator) == 0 ? $0 ^ 3 : $0 }
      let (elements, reference, codes, planes) = (blank(), blank(), blank(), blank())
      elements.bytes.copyBytes(from: mine)
      reference.bytes.copyBytes(from: other)
      Steps.difference(
        of: count, width: 2, UnsafeRawPointer(elements.start),
        from: UnsafeRawPointer(reference.start), into: codes.start)
      Steps.split(
        elements, count: count, from: reference,
        into: (planes.octets, planes.octets + count), scratch)
      for plane in 0..<2 {
        let expected = PinnedBytes(count: count)
        Planes.extract(
          plane, of: count, width: 2, rotation: 0, from: UnsafeRawPointer(codes.start),
          into: expected.octets)
        #expect(
          expected.first(count).elementsEqual(planes.part(plane * count..<(plane + 1) * count)))
      }
      Steps.add(
        (UnsafePointer(planes.octets), UnsafePointer(planes.octets + count)), count: count,
        to: reference.start, codes, scratch)
      #expect(reference.first(2 * count).elementsEqual(mine))
    }
  }

  @Test func `against a base outside compares each of its tensors before it is used`() throws {
    let near = neighbours(3000)
    func model(_ file: String, _ other: Sample) throws -> any TensorSource {
      try writeSafetensors(
        [
          Sample("small", .bf16, [2000], Array(near.0.bytes[..<4000])),
          Sample("w", .bf16, [3000], other.bytes),
        ], to: folder(file))
    }
    let base = try model("base.safetensors", near.0)
    let path = folder("b.safetensors.zst")
    let tuned = try writeSafetensors(
      [
        Sample("small", .bf16, [2000], Array(near.1.bytes[..<4000])),
        Sample("w", .bf16, [3000], near.1.bytes),
      ], to: folder("tuned.safetensors"))
    try Bundle.pack(tuned, against: base, to: path)
    try expectUnpacks(path, as: tuned, base: base)
    // The smallest tensor is the base's own, so that opening finds nothing.
    let bundle = try BundleSource(path, base: try model("other.safetensors", near.1))
    let error = CheckpointError(
      file: folder("other.safetensors"), tensor: "w", "is not what \(path) was packed against",
      remedy: "name the base that it was packed with")
    #expect(throws: error) { try bundle.proveBase(workers: 2) }
    #expect(throws: error) { try bundle.bytes(of: bundle.tensor("w")) }
    try bundle.selecting { $0.name == "small" }.proveBase(workers: 2)
  }

  @Test(arguments: [Codec.int8, .int4, .sign1], [DType.bf16, .f32])
  func `loses precision only on request and says how much`(codec: Codec, dtype: DType) throws {
    let lossy: [Codec: Bundle.Lossy] = [.int8: .int8, .int4: .int4, .sign1: .sign1]
    let sample = Sample.weights("w", dtype, [301, 129], seed: 1)
    let source = try writeSafetensors(
      [sample, .weights("bias", dtype, [300], seed: 2)], to: folder("in.safetensors"))
    let path = folder("b.safetensors.zst")
    try Bundle.pack(source, to: path, lossy: lossy[codec]!)
    let bundle = try BundleSource(path)
    try bundle.verify()
    #expect(try bundle.floats(of: "bias") == source.floats(of: "bias"))
    let (before, after) = (try source.floats(of: "w"), try bundle.floats(of: "w"))
    let errors = zip(before, after).reduce(0.0) { $0 + pow(Double($1.0 - $1.1), 2) }
    let squares = before.reduce(0.0) { $0 + pow(Double($1), 2) }
    let error = (errors / squares).squareRoot()
    let expected: ClosedRange<Double> =
      switch codec {
      case .int8: 0.003...0.012
      case .int4: 0.08...0.16
      default: 0.58...0.63  // sqrt(1 − 2/π) = 0.603 for normal weights.
      }
    #expect(expected.contains(error), "\(error)")
    let entry = try #require(bundle.recipe.models[0].tensors.first)
    #expect(abs(Double(entry.error ?? "")! - error) < 1e-6)
  }

  @Test(arguments: [DType.bf16, .f32])
  func `keeps a matrix as the product of two thin ones`(dtype: DType) throws {
    // More than a block; the other tensors are no matrices, too small or not finite.
    let source = try writeSafetensors(
      [
        .weights("w", dtype, [1100, 1000], seed: 1), .weights("long", dtype, [300], seed: 2),
        .weights("small", dtype, [2, 3], seed: 3),
        Sample("infinite", dtype, [64, 64], values: .init(repeating: .infinity, count: 4096)),
      ], to: folder("in.safetensors"))
    let left = (0..<2200).map { 1 + Float($0 % 7) / 8 }
    let right = (0..<2000).map { Float($0 % 11 - 5) / 300 }
    let path = folder("b.safetensors.zst")
    let factorisation = Bundle.Factorisation(memory: { rows, columns in 4 * rows * columns }) {
      (elements, columns, rank) in elements.count == 1_100_000 ? (left, right) : nil
    }
    try Bundle.pack(source, to: path, lossy: .lowRank(2, by: factorisation))

    let bundle = try BundleSource(path)
    try bundle.verify()
    #expect(
      bundle.recipe.models[0].tensors.map { $0.codec == .lowrank } == [true, false, false, false])
    let product = (0..<1_100_000).map { i -> Float in
      let (row, column) = (i / 1000, i % 1000)
      let first = left[2 * row] * right[column]
      return first + left[2 * row + 1] * right[1000 + column]
    }
    let expected = Sample("w", dtype, [1100, 1000], values: product)
    #expect(try bundle.bytes(of: bundle.tensor("w")) == expected.bytes)
    for name in ["long", "small", "infinite"] {
      #expect(
        try bundle.bytes(of: bundle.tensor(name)) == source.bytes(of: source.tensor(name)))
    }
    let before = try source.floats(of: "w")
    let after = try bundle.floats(of: "w")
    let errors = zip(before, after).reduce(0.0) { $0 + pow(Double($1.0 - $1.1), 2) }
    let squares = before.reduce(0.0) { $0 + pow(Double($1), 2) }
    let recorded = try #require(bundle.recipe.models[0].tensors.first?.error)
    #expect(abs(try #require(Double(recorded)) - (errors / squares).squareRoot()) < 1e-6)
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path).count == 2)

    #expect(
      throws: CheckpointError(
        file: source.path, tensor: "w",
        "needs 4400000 bytes for its factors; the budget is 4399999",
        remedy: "give it more with --memory, or lose precision in another way")
    ) {
      try Bundle.pack(
        source, to: path, lossy: .lowRank(2, by: factorisation), memory: 4_399_999)
    }
  }

  @Test func `reads normal weights in the space that theory allows`() throws {
    let source = try writeSafetensors(
      [.weights("w", .bf16, [1000, 200], seed: 1)], to: folder("in.safetensors"))
    try Bundle.pack(source, to: folder("b.safetensors.zst"))
    let packed = try contents(of: folder("b.safetensors.zst")).count
    // The order-0 limit is 65.7 %.
    #expect(Double(packed) / 400_000 < 0.67)
  }

  /// Tensors of every kind that a codec may like or not.
  private func everyKind() -> [Sample] {
    [
      .weights("w", .bf16, [7, 160], seed: 1), .weights("half", .f16, [33, 5], seed: 2),
      .weights("single", .f32, [100, 7], seed: 3), .weights("double", .f64, [3], seed: 4),
      .noise("ids", .i64, [11], seed: 5), .noise("eight", .f8E4M3, [2, 9], seed: 6),
      .noise("four", .f4, [6], seed: 7), Sample("empty", .bf16, [0, 4], []),
      Sample("scalar", .bf16, [], [1, 2]), .noise("nan", .f32, [500], seed: 8),
      .pruned("sparse.0", .bf16, [1_100_000], seed: 9), .pruned("sparse.1", .i32, [999], seed: 10),
      Sample("zeros", .u8, [2_100_000], [UInt8](repeating: 0, count: 2_100_000)),
      .pruned("w#gaps", .f64, [3000], seed: 11), .noise("#header", .bool, [3], seed: 12),
    ]
  }

  /// Two experts that differ by a hundredth.
  private func neighbours(_ count: Int) -> (Sample, Sample) {
    var generator = SeededGenerator(seed: 5)
    let values = (0..<count).map { _ in generator.normal(0.02) }
    let others = values.map { $0 + generator.normal(0.0002) }
    return (
      Sample("experts.0.w", .bf16, [count], values: values),
      Sample("experts.1.w", .bf16, [count], values: others)
    )
  }

  /// A base and a model that differs from it by a hundredth.
  private func family(_ dtype: DType) throws -> (any TensorSource, any TensorSource) {
    func model(_ name: String, _ deviation: Float) throws -> any TensorSource {
      var (weights, noise) = (SeededGenerator(seed: 1), SeededGenerator(seed: 2))
      let values = (0..<40_000).map { _ in weights.normal(0.02) + noise.normal(deviation) }
      var sample = Sample("w", dtype.isArithmetic ? dtype : .f16, [200, 200], values: values)
      if !dtype.isArithmetic {
        // The upper byte of an F16 is an F8_E5M2.
        let bytes = stride(from: 1, to: 80_000, by: 2).map { sample.bytes[$0] }
        sample = Sample("w", dtype, [200, 200], bytes)
      }
      return try writeSafetensors(
        [sample, .noise("odd", dtype, [7], seed: UInt64(deviation * 1e6))],
        metadata: ["name": name], to: folder("\(name).safetensors"))
    }
    return (try model("base", 0), try model("tuned", 0.0002))
  }

  private func expectUnpacks(
    _ path: String, as source: any TensorSource, base: (any TensorSource)? = nil
  ) throws {
    try Checkpoint.write(BundleSource(path, base: base), to: folder("out.safetensors"))
    #expect(try contents(of: folder("out.safetensors")) == contents(of: source.path))
  }
}

/// Gives the first byte of its tensors another value at every reading of them.
private final class Restless: TensorSource {
  private let source: any TensorSource
  private let readings = Atomic<UInt8>(0)

  init(_ source: any TensorSource) { self.source = source }

  var path: String { source.path }
  var manifest: Manifest { source.manifest }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    try source.read(tensor, at: offset, into: &buffer)
    guard offset == 0 else { return }
    let value = readings.wrappingAdd(1, ordering: .relaxed).newValue
    buffer.withUnsafeMutableBytes { $0[0] = value }
  }
}
