"""Bundles beside zipnn, python-zstandard and the zstd command: size and speed.

    SMELT=path/to/smelt python Benchmarks/bundle.py [MILLIONS_OF_PARAMETERS [TENSORS]]
    SMELT=path/to/smelt python Benchmarks/bundle.py MODELS
    SMELT=path/to/smelt python Benchmarks/bundle.py --one-tensor [GIGABYTES_UNPACKED]

MODELS is a folder of models, one of which is called base: safetensors files, or folders with a
model.safetensors. Each is packed alone, the others against the base too, and then all as a family.
--one-tensor counts the bytes that are read to get one tensor out of a large bundle.

Needs numpy, ml_dtypes, safetensors, zstandard, zipnn and the zstd command. Every file is in
the page cache and every way gets the same number of cores. Times are medians of five, of the
whole way from file to a new file that has reached the disk (fsync on every side). MB/s are of unpacked bytes; "a core" is of processor time. "limit" is the
order-0 entropy of the exponents, and of the differences in steps for each exponent of the base; it is
beaten where whole tensors are the same or runs repeat.
"""

import json
import os
import resource
import statistics
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
KINDS = {"BF16": (np.uint16, 8, "bfloat16"), "F32": (np.uint32, 8, "float32"), "F16": (np.uint16, 5, None)}


def processor_time():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def time_of(work, output):
    """The medians of wall time and of processor time of five runs, each to a new file."""
    times = []
    for _ in range(5):
        output.unlink(missing_ok=True)
        begin, used = time.perf_counter(), processor_time()
        work()
        times.append((time.perf_counter() - begin, processor_time() - used))
    return [statistics.median(column) for column in zip(*times)]


def run(*arguments):
    subprocess.run([str(a) for a in arguments], check=True, stdout=subprocess.DEVNULL)


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())


def run_and_sync(output, *arguments):
    run(*arguments)
    with open(output, "rb") as file:
        os.fsync(file.fileno())


def with_smelt(source, packed, back, *options):
    return (
        lambda: run(SMELT, "pack", source, packed, "--jobs", CORES, *options),
        lambda: run(SMELT, "unpack", packed, "-o", back, "--jobs", CORES, *options),
    )


def with_zstd(source, packed, back):
    return (
        lambda: run_and_sync(packed, "zstd", "-qf", "-3", f"-T{CORES}", source, "-o", packed),
        lambda: run_and_sync(back, "zstd", "-qdf", packed, "-o", back),
    )


def with_zstandard(source, packed, back):
    packer = zstandard.ZstdCompressor(level=3, threads=CORES)
    return (
        lambda: write(packed, packer.compress(source.read_bytes())),
        lambda: write(back, zstandard.ZstdDecompressor().decompress(packed.read_bytes())),
    )


def with_zipnn(source, packed, back, dtype):
    from zipnn import ZipNN

    def tool():
        return ZipNN(bytearray_dtype=dtype, threads=CORES)

    return (
        lambda: write(packed, tool().compress(source.read_bytes())),
        lambda: write(back, tool().decompress(packed.read_bytes())),
    )


def with_cp(source, packed, back):
    return (
        lambda: run_and_sync(packed, "cp", source, packed),
        lambda: run_and_sync(back, "cp", packed, back),
    )


def measure(folder, source, name, work):
    packed, back = folder / f"packed{'.safetensors.zst' if name == 'smelt' else ''}", folder / "back.safetensors"
    pack, unpack = work(source, packed, back)
    (pack_wall, pack_used), (unpack_wall, unpack_used) = time_of(pack, packed), time_of(unpack, back)
    assert back.read_bytes() == source.read_bytes(), name
    size = source.stat().st_size
    print(
        f"  {name:12} {100 * packed.stat().st_size / size:6.2f} %   pack {size / pack_wall / 1e6:5.0f} MB/s"
        f" ({size / pack_used / 1e6:4.0f} a core)   unpack {size / unpack_wall / 1e6:5.0f} MB/s"
        f" ({size / unpack_used / 1e6:4.0f} a core)",
        flush=True,
    )


