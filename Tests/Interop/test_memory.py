"""The memory that a merge takes: the budget and 48 MiB, whatever the size of the model, and what it
leaves of its inputs in the page cache."""

import ctypes
import json
import math
import mmap
import os
import random
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

SMELT = os.environ["SMELT"]
BUDGET = 32 << 20
MODELS = 4
# One tensor is larger than the budget, the next larger than a worker's share, the third not.
SHAPES = {"lm_head.weight": (2048, 10_000), "model.layers.0.up_proj.weight": (2048, 1200),
          "model.layers.0.q_proj.weight": (512, 512)}  # fmt: skip
# Many more, each of which must cost nothing before its turn comes.
SHAPES |= {f"model.layers.{layer}.norm.weight": (64,) for layer in range(120)}
# Every method: the parameters of its models, or of the recipe for those named in PAIRS.
SPARSE = "weight: 0.3, density: 0.4"
RECIPES = {
    "arcee_fusion": None,
    "breadcrumbs": SPARSE,
    "breadcrumbs_ties": SPARSE,
    "dare_linear": SPARSE,
    "dare_ties": SPARSE,
    "della": SPARSE,
    "della_linear": SPARSE,
    "karcher": None,
    "linear": "weight: 0.3",
    "model_stock": None,
    "multislerp": "weight: 0.3",
    "nearswap": "t: 0.01",
    "nuslerp": "weight: 0.3",
    "passthrough": "scale: 0.5",
    "ram": None,
    "ramplus_tl": None,
    "sce": "select_topk: 0.4",
    "slerp": "t: 0.4",
    "task_arithmetic": "weight: 0.3",
    "ties": SPARSE,
}
# How many models beside the base, where not three.
OTHERS = {"arcee_fusion": 1, "nearswap": 1, "slerp": 1, "nuslerp": 2, "passthrough": 1}
WITHOUT_BASE = ("linear", "karcher", "passthrough")

# A process of its own: what wait4 says of a child begins with the memory of who started it.
MEASURE = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_model(path, seed, shapes=SHAPES):
    """A BF16 model whose numbers are of magnitudes from 2^-7 to 2."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    high = bytes((byte & 0x80) | (0x3C + byte % 4) for byte in range(256))
    source = random.Random(seed)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset > 0:
            part = bytearray(source.randbytes(min(offset, 1 << 20)))
            part[1::2] = part[1::2].translate(high)
            file.write(part)
            offset -= len(part)


class Memory(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.out = Path(cls.folder.name)
        for model in range(MODELS):
            write_model(cls.out / f"m{model}.safetensors", model)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def recipe(self, method):
        lines = [f"merge_method: {method}"]
        if method not in WITHOUT_BASE:
            lines.append(f"base_model: {self.out}/m0.safetensors")
        models = [
            f"{{model: {self.out}/m{model}.safetensors}}"
            for model in range(1, 1 + OTHERS.get(method, MODELS - 1))
        ]
        lines.append(f"models: [{', '.join(models)}]")
        lines.append(f"parameters: {{{RECIPES[method] or ''}}}")
        path = self.out / f"{method}.yml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def peak(self, method, jobs, budget=BUDGET):
        output = self.out / "out.safetensors"
        result = subprocess.run(
            [sys.executable, "-S", "-c", MEASURE, SMELT, "merge", "--quiet", "--memory",
             str(budget), "--jobs", str(jobs), str(self.recipe(method)), str(output)],
            capture_output=True, text=True,
        )  # fmt: skip
        self.assertEqual(result.returncode, 0, result.stderr)
        return int(result.stdout) * 1024

    def test_a_merge_stays_within_the_budget_and_48_MiB(self):
        self.assertGreater(2 * 2048 * 10_000, BUDGET)
        for number, method in enumerate(RECIPES):
            # One worker for every other method: each has a larger share of the budget then.
            jobs = 1 + 2 * (number % 2)
            with self.subTest(method=method, jobs=jobs):
                self.assertLessEqual(self.peak(method, jobs), BUDGET + (48 << 20))

    def test_inputs_that_just_fit_the_budget_leave_room_for_what_is_counted(self):
        budget = 160 << 20
        inputs = MODELS * 2 * 2048 * 10_000
        self.assertTrue(budget - (8 << 20) < inputs <= budget)
        for method in ("ties", "sce"):
            with self.subTest(method=method):
                self.assertLessEqual(self.peak(method, 1, budget), budget + (48 << 20))


class PageCache(unittest.TestCase):
    """What is read once is dropped behind, unless it was cached before or shall be kept."""

    def setUp(self):
        # Not in a folder that may be memory itself.
        self.folder = tempfile.TemporaryDirectory(dir="/var/tmp")
        self.addCleanup(self.folder.cleanup)
        self.out = Path(self.folder.name)
        self.models = [self.out / f"m{model}.safetensors" for model in range(2)]
        for seed, path in enumerate(self.models):
            write_model(path, seed, {f"layers.{layer}.weight": (1024, 4096) for layer in range(10)})
        (self.out / "linear.yml").write_text(
            "merge_method: linear\nparameters: {weight: 0.5}\nmodels:\n"
            + "".join(f"  - model: {path}\n" for path in self.models)
        )

    def drop(self):
        for path in self.models:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if self.cached() > 0.1:
            self.skipTest("this file system keeps its files in memory")

    def cached(self):
        """The share of the inputs' pages that are in memory."""
        libc = ctypes.CDLL(None, use_errno=True)
        resident = total = 0
        for path in self.models:
            with open(path, "rb") as file:
                # Private, so that ctypes may have its address.
                mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
            pages = -(-len(mapped) // mmap.PAGESIZE)
            states = (ctypes.c_ubyte * pages)()
            first = ctypes.c_char.from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(first))
            self.assertEqual(libc.mincore(address, ctypes.c_size_t(len(mapped)), states), 0)
            del first
            mapped.close()
            resident += sum(state & 1 for state in states)
            total += pages
        return resident / total

    def merge(self, *options):
        output = self.out / "out.safetensors"
        output.unlink(missing_ok=True)
        subprocess.run(
            [SMELT, "merge", "--quiet", *options, self.out / "linear.yml", output], check=True
        )
        return output.read_bytes()

    def test_the_cache_is_dropped_behind_or_kept_and_the_result_is_the_same(self):
        self.drop()
        dropped = self.merge()
        self.assertLess(self.cached(), 0.5)
        self.drop()
        kept = self.merge("--keep-cache")
        self.assertGreater(self.cached(), 0.9)
        self.assertEqual(dropped, kept)
        # They are cached now, by somebody, and stay so.
        self.assertEqual(self.merge(), kept)
        self.assertGreater(self.cached(), 0.9)


if __name__ == "__main__":
    unittest.main()
