extension Bundle {
  /// A tensor of the inner safetensors file, cut into streams and these into frames.
  ///
  /// Each stream (a plane, or the whole tensor) begins a frame. Its frames hold 1 MiB each but
  /// the last, or each what belongs to one block of elements.
  struct Part: Sendable {
    let tensor: TensorInfo
    let streams: Int
    /// The number of frames of each stream if it is cut by block.
    let blocks: Int?
    var firstFrame = 0

    var streamLength: Int { tensor.byteCount / streams }
    var framesPerStream: Int { blocks ?? Bundle.frameCount(of: streamLength) }

    func frame(_ index: Int, of stream: Int) -> Int {
      firstFrame + stream * framesPerStream + index
    }

    /// Whether these are the contents of one of its streams' frames.
    func fits(_ contentSizes: ArraySlice<Int>) -> Bool {
      guard blocks == nil else { return contentSizes.reduce(0, +) == streamLength }
      return contentSizes.dropLast().allSatisfy { $0 == ZstdFrame.contentSize }
        && contentSizes.reduce(0, +) == streamLength
    }
  }

  /// How many frames of 1 MiB hold a stream of this length.
  static func frameCount(of byteCount: Int) -> Int {
    byteCount >> 20 + (byteCount & (1 << 20 - 1) == 0 ? 0 : 1)
  }
}
