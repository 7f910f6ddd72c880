"""Converting and listing, beside what a user would run instead.

    Scripts/setup --python && swift build -c release --product smelt
    .venv/bin/python Benchmarks/convert.py [FOLDER]

Writes about 9 GB to FOLDER (default: a temporary folder) and removes it again.
"""

import json
import os
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
from pairs import Side, compare

SMELT = Path(__file__).parents[1] / ".build" / "release" / "smelt"

H5PY_ZSTD = """
import json, sys
import h5py, hdf5plugin, numpy as np

with open(sys.argv[1], "rb") as file:
    start = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(start - 8))
data = np.memmap(sys.argv[1], np.uint8, "r")
with h5py.File(sys.argv[2], "w") as out:
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        out.create_dataset(
            name, data=data[begin:end].view(np.uint16).reshape(entry["shape"]),
            chunks=True, shuffle=True, compression=hdf5plugin.Zstd(clevel=1),
        )
"""

LIST_WHEEL = """
import sys
from safetensors import safe_open

with safe_open(sys.argv[1], "np") as file:
    for name in file.keys():
        tensor = file.get_slice(name)
        print(name, tensor.get_dtype(), tensor.get_shape())
"""

OPEN_WHEEL = """
import sys
from safetensors import safe_open

with safe_open(sys.argv[1], "np") as file:
    file.keys()
"""


def write_safetensors(path, shapes):
    """Write BF16 tensors of normally distributed weights, as a trained model has them."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while offset:
            size = min(offset, 64 << 20)
            values = random.standard_normal(size // 2, np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
            offset -= size


def llama(layers=22, width=2048, hidden=5632, words=32000):
    """Return the shapes of a Llama-like model of 2.2 GB in BF16."""
    shapes = {"model.embed_tokens.weight": [words, width]}
    for i in range(layers):
        p = f"model.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": [width, width],
            "self_attn.k_proj": [256, width],
            "self_attn.v_proj": [256, width],
            "self_attn.o_proj": [width, width],
            "mlp.gate_proj": [hidden, width],
            "mlp.up_proj": [hidden, width],
            "mlp.down_proj": [width, hidden],
            "input_layernorm": [width],
            "post_attention_layernorm": [width],
        }.items():
            shapes[f"{p}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": [width], "lm_head.weight": [words, width]}


def main(folder):
    model, many = folder / "model.safetensors", folder / "many.safetensors"
    write_safetensors(model, llama())
    write_safetensors(many, {f"layers.{i}.weight": [4] for i in range(100_000)})
    out, copy, zstd = folder / "out.h5", folder / "copy", folder / "zstd.h5"

    print("convert 2.2 GB BF16 to HDF5 | cp and sync, warm cache")
    ours = Side("smelt convert", [SMELT, "convert", model, out], [out, copy])
    theirs = Side("cp; sync", ["sh", "-c", f"cp {model} {copy} && sync {copy}"], [out, copy])
    print(compare(ours, theirs, runs=9))
    print("\nthe same | cp alone, which leaves the data in memory")
    alone = Side("cp", ["cp", model, copy], [out, copy])
    print(compare(ours, alone, runs=9))
    print("\nleaving the data in memory | cp alone")
    unsynced = Side("smelt convert --no-sync", [SMELT, "convert", "--no-sync", model, out], [out, copy])
    print(compare(unsynced, alone, runs=9))
    print("\nthe same | as many bytes to the disk, past the memory, from 4 MiB of zeros")
    direct = f"if=/dev/zero of={copy} bs=4M count={os.path.getsize(model) >> 22} oflag=direct"
    print(compare(ours, Side("dd oflag=direct", ["dd", *direct.split()], [out, copy])))

    print("\nconvert with zstd | h5py + hdf5plugin")
    out.unlink(missing_ok=True)
    copy.unlink(missing_ok=True)
    result = compare(
        Side("smelt convert --compress zstd", [SMELT, "convert", "--compress", "zstd", model, out], [out]),
        Side("h5py + hdf5plugin", [sys.executable, "-c", H5PY_ZSTD, model, zstd], [zstd]),
        runs=3,
        warmup=0,
    )
    print(result)
    print(f"sizes: {os.path.getsize(out) / 1e6:.0f} MB | {os.path.getsize(zstd) / 1e6:.0f} MB")

    print("\nlist 100,000 tensors | the safetensors wheel opening the file | and listing it")
    ours = Side("smelt inspect", [SMELT, "inspect", many])
    print(compare(ours, Side("safe_open", [sys.executable, "-c", OPEN_WHEEL, many])))
    print(compare(ours, Side("safe_open, listed", [sys.executable, "-c", LIST_WHEEL, many])))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
