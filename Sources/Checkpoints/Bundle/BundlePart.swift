extension Bundle {
  /// A tensor of the inner safetensors file, cut into streams and these into frames.
  ///
  /// Each stream (a plane, or the whole tensor) begins a frame, and only its last frame holds
  /// less than 1 MiB.
  struct Part: Sendable {
    let tensor: TensorInfo
    let streams: Int
    var firstFrame = 0

    init(_ tensor: TensorInfo, streams: Int) {
      self.tensor = tensor
      self.streams = streams
    }

    var streamLength: Int { tensor.byteCount / streams }
    var framesPerStream: Int { Bundle.frameCount(of: streamLength) }
    var frameCount: Int { streams * framesPerStream }

    func frame(_ index: Int, of stream: Int) -> Int {
      firstFrame + stream * framesPerStream + index
    }

    /// The bytes of its stream that frame `index` holds.
    func range(of index: Int) -> Range<Int> {
      index << 20..<min((index + 1) << 20, streamLength)
    }
  }

  /// How many frames hold a stream of this length.
  static func frameCount(of byteCount: Int) -> Int {
    byteCount >> 20 + (byteCount & (1 << 20 - 1) == 0 ? 0 : 1)
  }
}
