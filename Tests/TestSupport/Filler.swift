import Glibc

/// The deterministic values sin(0.9 i + 1.7 s + 0.13 s i) of the numeric oracles.
public func filler(_ s: Int, count: Int) -> [Double] {
  (0..<count).map { i in
    sin(0.9 * Double(i) + 1.7 * Double(s) + 0.13 * Double(s) * Double(i))
  }
}
