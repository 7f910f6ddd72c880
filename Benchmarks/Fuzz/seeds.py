"""Makes a corpus to begin with for each fuzz target: python3 seeds.py FOLDER"""

import json
import struct
import sys
import zipfile
from pathlib import Path

FIXTURES = Path(__file__).parents[2] / "Fixtures"


def headers():
    """The size of the data as one byte, then a safetensors header."""
    types = {"F32": 32, "BF16": 16, "U8": 8, "F4": 4, "F6_E2M3": 6, "C64": 64, "BOOL": 8}
    for dtype, bits in types.items():
        size = 8 * bits // 8
        entry = {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}
        yield bytes([size]) + json.dumps({"a": entry}).encode()
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    one = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    two = {"dtype": "F16", "shape": [1], "data_offsets": [1, 3]}
    yield b"\3" + json.dumps({"e": empty, "a.b": one, "c": two}, separators=(",", ":")).encode()
    yield b"\1" + json.dumps({"__metadata__": {"format": "pt", "k": "é\n"}, "a": one}).encode()
    yield b"\1" + json.dumps({"a": one | {"x": [1.5e3, None, True, {"y": "\ud83d\ude00"}]}}).encode()
    yield b"\0{}   "
    yield b'\1{"\\u0061\\"\\/\\b\\ud83d\\ude00":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}'
    checksums = "xxh3-64/1MiB c38506e5e94fa170 0123456789abcdef"  # The first is that of "U8 [] 1 a\n".
    yield b"\1" + json.dumps({"__metadata__": {"checksums": checksums}, "a": one}).encode()


def archives():
    for pattern in ("pytorch/*.p*t*", "pytorch/*.bin", "pytorch/*.ckpt", "numpy/*.npz"):
        yield from sorted(FIXTURES.glob(pattern))


def pickles():
    """PyTorch's pickles, arrays of numpy."""
    for path in archives():
        if not zipfile.is_zipfile(path):
            continue
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(("data.pkl", ".npy")):
                    yield archive.read(name)[:1024]


def bundles():
    """What is to be read as one byte, then a seek table, checksums of frames, contents or a recipe."""
    frames = b"".join(struct.pack("<II", 0, 0) for _ in range(2))
    table = struct.pack("<II", 0x184D2A5E, len(frames) + 9) + frames
    yield b"\0" + table + struct.pack("<IBI", 2, 0, 0x8F92EAB1)
    yield b"\1" + struct.pack("<IIII", 0x184D2A5B, 8, 1, 2)
    tensor = {"name": "t", "dtype": "BF16", "shape": [2], "codec": "planes", "xxh3": "0" * 16}
    for extra in (
        {}, {"parts": ["p"], "rotation": 1}, {"codec": "ulp", "reference": "s"},
        {"codec": "xor", "base": "b", "base_xxh3": "f" * 16},
        {"codec": "int8", "group": 64, "error": "0.5"}, {"codec": "raw", "dtype": "F4"},
    ):  # fmt: skip
        model = {"name": "m", "metadata": {"k": "v"}, "tensors": [tensor | extra]}
        yield b"\3" + json.dumps({"version": 1, "models": [model]}).encode()
    # A tensor for each of most codecs: its entry, its parts' types, shapes and frames.
    for entry, parts in (
        ({"codec": "planes", "dtype": "BF16", "shape": [2]}, {"": ("U8", [2, 2], [2, 2])}),
        ({"codec": "raw", "dtype": "F4", "shape": [4]}, {"": ("F4", [4], [2])}),
        ({"codec": "sparse", "dtype": "U8", "shape": [5]}, {"#gaps": ("U8", [2], [2]), "#values": ("U8", [1, 1], [1])}),
        ({"codec": "int4", "dtype": "F16", "shape": [3], "group": 16}, {"": ("U8", [2], [2]), "#scale": ("F32", [1], [4])}),
        ({"codec": "lowrank", "dtype": "F32", "shape": [2, 3]},
         {"#left": ("F32", [2, 1], [8]), "#right": ("F32", [1, 3], [12])}),
    ):  # fmt: skip
        inner, size, frames = {}, 0, b"\1"
        for suffix, (dtype, shape, contents) in parts.items():
            begin, size = size, size + sum(contents)
            inner["t" + suffix] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, size]}
            frames += bytes(contents)
        recipe = {"version": 1, "models": [{"name": "", "tensors": [tensor | entry]}]}
        text = (json.dumps(value, separators=(",", ":")).encode() for value in (inner, recipe))
        yield b"\2" + bytes([size]) + b"\xff".join([*text, frames])
    twice = [tensor | {"name": n} for n in "ab"]
    twice[1] |= {"codec": "xor", "reference": "a"}
    inner = {n: {"dtype": "U8", "shape": [2, 2], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate("ab")}
    recipe = {"version": 1, "models": [{"name": "", "tensors": twice}]}
    text = (json.dumps(value, separators=(",", ":")).encode() for value in (inner, recipe))
    yield b"\2\10" + b"\xff".join([*text, b"\1\2\2\2\2"])


folder = Path(sys.argv[1])
for target, seeds in {
    "FuzzHeader": headers(), "FuzzPickle": pickles(), "FuzzBundle": bundles(),
    "FuzzArchive": (path.read_bytes() for path in archives()),
}.items():  # fmt: skip
    (folder / target).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (folder / target / str(number)).write_bytes(seed)
(folder / "FuzzInventory").mkdir(exist_ok=True)
