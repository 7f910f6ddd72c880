"""Bundles read by pyzstd, zstandard, safetensors and less than sixty lines of numpy."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import pyzstd
import zstandard
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
import bundle_reader  # noqa: E402
import bundle_writer  # noqa: E402

SMELT = os.environ["SMELT"]
FIXTURES = Path(__file__).parents[2] / "Fixtures"


def smelt(*arguments):
    return subprocess.run([SMELT, *map(str, arguments)], capture_output=True, text=True)


def load_file(path):
    """The tensors of a safetensors file; the package gives numpy no 8-bit floats."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            data[start + t["data_offsets"][0] : start + t["data_offsets"][1]],
            bundle_reader.TYPES[t["dtype"]],
        ).reshape(-1 if t["dtype"][:2] in ("F4", "F6") else t["shape"])
        for name, t in header.items()
    }


def frames(data):
    """The content sizes and checksum flags of the frames, from the seek table and the frames."""
    count = int.from_bytes(data[-9:-5], "little")
    table = data[len(data) - 9 - 8 * count : -9]
    place = 0
    for i in range(count):
        size, content = (int.from_bytes(table[8 * i + k : 8 * i + k + 4], "little") for k in (0, 4))
        yield data[place : place + size], content
        place += size


def recipe(bundle):
    with pyzstd.SeekableZstdFile(bundle) as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return json.loads(json.loads(header)["__metadata__"]["bundle"])


class Counter:
    """A file that counts the bytes that are read from it."""

    def __init__(self, file):
        self.file, self.count = file, 0

    def read(self, *size):
        data = self.file.read(*size)
        self.count += len(data)
        return data

    def readinto(self, buffer):
        count = self.file.readinto(buffer)
        self.count += count
        return count

    def __getattr__(self, name):
        return getattr(self.file, name)


class InnerFile:
    """The safetensors file in a bundle, of which zstandard decompresses only the frames that are read."""

    def __init__(self, path):
        self.data, self.place, self.count = path.read_bytes(), 0, 0
        count = int.from_bytes(self.data[-9:-5], "little")
        table = np.frombuffer(self.data[-9 - 8 * count : -9], "<u4").reshape(-1, 2)
        self.starts, self.offsets = np.pad(np.cumsum(table, 0, "i8"), ((1, 0), (0, 0))).T

    def seek(self, place):
        self.place = place

    def read(self, size):
        first, last = np.searchsorted(self.offsets, self.place, "right") - 1, np.searchsorted(self.offsets, self.place + size)
        content = b""
        for frame in range(first, last):
            data = self.data[self.starts[frame] : self.starts[frame + 1]]
            self.count += len(data)
            content += zstandard.ZstdDecompressor().decompress(data)
        begin = self.place - self.offsets[first]
        return content[begin : begin + size]


