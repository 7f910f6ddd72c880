import ArgumentParser

@main
struct Smelt: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "smelt",
    abstract: "Convert, merge, upscale and pack model checkpoints in bounded memory.")
}
