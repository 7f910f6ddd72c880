"""The memory that a merge takes: the budget and 48 MiB, whatever the size of the model."""

import json
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
RECIPES = {
    "linear": "weight: 0.3",
    "task_arithmetic": "weight: 0.3",
    "slerp": None,
    "ties": "weight: 0.3, density: 0.4",
    "dare_ties": "weight: 0.3, density: 0.4",
    "della": "weight: 0.3, density: 0.4",
    "breadcrumbs": "weight: 0.3, density: 0.4",
    "sce": None,
}

# A process of its own: what wait4 says of a child begins with the memory of who started it.
MEASURE = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_model(path, seed):
    """A BF16 model whose numbers are of magnitudes from 2^-7 to 2."""
    header, offset = {}, 0
    for name, (rows, columns) in SHAPES.items():
        end = offset + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [offset, end]}
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
        parameters = RECIPES[method]
        models = range(2) if method == "slerp" else range(1, MODELS)
        lines = [f"merge_method: {method}"]
        if method != "linear":
            lines.append(f"base_model: {self.out}/m0.safetensors")
        lines.append("models:")
        for model in models:
            lines.append(f"  - model: {self.out}/m{model}.safetensors")
            if parameters:
                lines.append(f"    parameters: {{{parameters}}}")
        if method == "slerp":
            lines.append("parameters: {t: 0.4}")
        path = self.out / f"{method}.yml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def peak(self, method, jobs):
        output = self.out / "out.safetensors"
        result = subprocess.run(
            [sys.executable, "-S", "-c", MEASURE, SMELT, "merge", "--quiet", "--memory",
             str(BUDGET), "--jobs", str(jobs), str(self.recipe(method)), str(output)],
            capture_output=True, text=True,
        )  # fmt: skip
        self.assertEqual(result.returncode, 0, result.stderr)
        return int(result.stdout) * 1024

    def test_a_merge_stays_within_the_budget_and_48_MiB(self):
        self.assertGreater(2 * 2048 * 10_000, BUDGET)
        for method in RECIPES:
            for jobs in (1, 3):
                with self.subTest(method=method, jobs=jobs):
                    self.assertLessEqual(self.peak(method, jobs), BUDGET + (48 << 20))


if __name__ == "__main__":
    unittest.main()
