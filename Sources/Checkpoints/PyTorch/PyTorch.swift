/// PyTorch's own files (`pytorch_model.bin`, `.pt`, `.pth`), which can only be read: a zip file
/// of a pickle and, uncompressed, the elements of every storage.
///
/// https://pytorch.org/docs/stable/notes/serialization.html — a pickle is a program; `Unpickler`
/// knows only what makes tensors and runs nothing.
public enum PyTorch: CheckpointFormat {
  public static let name = "PyTorch"
  /// None: it is not written.
  public static let fileExtensions: [String] = []

  /// What a quarter of a million tensors need; a hostile byte can cost 50 of memory.
  private static let largestPickle = 64 << 20

  public static func recognises(_ beginning: [UInt8]) -> Bool {
    // An entry, or the end of an archive without entries, which may be 64-bit.
    [[3, 4], [5, 6], [6, 6]].contains { beginning.starts(with: [0x50, 0x4B] + $0) }
  }

  /// Opens a zip file; numpy's begin alike, and what is in them tells them apart.
  public static func open(_ path: String) throws(CheckpointError) -> any TensorSource {
    let archive = try ZipArchive(path)
    let pickles = archive.entries.filter {
      $0.name == "data.pkl" || $0.name.hasSuffix("/data.pkl")
    }
    guard let pickle = pickles.first, pickles.count == 1 else {
      return try NumPy.open(archive)
    }
    let folder = String(pickle.name.dropLast("data.pkl".count))
    func refused(_ problem: String, remedy: String? = nil) -> CheckpointError {
      CheckpointError(file: path, problem, remedy: remedy)
    }
    guard archive[folder + "constants.pkl"] == nil else {
      throw refused(
        "is a TorchScript program, not a file of tensors", remedy: "save its state_dict instead")
    }
    guard !pickle.isCompressed, pickle.size <= largestPickle else {
      throw refused("has a pickle that PyTorch would not have written: compressed or too large")
    }
    if let order = archive[folder + "byteorder"], order.size < 16, !order.isCompressed {
      let text = try archive.file.bytes(at: archive.offset(of: order), count: order.size)
      guard text.elementsEqual("little".utf8) else {
        throw refused("was written on a big-endian machine", remedy: "save it again elsewhere")
      }
    }
    var unpickler = Unpickler(
      try archive.file.bytes(at: archive.offset(of: pickle), count: pickle.size), file: path)
    let root = try unpickler.load()
    return try PyTorchSource(archive, folder: folder, unpickler, root)
  }

  public static func create(_ path: String, _ manifest: Manifest, _ options: WritingOptions)
    throws(CheckpointError) -> any TensorSink
  {
    throw CheckpointError(
      file: path, "would be a PyTorch file, which Smelt only reads", remedy: "write safetensors")
  }
}

/// The tensors of a PyTorch file: views of storages, which may be shared and strided.
private final class PyTorchSource: TensorSource {
  /// Where a tensor's elements are.
  private struct View {
    let entry: ZipArchive.Entry
    /// Where in the file its first element begins.
    let offset: Int
    let strides: [Int]
    let isContiguous: Bool
  }

  let path: String
  let manifest: Manifest
  let warnings: [String]
  private let archive: ZipArchive
  private let pickle: ZipArchive.Entry
  private var file: MappedFile { archive.file }
  private let views: [View]

  init(_ archive: ZipArchive, folder: String, _ pickle: Unpickler, _ root: Unpickler.Value)
    throws(CheckpointError)
  {
    let (named, leftOut) = try pickle.named(root, file: archive.path)
    var tensors: [TensorInfo] = []
    var views: [View] = []
    for (name, tensor) in named {
      let (info, view) = try Self.prove(tensor, of: pickle, name, archive, folder)
      tensors.append(info)
      views.append(view)
    }
    path = archive.path
    manifest = try Manifest(proving: tensors) {
      CheckpointError(file: archive.path, tensor: $0.name, "is there twice")
    }
    self.views = views
    self.archive = archive
    self.pickle = archive[folder + "data.pkl"]!
    warnings = leftOut > 0 ? ["\(path): \(leftOut) values that are no tensors left out"] : []
  }

