import ArgumentParser
import Merging

/// How task vectors are cleaned, as every command that cleans them takes it.
struct CleaningArguments: ParsableArguments {
  @Option(
    help: ArgumentHelp(
      "Clean the task vectors (AWD, arXiv 2411.18729): awd-row or awd-model, and what to change of it.",
      discussion: """
        For instance awd-model,scope=block,penalty=0.01. The parameters: scope=row|tensor|block|\
        model (what shares a redundant vector), objective=abs|squared, penalty=NUMBER|none, \
        optimizer=gd|sgd|converged, rate, momentum, weight_decay, iterations, epsilon. awd-row \
        cleans the rows of weight matrices with sgd, rate 1e-4; awd-model the whole model with \
        gd, rate 0.01, penalty 0.1.
        """, valueName: "preset[,name=value…]"),
    transform: { try Cleaning($0) })
  var clean: Cleaning?

  @Option(
    help: ArgumentHelp(
      "Clean only tensors whose names match; give it once for each pattern (*, ?, [a-z]).",
      discussion: """
        Default: rows and tensors of weight matrices but not of embeddings and heads; blocks of \
        all that is in a layer; the model of everything.
        """, valueName: "pattern"))
  var include: [String] = []

  @Option(
    help: ArgumentHelp("Leave tensors whose names match as they are.", valueName: "pattern"))
  var exclude: [String] = []

  /// The cleaning that was asked for, or `fallback`.
  func cleaning(or fallback: Cleaning?) throws -> Cleaning? {
    guard var cleaning = clean ?? fallback else {
      guard include.isEmpty, exclude.isEmpty else {
        throw ValidationError("--include and --exclude say what --clean cleans; give --clean too.")
      }
      return nil
    }
    cleaning.include = include
    cleaning.exclude = exclude
    return cleaning
  }
}

extension CleaningReads {
  /// Why something is read twice, and what would change that; nothing where it is not.
  var sentence: String? {
    guard groupsReadTwice > 0 else { return nil }
    let share =
      groups == 1 ? "the group that is cleaned does" : "\(groupsReadTwice) of \(groups) groups do"
    return
      "\(share) not fit the memory beside the tiles, and \(groupsReadTwice == 1 ? "is" : "are") read twice (\(ByteSize(bytes: bytesReadAgain)) again, from the page cache as far as it has room): for inner products and to be cleaned; --memory \(ByteSize(bytes: sufficientMemory).argument) would read all once"
  }
}

extension ByteSize {
  /// As an option takes it: rounded up to whole MiB.
  var argument: String { "\((bytes + (1 << 20) - 1) >> 20)MiB" }
}
