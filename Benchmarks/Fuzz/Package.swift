// swift-tools-version: 6.2
import PackageDescription

// A package of its own: its products have no main function, so they are built only with
// libFuzzer's. README.md has the command and the counts.
let package = Package(
  name: "Fuzz",
  dependencies: [.package(name: "Smelt", path: "../..")],
  targets: ["FuzzHeader", "FuzzPickle", "FuzzInventory", "FuzzBundle", "FuzzArchive"].map {
    .executableTarget(
      name: $0,
      dependencies: [.product(name: "Checkpoints", package: "Smelt")],
      swiftSettings: [.unsafeFlags(["-parse-as-library"])])
  }
)