  /// Proves that all of a tensor lies within its storage, and the storage in the file.
  private static func prove(
    _ tensor: Unpickler.Tensor, of pickle: Unpickler, _ name: String, _ archive: ZipArchive,
    _ folder: String
  ) throws(CheckpointError) -> (TensorInfo, View) {
    func malformed(_ problem: String, remedy: String? = nil) -> CheckpointError {
      CheckpointError(file: archive.path, tensor: name, problem, remedy: remedy)
    }
    let info: TensorInfo
    do { info = try TensorInfo(name: name, dtype: tensor.dtype, shape: tensor.shape) } catch {
      throw malformed("has a shape too large to count its bytes")
    }
    let storage = pickle.storages[tensor.storage]
    let width = tensor.dtype.bitWidth / 8
    let (size, overflow) = storage.count.multipliedReportingOverflow(
      by: storage.dtype.map { $0.bitWidth / 8 } ?? 1)
    guard let entry = archive["\(folder)data/\(storage.key)"] else {
      throw malformed("is in the storage \(quoted(storage.key)), which is not in the file")
    }
    guard !entry.isCompressed, !overflow, size <= entry.size else {
      throw malformed(
        "is in the storage \(quoted(storage.key)) of \(size) bytes, of which the file has \(entry.size)",
        remedy: "it is damaged: download it again")
    }
    // The last element's place: Σ (dimension − 1) · stride.
    var last = tensor.offset
    var isBeyond = false
    for (dimension, stride) in zip(tensor.shape, tensor.strides) where info.elementCount > 0 {
      let (reach, tooFar) = (dimension - 1).multipliedReportingOverflow(by: stride)
      let (sum, stillTooFar) = last.addingReportingOverflow(reach)
      isBeyond = isBeyond || tooFar || stillTooFar
      last = sum
    }
    guard info.elementCount == 0 || (!isBeyond && last < size / width) else {
      throw malformed("reaches beyond its storage of \(size / width) elements")
    }
    // Strides of 0 repeat elements: a few bytes could claim to be any number.
    guard info.byteCount <= max(size, 64 << 20) else {
      throw malformed("repeats a storage of \(size) bytes until it has \(info.byteCount)")
    }
    var expected = 1
    var isContiguous = true
    for (dimension, stride) in zip(tensor.shape, tensor.strides).reversed() where dimension != 1 {
      isContiguous = isContiguous && stride == expected
      expected *= max(dimension, 1)
    }
    let start = try archive.offset(of: entry)
    return (
      info,
      View(
        entry: entry,
        offset: info.elementCount == 0 ? start : start + tensor.offset * width,
        strides: tensor.strides, isContiguous: isContiguous || info.elementCount == 0)
    )
  }

  func verifyData(workers: Int) throws -> Verification {
    try refuseDamagedPickle()
    return try archive.verify(manifest.tensors, workers: workers) { [views] in views[$0].entry }
  }

  /// Which tensors there are, and where, is as good as the pickle.
  private func refuseDamagedPickle() throws(CheckpointError) {
    guard try archive.isSound(pickle) != false else {
      throw archive.damaged(pickle, "is not what its checksum was made of")
    }
  }

  func refuseDamage(of tensors: [TensorInfo], workers: Int) throws {
    try refuseDamagedPickle()
    let entries = tensors.map { views[manifest.position(of: $0.name)!].entry }
    try archive.verify(tensors, workers: workers) { entries[$0] }.refuseDamage(in: path)
  }

  func checkUnchanged() throws(CheckpointError) { try file.checkUnchanged() }

  func read(_ tensor: TensorInfo, at offset: Int, into buffer: inout MutableRawSpan)
    throws(CheckpointError)
  {
    precondition(offset >= 0 && offset + buffer.byteCount <= tensor.byteCount)
    let view = views[manifest.position(of: tensor.name)!]
    guard !view.isContiguous else {
      return try file.read(at: view.offset + offset, into: &buffer)
    }
    try file.gather(
      from: view.offset, shape: tensor.shape, strides: view.strides,
      width: tensor.dtype.bitWidth / 8, at: offset, into: &buffer)
  }
}

extension Unpickler {
  /// Deeper than any checkpoint of names is nested.
  private static let deepest = 32
  /// Bytes of one name, and of all.
  private static let longestName = 64 << 10
  private static let mostNameBytes = 256 << 20

  /// The tensors by name: keys of nested dictionaries and numbers in lists joined by dots.
  /// - Returns: also how many other values there are.
  func named(_ root: Value, file: String) throws(CheckpointError)
    -> (tensors: [(String, Tensor)], leftOut: Int)
  {
    var found: [(String, Tensor)] = []
    var leftOut = 0
    // Shared containers are visited again; a hostile file could make that exponential.
    var visits = 1000
    for container in containers { visits += 4 * container.count }
    // So are names: each tensor under a shared long key would have it again.
    var nameBytes = 0
    func visit(_ value: Value, _ name: String, depth: Int) throws(CheckpointError) {
      visits -= 1
      guard depth < Self.deepest, visits > 0 else {
        throw CheckpointError(file: file, "has a pickle of objects nested too deeply")
      }
      nameBytes += name.utf8.count
      guard name.utf8.count <= Self.longestName, nameBytes <= Self.mostNameBytes else {
        throw CheckpointError(
          file: file, "has a pickle with names too long: \(quoted(name))",
          remedy: "it is damaged, or made to do harm")
      }
      func joined(_ part: String) -> String { depth == 0 ? part : name + "." + part }
      switch value {
      case .tensor(let number): found.append((depth == 0 ? "tensor" : name, tensors[number]))
      case .container(let number):
        switch containers[number] {
        case .dictionary(let items):
          for (key, value) in items {
            switch key {
            case .string(let key): try visit(value, joined(key), depth: depth + 1)
            case .integer(let key): try visit(value, joined(String(key)), depth: depth + 1)
            default: leftOut += 1
            }
          }
        case .list(let values), .tuple(let values):
          for (index, value) in values.enumerated() {
            try visit(value, joined(String(index)), depth: depth + 1)
          }
        }
      default: leftOut += 1
      }
    }
    try visit(root, "", depth: 0)
    return (found, leftOut)
  }
}
