"""Makes checkpoints, packs them with $SMELT and damages copies of a bundle."""

import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import zstandard
from safetensors.numpy import save_file

HERE = Path(__file__).parent
random = np.random.default_rng(0)


def normal(*shape):
    return random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)


first = normal(64, 32)
pruned = normal(4000)
pruned[np.abs(pruned) < 0.03] = 0
tensors = {
    "experts.0.weight": first.astype(ml_dtypes.bfloat16),
    "experts.1.weight": (first + normal(64, 32) * np.float32(0.01)).astype(ml_dtypes.bfloat16),
    "experts.2.weight": first.astype(ml_dtypes.bfloat16),
    "half": normal(300).astype(np.float16),
    "pruned": pruned.astype(ml_dtypes.bfloat16),
    "single": normal(300),
    "small": normal(500).astype(ml_dtypes.float8_e5m2),
    "ids": np.arange(5),
    "empty": np.zeros((0, 3), np.float32),
}
save_file(tensors, HERE / "good.safetensors", metadata={"format": "pt"})
good = HERE / "good.safetensors.zst"
subprocess.run([os.environ["SMELT"], "pack", HERE / "good.safetensors", good], check=True)

# What the other codecs are for.
ids = random.integers(0, 2**20, 600, np.int32)
flipped = ids ^ random.integers(0, 2, 600, np.int32)
mask = random.random(600) < 0.1
save_file(
    {"ids.0": ids, "ids.1": flipped, "thin.0": ids * mask, "thin.1": flipped * mask},
    HERE / "good-xor.safetensors",
)
subprocess.run([os.environ["SMELT"], "pack", HERE / "good-xor.safetensors", HERE / "good-xor.safetensors.zst"], check=True)
matrix = normal(33, 150)
save_file(
    {"half": matrix[:, :130].astype(np.float16), "brain": matrix.astype(ml_dtypes.bfloat16), "single": matrix, "bias": matrix[0]},
    HERE / "matrices.safetensors",
)
for lossy in ["int8", "int4", "sign1", "lowrank:3"]:
    bundle = HERE / f"good-{lossy.split(':')[0]}.safetensors.zst"
    subprocess.run([os.environ["SMELT"], "pack", "--lossy", lossy, HERE / "matrices.safetensors", bundle], check=True)
    subprocess.run([os.environ["SMELT"], "unpack", bundle, "-o", bundle.with_suffix("")], check=True)
(HERE / "matrices.safetensors").unlink()

few = np.where(random.random((64, 32)) < 0.1, tensors["experts.1.weight"], tensors["experts.0.weight"])
save_file({"w.0": tensors["experts.0.weight"], "w.1": few}, HERE / "good-thin.safetensors")
subprocess.run([os.environ["SMELT"], "pack", HERE / "good-thin.safetensors", HERE / "good-thin.safetensors.zst"], check=True)

# A family in which each model is nearest to the one before it, and what is packed against a model that stays outside.
row = [tensors["experts.0.weight"].astype(np.float32)]
for step in range(3):
    row.append(row[-1] + normal(64, 32) * np.float32(0.005))
row.append(np.where(random.random((64, 32)) < 0.05, row[0], row[-1]))
models = {}
for name, weight in zip(["base", "one", "two", "three", "four"], row):
    models[name] = HERE / f"{name}.safetensors"
    save_file({"w": weight.astype(ml_dtypes.bfloat16), "ids": np.arange(5)}, models[name])
family, outside = HERE / "good-family.safetensors.zst", HERE / "good-outside.safetensors.zst"
base, *others = models.items()
subprocess.run(
    [os.environ["SMELT"], "pack", "--base", base[1], *(f"{name}={path}" for name, path in others), family], check=True
)
subprocess.run([os.environ["SMELT"], "unpack", family, "-o", family.with_suffix("")], check=True)
near = {name: (tensor.astype(np.float32) * 1.001).astype(tensor.dtype) for name, tensor in tensors.items()}
save_file(near, outside.with_suffix(""))
subprocess.run([os.environ["SMELT"], "pack", outside.with_suffix(""), outside, "--against", HERE / "good.safetensors"], check=True)
for path in models.values():
    path.unlink()

whole = good.read_bytes()
flipped = bytearray(whole)
flipped[len(whole) // 2] ^= 1
table = bytearray(whole)
table[-9 - 8 - 8] ^= 1  # The compressed size of the last frame that holds something.
content = (HERE / "good.safetensors").read_bytes()
for name, data in {
    "truncated": whole[:-1],
    "flipped": flipped,
    "lying-table": table,
    "no-table": zstandard.ZstdCompressor(write_checksum=True).compress(content),
}.items():
    (HERE / f"bad-{name}.safetensors.zst").write_bytes(data)
