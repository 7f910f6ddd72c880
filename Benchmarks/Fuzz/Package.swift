// swift-tools-version: 6.2
import PackageDescription

// A package of its own: its products have no main function, so they are built only with
// libFuzzer's.
//
//   swift build -c release --sanitize fuzzer -Xswiftc -enable-testing --product FuzzHeader
//   .build/release/FuzzHeader -runs=10000000 -max_len=300 corpus
let package = Package(
  name: "Fuzz",
  dependencies: [.package(name: "Smelt", path: "../..")],
  targets: ["FuzzHeader", "FuzzPickle"].map {
    .executableTarget(
      name: $0,
      dependencies: [.product(name: "Smelt", package: "Smelt")],
      swiftSettings: [.unsafeFlags(["-parse-as-library"])])
  }
)
