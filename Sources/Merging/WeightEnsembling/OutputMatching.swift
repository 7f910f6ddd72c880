import Glibc

/// A linear gate fitted to the experts' outputs: the mean of ‖MoE(h) − MLPᵢ(h)‖² over samples of
/// known task i, from a one-hot fit downhill.
///
/// One-hot targets are wrong where one-hot mixtures are not the experts, as with pruned task
/// vectors, and treat all mistakes alike, though some hardly change the output. The output is a
/// smooth function of the k weights of a sample, close to linear where fine-tuning moved little.
/// So its derivatives at the one-hot mixture turn the loss into a quadratic form of k variables a
/// sample (Gauss and Newton's approximation), computed once with at most 3k + 4 matrix products,
/// and the gate is the solution of a linear system. A descent through the network would take as
/// many products for every few steps.
///
/// The gate is held near the one-hot fit by a ridge. A quarter of the samples chooses the ridge
/// and measures the outcome.
public struct OutputMatching: Sendable {
  /// What a gate does on samples that its fit has not seen.
  public struct Quality: Sendable, Equatable {
    /// ‖MoE(h) − MLPᵢ(h)‖ over ‖MLP₀(h) − MLPᵢ(h)‖, root mean square: 1 for the base model.
    public let outputError: Double
    /// The share of samples whose largest weight is their own task's.
    public let routingAccuracy: Double
  }

  /// Fitted to all samples.
  public let gate: Dense
  /// The strength that holds the gate near the one-hot fit; nil where output matching did not
  /// help and the one-hot fit was kept.
  public let ridge: Double?
  /// Of the one-hot fit to three quarters of the samples.
  public let before: Quality
  /// Of the matched fit to three quarters of the samples.
  public let after: Quality
  /// Of the mixtures that the samples have so far, if they were given.
  public let present: Quality?

  /// - Parameters:
  ///   - samples: What the router sees: means over tokens, at least four samples a task.
  ///   - tokens: What the MLP sees: the same number of rows for every sample, in their order.
  ///   - module: The mixture; its router is not looked at.
  ///   - experts: The experts' MLPs, where the task vectors of the mixture are not exactly theirs.
  ///   - present: The mixtures that the samples have so far, [samples, experts].
  public init(
    _ samples: CalibrationSamples, tokens: Matrix<Float>, module: WeightEnsemblingMLP,
    experts: [MLPWeights]? = nil, present: Matrix<Float>? = nil
  ) throws(CalibrationError) {
    let split = try samples.split()
    let layer = MatchedLayer(
      samples: samples, tokens: tokens, module: module, experts: experts)
    // What is held out is looked at twice: its forms choose the ridge, its outputs are compared.
    let held = Array(layer.batches(of: split.held))
    let forms = layer.quadraticForms(held)
    let principal = PrincipalFeatures(samples.features)

    let start = RouterCalibration(samples.subset(split.fitted)).gate
    let path = GatePath(principal, forms, start: start(samples.features))
    var best = (ridge: Double.infinity, gate: start, loss: path.startLoss(of: split.held))
    var offset: Matrix<Double>?
    // From the strongest ridge, where the gate stays at the start, each fit begins at the last.
    for exponent in (-4...3).reversed() {
      let ridge = pow(10, Double(exponent))
      let found = path.solve(split.fitted, relativeRidge: ridge, from: offset)
      offset = found
      let loss = path.loss(of: split.held, found)
      if loss < best.loss {
        best = (ridge, start + path.gate(found), loss)
      } else if loss > 1.1 * best.loss {
        break
      }
    }

    let qualities = layer.qualities(
      ofMixtures: [start, best.gate].map { $0(samples.features) } + (present.map { [$0] } ?? []),
      held)
    self.present = present.map { _ in qualities[2] }
    before = qualities[0]
    let everything = RouterCalibration(samples, principal).gate
    if best.ridge.isFinite, qualities[1].outputError < before.outputError {
      let path = GatePath(principal, forms, start: everything(samples.features))
      gate = everything + path.gate(path.solve(nil, relativeRidge: best.ridge, from: nil))
      ridge = best.ridge
      after = qualities[1]
    } else {
      gate = everything
      ridge = nil
      after = before
    }
  }
}

extension CalibrationSamples {
  /// Whether every task has samples to hold out.
  var canBeSplit: Bool {
    (0..<taskCount).allSatisfy { task in tasks.count { $0 == task } >= 4 }
  }

  /// Every fourth sample of each task is held out of a fit.
  func split() throws(CalibrationError) -> (fitted: [Int], held: [Int]) {
    var seen = Array(repeating: 0, count: taskCount)
    var split: (fitted: [Int], held: [Int]) = ([], [])
    for (row, task) in tasks.enumerated() {
      seen[task] += 1
      if seen[task].isMultiple(of: 4) { split.held.append(row) } else { split.fitted.append(row) }
    }
    for (task, count) in seen.enumerated() where count < 4 {
      throw CalibrationError(
        "output matching needs at least 4 samples of every task, and task \(task) has \(count)")
    }
    return split
  }
}

extension Dense {
  fileprivate static func + (left: Dense, right: Dense) -> Dense {
    var sum = left
    sum.add(right, scale: 1)
    return sum
  }
}
