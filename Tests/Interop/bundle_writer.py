"""Writes bundles as FORMAT.md says, with nothing of Smelt's: what it describes can be written by another.

A recipe's checksums are XXH3, from libxxhash, which Smelt needs too.
"""

import ctypes
import json
import struct

import numpy as np
import zstandard

XXHASH = ctypes.CDLL("libxxhash.so.0")
XXHASH.XXH3_64bits.restype = ctypes.c_uint64
XXHASH.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
BLOCK = 1 << 20


def xxh3(data):
    return XXHASH.XXH3_64bits(data, len(data))


def frames_of(stream):
    return [stream[begin : begin + BLOCK] for begin in range(0, len(stream), BLOCK)]


def split(elements, rotation):
    """The planes of unsigned integers."""
    bits = 8 * elements.itemsize
    if rotation:
        elements = elements << rotation | elements >> (bits - rotation)
    return [(elements >> (bits - 8 - 8 * p)).astype(np.uint8).tobytes() for p in range(elements.itemsize)]


def order(elements):
    top = elements.dtype.type(1 << (8 * elements.itemsize - 1))
    return np.where(elements & top, ~elements, elements | top)


def sorted_steps(elements, reference):
    bits, out = 8 * elements.itemsize, []
    for begin in range(0, elements.size, BLOCK):
        here = slice(begin, begin + BLOCK)
        steps = (order(elements[here]) - order(reference[here])).view(f"i{elements.itemsize}").astype(np.int64)
        codes = np.where(steps >= 0, 2 * steps, -2 * steps - 1).astype(elements.dtype)
        turned = reference[here] << 1 | reference[here] >> (bits - 1)
        out.append(codes[np.argsort(turned >> (bits - 8), kind="stable")])
    return np.concatenate(out)


class Bundle:
    def __init__(self, version=1):
        self.version, self.models, self.parts = version, {}, {}

    def entry(self, model, name, dtype, array, codec, **more):
        text = f"{xxh3(array.tobytes()):016x}"
        entry = dict(name=name, dtype=dtype, shape=list(array.shape), codec=codec, xxh3=text, **more)
        self.models.setdefault(model, []).append(entry)
        return f"{model}/{name}"

    def part(self, name, dtype, shape, streams):
        """Streams as bytes, or as lists of frames if they are cut by block."""
        cut = [stream if isinstance(stream, list) else frames_of(stream) for stream in streams]
        frames = [frame for stream in cut for frame in stream]
        self.parts[name] = (dtype, shape, frames)

    def raw(self, model, name, dtype, array):
        self.part(self.entry(model, name, dtype, array, "raw"), dtype, list(array.shape), [array.tobytes()])

    def planes(self, model, name, dtype, bits):
        name = self.entry(model, name, dtype, bits, "planes")
        self.part(name, "U8", [bits.itemsize, bits.size], split(bits.ravel(), 1))

    def steps(self, model, name, dtype, bits, reference, other):
        name = self.entry(model, name, dtype, bits, "ulp", reference=other)
        codes = sorted_steps(bits.ravel(), reference.ravel())
        self.part(name, "U8", [bits.itemsize, bits.size], split(codes, 0))

    def xor(self, model, name, dtype, bits, reference, other):
        name = self.entry(model, name, dtype, bits, "xor", reference=other)
        self.part(name, "U8", [bits.itemsize, bits.size], split(bits.ravel() ^ reference.ravel(), 0))

    def sparse(self, model, name, dtype, bits):
        self.gaps(self.entry(model, name, dtype, bits, "sparse", rotation=3), bits.ravel(), 3)

    def sparse_steps(self, model, name, dtype, bits, reference, other):
        name = self.entry(model, name, dtype, bits, "sparseulp", reference=other, rotation=0)
        self.gaps(name, sorted_steps(bits.ravel(), reference.ravel()), 0)

    def gaps(self, name, bits, rotation):
        gaps, values = [], [[] for _ in range(bits.itemsize)]
        for begin in range(0, bits.size, BLOCK):
            block = bits[begin : begin + BLOCK]
            places, octets = np.flatnonzero(block), bytearray()
            for zeros in np.diff(places, prepend=-1) - 1:
                octets += b"\xfe" * (zeros // 254) + bytes([zeros % 254])
            gaps.append(bytes(octets) + b"\xff")
            for plane, frame in zip(values, split(block[places], rotation)):
                plane.append(frame)
        self.part(f"{name}#gaps", "U8", [sum(map(len, gaps))], [gaps])
        self.part(f"{name}#values", "U8", [bits.itemsize, sum(map(len, values[0]))], values)

    def int8(self, model, name, values, group):
        """Keeps F32 values inexactly and returns what they become."""
        padded = np.pad(values.ravel(), (0, -values.size % group)).reshape(-1, group)
        scale = np.abs(padded).max(1) / np.float32(127)
        codes = np.rint(padded / scale[:, None]).astype(np.int8)
        kept = (codes.astype(np.float32) * scale[:, None]).ravel()[: values.size].reshape(values.shape)
        error = np.sqrt(((values - kept) ** 2).sum() / (values**2).sum())
        name = self.entry(model, name, "F32", kept, "int8", group=group, error=str(error))
        self.part(name, "I8", list(values.shape), [codes.ravel()[: values.size].tobytes()])
        self.part(f"{name}#scale", "F32", [scale.size], [scale.tobytes()])
        return kept

    def write(self, path):
        models = [{"name": name, "tensors": tensors} for name, tensors in self.models.items()]
        header = {"__metadata__": {"bundle": json.dumps({"version": self.version, "models": models})}}
        contents, end = [], 0
        for name, (dtype, shape, frames) in self.parts.items():
            begin, end = end, end + sum(map(len, frames))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            contents += frames
        text = json.dumps(header).encode()
        contents = frames_of(struct.pack("<Q", len(text)) + text) + contents
        compress = zstandard.ZstdCompressor(level=3, write_checksum=True, write_content_size=True).compress
        frames = [compress(content) for content in contents]
        sums = struct.pack(f"<II{len(frames)}I", 0x184D2A5B, 4 * len(frames), *(xxh3(f) & 0xFFFFFFFF for f in frames))
        table = b"".join(struct.pack("<II", len(f), len(c)) for f, c in zip([*frames, sums], [*contents, b""]))
        table += struct.pack("<IBI", len(frames) + 1, 0, 0x8F92EAB1)
        path.write_bytes(b"".join(frames) + sums + struct.pack("<II", 0x184D2A5E, len(table)) + table)
