/// Reads the pickle of a PyTorch file without running anything: only what describes tensors is
/// known, everything else is refused by name.
///
/// The opcodes are those of Python's pickletools. Lists, tuples and dictionaries stand in one
/// list and refer to each other by number, so that neither cycles nor depth can hurt.
struct Unpickler {
  enum Value {
    case none
    case integer(Int)
    case string(String)
    case global(String)
    /// A list, tuple or dictionary: its number.
    case container(Int)
    case storage(Int)
    case tensor(Int)
    /// A number or bytes that no tensor needs.
    case other
  }

  enum Container {
    case list([Value])
    case tuple([Value])
    case dictionary([(key: Value, value: Value)])

    var count: Int {
      switch self {
      case .list(let values), .tuple(let values): values.count
      case .dictionary(let items): items.count
      }
    }
  }

  /// A stretch of elements that tensors share.
  struct Storage {
    /// Nil where the elements' type is left to the tensor.
    let dtype: DType?
    let key: String
    /// Elements; bytes where the type is left open.
    let count: Int
  }

  /// A view of a storage.
  struct Tensor {
    let storage: Int
    let dtype: DType
    let offset: Int
    let shape: [Int]
    let strides: [Int]
  }

  private(set) var containers: [Container] = []
  private(set) var storages: [Storage] = []
  private(set) var tensors: [Tensor] = []
  private var bytes: LittleEndianReader
  private var stack: [Value] = []
  private var marks: [Int] = []
  private var memo: [Int: Value] = [:]

  /// As much as a million tensors need; each takes a byte or more of a hostile file.
  private static let mostObjects = 8_000_000
  /// What a million tensors of two dimensions need.
  private static let mostTaken = 4_000_000
  /// PyTorch's own limit is about this.
  private static let mostDimensions = 64
  /// How many values have been taken out of containers, which a hostile file could share.
  private var takenCount = 0

  init(_ bytes: [UInt8], file: String) {
    self.bytes = LittleEndianReader(bytes, file: file, subject: "its pickle")
  }

  // MARK: The stack

  private func malformed(_ problem: String) -> CheckpointError {
    bytes.failure("has a malformed pickle: \(problem) at byte \(bytes.position)")
  }

  private mutating func pop() throws(CheckpointError) -> Value {
    // What lies below a mark belongs to what the mark will make.
    guard stack.count > marks.last ?? 0, let value = stack.popLast() else {
      throw malformed("a value is missing")
    }
    return value
  }

  private mutating func popToMark() throws(CheckpointError) -> [Value] {
    guard let mark = marks.popLast() else { throw malformed("a mark is missing") }
    defer { stack.removeSubrange(mark...) }
    return Array(stack[mark...])
  }

  private mutating func pop(_ count: Int) throws(CheckpointError) -> [Value] {
    var values: [Value] = []
    for _ in 0..<count { values.append(try pop()) }
    return values.reversed()
  }

  private mutating func push(_ container: Container) throws(CheckpointError) {
    guard containers.count < Unpickler.mostObjects else { throw malformed("too many objects") }
    containers.append(container)
    stack.append(.container(containers.count - 1))
  }

  private func top() throws(CheckpointError) -> Value {
    guard stack.count > marks.last ?? 0, let value = stack.last else {
      throw malformed("a value is missing")
    }
    return value
  }

  private mutating func remember(at index: Int) throws(CheckpointError) {
    guard memo.count < Unpickler.mostObjects else { throw malformed("too many objects") }
    memo[index] = try top()
  }

  private mutating func recall(_ index: Int) throws(CheckpointError) {
    guard let value = memo[index] else { throw malformed("nothing was remembered as \(index)") }
    stack.append(value)
  }

  private mutating func length(_ width: Int) throws(CheckpointError) -> Int {
    guard let length = Int(exactly: try bytes.unsigned(width)) else {
      throw malformed("a length is too large")
    }
    return length
  }

