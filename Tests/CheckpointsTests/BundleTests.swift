import Foundation
import TestSupport
import Testing

@testable import Checkpoints

typealias Bundle = Checkpoints.Bundle

@Suite struct `A bundle` {
  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  @Test func `gives back the very file that was packed`() throws {
    let source = try writeSafetensors(
      [
        .weights("w", .bf16, [700, 1600], seed: 1), .weights("half", .f16, [33, 5], seed: 2),
        .weights("single", .f32, [100, 7], seed: 3), .weights("double", .f64, [3], seed: 4),
        .noise("ids", .i64, [11], seed: 5), .noise("eight", .f8E4M3, [2, 9], seed: 6),
        .noise("four", .f4, [6], seed: 7), Sample("empty", .bf16, [0, 4], []),
        Sample("scalar", .bf16, [], [1, 2]), .noise("nan", .f32, [500], seed: 8),
      ], metadata: ["format": "pt", "bundle": "é\n\"\\"], to: folder("in.safetensors"))

    try Bundle.pack(source, to: folder("b.safetensors.zst"))
    let bundle = try BundleSource(folder("b.safetensors.zst"))
    let sink = try Safetensors.create(folder("out.safetensors"), bundle.manifest)
    try bundle.copy(into: sink, workers: 3)
    try sink.finish()

    #expect(bundle.manifest.metadata == source.manifest.metadata)
    #expect(
      try contents(of: folder("out.safetensors")) == contents(of: folder("in.safetensors")))
    try bundle.verify()
  }

  @Test(arguments: [1, 2, 3, 5])
  func `has the same bytes whatever the number of workers`(workers: Int) throws {
    let source = try writeSafetensors(
      [
        .weights("a", .bf16, [1_200_000], seed: 1), .weights("b", .f32, [300_000], seed: 2),
        .noise("c", .u8, [2_500_000], seed: 3),
      ], to: folder("in.safetensors"))
    try Bundle.pack(source, to: folder("one.safetensors.zst"), workers: 1)
    try Bundle.pack(source, to: folder("many.safetensors.zst"), workers: workers)
    #expect(
      try contents(of: folder("one.safetensors.zst"))
        == contents(of: folder("many.safetensors.zst")))
  }
}
