import CLinux

/// Memory that a worker allocates once and fills again and again.
///
/// Fresh memory is expensive (every page is zeroed by the kernel), so workers keep theirs.
public struct Buffer: ~Copyable, @unchecked Sendable {
  private let storage: UnsafeMutableRawBufferPointer

  public init(byteCount: Int) {
    storage = .allocate(byteCount: byteCount, alignment: 64)
  }

  deinit { storage.deallocate() }

  public var byteCount: Int { storage.count }

  /// The first `count` bytes, to be filled.
  @_lifetime(&self)
  public mutating func first(_ count: Int) -> MutableRawSpan {
    let bytes = UnsafeMutableRawBufferPointer(rebasing: storage[..<count])
    // Sound: the span borrows the buffer exclusively, and the buffer owns the memory.
    return _overrideLifetime(MutableRawSpan(_unsafeBytes: bytes), mutating: &self)
  }
}

/// Makes freed buffers go back to the system. Without it the allocator keeps them, a few for
/// every thread there ever was, and a command takes more memory than it promised.
public func returnFreedMemory() { smelt_return_freed_blocks() }

/// Makes freed memory wait for the next that asks. For work that makes and drops matrices of a
/// few sizes again and again, whose peak is what it needs at once either way.
public func keepFreedMemory() { smelt_keep_freed_blocks() }