  private mutating func pushString(_ count: Int) throws(CheckpointError) {
    guard let text = String(validating: try bytes.take(count), as: UTF8.self) else {
      throw malformed("a string is not UTF-8 text")
    }
    stack.append(.string(text))
  }

  // MARK: The opcodes

  /// Runs the pickle.
  /// - Returns: what it describes.
  mutating func load() throws(CheckpointError) -> Value {
    while true {
      guard stack.count + marks.count < Unpickler.mostObjects else {
        throw malformed("too many objects")
      }
      let opcode = UInt8(truncatingIfNeeded: try bytes.unsigned(1))
      switch opcode {
      case 0x80:  // PROTO
        let version = try bytes.unsigned(1)
        guard version <= 5 else { throw malformed("protocol \(version) is unknown") }
      case 0x95: try bytes.skip(8)  // FRAME
      case UInt8(ascii: "."): return try pop()  // STOP

      case UInt8(ascii: "("): marks.append(stack.count)  // MARK
      case UInt8(ascii: "0"): _ = try pop()  // POP
      case UInt8(ascii: "1"): _ = try popToMark()  // POP_MARK

      case UInt8(ascii: "N"): stack.append(.none)  // NONE
      case 0x88: stack.append(.integer(1))  // NEWTRUE
      case 0x89: stack.append(.integer(0))  // NEWFALSE
      case UInt8(ascii: "K"): stack.append(.integer(Int(try bytes.unsigned(1))))  // BININT1
      case UInt8(ascii: "M"): stack.append(.integer(Int(try bytes.unsigned(2))))  // BININT2
      case UInt8(ascii: "J"):  // BININT
        stack.append(.integer(Int(Int32(truncatingIfNeeded: try bytes.unsigned(4)))))
      case 0x8A: try pushLong(Int(try bytes.unsigned(1)))  // LONG1
      case 0x8B: try pushLong(try length(4))  // LONG4
      case UInt8(ascii: "G"):  // BINFLOAT
        try bytes.skip(8)
        stack.append(.other)

      case UInt8(ascii: "X"): try pushString(try length(4))  // BINUNICODE
      case 0x8C: try pushString(try length(1))  // SHORT_BINUNICODE
      case 0x8D: try pushString(try length(8))  // BINUNICODE8
      case UInt8(ascii: "T"): try pushString(try length(4))  // BINSTRING
      case UInt8(ascii: "U"): try pushString(try length(1))  // SHORT_BINSTRING
      case UInt8(ascii: "B"), UInt8(ascii: "C"), 0x8E:  // BINBYTES, SHORT_…, …8
        let width = opcode == 0x8E ? 8 : opcode == UInt8(ascii: "B") ? 4 : 1
        try bytes.skip(try length(width))
        stack.append(.other)

      case UInt8(ascii: "]"): try push(.list([]))  // EMPTY_LIST
      case UInt8(ascii: "}"): try push(.dictionary([]))  // EMPTY_DICT
      case UInt8(ascii: ")"): try push(.tuple([]))  // EMPTY_TUPLE
      case 0x8F: stack.append(.other)  // EMPTY_SET
      case 0x90:  // ADDITEMS
        _ = try popToMark()
        guard case .other = try top() else { throw malformed("what is added to is no set") }
      case 0x91:  // FROZENSET
        _ = try popToMark()
        stack.append(.other)
      case UInt8(ascii: "l"): try push(.list(try popToMark()))  // LIST
      case UInt8(ascii: "t"): try push(.tuple(try popToMark()))  // TUPLE
      case 0x85: try push(.tuple(try pop(1)))  // TUPLE1
      case 0x86: try push(.tuple(try pop(2)))  // TUPLE2
      case 0x87: try push(.tuple(try pop(3)))  // TUPLE3
      case UInt8(ascii: "a"): try append(try pop(1))  // APPEND
      case UInt8(ascii: "e"): try append(try popToMark())  // APPENDS
      case UInt8(ascii: "s"): try setItems(try pop(2))  // SETITEM
      case UInt8(ascii: "u"): try setItems(try popToMark())  // SETITEMS

      case UInt8(ascii: "q"): try remember(at: Int(try bytes.unsigned(1)))  // BINPUT
      case UInt8(ascii: "r"): try remember(at: Int(try bytes.unsigned(4)))  // LONG_BINPUT
      case 0x94: try remember(at: memo.count)  // MEMOIZE
      case UInt8(ascii: "h"): try recall(Int(try bytes.unsigned(1)))  // BINGET
      case UInt8(ascii: "j"): try recall(Int(try bytes.unsigned(4)))  // LONG_BINGET

      case UInt8(ascii: "c"):  // GLOBAL
        let (module, name) = (try bytes.line(), try bytes.line())
        try pushGlobal(
          String(decoding: module, as: UTF8.self) + "." + String(decoding: name, as: UTF8.self))
      case 0x93:  // STACK_GLOBAL
        let names = try pop(2)
        guard case .string(let module) = names[0], case .string(let name) = names[1] else {
          throw malformed("a global has no name")
        }
        try pushGlobal(module + "." + name)
      case UInt8(ascii: "Q"): try pushStorage(try pop())  // BINPERSID
      case UInt8(ascii: "R"):  // REDUCE
        let call = try pop(2)
        guard case .global(let name) = call[0], let arguments = elements(call[1]) else {
          throw malformed("something that is no function is called")
        }
        try reduce(name, arguments)
      case UInt8(ascii: "b"):  // BUILD: an object's attributes, which say nothing here
        _ = try pop()
        switch try top() {
        case .container, .other: break
        default: throw malformed("an object has a state")
        }

      default:
        throw malformed("opcode 0x\(String(opcode, radix: 16)) describes no tensor")
      }
    }
  }

