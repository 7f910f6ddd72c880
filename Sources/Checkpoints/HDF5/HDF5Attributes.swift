internal import CHDF5
import Glibc

/// Reads and writes the attributes of HDF5 objects; keeps what all of them need.
struct HDF5Attributes: ~Copyable {
  private let scalar: HDF5Handle
  private let text: HDF5Handle
  /// Names are UTF-8.
  private let creation: HDF5Handle

  init() throws(HDF5Failure) {
    let scalar = try HDF5Handle(H5Screate(H5S_SCALAR))
    // Of varying length (H5T_VARIABLE), because h5py reads only those as str.
    let text = try HDF5Handle(H5Tcopy(smelt_h5_c_string()))
    try HDF5Library.check(H5Tset_size(text.id, -1))
    try HDF5Library.check(H5Tset_cset(text.id, H5T_CSET_UTF8))
    let creation = try HDF5Handle(H5Pcreate(smelt_h5_attribute_creation()))
    try HDF5Library.check(H5Pset_char_encoding(creation.id, H5T_CSET_UTF8))
    self.scalar = scalar
    self.text = text
    self.creation = creation
  }
}

// MARK: - Writing

extension HDF5Attributes {
  /// Writes text as a string or, where NUL would end a string too early, as its bytes.
  /// - Precondition: `name` is one that HDF5 can hold: not empty and without NUL.
  func write(_ value: String, as name: String, to object: borrowing HDF5Handle)
    throws(HDF5Failure)
  {
    guard !value.utf8.contains(0) else {
      return try write(Array(value.utf8), of: smelt_h5_u8(), as: name, to: object)
    }
    let attribute = try HDF5Handle(
      H5Acreate2(object.id, name, text.id, scalar.id, creation.id, hid_t(H5P_DEFAULT)))
    let result = value.withCString { pointer in
      withUnsafePointer(to: pointer) { H5Awrite(attribute.id, text.id, $0) }
    }
    try HDF5Library.check(result)
  }

  /// Writes a list, which must not be empty, of fixed-width numbers.
  func write<Number: BitwiseCopyable>(
    _ numbers: [Number], of type: hid_t, as name: String, to object: borrowing HDF5Handle
  ) throws(HDF5Failure) {
    var count = hsize_t(numbers.count)
    let space = try HDF5Handle(H5Screate_simple(1, &count, nil))
    let attribute = try HDF5Handle(
      H5Acreate2(object.id, name, type, space.id, creation.id, hid_t(H5P_DEFAULT)))
    try HDF5Library.check(numbers.withUnsafeBytes { H5Awrite(attribute.id, type, $0.baseAddress) })
  }
}

// MARK: - Reading

extension HDF5Attributes {
  /// More than any sensible attribute has; less than would hurt.
  private static let largest = 256 << 20

  func names(of object: borrowing HDF5Handle) throws(HDF5Failure) -> [String] {
    var names: [String?] = []
    let result = withUnsafeMutablePointer(to: &names) {
      H5Aiterate2(
        object.id, H5_INDEX_NAME, H5_ITER_INC, nil,
        { _, name, _, context in
          context!.assumingMemoryBound(to: [String?].self).pointee
            .append(String(validatingCString: name!))
          return 0
        }, $0)
    }
    try HDF5Library.check(result)
    return try names.map { (name) throws(HDF5Failure) in
      guard let name else { throw HDF5Failure("has an attribute whose name is not UTF-8 text") }
      return name
    }
  }

  /// The text of an attribute, if there is one of this name.
  func text(_ name: String, of object: borrowing HDF5Handle) throws(HDF5Failure) -> String? {
    guard try HDF5Library.check(H5Aexists(object.id, name)) > 0 else { return nil }
    let attribute = try HDF5Handle(H5Aopen(object.id, name, hid_t(H5P_DEFAULT)))
    let type = try HDF5Handle(H5Aget_type(attribute.id))
    let count = try count(of: attribute)
    let kind = H5Tget_class(type.id)
    let isString = kind == H5T_STRING && count == 1
    let isBytes = kind == H5T_INTEGER && H5Tget_size(type.id) == 1
    guard isString || isBytes else {
      throw HDF5Failure("has an attribute \(quoted(name)) that is not text")
    }
    let bytes =
      try isString && H5Tis_variable_str(type.id) > 0
      ? variableString(attribute, type) : fixedBytes(attribute, type, count, trimmed: isString)
    guard let text = String(validating: bytes, as: UTF8.self) else {
      throw HDF5Failure("has an attribute \(quoted(name)) that is not UTF-8 text")
    }
    return text
  }

  /// The whole numbers of an attribute, if there is one of this name.
  func integers(_ name: String, of object: borrowing HDF5Handle) throws(HDF5Failure) -> [Int64]? {
    guard try HDF5Library.check(H5Aexists(object.id, name)) > 0 else { return nil }
    let attribute = try HDF5Handle(H5Aopen(object.id, name, hid_t(H5P_DEFAULT)))
    let type = try HDF5Handle(H5Aget_type(attribute.id))
    guard H5Tget_class(type.id) == H5T_INTEGER else {
      throw HDF5Failure("has an attribute \(quoted(name)) that is not whole numbers")
    }
    var numbers = [Int64](repeating: 0, count: try count(of: attribute))
    try HDF5Library.check(
      numbers.withUnsafeMutableBytes { H5Aread(attribute.id, smelt_h5_i64(), $0.baseAddress) })
    return numbers
  }

  private func count(of attribute: borrowing HDF5Handle) throws(HDF5Failure) -> Int {
    let space = try HDF5Handle(H5Aget_space(attribute.id))
    let count = try HDF5Library.check(H5Sget_simple_extent_npoints(space.id))
    guard count <= HDF5Attributes.largest / 8 else {
      throw HDF5Failure("has an attribute of \(count) elements")
    }
    return Int(count)
  }

  private func variableString(_ attribute: borrowing HDF5Handle, _ type: borrowing HDF5Handle)
    throws(HDF5Failure) -> [UInt8]
  {
    let memory = try HDF5Handle(H5Tget_native_type(type.id, H5T_DIR_DEFAULT))
    var pointer: UnsafeMutablePointer<CChar>?
    try HDF5Library.check(H5Aread(attribute.id, memory.id, &pointer))
    // The library allocated the string, ended it with NUL, and frees it. No string is none.
    guard let string = pointer else { return [] }
    defer { _ = H5free_memory(string) }
    return Array(UnsafeRawBufferPointer(start: string, count: strlen(string)))
  }

  private func fixedBytes(
    _ attribute: borrowing HDF5Handle, _ type: borrowing HDF5Handle, _ count: Int, trimmed: Bool
  ) throws(HDF5Failure) -> [UInt8] {
    let (size, overflow) = H5Tget_size(type.id).multipliedReportingOverflow(by: count)
    guard !overflow, size <= HDF5Attributes.largest else {
      throw HDF5Failure("has an attribute of more than \(HDF5Attributes.largest) bytes")
    }
    var bytes = [UInt8](repeating: 0, count: size)
    try HDF5Library.check(
      bytes.withUnsafeMutableBytes { H5Aread(attribute.id, type.id, $0.baseAddress) })
    return trimmed ? Array(bytes.prefix { $0 != 0 }) : bytes
  }
}
