import Foundation
import TestSupport

@testable import Checkpoints

extension SeededGenerator {
  /// From the normal distribution.
  mutating func normal(_ deviation: Float) -> Float {
    let (u, v) = (Double.random(in: 0..<1, using: &self), Double.random(in: 0..<1, using: &self))
    return deviation * Float((-2 * log(1 - u)).squareRoot() * cos(2 * .pi * v))
  }
}

/// A tensor and its bytes.
struct Sample {
  let tensor: TensorInfo
  let bytes: [UInt8]

  init(_ name: String, _ dtype: DType, _ shape: [Int], _ bytes: [UInt8]) {
    tensor = try! TensorInfo(name: name, dtype: dtype, shape: shape)
    self.bytes = bytes
    precondition(tensor.byteCount == bytes.count)
  }

  /// Values encoded as the type.
  init(_ name: String, _ dtype: DType, _ shape: [Int], values: [Float]) {
    var bytes = [UInt8](repeating: 0, count: values.count * dtype.bitWidth / 8)
    var span = bytes.mutableSpan
    var raw = span.mutableBytes
    dtype.encode(values.span, into: &raw)
    self.init(name, dtype, shape, bytes)
  }

  /// Its values, if it is small.
  var values: [Float] {
    var values = [Float](repeating: 0, count: tensor.elementCount)
    var span = values.mutableSpan
    tensor.dtype.decode(bytes.span.bytes, into: &span)
    return values
  }

  /// Weights as a model has them: normal with deviation 0.02.
  static func weights(_ name: String, _ dtype: DType, _ shape: [Int], seed: UInt64) -> Sample {
    var generator = SeededGenerator(seed: seed)
    let count = shape.reduce(1, *)
    return Sample(name, dtype, shape, values: (0..<count).map { _ in generator.normal(0.02) })
  }

  /// Nine elements in ten are zero.
  static func pruned(_ name: String, _ dtype: DType, _ shape: [Int], seed: UInt64) -> Sample {
    var generator = SeededGenerator(seed: seed)
    let width = dtype.bitWidth / 8
    let count = shape.reduce(1, *)
    var bytes = [UInt8](repeating: 0, count: count * width)
    for i in 0..<count where UInt8.random(in: 0..<10, using: &generator) == 0 {
      for byte in 0..<width {
        bytes[i * width + byte] = UInt8.random(in: 0..<16, using: &generator)
      }
    }
    return Sample(name, dtype, shape, bytes)
  }

  /// Any bytes at all.
  static func noise(_ name: String, _ dtype: DType, _ shape: [Int], seed: UInt64) -> Sample {
    var generator = SeededGenerator(seed: seed)
    let count = shape.reduce(1, *) * dtype.bitWidth / 8
    return Sample(
      name, dtype, shape, (0..<count).map { _ in UInt8.random(in: 0...255, using: &generator) })
  }
}

/// Writes samples as a safetensors file.
@discardableResult
func writeSafetensors(_ samples: [Sample], metadata: [String: String] = [:], to path: String) throws
  -> any TensorSource
{
  let sink = try Safetensors.create(
    path, Manifest(samples.map { $0.tensor }, metadata: metadata))
  for sample in samples {
    try sink.write(sample.bytes.span.bytes, of: sample.tensor, at: 0)
  }
  try sink.finish()
  return try Safetensors.open(path)
}

func contents(of path: String) throws -> [UInt8] {
  Array(try Data(contentsOf: URL(fileURLWithPath: path)))
}
