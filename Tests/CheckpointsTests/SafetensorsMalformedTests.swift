import Checkpoints
import Foundation
import TestSupport
import Testing

/// A file that must be refused, and the sentence it must be refused with.
struct MalformedFile: CustomTestStringConvertible {
  let what: String
  let bytes: [UInt8]
  /// The error, with the file called FILE.
  let error: String

  /// Any bytes at all.
  init(_ what: String, bytes: [UInt8], _ error: String) {
    (self.what, self.bytes, self.error) = (what, bytes, error)
  }

  /// A header of text behind its right length, and `body` bytes of data.
  init(_ what: String, _ header: String, body: Int = 0, _ error: String) {
    self.init(what, header: Array(header.utf8), body: body, error)
  }

  init(_ what: String, header: [UInt8], body: Int = 0, _ error: String) {
    self.init(what, bytes: safetensors(header, body: [UInt8](repeating: 7, count: body)), error)
  }

  var testDescription: String { what }
}

/// A safetensors file of this header, right or wrong, and body.
func safetensors(_ header: [UInt8], body: [UInt8] = []) -> [UInt8] {
  length(UInt64(header.count)) + header + body
}

func length(_ count: UInt64) -> [UInt8] {
  (0..<8).map { UInt8(truncatingIfNeeded: count >> (8 * $0)) }
}

/// The entry of a tensor of two bytes, with one field replaced or left out.
private func entry(
  _ dtype: String? = #""U8""#, _ shape: String? = "[2]", _ offsets: String? = "[0,2]"
) -> String {
  let fields = [("dtype", dtype), ("shape", shape), ("data_offsets", offsets)]
  let text = fields.compactMap { name, value in value.map { "\"\(name)\":\($0)" } }
  return "{" + text.joined(separator: ",") + "}"
}