  private mutating func pushLong(_ count: Int) throws(CheckpointError) {
    let digits = try bytes.take(count)
    guard count <= 8 else { return stack.append(.other) }
    let isNegative = digits.last.map { $0 >= 0x80 } ?? false
    let value = digits.reversed().reduce(isNegative ? -1 : 0) { $0 << 8 | Int($1) }
    stack.append(.integer(value))
  }

  private mutating func append(_ values: [Value]) throws(CheckpointError) {
    guard case .container(let number) = try top(), case .list(var list) = containers[number] else {
      throw malformed("what is appended to is no list")
    }
    containers[number] = .list([])  // So that the list is not copied.
    list += values
    containers[number] = .list(list)
  }

  private mutating func setItems(_ values: [Value]) throws(CheckpointError) {
    guard case .container(let number) = try top(), case .dictionary(var items) = containers[number],
      values.count.isMultiple(of: 2)
    else { throw malformed("what is added to is no dictionary") }
    containers[number] = .dictionary([])
    for index in stride(from: 0, to: values.count, by: 2) {
      items.append((values[index], values[index + 1]))
    }
    containers[number] = .dictionary(items)
  }

  // MARK: What makes tensors

  /// The types of elements by the names of PyTorch's storages.
  private static let storageTypes: [String: DType] = [
    "torch.DoubleStorage": .f64, "torch.FloatStorage": .f32, "torch.HalfStorage": .f16,
    "torch.BFloat16Storage": .bf16, "torch.LongStorage": .i64, "torch.IntStorage": .i32,
    "torch.ShortStorage": .i16, "torch.CharStorage": .i8, "torch.ByteStorage": .u8,
    "torch.BoolStorage": .bool, "torch.ComplexFloatStorage": .c64,
  ]