def finished(*arguments):
    """A run of the command that has ended but still has its entry in /proc."""
    process = subprocess.Popen([SMELT, *map(str, arguments)], stdout=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def bytes_read(*arguments):
    process = finished(*arguments)
    lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
    assert process.wait() == 0
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def peak_memory(*arguments):
    """The high-water mark of the resident memory, asked while the command runs."""
    process, peak = subprocess.Popen([SMELT, *map(str, arguments)], stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak] + [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")])
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            pass
    assert process.returncode == 0 and peak > 0
    return peak


class Bundles(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = Path(folder.name)

    def assert_reads(self, bundle, source, base={}):
        with pyzstd.SeekableZstdFile(bundle) as file:
            read = bundle_reader.load(file, base=base)
        expected = load_file(source)
        self.assertEqual(read.keys(), expected.keys())
        for name, tensor in expected.items():
            self.assertEqual(read[name].tobytes(), tensor.tobytes(), name)
            self.assertEqual((read[name].dtype, read[name].shape), (tensor.dtype, tensor.shape))

    def test_numpy_reads_what_smelt_packed(self):
        for source in [FIXTURES / "bundle/good.safetensors", FIXTURES / "digits/upright.safetensors"]:
            bundle = self.out / "b.safetensors.zst"
            self.assertEqual(smelt("pack", source, bundle).returncode, 0)
            self.assert_reads(bundle, source)

    def test_readme_prints_the_reader(self):
        reader = Path(bundle_reader.__file__).read_text()
        self.assertIn(f"```python\n{reader}```\n", (FIXTURES.parent / "README.md").read_text())
        self.assertLess(len(reader.splitlines()), 60)

    def test_numpy_reads_every_codec(self):
        random = np.random.default_rng(1)
        first = random.standard_normal((1100, 1000), dtype=np.float32)
        pruned = np.where(random.random(first.shape) < 0.1, first, 0).astype(np.float32)
        near = first + np.float32(1e-4) * random.standard_normal(first.shape, dtype=np.float32)
        flipped = (first.view(np.uint32) ^ random.integers(0, 2, first.shape, np.uint32)).view(np.float32)
        source = self.out / "in.safetensors"
        thin = np.where(random.random(first.shape) < 0.1, near, first)
        tensors = {"raw": random.integers(0, 256, 100, np.uint8), "experts.0": first, "experts.1": near}
        tensors |= {"pruned": pruned, "bits.0": first.view(np.int32) // 7, "bits.1": flipped.view(np.int32) // 7}
        tensors |= {"thin.0": first, "thin.1": thin}
        save_file(tensors, source)
        codecs = set()
        for lossy in [None, "int8", "int4", "sign1", "lowrank:3"]:
            bundle, back = self.out / "b.safetensors.zst", self.out / "back.safetensors"
            result = smelt("pack", source, bundle, *(["--lossy", lossy] if lossy else []))
            self.assertEqual(result.returncode, 0, result.stderr)
            smelt("unpack", bundle, "-o", back)
            self.assert_reads(bundle, back)
            codecs |= {t["codec"] for t in recipe(bundle)["models"][0]["tensors"]}
        self.assertEqual(codecs, {"raw", "planes", "ulp", "xor", "sparse", "sparseulp", "int8", "int4", "sign1", "lowrank"})

    def test_numpy_reads_every_type(self):
        random, header, data = np.random.default_rng(6), {}, b""
        bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
        for dtype in sorted(bundle_reader.TYPES):
            width = bits.get(dtype, 8 * np.dtype(bundle_reader.TYPES[dtype]).itemsize)
            first = random.integers(0, 2 if dtype == "BOOL" else 256, 6 * 700 * width // 8, np.uint8)
            near = first.copy()
            near[::997] ^= 1
            # As it is, a second one like it, no element at all and a scalar.
            for name, shape, tensor in [("experts.0", [6, 700], first), ("experts.1", [6, 700], near),
                                        ("empty", [0, 3], first[:0]), ("scalar", [], first[: width // 8])]:
                if width % 8 == 0 or shape:
                    header[f"{dtype}.{name}"] = {"dtype": dtype, "shape": shape,
                                                 "data_offsets": [len(data), len(data) + tensor.nbytes]}
                    data += tensor.tobytes()
        text = json.dumps(header).encode()
        source, bundle = self.out / "in.safetensors", self.out / "b.safetensors.zst"
        source.write_bytes(len(text).to_bytes(8, "little") + text + data)
        result = smelt("pack", source, bundle)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(len({t["dtype"] for t in header.values()}), 22)
        self.assert_reads(bundle, source)
        smelt("unpack", bundle, "-o", self.out / "out.safetensors")
        self.assertEqual((self.out / "out.safetensors").read_bytes(), source.read_bytes())

    def test_numpy_reads_rows_of_differences(self):
        random, models, weights = np.random.default_rng(7), {}, None
        for name, step in {"base": 1, "one": 0.1, "two": 1e-3, "three": 1e-5}.items():
            change = np.float32(step) * random.standard_normal((300, 300), dtype=np.float32)
            weights = change if weights is None else weights + change
            models[name] = self.out / f"{name}.safetensors"
            save_file({"w": weights}, models[name])
        bundle, named = self.out / "b.safetensors.zst", [f"{name}={models[name]}" for name in ["one", "two", "three"]]
        result = smelt("pack", "--base", models["base"], *named, bundle)
        self.assertEqual(result.returncode, 0, result.stderr)
        found = recipe(bundle)
        self.assertEqual([m["tensors"][0].get("reference") for m in found["models"]],
                         [None, "base/w", "one/w", "two/w"])
        self.assertEqual(found["version"], 2)
        with pyzstd.SeekableZstdFile(bundle) as file:
            read = bundle_reader.load(file)
        for name, path in models.items():
            self.assertEqual(read[f"{name}/w"].tobytes(), load_file(path)["w"].tobytes())

    def test_every_command_reads_a_bundle_of_differences_beside_its_base(self):
        base, tuned, other = (FIXTURES / f"digits/{name}.safetensors" for name in ["base", "upright", "inverted"])
        bundle, out = self.out / "b.safetensors.zst", self.out / "out.safetensors"
        smelt("pack", tuned, bundle, "--against", base)
        both = f"{bundle}@{base}"
        for command in [["verify", "--data", both], ["verify", tuned, "--against", both], ["diff", both, tuned],
                        ["inspect", both], ["convert", both, self.out / "out.h5"],
                        ["pack", both, self.out / "alone.safetensors.zst"],
                        ["upscale", "--base", base, "--expert", f"a={both}", "--expert", f"b={other}", "-o",
                         self.out / "moe.h5"]]:  # fmt: skip
            result = smelt(*command)
            self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(smelt("convert", both, out).returncode, 0)
        self.assertEqual(out.read_bytes(), tuned.read_bytes())
        recipe = self.out / "recipe.yml"
        recipe.write_text(f"models:\n- model: {both}\n- model: {tuned}\nmerge_method: linear\ndtype: float32\n"
                          "parameters: {weight: 0.5}\n")  # fmt: skip
        merged = self.out / "merged.safetensors"
        result = smelt("merge", recipe, merged)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(smelt("diff", merged, tuned).returncode, 0)
        # The output is not written over either of them.
        result = smelt("convert", both, bundle)
        self.assertEqual(result.returncode, 1)
        self.assertIn("is also an input", result.stderr)
        for path, words in [(bundle, "b.safetensors.zst@BASE"), (f"{bundle}@{other}", "was packed against")]:
            result = smelt("diff", path, tuned)
            self.assertEqual(result.returncode, 1)
            self.assertIn(words, result.stderr)

    def test_a_bundle_of_a_family_is_packed_as_one_again(self):
        base, one, two = (FIXTURES / f"digits/{name}.safetensors" for name in ["base", "upright", "inverted"])
        bundle, again = self.out / "b.safetensors.zst", self.out / "again.safetensors.zst"
        smelt("pack", "--base", base, f"one={one}", f"two={two}", bundle)
        for command in ["pack", "convert"]:
            result = smelt(command, bundle, again)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(again.read_bytes(), bundle.read_bytes())
            again.unlink()

    def test_numpy_reads_differences_from_a_base_outside(self):
        base, tuned = (FIXTURES / f"digits/{name}.safetensors" for name in ["base", "upright"])
        bundle = self.out / "b.safetensors.zst"
        smelt("pack", tuned, bundle, "--against", base)
        self.assertIn("base", {key for t in recipe(bundle)["models"][0]["tensors"] for key in t})
        self.assert_reads(bundle, tuned, load_file(base))

    def test_one_tensor_is_read_by_touching_only_its_frames(self):
        random = np.random.default_rng(2)
        tensors = {f"layers.{i}.w": random.standard_normal((700, 700), dtype=np.float32) for i in range(12)}
        source, bundle = self.out / "in.safetensors", self.out / "b.safetensors.zst"
        save_file(tensors, source)
        smelt("pack", source, bundle)
        size = bundle.stat().st_size
        # pyzstd: what it asks of the file is counted.
        with open(bundle, "rb", buffering=0) as raw:
            counter = Counter(raw)
            got = bundle_reader.load(pyzstd.SeekableZstdFile(counter), ["layers.7.w"])
        np.testing.assert_array_equal(got["layers.7.w"], tensors["layers.7.w"])
        self.assertLess(counter.count, size / 6)
        # zstandard, with the seek table read by hand.
        inner = InnerFile(bundle)
        got = bundle_reader.load(inner, ["layers.7.w"])
        np.testing.assert_array_equal(got["layers.7.w"], tensors["layers.7.w"])
        self.assertLess(inner.count, size / 8)
        # Smelt: what the kernel counts, of the output's check too.
        one, whole = (bytes_read("unpack", bundle, *options, "-o", self.out / "out.safetensors")
                      for options in [["--tensors", "layers.7.w"], []])
        self.assertLess(one, size / 4)
        self.assertGreater(whole, size)

    def test_memory_is_bounded(self):
        random = np.random.default_rng(3)
        first = random.standard_normal(24 << 20, dtype=np.float32)
        paths = [self.out / f"{name}.safetensors" for name in ["base", "one", "two"]]
        for path in paths:
            save_file({"w": first + np.float32(1e-3) * random.standard_normal(first.size, dtype=np.float32)}, path)
        bundle = self.out / "b.safetensors.zst"
        for budget in [1, 40, 150]:
            options = ["--memory", f"{budget}MiB", "--jobs", 6]
            peak = peak_memory("pack", "--base", paths[0], f"one={paths[1]}", f"two={paths[2]}", bundle, *options)
            self.assertLess(peak, max(budget, 32) + 48 << 20)
            peak = peak_memory("unpack", bundle, "--model", "two", "-o", self.out / "out.safetensors", *options)
            self.assertLess(peak, max(budget, 32) + 48 << 20)
        self.assertEqual((self.out / "out.safetensors").read_bytes(), paths[2].read_bytes())

    def test_a_wrong_base_is_refused_with_both_names_and_leaves_nothing(self):
        base, tuned, other = (FIXTURES / f"digits/{name}.safetensors" for name in ["base", "upright", "inverted"])
        bundle, out = self.out / "b.safetensors.zst", self.out / "out.safetensors"
        smelt("pack", tuned, bundle, "--against", base)
        for wrong in [["--against", other], []]:
            result = smelt("unpack", bundle, "-o", out, *wrong)
            self.assertEqual(result.returncode, 1)
            for name in [bundle, *wrong[1:]]:
                self.assertIn(str(name), result.stderr)
            self.assertEqual(list(self.out.iterdir()), [bundle])
        self.assertEqual(smelt("unpack", bundle, "-o", out, "--against", base).returncode, 0)
        self.assertEqual(out.read_bytes(), tuned.read_bytes())

    def test_small_checkpoints_hardly_grow(self):
        random = np.random.default_rng(4)
        shapes = {"gate.weight": (3, 16), "base_model.weight": (8, 8), "task_vectors.0.weight": (8, 8), "norm": (16,)}
        tensors = {
            f"layers.{i}.mlp.{name}": random.standard_normal(shape, dtype=np.float32)
            for i in range(4) for name, shape in shapes.items()
        }
        source, bundle = self.out / "in.safetensors", self.out / "b.safetensors.zst"
        save_file(tensors, source)
        smelt("pack", source, bundle)
        self.assertLess(bundle.stat().st_size, 1.02 * source.stat().st_size)

    def test_numpy_and_smelt_read_the_stored_bundles(self):
        codecs = set()
        for bundle in (FIXTURES / "bundle").glob("good*.zst"):
            unpacked, outside = bundle.with_suffix(""), FIXTURES / "bundle/good.safetensors"
            is_difference = bundle.name == "good-outside.safetensors.zst"
            self.assert_reads(bundle, unpacked, load_file(outside) if is_difference else {})
            smelt("unpack", f"{bundle}@{outside}" if is_difference else bundle, "-o", self.out / "out.safetensors")
            self.assertEqual((self.out / "out.safetensors").read_bytes(), unpacked.read_bytes(), bundle.name)
            codecs |= {t["codec"] for t in recipe(bundle)["models"][0]["tensors"]}
        self.assertEqual(codecs, {"raw", "planes", "ulp", "xor", "sparse", "sparseulp", "int8", "int4", "sign1", "lowrank"})

    def test_smelt_and_numpy_read_what_another_wrote_by_the_format(self):
        random, shape = np.random.default_rng(5), (3, 400_001)
        bits = lambda values: (values.view(np.uint32) >> 16).astype(np.uint16)
        first = random.standard_normal(shape, dtype=np.float32)
        base, tuned = bits(first), bits(first + np.float32(0.01) * random.standard_normal(shape, dtype=np.float32))
        pruned = np.where(random.random(shape) < 0.03, tuned, np.uint16(0))
        pruned[0, :600] = 0
        bundle = bundle_writer.Bundle(version=2)
        bundle.planes("base", "w", "BF16", base)
        bundle.raw("base", "count", "I64", np.arange(11))
        bundle.steps("one", "w", "BF16", tuned, base, "base/w")
        bundle.xor("one", "x", "BF16", tuned, base, "base/w")
        bundle.entry("one", "twin", "BF16", base, "planes", parts=["base/w"])
        bundle.sparse("one", "pruned", "BF16", pruned)
        nearly = np.where(random.random(shape) < 0.03, bits(first + np.float32(0.1)), tuned)
        bundle.sparse_steps("two", "w", "BF16", nearly, tuned, "one/w")
        kept = bundle.int8("one", "q", random.standard_normal((5, 300), dtype=np.float32), 64)
        path, out = self.out / "b.safetensors.zst", self.out / "out.npz"
        bundle.write(path)
        expected = {"base/w": base, "base/count": np.arange(11), "one/w": tuned, "one/x": tuned, "one/twin": base,
                    "one/pruned": pruned, "two/w": nearly, "one/q": kept}  # fmt: skip
        for command in [["verify", "--data", path], ["unpack", path, "-o", out]]:
            result = smelt(*command)
            self.assertEqual(result.returncode, 0, result.stderr)
        with np.load(out) as unpacked, pyzstd.SeekableZstdFile(path) as file:
            self.assertEqual(set(unpacked), set(expected))
            read = bundle_reader.load(file)
            for name, array in expected.items():
                self.assertEqual(unpacked[name].tobytes(), array.tobytes(), name)
                self.assertEqual(read[name].tobytes(), array.tobytes(), name)

    def test_every_frame_is_small_sized_and_checked(self):
        data = (FIXTURES / "bundle/good.safetensors.zst").read_bytes()
        *ordinary, (checksums, nothing) = frames(data)
        self.assertEqual((nothing, checksums[:4]), (0, b"\x5b\x2a\x4d\x18"))
        for frame, content in ordinary:
            parameters = zstandard.get_frame_parameters(frame)
            self.assertTrue(parameters.has_checksum)
            self.assertEqual(parameters.content_size, content)
            self.assertLessEqual(content, 1 << 20)

    def test_what_zstd_makes_of_it_is_a_safetensors_file(self):
        with open(FIXTURES / "bundle/good.safetensors.zst", "rb") as file:
            inner = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
        (self.out / "inner.safetensors").write_bytes(inner)
        with safe_open(self.out / "inner.safetensors", "np") as file:
            self.assertIn("bundle", file.metadata())
            self.assertIn("pruned#gaps", file.keys())

    def test_bad_bundles_are_refused_with_a_sentence(self):
        for bad in sorted((FIXTURES / "bundle").glob("bad-*")):
            result = smelt("unpack", bad, "-o", self.out / "out.safetensors")
            self.assertEqual(result.returncode, 1, bad.name)
            self.assertIn(str(bad), result.stderr)
            self.assertEqual(list(self.out.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
