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
    if let warning = MixtureDescription.warning(of: source) { note(warning) }
    if json {
      try printJSON(source)
    } else {
      printTable(source)
    }
  }

  private func printTable(_ source: any TensorSource) {
    let manifest = source.manifest
    var columns = ["type", "shape", "size"]
    var rows = manifest.tensors.map {
      [$0.dtype.rawValue, $0.shapeDescription, ByteSize(bytes: $0.byteCount).description]
    }
    var largest: (error: Double, tensor: String)?
    if let bundle = source as? BundleSource {
      let errors = manifest.tensors.map { bundle.error(of: $0) }
      for (error, tensor) in zip(errors, manifest.tensors) {
        if let error, error > largest?.error ?? -1 { largest = (error, shown(tensor.name)) }
      }
      columns += ["codec"] + (largest == nil ? [] : ["error"])
      for (index, tensor) in manifest.tensors.enumerated() {
        rows[index].append(bundle.codec(of: tensor))
        if largest != nil { rows[index].append(errors[index].map { decimal($0, 5) } ?? "") }
      }
    }
    for (index, tensor) in manifest.tensors.enumerated() { rows[index].append(shown(tensor.name)) }
    print(Table(columns: columns + ["tensor"], rows: rows, rightAligned: [2]))
    for pair in manifest.metadata.sorted(by: { $0.key < $1.key }) {
      print("\(shown(pair.key)) = \(shown(pair.value))")
    }
    let elements = manifest.tensors.reduce(0) { $0 + $1.elementCount }
    print(
      "\(manifest.tensors.count) tensors, \(elements.formatted()) elements, "
        + ByteSize(bytes: manifest.byteCount).description)
    if let largest {
      print(
        "largest error: \(decimal(largest.error, 5)) of the tensor's norm, in \(largest.tensor)")
    }
  }

  private func shown(_ text: String) -> String { String(quoted(text).dropFirst().dropLast()) }

  private func printJSON(_ source: any TensorSource) throws {
    struct Description: Encodable {
      struct Tensor: Encodable {
        let name: String
        let dtype: String
        let shape: [Int]
        let bytes: Int
        /// Of a bundle's tensor: how it is kept, and what that has lost.
        let codec: String?
        let error: Double?
      }
      let path: String
      let tensors: [Tensor]
      let metadata: [String: String]
      let bytes: Int
    }
    let (manifest, bundle) = (source.manifest, source as? BundleSource)
    try print(
      json: Description(
        path: path,
        tensors: manifest.tensors.map { tensor in
          .init(
            name: tensor.name, dtype: tensor.dtype.rawValue, shape: tensor.shape,
            bytes: tensor.byteCount, codec: bundle?.codec(of: tensor),
            error: bundle?.error(of: tensor))
        },
        metadata: manifest.metadata, bytes: manifest.byteCount))
  }
}