  /// The types that have no storage of their own, by their own names.
  private static let otherTypes: [String: DType] = [
    "torch.uint16": .u16, "torch.uint32": .u32, "torch.uint64": .u64,
    "torch.float8_e4m3fn": .f8E4M3, "torch.float8_e5m2": .f8E5M2,
    "torch.float8_e4m3fnuz": .f8E4M3FNUZ, "torch.float8_e5m2fnuz": .f8E5M2FNUZ,
    "torch.float8_e8m0fnu": .f8E8M0,
  ]

  private static let functions: Set<String> = [
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
    "collections.OrderedDict", "torch.Size", "torch.storage.UntypedStorage",
  ]

  /// What training leaves in its checkpoints beside tensors: passed over, whatever is asked of it.
  private static let bystanders: Set<String> = [
    "torch.device", "_codecs.encode", "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "__builtin__.set", "builtins.set", "__builtin__.frozenset", "builtins.frozenset",
    "__builtin__.complex", "builtins.complex", "__builtin__.bytearray", "builtins.bytearray",
  ]

  /// Dictionaries by other names, and the kinds of values that they make up.
  private static let dictionaries: Set<String> = ["collections.defaultdict", "collections.Counter"]
  private static let valueKinds: Set<String> = Set(
    ["dict", "list", "int", "float"].flatMap { ["__builtin__.\($0)", "builtins.\($0)"] })

  /// Types as values: of PyTorch's, those that it can save tensors of.
  private static let typeNames: Set<String> = [
    "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16", "torch.complex64",
    "torch.complex128", "torch.int64", "torch.int32", "torch.int16", "torch.int8", "torch.uint8",
    "torch.bool",
  ]

  /// What makes tensors of other kinds than safetensors has, and what they are.
  private static let refused: [String: (what: String, remedy: String)] = [
    "torch.ComplexDoubleStorage": ("of complex128, a type that is not known", "make it complex64"),
    "torch._utils._rebuild_qtensor": ("that is quantised", "dequantise it"),
    "torch._utils._rebuild_sparse_tensor": ("that is sparse", "make it dense"),
    "torch._utils._rebuild_sparse_csr_tensor": ("that is sparse", "make it dense"),
    "torch._utils._rebuild_nested_tensor": ("that is nested", "save its parts"),
    "torch._utils._rebuild_meta_tensor_no_storage": (
      "on the meta device, which has no values", "leave it out"
    ),
    "torch._utils._rebuild_wrapper_subclass": (
      "of a class of its own", "make it an ordinary tensor"
    ),
    "torch._tensor._rebuild_from_type_v2": ("of a class of its own", "make it an ordinary tensor"),
  ]

  private mutating func pushGlobal(_ name: String) throws(CheckpointError) {
    if let (what, remedy) = Self.refused[name] {
      throw bytes.failure(
        "has a tensor \(what)", remedy: "\(remedy) in PyTorch and save the file again")
    }
    let known = [
      Self.functions, Self.bystanders, Self.dictionaries, Self.valueKinds, Self.typeNames,
    ]
    guard
      known.contains(where: { $0.contains(name) }) || Self.storageTypes[name] != nil
        || Self.otherTypes[name] != nil
    else {
      throw bytes.failure(
        "asks Python for \(quoted(name)), which no tensor needs; nothing was run",
        remedy: "if you trust it, save only its state_dict with PyTorch")
    }
    stack.append(.global(name))
  }

  /// The elements of a tuple or list.
  private func elements(_ value: Value) -> [Value]? {
    guard case .container(let number) = value else { return nil }
    switch containers[number] {
    case .tuple(let elements), .list(let elements): return elements
    case .dictionary: return nil
    }
  }

  private mutating func take(_ count: Int) throws(CheckpointError) {
    takenCount += count
    guard takenCount < Unpickler.mostTaken else { throw malformed("too many objects") }
  }

