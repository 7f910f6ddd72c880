"""The main job on the digits fixtures, its outputs read with h5py, safetensors and numpy."""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import load_file

SMELT = os.environ["SMELT"]
DIGITS = Path(__file__).parents[2] / "Fixtures" / "digits"
sys.path.insert(0, str(DIGITS))
import evaluate  # noqa: E402

MLP = "vision_model.encoder.layers.1.mlp"


def smelt(*arguments):
    subprocess.run([SMELT, *map(str, arguments)], check=True, capture_output=True)


class MainJob(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.out = Path(cls.folder.name)
        family = ["--base", DIGITS / "base.safetensors"]
        for task in evaluate.TASKS:
            family += ["--expert", f"{task}={DIGITS / task}.safetensors"]
        for ending in ("h5", "safetensors"):
            smelt("upscale", *family, "-o", cls.out / f"moe.{ending}", "--clean", "awd-row")
        smelt("upscale", *family, "-o", cls.out / "plain.h5")
        smelt(
            "calibrate", cls.out / "moe.h5", "--activations", DIGITS / "calibration.safetensors",
            "-o", cls.out / "calibrated.h5",
        )  # fmt: skip
        cls.base = load_file(DIGITS / "base.safetensors")
        cls.experts = [load_file(DIGITS / f"{task}.safetensors") for task in evaluate.TASKS]

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def test_hdf5_and_safetensors_hold_the_same_tensors(self):
        ours = load_file(self.out / "moe.safetensors")
        with h5py.File(self.out / "moe.h5") as file:
            names = {name for name in file if isinstance(file[name], h5py.Dataset)}
            self.assertEqual(names, set(ours))
            for name, array in ours.items():
                np.testing.assert_array_equal(file[name][...], array)

    def test_the_static_part_is_task_arithmetic(self):
        name = "vision_model.encoder.layers.0.self_attn.q_proj.bias"
        total = sum(expert[name] - self.base[name] for expert in self.experts)
        with h5py.File(self.out / "plain.h5") as file:
            np.testing.assert_array_equal(
                file[name][...], self.base[name] + np.float32(0.3) * total
            )

    def test_one_hot_routing_gives_the_experts_back(self):
        mixture = load_file(self.out / "moe.safetensors")
        for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            for number, expert in enumerate(self.experts):
                restored = (
                    mixture[f"{MLP}.base_model.{key}"] + mixture[f"{MLP}.task_vectors.{number}.{key}"]
                )
                np.testing.assert_allclose(restored, expert[f"{MLP}.{key}"], rtol=0, atol=1e-7)

    def test_the_way_through_hdf5_and_back_is_byte_identical(self):
        smelt("convert", DIGITS / "base.safetensors", self.out / "base.h5")
        smelt("convert", self.out / "base.h5", self.out / "base.safetensors")
        self.assertEqual(
            (self.out / "base.safetensors").read_bytes(),
            (DIGITS / "base.safetensors").read_bytes(),
        )

    def test_calibration_lifts_accuracy_close_to_the_experts(self):
        def mean(path):
            return np.mean(list(evaluate.accuracies(evaluate.read_checkpoint(path)).values()))

        before, after = mean(self.out / "moe.h5"), mean(self.out / "calibrated.h5")
        own = [
            evaluate.accuracies(expert)[task]
            for task, expert in zip(evaluate.TASKS, self.experts)
        ]
        self.assertGreater(after, before + 20)
        self.assertGreater(after, 0.93 * np.mean(own))


if __name__ == "__main__":
    unittest.main()
