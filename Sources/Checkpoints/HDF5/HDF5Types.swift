internal import CHDF5

extension DType {
  /// The element type as HDF5 has it, or the bytes it is packed into.
  ///
  /// Floats of 8 bits and fewer are kept as bytes: libhdf5 would read 14 codes of E4M3 as
  /// infinities and NaNs, which that type does not have.
  var hdf5StorageType: DType {
    switch self {
    case .f4, .f6E2M3, .f6E3M2, .f8E5M2, .f8E4M3, .f8E8M0, .f8E4M3FNUZ, .f8E5M2FNUZ: .u8
    default: self
    }
  }

  /// What numpy, or ml_dtypes where numpy has no such type, calls it.
  var numpyName: String {
    switch self {
    case .bool: "bool"
    case .f4: "float4_e2m1fn"
    case .f6E2M3: "float6_e2m3fn"
    case .f6E3M2: "float6_e3m2fn"
    case .u8: "uint8"
    case .i8: "int8"
    case .f8E5M2: "float8_e5m2"
    case .f8E4M3: "float8_e4m3fn"
    case .f8E8M0: "float8_e8m0fnu"
    case .f8E4M3FNUZ: "float8_e4m3fnuz"
    case .f8E5M2FNUZ: "float8_e5m2fnuz"
    case .i16: "int16"
    case .u16: "uint16"
    case .f16: "float16"
    case .bf16: "bfloat16"
    case .i32: "int32"
    case .u32: "uint32"
    case .f32: "float32"
    case .c64: "complex64"
    case .f64: "float64"
    case .i64: "int64"
    case .u64: "uint64"
    }
  }

  /// The type of a dataset that holds such elements.
  /// - Precondition: the type is its own `hdf5StorageType`.
  func hdf5Type() throws(HDF5Failure) -> HDF5Handle {
    switch self {
    case .u8: try HDF5Handle(H5Tcopy(smelt_h5_u8()))
    case .i8: try HDF5Handle(H5Tcopy(smelt_h5_i8()))
    case .u16: try HDF5Handle(H5Tcopy(smelt_h5_u16()))
    case .i16: try HDF5Handle(H5Tcopy(smelt_h5_i16()))
    case .u32: try HDF5Handle(H5Tcopy(smelt_h5_u32()))
    case .i32: try HDF5Handle(H5Tcopy(smelt_h5_i32()))
    case .u64: try HDF5Handle(H5Tcopy(smelt_h5_u64()))
    case .i64: try HDF5Handle(H5Tcopy(smelt_h5_i64()))
    case .f32: try HDF5Handle(H5Tcopy(smelt_h5_f32()))
    case .f64: try HDF5Handle(H5Tcopy(smelt_h5_f64()))
    case .f16: try sixteenBitFloat(exponent: 10, exponentBits: 5, bias: 15)
    case .bf16: try sixteenBitFloat(exponent: 7, exponentBits: 8, bias: 127)
    case .bool: try booleanType()
    case .c64: try complexType()
    default: preconditionFailure("\(rawValue) is stored as bytes")
    }
  }

  /// A float with its sign in bit 15, its exponent from bit `exponent` on and its mantissa below.
  private func sixteenBitFloat(exponent: Int, exponentBits: Int, bias: Int)
    throws(HDF5Failure) -> HDF5Handle
  {
    let type = try HDF5Handle(H5Tcopy(smelt_h5_f32()))
    // In this order: each step must leave a type that the library finds consistent.
    try HDF5Library.check(H5Tset_fields(type.id, 15, exponent, exponentBits, 0, exponent))
    try HDF5Library.check(H5Tset_precision(type.id, 16))
    try HDF5Library.check(H5Tset_size(type.id, 2))
    try HDF5Library.check(H5Tset_ebias(type.id, bias))
    return type
  }

  /// h5py's bool: an enumeration over a signed byte.
  private func booleanType() throws(HDF5Failure) -> HDF5Handle {
    let type = try HDF5Handle(H5Tenum_create(smelt_h5_i8()))
    for (name, value) in [("FALSE", Int8(0)), ("TRUE", Int8(1))] {
      try HDF5Library.check(withUnsafePointer(to: value) { H5Tenum_insert(type.id, name, $0) })
    }
    return type
  }

  /// h5py's complex64: a pair of floats named r and i.
  private func complexType() throws(HDF5Failure) -> HDF5Handle {
    let type = try HDF5Handle(H5Tcreate(H5T_COMPOUND, 8))
    try HDF5Library.check(H5Tinsert(type.id, "r", 0, smelt_h5_f32()))
    try HDF5Library.check(H5Tinsert(type.id, "i", 4, smelt_h5_f32()))
    return type
  }

  /// The element type of a dataset, by its HDF5 type alone.
  init(hdf5Type type: hid_t) throws(HDF5Failure) {
    let size = H5Tget_size(type)
    let candidates: [DType] =
      switch (H5Tget_class(type), size) {
      case (H5T_INTEGER, 1): [.u8, .i8]
      case (H5T_INTEGER, 2): [.u16, .i16]
      case (H5T_INTEGER, 4): [.u32, .i32]
      case (H5T_INTEGER, 8): [.u64, .i64]
      case (H5T_FLOAT, 2): [.f16, .bf16]
      case (H5T_FLOAT, 4): [.f32]
      case (H5T_FLOAT, 8): [.f64]
      case (H5T_ENUM, 1): [.bool]
      case (H5T_COMPOUND, 8): [.c64]
      default: []
      }
    for candidate in candidates {
      let known = try candidate.hdf5Type()
      if try HDF5Library.check(H5Tequal(type, known.id)) > 0 {
        self = candidate
        return
      }
    }
    throw HDF5Failure(
      "holds \(describe(type, size: size)), which is no tensor's element type",
      remedy: "convert it with h5py")
  }
}

/// A type that Smelt does not read, in words.
private func describe(_ type: hid_t, size: Int) -> String {
  let bits = size.multipliedReportingOverflow(by: 8)
  let width = bits.overflow ? "\(size)-byte" : "\(bits.partialValue)-bit"
  let order = H5Tget_order(type) == H5T_ORDER_BE ? "big-endian " : ""
  return switch H5Tget_class(type) {
  case H5T_INTEGER: "\(order)\(width) integers" + (order.isEmpty ? " of an unusual make" : "")
  case H5T_FLOAT: "\(order)\(width) floats" + (order.isEmpty ? " of an unusual make" : "")
  case H5T_STRING: "strings"
  case H5T_BITFIELD: "bit fields"
  case H5T_OPAQUE: "opaque bytes"
  case H5T_COMPOUND: "compounds of \(H5Tget_nmembers(type)) fields"
  case H5T_REFERENCE: "references"
  case H5T_ENUM: "an enumeration"
  case H5T_VLEN: "lists of varying length"
  case H5T_ARRAY: "arrays"
  default: "a type unknown to Smelt"
  }
}
