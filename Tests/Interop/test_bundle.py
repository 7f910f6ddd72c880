"""Bundles read by zstandard, safetensors and forty lines of numpy."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import zstandard
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
import bundle_reader  # noqa: E402

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
        ).reshape(t["shape"])
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


class Bundles(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = Path(folder.name)

    def assert_reads(self, bundle, source):
        read, expected = bundle_reader.load(bundle), load_file(source)
        self.assertEqual(read.keys(), expected.keys())
        for name, tensor in expected.items():
            self.assertEqual(read[name].tobytes(), tensor.tobytes(), name)
            self.assertEqual((read[name].dtype, read[name].shape), (tensor.dtype, tensor.shape))

    def test_numpy_reads_what_smelt_packed(self):
        for source in [FIXTURES / "bundle/good.safetensors", FIXTURES / "digits/upright.safetensors"]:
            bundle = self.out / "b.safetensors.zst"
            self.assertEqual(smelt("pack", source, bundle).returncode, 0)
            self.assert_reads(bundle, source)

    def test_numpy_and_smelt_read_the_stored_bundle(self):
        good = FIXTURES / "bundle/good.safetensors"
        self.assert_reads(f"{good}.zst", good)
        smelt("unpack", f"{good}.zst", "-o", self.out / "out.safetensors")
        self.assertEqual((self.out / "out.safetensors").read_bytes(), good.read_bytes())

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