private func u8(_ name: String, _ begin: Int, _ end: Int, count: Int? = nil) -> String {
  "\"\(name)\":" + entry(#""U8""#, "[\(count ?? (end - begin))]", "[\(begin),\(end)]")
}

@Suite struct `Malformed safetensors files` {
  static let lengths: [MalformedFile] = [
    .init("an empty file", bytes: [], "FILE: is empty; download it again"),
    .init(
      "under 8 bytes", bytes: [1, 0, 0],
      "FILE: has 3 bytes; a safetensors file begins with 8 bytes of header length"),
    .init("a header of no bytes", bytes: length(0) + [1], "FILE: declares a header of 0 bytes"),
    .init(
      "a header beyond the file", bytes: length(9) + Array("{}".utf8),
      "FILE: declares a header of 9 bytes but has only 2 after the length; it is truncated: download it again"
    ),
    .init(
      "a header of 2⁶³ bytes", bytes: length(1 << 63) + Array("{}".utf8),
      "FILE: declares a header of 9223372036854775808 bytes; the format's limit is 100000000; it may not be a safetensors file"
    ),
    .init(
      "a header of 2⁶⁴ − 1 bytes", bytes: length(.max) + Array("{}".utf8),
      "FILE: declares a header of 18446744073709551615 bytes; the format's limit is 100000000; it may not be a safetensors file"
    ),
    .init(
      "a header over the limit", bytes: length(100_000_001) + Array("{}".utf8),
      "FILE: declares a header of 100000001 bytes; the format's limit is 100000000; it may not be a safetensors file"
    ),
  ]

  static let confusions: [MalformedFile] = [
    .init(
      "a Git LFS pointer",
      bytes: Array("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a".utf8),
      "FILE: is not a safetensors file: it looks like a Git LFS pointer; fetch the file itself with 'git lfs pull'"
    ),
    .init(
      "an HTML page", bytes: Array("<!DOCTYPE html><html><body>Sign in".utf8),
      "FILE: is not a safetensors file: it looks like an HTML page; the download got a web page instead of the file"
    ),
    .init(
      "an HTML page behind a mark and white space",
      bytes: [0xEF, 0xBB, 0xBF] + Array("\r\n\n  <!DocType HTML>".utf8),
      "FILE: is not a safetensors file: it looks like an HTML page; the download got a web page instead of the file"
    ),
    .init(
      "an HTML page without its type", bytes: Array("<head><title>404".utf8),
      "FILE: is not a safetensors file: it looks like an HTML page; the download got a web page instead of the file"
    ),
    .init(
      "an XHTML page",
      bytes: Array("<?xml version=\"1.0\"?>\n<html xmlns=\"http://www.w3.org/1999/xhtml\">".utf8),
      "FILE: is not a safetensors file: it looks like an HTML page; the download got a web page instead of the file"
    ),
    .init(
      "a server's refusal as XML",
      bytes: Array("<?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code></Error>".utf8),
      "FILE: is not a safetensors file: it looks like an XML document; the download got a server's message instead of the file: read it, it says why"
    ),
    .init(
      "a server's refusal as JSON", bytes: Array(#"{"errors":{"message":"Not found"}}"#.utf8),
      "FILE: is not a safetensors file: it looks like JSON text; name the file with the tensors; if this should be it, the download got a server's message instead: read it"
    ),
    .init(
      "a JSON file with a brace in the ninth place", bytes: Array("{\n\"abcd\":{\"x\":1}}".utf8),
      "FILE: is not a safetensors file: it looks like JSON text; name the file with the tensors; if this should be it, the download got a server's message instead: read it"
    ),
    .init(
      "a gzip file", bytes: [0x1F, 0x8B, 8, 0] + length(3),
      "FILE: is not a safetensors file: it looks like a gzip file; unpack it first, with 'gunzip', or 'tar -xzf' if it is an archive"
    ),
    .init(
      "a tar archive",
      bytes: Array("model.safetensors".utf8) + [UInt8](repeating: 0, count: 240)
        + Array("ustar\u{0}00".utf8) + [UInt8](repeating: 0, count: 248),
      "FILE: is not a safetensors file: it looks like a tar archive; take the checkpoint out of it first, with 'tar -xf'"
    ),
    .init(
      "a zip archive", bytes: Array("PK\u{3}\u{4}".utf8) + length(3),
      "FILE: is not a safetensors file: it looks like a zip archive"),
    .init(
      "a pickle", bytes: [0x80, 2] + Array("}q\0X\u{3}\0\0\0abc".utf8),
      "FILE: is not a safetensors file: it looks like a Python pickle"),
    .init(
      "a PyTorch file without zip",
      bytes: [0x80, 2, 0x8A, 10, 0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19, 0x2E],
      "FILE: is not a safetensors file: it looks like a PyTorch file of before 1.6; in Python: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)"
    ),
    .init(
      "an HDF5 file", bytes: [0x89] + Array("HDF\r\n\u{1A}\n".utf8) + length(0),
      "FILE: is not a safetensors file: it looks like an HDF5 file"),
    .init(
      "a zstd file", bytes: [0x28, 0xB5, 0x2F, 0xFD] + length(3),
      "FILE: is not a safetensors file: it looks like a zstd file"),
    .init(
      "a GGUF file", bytes: Array("GGUF".utf8) + length(3),
      "FILE: is not a safetensors file: it looks like a GGUF file"),
    .init(
      "zeros", bytes: [UInt8](repeating: 0, count: 64),
      "FILE: is not a safetensors file: it looks like zeros only; the download did not finish: download it again"
    ),
  ]

  static let text: [MalformedFile] = [
    .init(
      "not UTF-8", header: [0xFF, 0xFE, 0x7B],
      "FILE: the header is not UTF-8 text at its byte 0"),
    .init(
      "bad UTF-8 in a name", header: Array(#"{"a"#.utf8) + [0xC3] + Array(#"":{}}"#.utf8),
      "FILE: the header is not UTF-8 text in the string at its byte 2"),
    .init(
      "an overlong NUL in a name", header: Array("{\"".utf8) + [0xC0, 0x80] + Array("\":{}}".utf8),
      "FILE: the header is not UTF-8 text in the string at its byte 2"),
    .init(
      "bad UTF-8 in a name with an escape",
      header: Array(#"{"\n"#.utf8) + [0xC3] + Array(#"":{}}"#.utf8),
      "FILE: the header is not UTF-8 text in the string at its byte 2"),
    .init(
      "a lone lead surrogate", #"{"\ud800":{}}"#,
      "FILE: the header has half a surrogate pair in a string at its byte 2"),
    .init(
      "a lone trail surrogate", #"{"a\udc00":{}}"#,
      "FILE: the header has half a surrogate pair in a string at its byte 3"),
    .init(
      "two lead surrogates", #"{"\ud800\ud800":{}}"#,
      "FILE: the header has half a surrogate pair in a string at its byte 2"),
    .init(
      "an unknown escape", #"{"\x41":{}}"#,
      "FILE: the header has an unknown escape in a string at its byte 2"),
    .init(
      "a short unicode escape", #"{"\u12":{}}"#,
      "FILE: the header has an unknown escape in a string at its byte 2"),
    .init(
      "truncated JSON", "{\"a\":" + entry(),
      body: 2,
      "FILE: the header ends where \"}\" was expected as the header"),
    .init(
      "JSON cut inside a string", #"{"abc"#,
      "FILE: the header ends inside the string that begins at its byte 1"),
    .init(
      "JSON cut behind a backslash", #"{"abc\"#,
      "FILE: the header ends inside the string that begins at its byte 1"),
    .init(
      "only white space", "   ",
      "FILE: the header ends where \"{\" was expected as the header"),
    .init(
      "a top-level array", "[]",
      "FILE: the header has \"[\" at its byte 0 where \"{\" was expected as the header"),
    .init(
      "a top-level null", "null",
      "FILE: the header has \"n\" at its byte 0 where \"{\" was expected as the header"),
    .init(
      "junk after the JSON", "{} x",
      "FILE: the header has \"x\" at its byte 3 where nothing was expected after the JSON"),
    .init(
      "a second object", "{}{}",
      "FILE: the header has \"{\" at its byte 2 where nothing was expected after the JSON"),
    .init(
      "NUL padding", "{}\0\0",
      "FILE: the header has a NUL byte at its byte 2 where nothing was expected after the JSON"
    ),
    .init(
      "a byte order mark", "\u{FEFF}{}",
      "FILE: the header has a byte order mark at its byte 0 where \"{\" was expected as the header"
    ),
    .init(
      "single quotes", "{'a':{}}",
      "FILE: the header has \"'\" at its byte 1 where a string was expected as the header"),
    .init(
      "a trailing comma", "{\"a\":" + entry() + ",}", body: 2,
      "FILE: the header has \"}\" at its byte 53 where a string was expected as the header"),
    .init(
      "a trailing comma in a list", "{\"a\":" + entry(#""U8""#, "[2,]") + "}", body: 2,
      "FILE: tensor \"a\": the header has \"]\" at its byte 30 where a whole number was expected in its shape"
    ),
    .init(
      "a comment", "{/**/}",
      "FILE: the header has \"/\" at its byte 1 where a string was expected as the header"),
    .init(
      "a raw control character in a name", "{\"a\nb\":" + entry() + "}", body: 2,
      "FILE: the header has a raw control character in a string at its byte 3"),
    .init(
      "NaN as an extra field", "{\"a\":{\"x\":NaN}}",
      "FILE: tensor \"a\": the header has \"N\" at its byte 10 where a value was expected in its entry"
    ),
    .init(
      "a malformed number in an extra field", "{\"a\":{\"x\":01}}",
      "FILE: tensor \"a\": the header has a malformed number in its entry"),
    .init(
      "100,000 levels of nesting",
      "{\"a\":{\"x\":" + String(repeating: "[", count: 100_000),
      "FILE: tensor \"a\": the header is nested more than 127 levels deep"),
  ]

  static let entries: [MalformedFile] = [
    .init(
      "an unknown dtype", "{\"a\":" + entry(#""F128""#) + "}", body: 2,
      #"FILE: tensor "a": has the unknown dtype "F128""#),
    .init(
      "a lower-case dtype", "{\"a\":" + entry(#""u8""#) + "}", body: 2,
      #"FILE: tensor "a": has the unknown dtype "u8""#),
    .init(
      "a dtype that is no string", "{\"a\":" + entry("8") + "}", body: 2,
      "FILE: tensor \"a\": has a dtype that is not a string"),
    .init(
      "no dtype", "{\"a\":" + entry(nil) + "}", body: 2, #"FILE: tensor "a": has no dtype"#),
    .init(
      "no shape", "{\"a\":" + entry(#""U8""#, nil) + "}", body: 2,
      #"FILE: tensor "a": has no shape"#),
    .init(
      "no offsets", "{\"a\":" + entry(#""U8""#, "[2]", nil) + "}", body: 2,
      #"FILE: tensor "a": has no data_offsets"#),
    .init(
      "one offset", "{\"a\":" + entry(#""U8""#, "[2]", "[0]") + "}", body: 2,
      #"FILE: tensor "a": has 1 data_offsets instead of 2"#),
    .init(
      "three offsets", "{\"a\":" + entry(#""U8""#, "[2]", "[0,2,2]") + "}", body: 2,
      #"FILE: tensor "a": has 3 data_offsets instead of 2"#),
    .init(
      "offsets in an object", "{\"a\":" + entry(#""U8""#, "[2]", "{}") + "}", body: 2,
      #"FILE: tensor "a": has no list of numbers in its data_offsets"#),
    .init(
      "a shape that is a number", "{\"a\":" + entry(#""U8""#, "2") + "}", body: 2,
      #"FILE: tensor "a": has no list of numbers in its shape"#),
    .init(
      "a null entry", #"{"a":null}"#, #"FILE: tensor "a": is not described by a JSON object"#),
    .init(
      "an entry that is an array", #"{"a":[]}"#,
      #"FILE: tensor "a": is not described by a JSON object"#),
    .init(
      "a dtype twice",
      "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}",
      body: 1, #"FILE: tensor "a": has two fields dtype"#),
    .init(
      "a shape twice",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"shape\":[],\"data_offsets\":[0,1]}}",
      body: 1, #"FILE: tensor "a": has two fields shape"#),
    .init(
      "offsets twice",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1],\"data_offsets\":[0,1]}}",
      body: 1, #"FILE: tensor "a": has two fields data_offsets"#),
    .init(
      "a field of others twice",
      "{\"a\":{\"dtype\":\"U8\",\"n\":1,\"shape\":[],\"data_offsets\":[0,1],\"\\u006e\":{}}}",
      body: 1, #"FILE: tensor "a": has two fields "n""#),
    .init(
      "a name twice", "{" + u8("a", 0, 1) + "," + u8("a", 1, 2) + "}", body: 2,
      #"FILE: tensor "a": the header names it twice"#),
    .init(
      "a name twice, once escaped", "{" + u8("a", 0, 1) + "," + u8(#"\u0061"#, 1, 2) + "}", body: 2,
      #"FILE: tensor "a": the header names it twice"#),
  ]

  /// Dimensions and offsets that are not natural numbers.
  static let numbers: [MalformedFile] =
    ["-1", "2.0", "2e0", "2E0", "02", "-0", "+2"].flatMap { number -> [MalformedFile] in
      [
        .init(
          "a dimension \(number)", "{\"a\":" + entry(#""U8""#, "[\(number)]") + "}", body: 2,
          "FILE: tensor \"a\": has \(number) in its shape; only whole numbers from 0 on are allowed"
        ),
        .init(
          "an offset \(number)", "{\"a\":" + entry(#""U8""#, "[2]", "[0,\(number)]") + "}", body: 2,
          "FILE: tensor \"a\": has \(number) in its data_offsets; only whole numbers from 0 on are allowed"
        ),
      ]
    }

  static let otherNumbers: [MalformedFile] =
    [
      .init(
        "a string as a dimension", "{\"a\":" + entry(#""U8""#, #"["2"]"#) + "}", body: 2,
        "FILE: tensor \"a\": the header has \"\"\" at its byte 28 where a whole number was expected in its shape"
      ),
      .init(
        "a boolean as a dimension", "{\"a\":" + entry(#""U8""#, "[true]") + "}", body: 2,
        "FILE: tensor \"a\": the header has \"t\" at its byte 28 where a whole number was expected in its shape"
      ),
      .init(
        "a dimension beyond 64 bits", "{\"a\":" + entry(#""U8""#, "[18446744073709551616]") + "}",
        body: 2, #"FILE: tensor "a": has 18446744073709551616 in its shape, which is too large"#),
      .init(
        "a dimension of 2⁶³", "{\"a\":" + entry(#""U8""#, "[9223372036854775808]") + "}",
        body: 2, #"FILE: tensor "a": has 9223372036854775808 in its shape, which is too large"#),
      .init(
        "an offset of 2⁶³", "{\"a\":" + entry(#""U8""#, "[2]", "[0,9223372036854775808]") + "}",
        body: 2,
        #"FILE: tensor "a": has 9223372036854775808 in its data_offsets, which is too large"#),
    ]
    + [
      "[4294967296,4294967296]", "[0,4294967296,4294967296]", "[4294967296,4294967296,0]",
      "[4294967296,0,4294967296]", "[9223372036854775807,2]", "[1152921504606846976]",
    ].map { (shape: String) -> MalformedFile in
      MalformedFile(
        "a shape \(shape) that overflows", "{\"a\":" + entry(#""U8""#, shape, "[0,0]") + "}",
        #"FILE: tensor "a": has a shape too large to count its bytes"#)
    }

  static let layout: [MalformedFile] = [
    .init(
      "an end before its begin", "{\"a\":" + entry(#""U8""#, "[2]", "[2,0]") + "}", body: 2,
      #"FILE: tensor "a": begins at byte 2, after its end at 0"#),
    .init(
      "a hole at the start", "{" + u8("a", 1, 3) + "}", body: 3,
      #"FILE: tensor "a": begins at byte 1, but no tensor has the bytes from 0 on"#),
    .init(
      "a hole between", "{" + u8("a", 0, 2) + "," + u8("b", 4, 6) + "}", body: 6,
      #"FILE: tensor "b": begins at byte 4, leaving a hole of 2 bytes behind "a""#),
    .init(
      "the same bytes twice", "{" + u8("a", 0, 2) + "," + u8("b", 0, 2) + "}", body: 2,
      #"FILE: tensor "b": has the same bytes as "a""#),
    .init(
      "a partial overlap", "{" + u8("a", 0, 2) + "," + u8("b", 1, 3) + "}", body: 3,
      #"FILE: tensor "b": begins at byte 1, before the end of "a" at 2"#),
    .init(
      "a tensor inside another", "{" + u8("a", 0, 9) + "," + u8("b", 1, 3) + "}", body: 9,
      #"FILE: tensor "b": lies within "a""#),
    .init(
      "more bytes than its shape", "{" + u8("a", 0, 3, count: 2) + "}", body: 3,
      #"FILE: tensor "a": takes 3 bytes but its shape [2] of U8 needs 2"#),
    .init(
      "fewer bytes than its shape", "{" + u8("a", 0, 1, count: 2) + "}", body: 1,
      #"FILE: tensor "a": takes 1 bytes but its shape [2] of U8 needs 2"#),
    .init(
      "a truncated body", "{" + u8("a", 0, 2) + "," + u8("b", 2, 9) + "}", body: 8,
      #"FILE: tensor "b": ends at byte 9 of the data, which has only 8; the file is truncated: download it again"#
    ),
    .init(
      "bytes after the last tensor", "{" + u8("a", 0, 2) + "}", body: 5,
      "FILE: has 3 bytes after the last tensor; they belong to nothing: the header or the file is damaged"
    ),
    .init(
      "bytes without a tensor", "{}", body: 5,
      "FILE: has 5 bytes after the last tensor; they belong to nothing: the header or the file is damaged"
    ),
    .init(
      "four-bit elements that end within a byte", "{\"a\":" + entry(#""F4""#, "[3]") + "}", body: 2,
      #"FILE: tensor "a": has 4-bit elements that do not fill whole bytes"#),
    .init(
      "six-bit elements that end within a byte", "{\"a\":" + entry(#""F6_E2M3""#, "[2]") + "}",
      body: 2, #"FILE: tensor "a": has 6-bit elements that do not fill whole bytes"#),
    .init(
      "an empty tensor inside another", "{" + u8("a", 0, 2) + "," + u8("b", 1, 1) + "}", body: 2,
      #"FILE: tensor "b": lies within "a""#),
    .init(
      "an empty tensor behind the data", "{" + u8("a", 0, 2) + "," + u8("b", 7, 7) + "}", body: 2,
      #"FILE: tensor "b": begins at byte 7, leaving a hole of 5 bytes behind "a""#),
  ]

  static let metadata: [MalformedFile] = [
    .init(
      "__metadata__ twice", #"{"__metadata__":{},"__metadata__":{}}"#,
      "FILE: the header has two __metadata__"),
    .init(
      "a key of __metadata__ twice", #"{"__metadata__":{"k":"1","\u006b":"2"}}"#,
      #"FILE: __metadata__ has the key "k" twice"#),
    .init(
      "a number in __metadata__", #"{"__metadata__":{"k":1}}"#,
      #"FILE: __metadata__ has a value for "k" that is not a string"#),
    .init(
      "nested __metadata__", #"{"__metadata__":{"k":{"l":"m"}}}"#,
      #"FILE: __metadata__ has a value for "k" that is not a string"#),
    .init(
      "an array in __metadata__", #"{"__metadata__":{"k":["l"]}}"#,
      #"FILE: __metadata__ has a value for "k" that is not a string"#),
    .init(
      "null in __metadata__", #"{"__metadata__":{"k":null}}"#,
      #"FILE: __metadata__ has a value for "k" that is not a string"#),
    .init(
      "an array as __metadata__", #"{"__metadata__":[]}"#,
      "FILE: the header has \"[\" at its byte 16 where \"{\" was expected as __metadata__"),
    .init(
      "a tensor as __metadata__", "{\"__metadata__\":" + entry() + "}", body: 2,
      #"FILE: __metadata__ has a value for "shape" that is not a string"#),
  ]

  static let all =
    [lengths, confusions, text, entries, numbers, otherNumbers, layout, metadata].flatMap { $0 }

  @Test(arguments: all)
  func `are each refused by name`(_ file: MalformedFile) throws {
    let folder = try TemporaryFolder()
    let path = folder("model.safetensors")
    try Data(file.bytes).write(to: URL(filePath: path))
    let error = try #require(throws: CheckpointError.self) { try Safetensors.open(path) }
    #expect(error.description.replacing(path, with: "FILE") == file.error)
  }

  @Test func `every truncation of a good file is refused`() throws {
    let folder = try TemporaryFolder()
    let header = "{" + u8("a", 0, 4) + ",\"b\":" + entry(#""F32""#, "[1,2]", "[4,12]") + "}"
    let whole = safetensors(Array(header.utf8), body: [UInt8](repeating: 1, count: 12))
    for count in 0..<whole.count {
      let path = folder("\(count).safetensors")
      try Data(whole[..<count]).write(to: URL(filePath: path))
      #expect(throws: CheckpointError.self) { try Safetensors.open(path) }
    }
  }
}
