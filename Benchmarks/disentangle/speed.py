"""Time `smelt disentangle` beside the plain tools that read and write the same files.

    SMELT=path/to/smelt python speed.py FOLDER [LAYERS ...]

makes a Llama-shaped BF16 base and four experts for every number of layers (default 2 4 8; 8 is
about 1 GB a model, and FOLDER needs ten times that), then measures, best of three, warm cache,
fsync included on both sides:

    plain    cat of the five inputs > /dev/null, then cp of the four experts and sync of the copies
    row      smelt disentangle --clean awd-row
    model    smelt disentangle --clean awd-model

then the same for 2, 4 and 8 experts of the smallest size. Last come two lines that say how the
processor time (user + system, which other work on the machine hardly moves) grows with the size
and with the number of experts. Needs numpy and GNU time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SMELT = os.environ["SMELT"]
HIDDEN, MLP, VOCABULARY = 2048, 5632, 16000
MEMORY = os.environ.get("MEMORY", "256MiB")
ROUNDS = int(os.environ.get("ROUNDS", "3"))
MIB = 2**20


def shapes(layers):
    result = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN]}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            result[f"{layer}.self_attn.{name}_proj.weight"] = [HIDDEN, HIDDEN]
        result[f"{layer}.mlp.gate_proj.weight"] = [MLP, HIDDEN]
        result[f"{layer}.mlp.up_proj.weight"] = [MLP, HIDDEN]
        result[f"{layer}.mlp.down_proj.weight"] = [HIDDEN, MLP]
        result[f"{layer}.input_layernorm.weight"] = [HIDDEN]
    return result


def make(folder, layers, experts):
    """Write base and experts, whose task vectors share a fifth of their energy."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = np.random.default_rng(1).standard_normal(1 << 26, dtype=np.float32)
    header, offset = {}, 0
    for name, shape in shapes(layers).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for model in range(experts + 1):
        path = folder / f"{model}.safetensors"
        if path.exists():
            continue
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for index, shape in enumerate(shapes(layers).values()):
                count = int(np.prod(shape))

                def draw(stream):
                    start = int(np.random.default_rng([index, stream]).integers(len(pool) - count))
                    return pool[start : start + count]

                values = 0.02 * draw(0)
                if model:
                    values += 0.001 * draw(1000)
                    values += 0.002 * draw(model)
                bits = values.view(np.uint32)
                file.write(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes())
            file.flush()
            os.fsync(file.fileno())
    return [folder / f"{model}.safetensors" for model in range(experts + 1)]


def timed(command):
    """Return seconds, the peak resident MiB and the processor seconds of a command."""
    done = subprocess.run(
        ["/usr/bin/time", "-f", "%e %M %U %S", *map(str, command)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    words = re.findall(r"^([\d.]+) (\d+) ([\d.]+) ([\d.]+)$", done.stderr, re.M)[-1]
    return float(words[0]), int(words[1]) / 1024, float(words[2]) + float(words[3])


def plain(paths, out):
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    start = time.time()
    subprocess.run(["cat", *paths], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["cp", *paths[1:], out], check=True)
    subprocess.run(["sync", *out.iterdir()], check=True)
    return time.time() - start, 0, 0


def smelt(paths, out, cleaning):
    shutil.rmtree(out, ignore_errors=True)
    family = ["--base", paths[0]]
    for index, path in enumerate(paths[1:]):
        family += ["--expert", f"e{index}={path}"]
    return timed([SMELT, "disentangle", *family, "-o", out, "--clean", cleaning, "--memory", MEMORY])


def best(measure):
    results = [measure() for _ in range(ROUNDS)]
    return min(r[0] for r in results), max(r[1] for r in results), min(r[2] for r in results)


def main(folder, sizes):
    print(f"{'model':>9} {'experts':>8}  {'plain s':>8} {'row s':>8} {'ratio':>6} {'model s':>8} {'ratio':>6}  peak MiB (budget {MEMORY})")
    per_size = [report(make(folder / f"layers{n}", n, 4), folder / "out") for n in sizes]
    paths = make(folder / f"layers{sizes[0]}", sizes[0], 8)
    counts = (2, 4, 8)
    per_count = [report(paths[: k + 1], folder / "out") for k in counts]
    print("\nprocessor seconds (row, model)")
    print("  a GB of model: " + ", ".join(f"{size:.2f} GB {row / size:.2f} {model / size:.2f}" for size, row, model in per_size))
    first = per_count[0]
    print(
        "  beside 2 experts: "
        + ", ".join(f"k = {k} × {row / first[1]:.2f} {model / first[2]:.2f}" for k, (_, row, model) in zip(counts, per_count))
        + "  (k² is × 1, 4, 16; the files are × 1, 1.8, 3.4)"
    )


def report(paths, out):
    """Measure and print one row; return GB and the processor seconds by rows and for the model."""
    base, _, _ = best(lambda: plain(paths, out))
    row, row_peak, row_work = best(lambda: smelt(paths, out, "awd-row"))
    model, model_peak, model_work = best(lambda: smelt(paths, out, "awd-model"))
    size = paths[0].stat().st_size / 1e9
    print(
        f"{size:6.2f} GB {len(paths) - 1:8}  {base:8.2f} {row:8.2f} {row / base:6.2f} {model:8.2f} {model / base:6.2f}"
        f"  {row_peak:.0f}, {model_peak:.0f}",
        flush=True,
    )
    shutil.rmtree(out, ignore_errors=True)
    return size, row_work, model_work


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(a) for a in sys.argv[2:]] or [2, 4, 8])