def entropy(symbols):
    share = np.bincount(symbols) / symbols.size
    share = share[share > 0]
    return -(share * np.log2(share)).sum()


def tensors_of(path):
    """Name, type and bits of the tensors of a safetensors file."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, t in header.items():
        begin, end = (start + offset for offset in t["data_offsets"])
        if t["dtype"] in KINDS:
            yield name, t["dtype"], data[begin:end].view(KINDS[t["dtype"]][0])
        else:
            yield name, t["dtype"], data[begin:end]


def plane_entropy(values):
    """Bits of an element, its bytes taken by themselves."""
    return sum(entropy(values >> 8 * byte & 255) for byte in range(values.itemsize))


def limit(path, base=None):
    """The order-0 limit of a file in % of its tensors, each taken alone or as steps from the base's."""
    others = {name: bits for name, _, bits in tensors_of(base)} if base else {}
    bits_used, size = 0.0, 0
    for name, dtype, bits in tensors_of(path):
        size += bits.nbytes
        if dtype not in KINDS or bits.size == 0:
            bits_used += entropy(bits) * bits.size if bits.size else 0
            continue
        width, (_, exponent, _) = 8 * bits.itemsize, KINDS[dtype]
        keep = width - 1 - exponent
        best = (entropy(bits >> keep & (1 << exponent) - 1) + keep + 1) * bits.size
        other = others.get(name)
        if other is not None and other.shape == bits.shape and keep <= 32:
            top = bits.dtype.type(1 << (width - 1))
            order = lambda u: np.where(u & top, ~u, u | top)
            steps = order(bits) - order(other)
            code = steps << 1 ^ (0 - (steps >> (width - 1)))
            key = other >> (width - 1 - 8) & 255
            best = min(best, sum(plane_entropy(code[key == k]) * (key == k).sum() for k in np.unique(key)))
        bits_used += best
    return 100 * bits_used / 8 / size


def measure_models(models):
    """Real models, one by one, against the base and as a family."""
    paths = {}
    for path in sorted(Path(models).iterdir()):
        file = path / "model.safetensors" if path.is_dir() else path
        if file.suffix == ".safetensors" and file.exists():
            paths[path.stem] = file
    base = paths.pop("base")
    dtypes = {dtype for _, dtype, _ in tensors_of(base)} & KINDS.keys()
    kind = KINDS[dtypes.pop()][2] if len(dtypes) == 1 else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for name, path in {"base": base, **paths}.items():
            print(f"{name}, {path.stat().st_size / 1e6:.1f} MB, alone (limit {limit(path):.2f} %), {CORES} cores")
            ways = {"smelt": with_smelt, "zstd -3": with_zstd, "zstandard": with_zstandard}
            if name == "base" and kind:
                ways["zipnn"] = lambda *files: with_zipnn(*files, kind)
            for way, work in ways.items() if name == "base" else [("smelt", with_smelt)]:
                measure(folder, path, way, work)
            if name != "base":
                print(f"{name}, against the base (limit {limit(path, base):.2f} %)")
                measure(folder, path, "smelt", lambda *files: with_smelt(*files, "--against", base))
                if kind:
                    measure(folder, path, "zipnn", lambda *files: with_zipnn(*files, kind))
        bundle, family = folder / "family.safetensors.zst", [f"{name}={path}" for name, path in paths.items()]
        wall, used = time_of(lambda: run(SMELT, "pack", "--base", base, *family, bundle), bundle)
        size = sum(path.stat().st_size for path in [base, *paths.values()])
        print(
            f"all {1 + len(paths)} as a family: {bundle.stat().st_size / 1e6:.1f} of {size / 1e6:.1f} MB,"
            f" {100 * bundle.stat().st_size / size:.2f} %, {bundle.stat().st_size / base.stat().st_size:.2f} x the base;"
            f" pack {size / wall / 1e6:.0f} MB/s ({size / used / 1e6:.0f} a core)"
        )
        for name, path in {"base": base, **paths}.items():
            run(SMELT, "unpack", bundle, "--model", name, "-o", folder / "back.safetensors")
            assert (folder / "back.safetensors").read_bytes() == path.read_bytes(), name


