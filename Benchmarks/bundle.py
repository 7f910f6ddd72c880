"""Bundles beside zipnn, python-zstandard and the zstd command: size and speed.

    SMELT=path/to/smelt python Benchmarks/bundle.py [MILLIONS_OF_PARAMETERS]

Needs numpy, ml_dtypes, safetensors, zstandard, zipnn and the zstd command. Every file is in
the page cache and every way gets the same number of cores. Times are the best of three, of the
whole way from file to file. MB/s are of unpacked bytes. "limit" is the order-0 entropy of the
best split into planes, or of the differences in steps.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import zstandard
from safetensors.numpy import save_file

SMELT = os.environ["SMELT"]
CORES = os.cpu_count()
BF16 = ml_dtypes.bfloat16
MILLIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 128


def best(work):
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def run(*arguments):
    subprocess.run([str(a) for a in arguments], check=True, stdout=subprocess.DEVNULL)


def with_smelt(source, packed, back, *options):
    return (
        lambda: run(SMELT, "pack", source, packed, "--jobs", CORES, *options),
        lambda: run(SMELT, "unpack", packed, "-o", back, "--jobs", CORES, *options),
    )


def with_zstd(source, packed, back):
    return (
        lambda: run("zstd", "-qf", "-3", f"-T{CORES}", source, "-o", packed),
        lambda: run("zstd", "-qdf", packed, "-o", back),
    )


def with_zstandard(source, packed, back):
    packer = zstandard.ZstdCompressor(level=3, threads=CORES)
    return (
        lambda: packed.write_bytes(packer.compress(source.read_bytes())),
        lambda: back.write_bytes(zstandard.ZstdDecompressor().decompress(packed.read_bytes())),
    )


def with_zipnn(source, packed, back, dtype):
    from zipnn import ZipNN

    def tool():
        return ZipNN(bytearray_dtype=dtype, threads=CORES)

    return (
        lambda: packed.write_bytes(tool().compress(source.read_bytes())),
        lambda: back.write_bytes(tool().decompress(packed.read_bytes())),
    )


def with_cp(source, packed, back):
    return lambda: run("cp", source, packed), lambda: run("cp", packed, back)


def measure(folder, source, name, work):
    packed, back = folder / f"packed{'.safetensors.zst' if name == 'smelt' else ''}", folder / "back.safetensors"
    pack, unpack = work(source, packed, back)
    times = best(pack), best(unpack)
    assert back.read_bytes() == source.read_bytes(), name
    size = source.stat().st_size
    print(
        f"  {name:12} {100 * packed.stat().st_size / size:6.2f} %   pack {size / times[0] / 1e6:6.0f} MB/s"
        f"   unpack {size / times[1] / 1e6:6.0f} MB/s",
        flush=True,
    )


def entropy(symbols):
    share = np.bincount(symbols) / symbols.size
    share = share[share > 0]
    return -(share * np.log2(share)).sum()


def main():
    random = np.random.default_rng(0)
    rows = MILLIONS * 1000 * 1000 // 1024 // 16
    weights = [random.standard_normal((rows, 1024), dtype=np.float32) * 0.02 for _ in range(16)]
    base = {f"layers.{i}.weight": w.astype(BF16) for i, w in enumerate(weights)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def save(tensors, name):
            save_file(tensors, folder / f"{name}.safetensors")
            return folder / f"{name}.safetensors"

        plain = save(base, "base")
        bits = base["layers.0.weight"].view(np.uint16).ravel()
        limit = 100 * (entropy(bits >> 7 & 255) + entropy(bits & 127) + 1) / 16
        print(f"{MILLIONS} M normal weights, BF16 (limit {limit:.2f} %), {CORES} cores")
        ways = {"smelt": with_smelt, "zstd -3": with_zstd, "zstandard": with_zstandard, "cp": with_cp}
        for name, work in ways.items():
            measure(folder, plain, name, work)
        measure(folder, plain, "zipnn", lambda *paths: with_zipnn(*paths, "bfloat16"))

        single = save({k: w for k, w in zip(base, weights)}, "single")
        print(f"{MILLIONS} M normal weights, F32")
        measure(folder, single, "smelt", with_smelt)
        measure(folder, single, "zipnn", lambda *paths: with_zipnn(*paths, "float32"))
        single.unlink()

        for share in (0.0025, 0.01, 0.05):
            tuned = {
                k: (v.astype(np.float32) + random.standard_normal(v.shape, dtype=np.float32) * np.float32(0.02 * share)).astype(BF16)
                for k, v in base.items()
            }
            path = save(tuned, "tuned")
            print(f"a fine-tune that differs by {100 * share} % of the weights' deviation")
            try:
                measure(folder, path, "smelt", lambda *paths: with_smelt(*paths, "--against", plain))
            except subprocess.CalledProcessError:
                print("  this smelt has no --against")
            measure(folder, path, "zipnn", lambda *paths: with_zipnn(*paths, "bfloat16"))
            if share == 0.01:
                pruned = {}
                for k in base:
                    delta = tuned[k].astype(np.float32) - base[k].astype(np.float32)
                    kept = np.argsort(-np.abs(delta), axis=None, kind="stable")[: delta.size // 10]
                    thin = np.zeros(delta.size, np.float32)
                    thin[kept] = delta.ravel()[kept]
                    pruned[k] = thin.reshape(delta.shape).astype(BF16)
                path = save(pruned, "pruned")
                print("its difference, the largest tenth kept")
                for name in ("smelt", "zstd -3"):
                    measure(folder, path, name, ways[name])


if __name__ == "__main__":
    main()
