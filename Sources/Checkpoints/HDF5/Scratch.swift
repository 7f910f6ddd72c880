/// Memory that grows to what was asked of it and is used again.
struct Scratch: ~Copyable {
  private var memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 0, alignment: 64)

  deinit { memory.deallocate() }

  /// Memory of this size, with whatever it held before if it did not have to grow.
  mutating func room(_ byteCount: Int) -> UnsafeMutableRawBufferPointer {
    if memory.count < byteCount {
      memory.deallocate()
      memory = .allocate(byteCount: byteCount, alignment: 64)
    }
    return UnsafeMutableRawBufferPointer(rebasing: memory[..<byteCount])
  }
}