def measure_one_tensor(gigabytes):
    """Bytes that are read from a large bundle for one of its tensors, as the kernel counts them."""
    random, count = np.random.default_rng(0), max(4, round(gigabytes * 1e9 / 2 / (4096 * 1024)))
    with tempfile.TemporaryDirectory() as name:
        source, bundle = Path(name) / "in.safetensors", Path(name) / "b.safetensors.zst"
        block = (random.standard_normal((4096, 1024), dtype=np.float32) * 0.02).astype(BF16).view(np.uint16)
        # Turned by another amount in every tensor, so that none is like another.
        save_file({f"layers.{i}.weight": np.roll(block.ravel(), 1001 * i).reshape(block.shape).view(BF16)
                   for i in range(count)}, source)
        run(SMELT, "pack", source, bundle)

        def bytes_read(*arguments):
            process = subprocess.Popen([SMELT, *map(str, arguments)], stdout=subprocess.DEVNULL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
            assert process.wait() == 0
            return int(next(line for line in lines if line.startswith("rchar")).split()[1])

        nothing = bytes_read("--version")
        listed = bytes_read("inspect", bundle) - nothing
        out = Path(name) / "one.safetensors"
        begin = time.perf_counter()
        one = bytes_read("unpack", bundle, "--tensors", f"layers.{count // 2}.weight", "-o", out) - nothing
        print(
            f"a bundle of {bundle.stat().st_size / 1e9:.2f} GB, {count} tensors: read to list them {listed / 1e3:.1f} KB,"
            f" to unpack one of {out.stat().st_size / 1e6:.1f} MB {one / 1e6:.2f} MB in"
            f" {time.perf_counter() - begin:.3f} s"
        )


def main():
    argument = sys.argv[1] if len(sys.argv) > 1 else "128"
    if argument == "--one-tensor":
        return measure_one_tensor(float(sys.argv[2]) if len(sys.argv) > 2 else 3.02)
    if not argument.isdigit():
        return measure_models(argument)
    millions = int(argument)
    random = np.random.default_rng(0)
    tensors = int(sys.argv[2]) if len(sys.argv) > 2 else 16
    rows = millions * 1000 * 1000 // 1024 // tensors
    weights = [random.standard_normal((rows, 1024), dtype=np.float32) * 0.02 for _ in range(tensors)]
    base = {f"layers.{i}.weight": w.astype(BF16) for i, w in enumerate(weights)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def save(tensors, name):
            save_file(tensors, folder / f"{name}.safetensors")
            return folder / f"{name}.safetensors"

        plain = save(base, "base")
        print(f"{millions} M normal weights, BF16 (limit {limit(plain):.2f} %), {CORES} cores")
        ways = {"smelt": with_smelt, "zstd -3": with_zstd, "zstandard": with_zstandard, "cp": with_cp}
        for name, work in ways.items():
            measure(folder, plain, name, work)
        measure(folder, plain, "zipnn", lambda *paths: with_zipnn(*paths, "bfloat16"))

        single = save({k: w for k, w in zip(base, weights)}, "single")
        print(f"{millions} M normal weights, F32 (limit {limit(single):.2f} %)")
        measure(folder, single, "smelt", with_smelt)
        measure(folder, single, "zipnn", lambda *paths: with_zipnn(*paths, "float32"))
        single.unlink()

        for share in (0.0025, 0.01, 0.05):
            tuned = {
                k: (v.astype(np.float32) + random.standard_normal(v.shape, dtype=np.float32) * np.float32(0.02 * share)).astype(BF16)
                for k, v in base.items()
            }
            path = save(tuned, "tuned")
            print(f"a fine-tune that differs by {100 * share} % of the weights' deviation (limit {limit(path, plain):.2f} %)")
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
