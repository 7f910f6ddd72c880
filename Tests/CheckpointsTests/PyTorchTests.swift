import Foundation
import TestSupport
import Testing

@testable import Checkpoints

@Suite struct `PyTorch files` {
  // MARK: Written by PyTorch

  @Test func `every type is read as it was written`() throws {
    let source = try Checkpoint.open(fixture("pytorch/types.pt"))
    let dtypes: [String: DType] = [
      "float64": .f64, "float32": .f32, "float16": .f16, "bfloat16": .bf16, "int64": .i64,
      "int32": .i32, "int16": .i16, "int8": .i8, "uint8": .u8, "bool": .bool, "complex64": .c64,
      "uint16": .u16, "uint32": .u32, "uint64": .u64, "float8_e4m3fn": .f8E4M3,
      "float8_e5m2": .f8E5M2,
    ]
    #expect(source.manifest.tensors.count == dtypes.count)
    for (name, dtype) in dtypes {
      let tensor = try source.tensor(name)
      #expect(tensor.dtype == dtype)
      #expect(tensor.shape == [2, 3])
      if dtype.isArithmetic {
        #expect(try source.floats(of: name) == [0, 1, 2, 3, 4, 5])
      } else if ![.bool, .c64, .f8E4M3, .f8E5M2].contains(dtype) {
        #expect(try source.integers(of: tensor) == [0, 1, 2, 3, 4, 5])
      }
    }
    #expect(try source.bytes(of: source.tensor("bool")) == [0, 1, 1, 1, 1, 1])
    #expect(
      try source.bytes(of: source.tensor("float8_e4m3fn")) == [0, 0x38, 0x40, 0x44, 0x48, 0x4A])
  }

  @Test func `views of a shared storage are read as tensors of their own`() throws {
    let source = try Checkpoint.open(fixture("pytorch/views.pt"))
    func expect(_ name: String, _ shape: [Int], _ values: [Float]) throws {
      #expect(try source.tensor(name).shape == shape, "\(name)")
      #expect(try source.floats(of: name) == values, "\(name)")
    }
    let base = (0..<24).map { Float($0) }
    try expect("whole", [4, 6], base)
    try expect("transposed", [6, 4], (0..<24).map { base[$0 % 4 * 6 + $0 / 4] })
    try expect("rows", [2, 6], Array(base[6..<18]))
    try expect("columns", [4, 2], [2, 3, 8, 9, 14, 15, 20, 21])
    try expect("steps", [2, 2], [0, 3, 12, 15])
    try expect(
      "permuted", [4, 2, 3],
      (0..<24).map { base[$0 / 6 + $0 / 3 % 2 * 12 + $0 % 3 * 4] })
    try expect("scalar", [], [23])
    try expect("empty", [0, 6], [])
    try expect("expanded", [3, 4], Array(repeating: 0, count: 12))
  }

  @Test(arguments: [2, 5, 24, 7])
  func `pieces of a strided tensor fit together`(elements: Int) throws {
    let source = try Checkpoint.open(fixture("pytorch/views.pt"))
    let tensor = try source.tensor("permuted")
    var pieces: [UInt8] = []
    for begin in stride(from: 0, to: 24, by: elements) {
      var buffer = Buffer(byteCount: 96)
      var bytes = buffer.first(4 * (min(begin + elements, 24) - begin))
      try source.read(tensor, at: 4 * begin, into: &bytes)
      bytes.withUnsafeBytes { pieces += $0 }
    }
    #expect(try pieces == source.bytes(of: tensor))
  }

  @Test(arguments: ["pytorch_model.bin", "protocol4.pt", "parameters.pth"])
  func `a layer's state is read`(file: String) throws {
    let source = try Checkpoint.open(fixture("pytorch/\(file)"))
    #expect(source.manifest.tensors.map { $0.name } == ["weight", "bias"])
    #expect(try source.floats(of: "weight") == [0, 1, 2, 3, 4, 5])
    #expect(try source.floats(of: "bias") == [-1, 1])
  }

  @Test func `nested tensors have the names of their way`() throws {
    let source = try Checkpoint.open(fixture("pytorch/nested.ckpt"))
    #expect(
      source.manifest.tensors.map { $0.name } == [
        "state_dict.weight", "state_dict.bias", "list.0", "7",
      ])
    #expect(source.warnings == ["\(source.path): 2 values that are no tensors left out"])
  }

  @Test func `what training leaves beside tensors is passed over`() throws {
    let source = try Checkpoint.open(fixture("pytorch/training.ckpt"))
    let moments = [0, 1].flatMap { number in
      ["step", "exp_avg", "exp_avg_sq"].map { "optimizer.state.\(number).\($0)" }
    }
    #expect(
      source.manifest.tensors.map { $0.name }
        == ["state_dict.weight", "state_dict.bias"] + moments + ["parameter"])
    #expect(try source.floats(of: "parameter") == [1, 1])
    #expect(try source.floats(of: "optimizer.state.0.step") == [1])
    #expect(source.warnings.count == 1)
  }

  @Test func `small floats and parts of a shared storage are read`() throws {
    let source = try Checkpoint.open(fixture("pytorch/odd.pt"))
    #expect(try source.bytes(of: source.tensor("f8")) == [0, 0x38, 0x40, 0x44])
    #expect(try source.tensor("f8").dtype == .f8E4M3)
    #expect(try source.floats(of: "shared.0") == [8, 9])
    #expect(try source.floats(of: "shared.1") == [13, 14, 15, 16, 17])
    #expect(try source.tensor("shared.1").shape == [1, 5])
  }

  @Test(arguments: [
    (
      "namespace",
      #"asks Python for "argparse.Namespace", which no tensor needs; nothing was run; if you trust it, save only its state_dict with PyTorch"#
    ),
    (
      "complex128",
      "has a tensor of complex128, a type that is not known; make it complex64 in PyTorch and save the file again"
    ),
    (
      "quantised",
      "has a tensor that is quantised; dequantise it in PyTorch and save the file again"
    ),
    ("sparse", "has a tensor that is sparse; make it dense in PyTorch and save the file again"),
    ("sparse_csr", "has a tensor that is sparse; make it dense in PyTorch and save the file again"),
    (
      "meta",
      "has a tensor on the meta device, which has no values; leave it out in PyTorch and save the file again"
    ),
    (
      "conjugate",
      "has a tensor that is conjugated or negated only when it is read; save tensor.resolve_conj().resolve_neg() in PyTorch"
    ),
    (
      "negative",
      "has a tensor that is conjugated or negated only when it is read; save tensor.resolve_conj().resolve_neg() in PyTorch"
    ),
  ])
  func `a tensor that cannot be rebuilt is refused by name`(file: String, error: String) throws {
    let path = fixture("pytorch/\(file).pt")
    let found = try #require(throws: CheckpointError.self) { try Checkpoint.open(path) }
    #expect(found.description == "\(path): \(error)")
  }

  @Test func `a sharded model is read`() throws {
    let folder = try TemporaryFolder()
    try FileManager.default.copyItem(
      atPath: fixture("pytorch/pytorch_model.bin"),
      toPath: folder("pytorch_model-00001-of-00001.bin"))
    try Data(
      #"{"metadata":{},"weight_map":{"weight":"pytorch_model-00001-of-00001.bin","bias":"pytorch_model-00001-of-00001.bin"}}"#
        .utf8
    ).write(to: URL(filePath: folder("pytorch_model.bin.index.json")))
    let source = try Checkpoint.open(folder.path)
    #expect(try source.floats(of: "bias") == [-1, 1])
    #expect(source.warnings == [])
  }

  @Test(arguments: [
    (
      "module.pt",
      #"asks Python for "torch.nn.modules.linear.Linear", which no tensor needs; nothing was run"#
    ), ("script.pt", "is a TorchScript program, not a file of tensors"),
    ("old.pt", "is not a safetensors file: it looks like a PyTorch file of before 1.6"),
  ])
  func `what is no plain file of tensors is refused by name`(file: String, problem: String) throws {
    let error = try #require(throws: CheckpointError.self) {
      try Checkpoint.open(fixture("pytorch/\(file)"))
    }
    #expect(error.problem == problem)
  }

  // MARK: Hostile

  /// Opens a PyTorch file of this pickle and one storage "0".
  private func open(_ pickle: [UInt8], storage: [UInt8] = [], in folder: TemporaryFolder) throws
    -> any TensorSource
  {
    let path = folder("x.pt")
    let bytes = zip([("x/data.pkl", pickle), ("x/data/0", storage)])
    try Data(bytes).write(to: URL(filePath: path))
    return try Checkpoint.open(path)
  }

  private func error(_ pickle: [UInt8], storage: [UInt8] = []) throws -> String {
    let folder = try TemporaryFolder()
    let error = try #require(throws: CheckpointError.self) {
      try open(pickle, storage: storage, in: folder)
    }
    return error.description.replacing(folder("x.pt"), with: "FILE")
  }

  private static func text(_ text: String) -> [UInt8] { Array(text.utf8) }

  /// The pickle of `{"t": tensor}`, a view of a storage of floats.
  private static func tensor(
    count: Int32, offset: Int32, shape: [Int32], strides: [Int32], key: String = "0"
  ) -> [UInt8] {
    func integer(_ value: Int32) -> [UInt8] { text("J") + withUnsafeBytes(of: value) { Array($0) } }
    func string(_ value: String) -> [UInt8] {
      text("X") + withUnsafeBytes(of: UInt32(value.utf8.count)) { Array($0) } + text(value)
    }
    func tuple(_ values: [Int32]) -> [UInt8] { text("(") + values.flatMap(integer) + text("t") }
    return [0x80, 2] + text("}") + string("t") + text("ctorch._utils\n_rebuild_tensor_v2\n((")
      + string("storage") + text("ctorch\nFloatStorage\n") + string(key) + string("cpu")
      + integer(count) + text("tQ") + integer(offset) + tuple(shape) + tuple(strides)
      + [0x89] + text("}tRs.")
  }

  /// The pickle of `{name: [None, …]}`: each element's name begins with the key.
  private static func shared(name: Int, count: Int) -> [UInt8] {
    text("}X") + withUnsafeBytes(of: UInt32(name)) { Array($0) }
      + [UInt8](repeating: UInt8(ascii: "n"), count: name) + text("(")
      + [UInt8](repeating: UInt8(ascii: "N"), count: count) + text("ls.")
  }

  @Test func `a call of anything else is refused by name and not run`() throws {
    let folder = try TemporaryFolder()
    let command = "touch \(folder("owned"))"
    let pickle = Self.text(
      "cos\nsystem\n(X\(Character(UnicodeScalar(UInt8(command.utf8.count))))\0\0\0\(command)tR.")
    #expect(
      try error(pickle)
        == #"FILE: asks Python for "os.system", which no tensor needs; nothing was run; if you trust it, save only its state_dict with PyTorch"#
    )
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path) == [])
  }

  struct Hostile: CustomTestStringConvertible {
    let what: String
    let pickle: [UInt8]
    let error: String
    var testDescription: String { what }

    init(_ what: String, _ pickle: [UInt8], _ error: String) {
      (self.what, self.pickle, self.error) = (what, pickle, error)
    }
  }

  static let hostile: [Hostile] = [
    .init("an empty pickle", [], "ends within its pickle; it is truncated: download it again"),
    .init(
      "a builtin", text("c__builtin__\neval\n."),
      #"asks Python for "__builtin__.eval", which no tensor needs; nothing was run; if you trust it, save only its state_dict with PyTorch"#
    ),
    .init(
      "a builtin by a later opcode", [0x8C, 2] + text("os") + [0x8C, 4] + text("exec") + [0x93],
      #"asks Python for "os.exec", which no tensor needs; nothing was run; if you trust it, save only its state_dict with PyTorch"#
    ),
    .init(
      "an object of a class", text("(ctorch\nSize\no."),
      "has a malformed pickle: opcode 0x6f describes no tensor at byte 14"
    ),
    .init(
      "an instance", text("(ios\nsystem\n."),
      "has a malformed pickle: opcode 0x69 describes no tensor at byte 2"
    ),
    .init(
      "an extension", [0x82, 1, UInt8(ascii: ".")],
      "has a malformed pickle: opcode 0x82 describes no tensor at byte 1"
    ),
    .init(
      "a far memo", text("]r") + [255, 255, 255, 255] + text("0h\0."),
      "has a malformed pickle: nothing was remembered as 0 at byte 9"
    ),
    .init("an empty stack", text("."), "has a malformed pickle: a value is missing at byte 1"),
    .init("no mark", text("t."), "has a malformed pickle: a mark is missing at byte 1"),
    .init(
      "a value behind a mark", text("N(0."), "has a malformed pickle: a value is missing at byte 3"),
    .init(
      "a string beyond the end", text("X") + [255, 255, 255, 127],
      "ends within its pickle; it is truncated: download it again"
    ),
    .init(
      "a string of 2⁶³ bytes", [0x8D] + [0, 0, 0, 0, 0, 0, 0, 0x80],
      "has a malformed pickle: a length is too large at byte 9"
    ),
    .init(
      "a call of a string", text("U\u{1}a)R."),
      "has a malformed pickle: something that is no function is called at byte 5"
    ),
    .init(
      "a storage from nothing", text("NQ."),
      "has a malformed pickle: a persistent id is not that of a storage at byte 2"
    ),
    .init(
      "a tensor of nothing", text("ctorch._utils\n_rebuild_tensor_v2\n)R."),
      "has a malformed pickle: a tensor has no storage at byte 35"
    ),
    .init("protocol 6", [0x80, 6], "has a malformed pickle: protocol 6 is unknown at byte 2"),
    .init(
      "a list in itself", text("]q\0h\0a."), "has a pickle of objects nested too deeply"
    ),
    .init(
      "deep nesting",
      [UInt8](repeating: UInt8(ascii: "]"), count: 200_000)
        + [UInt8](repeating: UInt8(ascii: "a"), count: 199_999) + text("."),
      "has a pickle of objects nested too deeply"
    ),
    .init(
      // Each list holds the one before ten times: 10¹⁸ in the last.
      "a billion laughs",
      text("]q\0")
        + (1...18).flatMap { level -> [UInt8] in
          text("](") + (0..<10).flatMap { _ in [UInt8(ascii: "h"), UInt8(level - 1)] } + text("eq")
            + [UInt8(level)]
        } + text("."), "has a pickle of objects nested too deeply"
    ),
    .init(
      "a view beyond its storage", tensor(count: 4, offset: 1, shape: [2, 2], strides: [2, 1]),
      #"tensor "t": reaches beyond its storage of 4 elements"#
    ),
    .init(
      "strides beyond the storage", tensor(count: 4, offset: 0, shape: [2, 2], strides: [3, 1]),
      #"tensor "t": reaches beyond its storage of 4 elements"#
    ),
    .init(
      "negative strides", tensor(count: 4, offset: 3, shape: [4], strides: [-1]),
      "has a malformed pickle: something that is no natural number is where one is due at byte 120"
    ),
    .init(
      "a storage beyond the file", tensor(count: 5, offset: 0, shape: [5], strides: [1]),
      #"tensor "t": is in the storage "0" of 20 bytes, of which the file has 16; it is damaged: download it again"#
    ),
    .init(
      "a storage that is missing",
      tensor(count: 4, offset: 0, shape: [4], strides: [1], key: "../0"),
      #"tensor "t": is in the storage "../0", which is not in the file"#
    ),
    .init(
      "too few strides", tensor(count: 4, offset: 0, shape: [2, 2], strides: [1]),
      "has a malformed pickle: a tensor has 2 dimensions, but not as many strides at byte 125"
    ),
    .init(
      "a shape bomb",
      tensor(count: 4, offset: 0, shape: [.max, .max, 1], strides: [0, 0, 0]),
      #"tensor "t": has a shape too large to count its bytes"#
    ),
    .init(
      "a tensor of 65 dimensions",
      tensor(
        count: 4, offset: 0, shape: .init(repeating: 1, count: 65),
        strides: .init(repeating: 1, count: 65)),
      "has a malformed pickle: a tensor has 65 dimensions at byte 760"
    ),
    .init(
      "a name that many tensors share", shared(name: 100_000, count: 3),
      "has a pickle with names too long: \"\(String(repeating: "n", count: 200))…\"; "
        + "it is damaged, or made to do harm"
    ),
    .init(
      "a long name that many tensors share", shared(name: 60_000, count: 5000),
      "has a pickle with names too long: \"\(String(repeating: "n", count: 200))…\"; "
        + "it is damaged, or made to do harm"
    ),
    .init(
      "a repetition bomb", tensor(count: 4, offset: 0, shape: [1 << 30], strides: [0]),
      #"tensor "t": repeats a storage of 16 bytes until it has 4294967296"#
    ),
  ]

  @Test(arguments: hostile)
  func `a hostile pickle is refused by name`(_ hostile: Hostile) throws {
    let error = try error(hostile.pickle, storage: [UInt8](repeating: 0, count: 16))
    #expect(error == "FILE: " + hostile.error)
  }

  @Test func `a good pickle of the same making is read`() throws {
    let folder = try TemporaryFolder()
    let pickle = Self.tensor(count: 4, offset: 0, shape: [2, 2], strides: [1, 2])
    let floats: [Float] = [1, 2, 3, 4]
    let source = try open(pickle, storage: floats.withUnsafeBytes { Array($0) }, in: folder)
    #expect(try source.floats(of: "t") == [1, 3, 2, 4])
  }

  @Test func `every truncation is refused`() throws {
    let folder = try TemporaryFolder()
    let whole = try Data(contentsOf: URL(filePath: fixture("pytorch/pytorch_model.bin")))
    for count in 0..<whole.count {
      try whole.prefix(count).write(to: URL(filePath: folder("x.bin")))
      #expect(throws: CheckpointError.self, "\(count)") { try Checkpoint.open(folder("x.bin")) }
    }
  }
}
