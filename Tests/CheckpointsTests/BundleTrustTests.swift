import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `A bundle from a stranger` {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  @Test func `shows every flipped bit and names the tensor`() throws {
    let (bytes, frames) = try smallBundle()
    let path = folder("damaged.safetensors.zst")
    for bit in 0..<8 * bytes.count {
      var damaged = bytes
      damaged[bit / 8] ^= 1 << UInt8(bit % 8)
      try Data(damaged).write(to: URL(fileURLWithPath: path))
      let error = try #require(problem(in: path), "bit \(bit) of \(8 * bytes.count)")
      #expect(error.file == path)
      for (name, range) in frames where range.contains(bit / 8) {
        #expect(error.tensor == name, "bit \(bit): \(error)")
      }
      // What is no tensor's is named too, or the tensor that no longer fits.
      let names = ["header", "seek table"]
      #expect(
        error.tensor != nil || names.contains { error.problem.contains($0) },
        "bit \(bit): \(error)")
    }
  }

  @Test func `shows every truncation and names what is cut off first`() throws {
    let (bytes, frames) = try smallBundle()
    let first = frames.map { $0.1.lowerBound }.min()!
    let path = folder("short.safetensors.zst")
    for count in bytes.indices {
      try Data(bytes[..<count]).write(to: URL(fileURLWithPath: path))
      let error = try #require(problem(in: path), "\(count) of \(bytes.count) bytes")
      if let (name, _) = frames.sorted(by: { $0.1.lowerBound < $1.1.lowerBound }).first(where: {
        count < $0.1.upperBound
      }), count >= first {
        #expect(error.tensor == name, "\(count): \(error)")
        #expect(
          error.problem == "it is cut off where the file ends, at byte \(count)", "\(error)")
      } else {
        #expect(error.tensor == nil)
        #expect(
          error.problem.contains(count < first ? "header" : "seek table"), "\(count): \(error)")
      }
    }
  }

  @Test func `that refers to what is not there is refused`() throws {
    let w = #""name":"w","dtype":"BF16","shape":[2],"xxh3":"0000000000000000""#
    let cases: [(String, String)] = [
      (#"{\#(w),"codec":"planes"}"#, "needs \"w\" as U8 [2, 2], but it is BF16 [2]"),
      (#"{\#(w),"codec":"raw","parts":["x"]}"#, "needs \"x\", which the bundle does not hold"),
      (
        #"{\#(w),"codec":"raw","parts":["../../etc/passwd"]}"#,
        "needs \"../../etc/passwd\", which the bundle does not hold"
      ),
      (#"{\#(w),"codec":"raw","parts":["w","w"]}"#, "has 2 parts instead of 1"),
      (#"{\#(w),"codec":"raw","reference":"w"}"#, "has a reference and needs none, or the reverse"),
      (#"{\#(w),"codec":"raw"},{\#(w),"codec":"raw"}"#, "is in the recipe twice"),
      (
        #"{\#(w),"codec":"lzma"}"#,
        "has a recipe that is malformed: its dtype, shape, codec or xxh3 is missing or unknown"
      ),
      (
        #"{\#(w),"codec":"raw","color":1}"#,
        "has a recipe that is malformed: has the unknown field \"color\""
      ),
      (
        #"{\#(w),"codec":"int8","group":16,"error":"none"}"#,
        "has a recipe that is malformed: its error is not a number"
      ),
      (
        #"{\#(w),"codec":"raw","error":"0.5"}"#,
        "has a recipe that is malformed: has an error though its codec has none"
      ),
      (
        #"{\#(w),"codec":"sparseulp","reference":"w"}"#,
        "has codec sparseulp, which came with version 2"
      ),
      (#"{\#(w),"codec":"int8","group":0}"#, "has groups of 0 elements"),
      (#"{\#(w),"codec":"lowrank","parts":["w","w"]}"#, "is of rank 2"),
      (#"{\#(w),"codec":"lowrank"}"#, "is of rank 0"),
      (
        #"{"name":"w","dtype":"BF16","shape":[9000000000000000000],"xxh3":"0000000000000000","codec":"raw"}"#,
        "has a recipe that is malformed: its shape is too large or not of whole bytes"
      ),
      (
        #"{"name":"w","dtype":"BF16","shape":[1000000000000],"xxh3":"0000000000000000","codec":"raw"}"#,
        "needs \"w\" as BF16 [1000000000000], but it is BF16 [2]"
      ),
    ]
    for (entries, expected) in cases {
      try writeBundle(
        recipe: recipe(entries), [try TensorInfo(name: "w", dtype: .bf16, shape: [2])],
        [[0, 0, 0, 0]])
      #expect(problem(in: folder("b.safetensors.zst"))?.problem == expected)
    }
  }

  @Test func `whose differences form a chain or a circle is refused`() throws {
    func entry(_ name: String, _ reference: String) -> String {
      #"{"name":"\#(name)","dtype":"BF16","shape":[2],"xxh3":"0000000000000000","codec":"ulp","reference":"\#(reference)"}"#
    }
    let planes = try ["a", "b", "c"].map {
      try TensorInfo(name: $0, dtype: .u8, shape: [2, 2])
    }
    let plain =
      #"{"name":"c","dtype":"BF16","shape":[2],"xxh3":"0000000000000000","codec":"planes"}"#
    let cases = [
      (
        entry("a", "a") + "," + entry("b", "a") + "," + plain,
        "refers to \"a\", which is not among the tensors before it"
      ),
      (
        entry("a", "b") + "," + entry("b", "a") + "," + plain,
        "refers to \"b\", which is not among the tensors before it"
      ),
      (
        plain + "," + entry("a", "c") + "," + entry("b", "a"),
        "refers to a tensor that is itself a difference from another, 2 in a row"
      ),
    ]
    for (entries, expected) in cases {
      try writeBundle(
        recipe: recipe(entries), planes, [[0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]])
      #expect(problem(in: folder("b.safetensors.zst"))?.problem == expected)
    }
    // The second version has rows of three.
    for (count, version) in [(2, 2), (4, 2), (5, 2)] {
      let names = (0..<count).map { "t\($0)" }
      let row = zip(names.dropFirst(), names).map { entry($0, $1) }
      let head = plain.replacing("\"c\"", with: "\"t0\"")
      try writeBundle(
        recipe: recipe(([head] + row).joined(separator: ","), version: version),
        try names.map { try TensorInfo(name: $0, dtype: .u8, shape: [2, 2]) },
        Array(repeating: [0, 0], count: 2 * count))
      let problem = problem(in: folder("b.safetensors.zst"))?.problem
      #expect(
        problem
          == (count < 5
            ? "does not have the checksum that was recorded"
            : "refers to a tensor that is itself a difference from another, 4 in a row"))
    }
  }

  @Test func `that would fill the memory or the disk is refused`() throws {
    // A gigabyte of headers that are one.
    let models = (0..<20).map { #"{"name":"\#($0)","header":"h","tensors":[]}"# }
    let header = [UInt8](repeating: UInt8(ascii: " "), count: 1 << 20)
    try writeBundle(
      recipe: #"{"version":1,"models":[\#(models.joined(separator: ","))]}"#,
      [try TensorInfo(name: "h", dtype: .u8, shape: [50 << 20])],
      Array(repeating: header, count: 50))
    let path = folder("b.safetensors.zst")
    #expect(problem(in: path)?.problem == "has headers of more than 100000000 bytes")

    // Half a terabyte that is the product of two rows of zeros, and once more.
    let long = 1 << 18
    func entry(_ name: String) -> String {
      #"{"name":"\#(name)","dtype":"F64","shape":[\#(long),\#(long)],"xxh3":"0000000000000000","codec":"lowrank","parts":["l","r"]}"#
    }
    let zeros = [[UInt8](repeating: 0, count: 1 << 20), [UInt8](repeating: 0, count: 1 << 20)]
    let thin = try [
      TensorInfo(name: "l", dtype: .f32, shape: [long, 1]),
      TensorInfo(name: "r", dtype: .f32, shape: [1, long]),
    ]
    try writeBundle(recipe: recipe(entry("a") + "," + entry("b")), thin, zeros)
    let error = try #require(problem(in: path))
    #expect(error.tensor == "a")
    #expect(error.problem == "is too large for so small a bundle")

    // Products of as many rows as a matrix of zeros has take long.
    let (rows, rank) = (1 << 10, 1 << 8)
    let matrix = try [
      TensorInfo(name: "l", dtype: .f32, shape: [rows, rank]),
      TensorInfo(name: "r", dtype: .f32, shape: [rank, rows]),
    ]
    let small = (0..<4).map { i in
      #"{"name":"\#(i)","dtype":"F32","shape":[\#(rows),\#(rows)],"xxh3":"0000000000000000","codec":"lowrank","parts":["l","r"]}"#
    }
    try writeBundle(recipe: recipe(small.joined(separator: ",")), matrix, zeros)
    let slow = try #require(problem(in: path))
    #expect(slow.problem == "asks for more multiplications than so small a bundle may")

    // So do the differences from one that by itself may be asked for.
    let product =
      #"{"name":"0","dtype":"F32","shape":[\#(rows),\#(rows)],"xxh3":"0000000000000000","codec":"lowrank","parts":["l","r"]}"#
    let differences = (1..<8).map { i in
      #"{"name":"\#(i)","dtype":"F32","shape":[\#(rows),\#(rows)],"xxh3":"0000000000000000","codec":"xor","parts":["z"],"reference":"0"}"#
    }
    let thinner = try [
      TensorInfo(name: "l", dtype: .f32, shape: [rows, 8]),
      TensorInfo(name: "r", dtype: .f32, shape: [8, rows]),
      TensorInfo(name: "z", dtype: .u8, shape: [4, rows * rows]),
    ]
    let short = [UInt8](repeating: 0, count: 32 * rows)
    try writeBundle(
      recipe: recipe(([product] + differences).joined(separator: ",")), thinner,
      [short, short] + zeros + zeros)
    let many = try #require(problem(in: path))
    #expect(many.tensor != "0")
    #expect(many.problem == slow.problem)
  }

  @Test func `that is none and has no end is not read through`() throws {
    let start: [UInt8] = [0x28, 0xB5, 0x2F, 0xFD, 0x64, 0, 0]
    let path = folder("b.safetensors.zst")
    try Data(start + [UInt8](repeating: 0, count: 1 << 20)).write(to: URL(filePath: path))
    #expect(problem(in: path)?.problem == "has no seek table at its end")
  }

  @Test func `whose recipe says its version twice is refused`() throws {
    try writeBundle(recipe: #"{"version":9,"version":1,"models":[]}"#, [], [])
    #expect(
      problem(in: folder("b.safetensors.zst"))?.problem
        == #"has a recipe that is malformed: the field "version" is unknown or there twice"#)
  }

  @Test func `that takes a tensor of the base for two is refused`() throws {
    try Checkpoint.write(
      [SmallTensor("c", [2], dtype: .bf16, [1, 2])], to: folder("base.safetensors"))
    let base = try Checkpoint.open(folder("base.safetensors"))
    let right = try base.checksum(of: base.tensor("c"), through: PinnedBytes(count: 1 << 20))
    func entry(_ name: String, _ checksum: UInt64) -> String {
      #"{"name":"\#(name)","dtype":"BF16","shape":[2],"xxh3":"0000000000000000","codec":"xor","base":"c","base_xxh3":"\#(hexadecimal(checksum))"}"#
    }
    try writeBundle(
      recipe: recipe(entry("a", right) + "," + entry("b", right ^ 1)),
      try ["a", "b"].map { try TensorInfo(name: $0, dtype: .u8, shape: [2, 2]) },
      Array(repeating: [0, 0], count: 4))
    let bundle = try BundleSource(folder("b.safetensors.zst"), base: base)
    #expect(try bundle.bytes(of: bundle.tensor("a")) == base.bytes(of: base.tensor("c")))
    let error = #expect(throws: CheckpointError.self) {
      try bundle.bytes(of: bundle.tensor("b"))
    }
    #expect(error?.problem.hasPrefix("is not what ") == true, "\(String(describing: error))")
  }

  @Test func `whose frames or seek table lie is refused`() throws {
    let entries = #"{"name":"w","dtype":"U8","shape":[4],"xxh3":"0000000000000000","codec":"raw"}"#
    let part = [try TensorInfo(name: "w", dtype: .u8, shape: [4])]
    let path = folder("b.safetensors.zst")
    // Cut elsewhere than the format says.
    try writeBundle(recipe: recipe(entries), part, [[1, 2], [3, 4]])
    #expect(problem(in: path)?.problem == "is not cut into frames as the format says")
    // The right cut, the wrong checksum of the tensor.
    try writeBundle(recipe: recipe(entries), part, [[1, 2, 3, 4]])
    #expect(
      problem(in: path)
        == CheckpointError(
          file: path, tensor: "w", "does not have the checksum that was recorded",
          remedy: "the bundle is damaged: get it again"))
    let some = try BundleSource(path).selecting { $0.name == "w" }
    #expect(throws: CheckpointError.self) {
      try Checkpoint.write(some, to: folder("out.safetensors"))
    }
    // A seek table that claims a frame of 4 GB.
    var bytes = try contents(of: path)
    let last = bytes.count - 9 - 8 - 4
    bytes.replaceSubrange(last..<last + 4, with: [255, 255, 255, 255])
    try Data(bytes).write(to: URL(fileURLWithPath: path))
    #expect(problem(in: path)?.problem.hasPrefix("has a seek table with a frame of") == true)
    // One that claims more frames than there are bytes.
    bytes.replaceSubrange(bytes.count - 9..<bytes.count - 5, with: [255, 255, 255, 255])
    try Data(bytes).write(to: URL(fileURLWithPath: path))
    #expect(
      problem(in: path)?.problem
        == "has a seek table of 4294967295 frames, more than fit into the file")
  }

  @Test func `of sparse tensors whose gaps do not fit is refused`() throws {
    let entries =
      #"{"name":"w","dtype":"U8","shape":[5],"xxh3":"0000000000000000","codec":"sparse"}"#
    for (gaps, values) in [
      ([5, 255], [1]), ([0, 254, 255], [1]), ([0, 0], [1, 2]), ([0, 255, 255], [1]),
      ([255], [1]), ([0, 0, 255], [1]),
    ] as [([UInt8], [UInt8])] {
      let parts = [
        try TensorInfo(name: "w#gaps", dtype: .u8, shape: [gaps.count]),
        try TensorInfo(name: "w#values", dtype: .u8, shape: [1, values.count]),
      ]
      try writeBundle(recipe: recipe(entries), parts, [gaps, values])
      #expect(
        problem(in: folder("b.safetensors.zst"))?.problem
          == "has gaps that do not fit its values", "\(gaps)")
    }
  }

  /// Whatever is in the recipe, the header or the frames' contents, with all checksums of the
  /// frames right: an error or the truth, soon and never a trap.
  @Test func `never traps whatever it says`() throws {
    let seed = UInt64.random(in: 0...UInt64.max)
    var generator = SeededGenerator(seed: seed)
    let (bytes, _) = try smallBundle()
    let original = folder("small.safetensors.zst")
    try Data(bytes).write(to: URL(fileURLWithPath: original))
    let contents = try frameContents(of: original)
    let path = folder("b.safetensors.zst")
    let clock = ContinuousClock()
    for round in 0..<600 {
      var mutated = contents
      for _ in 0..<Int.random(in: 1...3, using: &generator) {
        let frame =
          Int.random(in: 0..<3, using: &generator) > 0
          ? 0 : mutated.indices.randomElement(using: &generator)!
        mutate(&mutated[frame], &generator)
      }
      try writeFrames(mutated)
      let time = clock.measure { _ = problem(in: path) }
      #expect(time < .seconds(10), "seed \(seed), round \(round)")
    }
  }
}

extension `A bundle from a stranger` {
  /// What is wrong with a bundle, if anything is.
  private func problem(in path: String) -> CheckpointError? {
    do {
      let bundle = try BundleSource(path)
      try bundle.verify(workers: 1)
      return nil
    } catch { return error as? CheckpointError }
  }

  /// A bundle of a tensor for each of most codecs, and where the frames of each lie.
  private func smallBundle() throws -> (bytes: [UInt8], frames: [(String, Range<Int>)]) {
    func part(_ name: String, _ dtype: DType, _ shape: [Int], _ frames: [[UInt8]]) throws
      -> (TensorInfo, [[UInt8]])
    { (try TensorInfo(name: name, dtype: dtype, shape: shape), frames) }
    let parts = try [
      part("r", .u8, [3], [[1, 2, 3]]),
      part("p", .u8, [2, 2], [[126, 127], [20, 35]]),
      part("u", .u8, [2, 2], [[0, 0], [3, 4]]),
      part("x", .u8, [2, 2], [[0, 0], [5, 6]]),
      part("s#gaps", .u8, [2], [[1, 255]]), part("s#values", .u8, [2, 1], [[7], [8]]),
      part("t#gaps", .u8, [2], [[1, 255]]), part("t#values", .u8, [2, 1], [[0], [6]]),
      part("i", .i8, [16], [Array(1...16)]), part("i#scale", .f32, [1], [[0, 0, 128, 63]]),
      part("l#left", .f32, [1, 1], [[0, 0, 64, 64]]),
      part("l#right", .f32, [1, 1], [[0, 0, 160, 64]]),
    ]
    let entries = [
      ("r", #""U8","shape":[3],"codec":"raw""#), ("p", #""BF16","shape":[2],"codec":"planes""#),
      ("u", #""BF16","shape":[2],"codec":"ulp","reference":"p""#),
      ("x", #""BF16","shape":[2],"codec":"xor","reference":"p""#),
      ("t", #""BF16","shape":[2],"codec":"sparseulp","reference":"p""#),
      ("s", #""U16","shape":[5],"codec":"sparse""#),
      ("i", #""BF16","shape":[16],"codec":"int8","group":16"#),
      ("l", #""BF16","shape":[1,1],"codec":"lowrank""#),
    ]
    let path = folder("b.safetensors.zst")
    var checksums = entries.map { _ in UInt64(0) }
    // Once to learn the checksums, once with them.
    for _ in 0..<2 {
      let list = zip(entries, checksums).map {
        #"{"name":"\#($0.0)","dtype":\#($0.1),"xxh3":"\#(hexadecimal($1))"}"#
      }
      let inner = try Safetensors.Layout(
        writing: Manifest(
          parts.map { $0.0 }, metadata: ["bundle": recipe(list.joined(separator: ","), version: 2)]),
        path: "")
      let frames = inner.manifest.tensors.flatMap { tensor in
        parts.first { $0.0 == tensor }!.1
      }
      try writeFrames([inner.prefix] + frames)
      let bundle = try BundleSource(path)
      let piece = PinnedBytes(count: 1 << 20)
      checksums = try entries.map { try bundle.checksum(of: bundle.tensor($0.0), through: piece) }
    }
    #expect(problem(in: path) == nil)
    let file = try BundleFile(path, base: nil)
    let frames = file.tensors.flatMap { stored in
      stored.parts.flatMap { position in
        let part = file.parts[position]
        return (0..<part.streams * part.framesPerStream).map {
          (stored.tensor.name, file.frames.table[part.firstFrame + $0])
        }
      }
    }
    return (try contents(of: path), frames)
  }

  private func recipe(_ entries: String, version: Int = 1) -> String {
    #"{"version":\#(version),"models":[{"name":"","tensors":[\#(entries)]}]}"#
  }

  /// A bundle of this recipe, however wrong, with these frames.
  private func writeBundle(recipe: String, _ parts: [TensorInfo], _ frames: [[UInt8]]) throws {
    let inner = try Safetensors.Layout(
      writing: Manifest(parts, metadata: ["bundle": recipe]), path: "")
    try writeFrames([inner.prefix] + frames)
  }

  private func writeFrames(_ contents: [[UInt8]]) throws {
    let encoder = FrameEncoder()
    let frame = PinnedBytes(count: ZstdFrame.largest)
    var (bytes, table, checksums) = ([UInt8](), SeekTable(), FrameChecksums())
    for content in contents {
      let size = content.withUnsafeBytes { encoder.encode($0, .matches, into: frame.bytes) }
      bytes += frame.first(size)
      table.append(frame: size, content: content.count)
      checksums.append(FrameChecksums.of(frame.first(size)))
    }
    table.append(frame: checksums.bytes.count, content: 0)
    try Data(bytes + checksums.bytes + table.bytes).write(
      to: URL(fileURLWithPath: folder("b.safetensors.zst")))
  }

  private func frameContents(of path: String) throws -> [[UInt8]] {
    let file = try FrameFile(path)
    let decoder = FrameDecoder()
    let scratch = PinnedBytes(count: ZstdFrame.largest)
    return try file.table.contentSizes.indices.map { index in
      var content = [UInt8](repeating: 0, count: file.table.contentSizes[index])
      try content.withUnsafeMutableBytes {
        try file.decode(index, of: nil, using: decoder, scratch, into: $0)
      }
      return content
    }
  }

  /// A byte changed, a piece repeated or lost, or a number or word put in.
  private func mutate(_ bytes: inout [UInt8], _ generator: inout SeededGenerator) {
    guard !bytes.isEmpty else { return }
    let place = bytes.indices.randomElement(using: &generator)!
    let end = min(bytes.count, place + Int.random(in: 1...12, using: &generator))
    switch Int.random(in: 0..<6, using: &generator) {
    case 0: bytes[place] = UInt8.random(in: 0...255, using: &generator)
    case 1: bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
    case 2: bytes.insert(contentsOf: bytes[place..<end], at: place)
    case 3: bytes.removeSubrange(place..<end)
    case 4:
      let digits = bytes.indices.filter { (0x30...0x39).contains(bytes[$0]) }
      guard let digit = digits.randomElement(using: &generator) else { return }
      let numbers = ["0", "1", "9", "4611686018427387904", "1048577", "-1"]
      bytes.replaceSubrange(digit...digit, with: numbers.randomElement(using: &generator)!.utf8)
    default:
      let words = Codec.allCases.map { $0.rawValue } + ["BF16", "F32", "F4", "\"p\"", "s#gaps"]
      let found = words.compactMap { word in
        bytes.indices.first { bytes[$0...].starts(with: word.utf8) }.map { ($0, word.utf8.count) }
      }
      guard let (begin, count) = found.randomElement(using: &generator) else { return }
      bytes.replaceSubrange(
        begin..<begin + count, with: words.randomElement(using: &generator)!.utf8)
    }
    // The length of the inner header keeps step in most rounds, so that what follows is seen.
    if bytes.count > 8, bytes[8] == UInt8(ascii: "{") {
      for byte in 0..<8 { bytes[byte] = UInt8(truncatingIfNeeded: (bytes.count - 8) >> (8 * byte)) }
    }
  }
}
