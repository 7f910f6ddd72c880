import ArgumentParser
import Checkpoints
import Foundation
import Merging

struct Inspect: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "List a checkpoint's tensors, their shapes, types and sizes, and its metadata.")

  @Argument(help: "The checkpoint to look at.", completion: .file())
  var path: String

  @Flag(help: "Print JSON for programs.")
  var json = false

  func run() throws {
    let source = try Checkpoint.open(path)
    source.warnings.forEach(note)
    let manifest = source.manifest
    if let warning = MixtureDescription.warning(of: source) { note(warning) }
    if json {
      try printJSON(manifest)
    } else {
      printTable(manifest)
    }
  }

  private func printTable(_ manifest: Manifest) {
    let rows = manifest.tensors.map {
      [
        $0.dtype.rawValue, $0.shapeDescription, ByteSize(bytes: $0.byteCount).description,
        shown($0.name),
      ]
    }
    print(Table(columns: ["type", "shape", "size", "tensor"], rows: rows, rightAligned: [2]))
    for pair in manifest.metadata.sorted(by: { $0.key < $1.key }) {
      print("\(shown(pair.key)) = \(shown(pair.value))")
    }
    let elements = manifest.tensors.reduce(0) { $0 + $1.elementCount }
    print(
      "\(manifest.tensors.count) tensors, \(elements.formatted()) elements, "
        + ByteSize(bytes: manifest.byteCount).description)
  }

  private func shown(_ text: String) -> String { String(quoted(text).dropFirst().dropLast()) }

  private func printJSON(_ manifest: Manifest) throws {
    struct Description: Encodable {
      struct Tensor: Encodable {
        let name: String
        let dtype: String
        let shape: [Int]
        let bytes: Int
      }
      let path: String
      let tensors: [Tensor]
      let metadata: [String: String]
      let bytes: Int
    }
    try print(
      json: Description(
        path: path,
        tensors: manifest.tensors.map {
          .init(name: $0.name, dtype: $0.dtype.rawValue, shape: $0.shape, bytes: $0.byteCount)
        },
        metadata: manifest.metadata, bytes: manifest.byteCount))
  }
}
