"""A mixture's modules have the keys and shapes of FusionBench's WeightEnsemblingMoE."""

import json
import os
import subprocess
import tempfile
import unittest
from pathlib import Path

from safetensors.numpy import load_file

SMELT = os.environ["SMELT"]
FIXTURES = Path(__file__).parents[2] / "Fixtures"
DIGITS = FIXTURES / "digits"
TASKS = ("upright", "rotated", "inverted", "shuffled")


class FusionBenchLayout(unittest.TestCase):
    def check(self, *options):
        keys = json.loads((FIXTURES / "fusionbench" / "module-keys.json").read_text())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "moe.safetensors"
            experts = [f"--expert={task}={DIGITS / task}.safetensors" for task in TASKS]
            subprocess.run(
                [SMELT, "upscale", "--base", DIGITS / "base.safetensors", *experts, "-o", path, *options],
                check=True, capture_output=True,
            )  # fmt: skip
            tensors = load_file(path)
        for layer in range(4):
            prefix = f"vision_model.encoder.layers.{layer}.mlp."
            own = {n[len(prefix) :]: list(t.shape) for n, t in tensors.items() if n.startswith(prefix)}
            self.assertEqual(own, keys)

    def test_plain(self):
        self.check()

    def test_pruned(self):
        self.check("--prune", "0.9")

    def test_shared_gate_in_every_layer(self):
        self.check("--shared-gate", "--duplicate-gate")


if __name__ == "__main__":
    unittest.main()
