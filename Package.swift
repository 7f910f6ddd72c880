// swift-tools-version: 6.2
import PackageDescription

let package = Package(
  name: "Smelt",
  products: [
    .executable(name: "smelt", targets: ["smelt"]),
    .library(name: "Smelt", targets: ["Checkpoints", "Merging"]),
    .library(name: "Checkpoints", targets: ["Checkpoints"]),
  ],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
    .package(url: "https://github.com/jpsim/Yams", from: "6.2.2"),
  ],
  targets: [
    .systemLibrary(name: "CLinux"),
    .systemLibrary(name: "CHDF5", pkgConfig: "hdf5", providers: [.apt(["libhdf5-dev"])]),
    .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
    .systemLibrary(name: "CZlib", pkgConfig: "zlib", providers: [.apt(["zlib1g-dev"])]),
    .systemLibrary(name: "CCrypto", pkgConfig: "libcrypto", providers: [.apt(["libssl-dev"])]),
    .systemLibrary(name: "CXXHash", pkgConfig: "libxxhash", providers: [.apt(["libxxhash-dev"])]),
    .systemLibrary(
      name: "COpenBLAS", pkgConfig: "openblas", providers: [.apt(["libopenblas-dev"])]),

    .target(
      name: "Checkpoints",
      dependencies: ["CLinux", "CHDF5", "CZstd", "CZlib", "CXXHash", "CCrypto", "CKernels"],
      exclude: ["Bundle/FORMAT.md"]),
    .target(name: "CKernels"),
    .target(
      name: "Merging",
      dependencies: [
        "Checkpoints", "COpenBLAS", "CKernels", .product(name: "Yams", package: "Yams"),
      ]),
    .executableTarget(
      name: "smelt",
      dependencies: [
        "Checkpoints", "Merging",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
      ]),

    .target(name: "TestSupport", dependencies: ["Checkpoints"], path: "Tests/TestSupport"),
    .testTarget(name: "CheckpointsTests", dependencies: ["Checkpoints", "TestSupport"]),
    .testTarget(
      name: "MergingTests", dependencies: ["Merging", "Checkpoints", "CKernels", "TestSupport"]),
    .testTarget(name: "SmeltTests", dependencies: ["smelt", "Checkpoints", "TestSupport"]),
  ],
  swiftLanguageModes: [.v6]
)

for target in package.targets where target.type != .system && target.name != "CKernels" {
  target.swiftSettings = [
    .treatAllWarnings(as: .error),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableExperimentalFeature("Lifetimes"),
  ]
}
