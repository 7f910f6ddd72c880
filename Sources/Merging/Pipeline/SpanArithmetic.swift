// The inner loops: plain, over spans, so that the compiler vectorises them.

/// target = source
func copy(_ source: Span<Float>, into target: inout MutableSpan<Float>) {
  for i in target.indices { target[i] = source[i] }
}

/// target += weight · source
func add(_ source: Span<Float>, times weight: Float, into target: inout MutableSpan<Float>) {
  for i in target.indices { target[i] += weight * source[i] }
}

/// target = source + weight · target
func scale(_ target: inout MutableSpan<Float>, by weight: Float, onto source: Span<Float>) {
  for i in target.indices { target[i] = source[i] + weight * target[i] }
}
