"""A mixture's modules have the keys and shapes of FusionBench's WeightEnsemblingMoE."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from safetensors.numpy import load_file

SMELT = os.environ["SMELT"]
FIXTURES = Path(__file__).parents[2] / "Fixtures"
DIGITS = FIXTURES / "digits"
sys.path.insert(0, str(FIXTURES.parent / "Scripts"))
TASKS = ("upright", "rotated", "inverted", "shuffled")


class FusionBenchLayout(unittest.TestCase):
    def check(self, *options):
        keys = json.loads((FIXTURES / "fusionbench" / "module-keys.json").read_text())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "moe.safetensors"
            experts = [f"--expert={task}={DIGITS / task}.safetensors" for task in TASKS]
            subprocess.run(
                [SMELT, "upscale", "--base", DIGITS / "base.safetensors", *experts, "-o", path, "--format", "fusionbench", *options],
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
        self.check("--shared-gate")


try:
    import torch
    import transformers
    import wemoe
    from fusion_bench.models.sparse_we_moe import SparseWeightEnsemblingMoE
    from fusion_bench.models.we_moe import WeightEnsemblingMoE
    from test_wemoe import digits_config, make_mixture
    from transformers.models.clip.modeling_clip import CLIPMLP
except (ImportError, unittest.SkipTest) as error:
    WHY_NOT = f"needs torch, transformers and fusion_bench: {error}"
else:
    WHY_NOT = None


@unittest.skipIf(WHY_NOT, WHY_NOT or "")
class FusionBenchLoads(unittest.TestCase):
    """FusionBench's own classes load the modules strictly and compute what Scripts/wemoe.py does."""

    def check(self, module_class, depth, *options):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = make_mixture(Path(folder), DIGITS / "base.safetensors", "--router-depth", depth, *options, "--format", "fusionbench")
            model = wemoe.load(path, digits_config(), transformers.CLIPVisionModel)
            seen, made = {}, {}
            layers = [m for m in model.modules() if isinstance(m, CLIPMLP)]
            for number, layer in enumerate(layers):

                def keep(_, arguments, output, number=number):
                    seen[number], made[number] = arguments[0], output

                layer.register_forward_hook(keep)
            model(pixel_values=torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
            tensors, config = wemoe.read_safetensors(path)[0], digits_config()
            for number in range(4):
                prefix = f"vision_model.encoder.layers.{number}.mlp."
                module = module_class(
                    hidden_size=64, base_model=CLIPMLP(config), expert_models=[CLIPMLP(config) for _ in range(2)],
                    batch_first=True, router_hidden_layers=depth,
                )  # fmt: skip
                own = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
                module.load_state_dict(own, strict=True)
                torch.testing.assert_close(module(seen[number]), made[number])

    def test_plain(self):
        for depth in (0, 1, 2):
            with self.subTest(depth=depth):
                self.check(WeightEnsemblingMoE, depth)

    def test_pruned_with_a_shared_gate(self):
        self.check(SparseWeightEnsemblingMoE, 2, "--prune", "0.9", "--shared-gate")


if __name__ == "__main__":
    unittest.main()
