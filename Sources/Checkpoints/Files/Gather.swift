extension MappedFile {
  /// Reads part of a strided tensor, its elements in row-major order.
  ///
  /// The file is read in its own order, in stretches of at most 256 KiB, whatever the tensor's
  /// size: what lies between elements is read with them if it is less than a page.
  /// - Parameters:
  ///   - start: where in the file the tensor's first element begins.
  ///   - strides: in elements, none negative.
  ///   - width: bytes of an element: 1, 2, 4 or 8.
  ///   - offset: where in the row-major tensor the part begins, in bytes.
  /// - Precondition: every element lies within the file.
  func gather(
    from start: Int, shape: [Int], strides: [Int], width: Int, at offset: Int,
    into buffer: inout MutableRawSpan
  ) throws(CheckpointError) {
    precondition(offset.isMultiple(of: width) && buffer.byteCount.isMultiple(of: width))
    let (first, count) = (offset / width, buffer.byteCount / width)
    guard count > 0 else { return }
    var gathering = Gathering(file: self, start: start, width: width)
    for box in StridedBox.boxes(first..<first + count, shape: shape, strides: strides) {
      try gathering.read(box.axes[...], box.source, box.target, into: &buffer)
    }
  }
}

/// Elements of which the indices are independent of each other: a loop for each axis.
struct StridedBox: Equatable {
  struct Axis: Equatable {
    var count: Int
    /// How far apart its elements are in the file, and in the row-major part; in elements.
    let source: Int
    let target: Int
  }

  /// The widest strides of the file first.
  let axes: [Axis]
  let source: Int
  let target: Int

  /// Cuts a range of a tensor's elements in row-major order into boxes: at most two an axis.
  static func boxes(_ range: Range<Int>, shape: [Int], strides: [Int]) -> [StridedBox] {
    var boxes: [StridedBox] = []
    /// Elements below each axis: `sizes[axis]` for one step of it.
    var sizes = [Int](repeating: 1, count: shape.count)
    for axis in shape.indices.dropLast().reversed() {
      sizes[axis] = sizes[axis + 1] * shape[axis + 1]
    }
    func add(_ count: Int, from axis: Int, _ source: Int, _ target: Int) {
      var axes: [Axis] = []
      for axis in axis..<shape.count {
        axes.append(Axis(count: shape[axis], source: strides[axis], target: sizes[axis]))
      }
      if !axes.isEmpty { axes[0].count = count }
      axes = axes.filter { $0.count > 1 }.sorted { $0.source > $1.source }
      boxes.append(StridedBox(axes: axes, source: source, target: target))
    }
    /// The elements of a range within one step of the axes before.
    func cut(_ range: Range<Int>, axis: Int, _ source: Int, _ target: Int) {
      guard axis < shape.count else { return add(1, from: axis, source, target) }
      let size = sizes[axis]
      var lower = range.lowerBound
      while lower < range.upperBound {
        let (step, rest) = lower.quotientAndRemainder(dividingBy: size)
        let begin = source + step * strides[axis]
        let place = target + lower - range.lowerBound
        let whole = (range.upperBound - lower) / size
        if rest == 0, whole > 0 {
          add(whole, from: axis, begin, place)
          lower += whole * size
        } else {
          let end = min(range.upperBound, (step + 1) * size)
          cut(rest..<rest + end - lower, axis: axis + 1, begin, place)
          lower = end
        }
      }
    }
    cut(range, axis: 0, 0, 0)
    return boxes
  }
}

/// Reads boxes of a file.
private struct Gathering: ~Copyable {
  let file: MappedFile
  let start: Int
  let width: Int
  private var scratch = Buffer(byteCount: 1 << 18)

  /// Reading a page more is cheaper than a system call.
  private static let widestGap = 4096

  init(file: MappedFile, start: Int, width: Int) {
    self.file = file
    self.start = start
    self.width = width
  }

  mutating func read(
    _ axes: ArraySlice<StridedBox.Axis>, _ source: Int, _ target: Int,
    into buffer: inout MutableRawSpan
  ) throws(CheckpointError) {
    guard let outer = axes.first else {
      return try readStretch(axes, 1, source, target, into: &buffer)
    }
    let inner = axes.dropFirst()
    let reach = inner.reduce(1) { $0 + ($1.count - 1) * $1.source }
    let fitting = scratch.byteCount / width - reach
    guard fitting >= 0, isDense(axes) else {
      for step in 0..<outer.count {
        try read(inner, source + step * outer.source, target + step * outer.target, into: &buffer)
      }
      return
    }
    let atOnce = outer.source == 0 ? outer.count : fitting / outer.source + 1
    for step in stride(from: 0, to: outer.count, by: atOnce) {
      var stretch = axes
      stretch[stretch.startIndex].count = min(atOnce, outer.count - step)
      try readStretch(
        stretch, (stretch.first!.count - 1) * outer.source + reach,
        source + step * outer.source, target + step * outer.target, into: &buffer)
    }
  }

  /// Whether the elements of a box lie close together in the file.
  private func isDense(_ axes: ArraySlice<StridedBox.Axis>) -> Bool {
    var reach = 1
    for axis in axes.reversed() {
      guard (axis.source - reach) * width <= Self.widestGap else { return false }
      reach += (axis.count - 1) * axis.source
    }
    return true
  }

  /// Reads a stretch of `count` elements of the file and puts those of the box in their places.
  private mutating func readStretch(
    _ axes: ArraySlice<StridedBox.Axis>, _ count: Int, _ source: Int, _ target: Int,
    into buffer: inout MutableRawSpan
  ) throws(CheckpointError) {
    let (file, width, begin) = (file, width, start + source * width)
    var bytes = scratch.first(count * width)
    try file.read(at: begin, into: &bytes)
    // Sound: both stay where they are for the length of the call, and every place is within.
    buffer.withUnsafeMutableBytes { buffer in
      bytes.withUnsafeBytes { bytes in
        let (from, to) = (bytes.baseAddress!, buffer.baseAddress! + target * width)
        switch width {
        case 1: scatter(axes, from, to, of: UInt8.self)
        case 2: scatter(axes, from, to, of: UInt16.self)
        case 4: scatter(axes, from, to, of: UInt32.self)
        default: scatter(axes, from, to, of: UInt64.self)
        }
      }
    }
  }
}

/// Copies the elements of a box to their places.
private func scatter<Element: BitwiseCopyable>(
  _ axes: ArraySlice<StridedBox.Axis>, _ source: UnsafeRawPointer,
  _ target: UnsafeMutableRawPointer, of type: Element.Type
) {
  let size = MemoryLayout<Element>.size
  guard let axis = axes.first else {
    return target.storeBytes(of: source.loadUnaligned(as: type), as: type)
  }
  let (from, to) = (axis.source * size, axis.target * size)
  guard axes.count == 1 else {
    for step in 0..<axis.count {
      scatter(axes.dropFirst(), source + step * from, target + step * to, of: type)
    }
    return
  }
  for step in 0..<axis.count {
    (target + step * to).storeBytes(
      of: (source + step * from).loadUnaligned(as: type), as: type)
  }
}