  private mutating func naturals(_ value: Value) throws(CheckpointError) -> [Int] {
    guard let elements = elements(value) else { throw malformed("a shape is no tuple") }
    guard elements.count <= Unpickler.mostDimensions else {
      throw malformed("a tensor has \(elements.count) dimensions")
    }
    try take(elements.count)
    var numbers: [Int] = []
    for element in elements { numbers.append(try natural(element)) }
    return numbers
  }

  private func natural(_ value: Value) throws(CheckpointError) -> Int {
    guard case .integer(let number) = value, number >= 0 else {
      throw malformed("something that is no natural number is where one is due")
    }
    return number
  }

  /// `("storage", type, key, location, count)`
  private mutating func pushStorage(_ id: Value) throws(CheckpointError) {
    guard let fields = elements(id), fields.count >= 5, case .string("storage") = fields[0],
      case .global(let type) = fields[1], case .string(let key) = fields[2]
    else { throw malformed("a persistent id is not that of a storage") }
    let dtype = Self.storageTypes[type]
    guard dtype != nil || type == "torch.storage.UntypedStorage" else {
      throw malformed("\(quoted(type)) is no storage")
    }
    storages.append(Storage(dtype: dtype, key: key, count: try natural(fields[4])))
    stack.append(.storage(storages.count - 1))
  }

  private mutating func reduce(_ name: String, _ arguments: [Value]) throws(CheckpointError) {
    switch name {
    case _ where Self.bystanders.contains(name): stack.append(.other)
    case "collections.defaultdict": try push(.dictionary([]))
    case "collections.Counter":
      guard case .container? = arguments.first else { throw malformed("a Counter counts nothing") }
      stack.append(arguments[0])
    case "collections.OrderedDict":
      try push(.dictionary([]))
      let pairs = arguments.first.flatMap { elements($0) } ?? []
      try take(pairs.count)
      for pair in pairs {
        guard let item = elements(pair), item.count == 2 else {
          throw malformed("an OrderedDict has an item that is no pair")
        }
        try setItems(item)
      }
    case "torch.Size":
      guard arguments.count == 1 else { throw malformed("a Size has no one tuple") }
      stack.append(arguments[0])
    case "torch._utils._rebuild_parameter":
      guard case .tensor = arguments.first else { throw malformed("a parameter is no tensor") }
      stack.append(arguments[0])
    case "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
      "torch._utils._rebuild_tensor_v3":
      try pushTensor(arguments, isTyped: name.hasSuffix("_v3"))
    default: throw malformed("\(quoted(name)) is called")
    }
  }

  /// `(storage, offset, shape, strides, requires_grad, hooks[, dtype])`
  private mutating func pushTensor(_ arguments: [Value], isTyped: Bool) throws(CheckpointError) {
    guard arguments.count >= (isTyped ? 7 : 4), case .storage(let storage) = arguments[0] else {
      throw malformed("a tensor has no storage")
    }
    // Only a lazily conjugated or negated tensor has more to say of itself.
    guard arguments.count <= (isTyped ? 7 : 6) else {
      throw bytes.failure(
        "has a tensor that is conjugated or negated only when it is read",
        remedy: "save tensor.resolve_conj().resolve_neg() in PyTorch")
    }
    var dtype = storages[storage].dtype
    if isTyped {
      guard case .global(let type) = arguments[6] else { throw malformed("a tensor has no type") }
      dtype = Self.otherTypes[type]
      guard dtype != nil else {
        throw bytes.failure("has a tensor of \(quoted(type)), a type that is not known")
      }
    }
    guard let dtype else { throw malformed("a tensor has no type") }
    let tensor = Tensor(
      storage: storage, dtype: dtype, offset: try natural(arguments[1]),
      shape: try naturals(arguments[2]), strides: try naturals(arguments[3]))
    guard tensor.shape.count == tensor.strides.count else {
      throw malformed("a tensor has \(tensor.shape.count) dimensions, but not as many strides")
    }
    tensors.append(tensor)
    stack.append(.tensor(tensors.count - 1))
  }
}
