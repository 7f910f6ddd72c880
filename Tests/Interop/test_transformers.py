"""What Smelt and Scripts/capture-activations make for, and of, models of transformers.

Needs torch and transformers beside what the other interop tests need; skipped without them.
Tests/Interop/README.md tells how to run it with them.
"""

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
from test_wemoe import FAMILIES, FORWARD, ROOT, make_experts, make_mixture, smelt, tiny_model

# Where torch or transformers is missing, test_wemoe has said so.
import torch
import transformers
import wemoe
from safetensors.torch import load_file, save_file

CAPTURE = ROOT / "Scripts" / "capture-activations"


def assert_close(test, one, other, tolerance=1e-4):
    """Check that two arrays differ by little beside the largest element."""
    one, other = np.asarray(one), np.asarray(other)
    test.assertEqual(one.shape, other.shape)
    test.assertLess(np.abs(one - other).max() / np.abs(other).max(), tolerance)


class CaptureTests(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def capture(self, *arguments):
        subprocess.run([sys.executable, CAPTURE, *map(str, arguments)], check=True, capture_output=True)

    def test_smelt_records_the_same(self):
        """Of every architecture that Smelt runs: the same tensors, names and types, means and tokens."""
        theirs, ours = self.folder / "theirs.safetensors", self.folder / "ours.safetensors"
        for family in FAMILIES:
            for inputs in sorted((FORWARD / family).glob("inputs*.safetensors")):
                for options in ([], ["--tokens", "--final", "--attention"]):
                    with self.subTest(family=family, inputs=inputs.name, options=options):
                        self.capture(FORWARD / family, inputs, "-o", theirs, *options)
                        smelt("activations", FORWARD / family, inputs, "-o", ours, *options)
                        one, other = load_file(theirs), load_file(ours)
                        self.assertEqual(
                            {name: (t.dtype, t.shape) for name, t in one.items()},
                            {name: (t.dtype, t.shape) for name, t in other.items()},
                        )
                        for name, tensor in one.items():
                            assert_close(self, tensor, other[name])

    def test_sliding_windows_behind_the_first_layers(self):
        """Qwen2's configurations from before layer types say in two numbers which layers have windows."""
        folder = self.folder / "qwen2"
        shutil.copytree(FORWARD / "qwen2", folder)
        config = json.loads((folder / "config.json").read_text())
        del config["layer_types"]
        config |= {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
        (folder / "config.json").write_text(json.dumps(config))
        theirs, ours = self.folder / "theirs.safetensors", self.folder / "ours.safetensors"
        self.capture(folder, folder / "inputs.safetensors", "-o", theirs, "--tokens", "--final")
        smelt("activations", folder, folder / "inputs.safetensors", "-o", ours, "--tokens", "--final")
        for name, tensor in load_file(theirs).items():
            assert_close(self, tensor, load_file(ours)[name])
        full = load_file(FORWARD / "qwen2" / "expected.safetensors")["last_hidden_state"]
        self.assertGreater((full - load_file(ours)["last_hidden_state"]).abs().max().item(), 1e-3)

    def test_routers_of_other_architectures_are_fitted(self):
        """GPT-2's, T5's and Phi-3's recordings have the modules that their mixtures have."""
        kinds = ("gpt2", "t5", "t5 1.1", "phi3")
        for kind, options in itertools.product(kinds, ([], ["--attention"])):
            with self.subTest(kind=kind, options=options):
                folder = self.folder / kind
                base, _ = tiny_model(folder, kind)
                inputs, recorded = self.folder / "inputs.npz", self.folder / "recorded.safetensors"
                ids, task = np.random.default_rng(2).integers(3, 40, (16, 6)), np.arange(16) % 2
                np.savez(inputs, input_ids=ids, attention_mask=np.ones_like(ids), task=task)
                self.capture(folder, inputs, "-o", recorded, *options)
                mixture = make_mixture(self.folder, base, *options)
                modules = json.loads(smelt("inspect", mixture, "--json"))["metadata"]["wemoe"]
                modules = {module["prefix"] for module in json.loads(modules)["modules"]}
                self.assertEqual(set(load_file(recorded)) - {"task"}, modules)
                smelt("calibrate", mixture, "--activations", recorded, "-o", self.folder / "fitted.h5")


class FamilyTests(unittest.TestCase):
    """Every family from fine-tuned models to a calibrated mixture and back, by the command alone."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def families(self):
        """Yield (name, the base's file, the folder of its configuration, its class, options of upscale)."""
        for family, model_class in FAMILIES.items():
            options = ["--mlp", "vision_model.encoder.layers.{i}.mlp:fc1,fc2"] if family == "clip" else []
            yield family, FORWARD / family / "model.safetensors", FORWARD / family, model_class, options
        for kind in ("gpt2", "t5", "t5 1.1", "phi3"):
            base, model_class = tiny_model(self.folder / kind, kind)
            yield kind, base, self.folder / kind, model_class, []

    def inputs(self, config):
        """Return inputs of two tasks, as smelt and as PyTorch want them."""
        inputs = {"input_ids": torch.randint(3, 40, (16, 6), generator=torch.Generator().manual_seed(9))}
        given = config / "inputs.safetensors"
        if given.exists() and "pixel_values" in (stored := load_file(given)):
            shape = stored["pixel_values"].shape[1:]
            inputs = {"pixel_values": torch.rand(16, *shape, generator=torch.Generator().manual_seed(9))}
        save_file({**inputs, "task": torch.arange(16) % 2}, self.folder / "inputs.safetensors")
        return inputs

    @torch.no_grad()
    def test_there_and_back(self):
        """Calibrates; gives experts back bit for bit; routes one-hot as the plain model computes."""
        for family, base, config, model_class, options in self.families():
            with self.subTest(family):
                inputs = self.inputs(config)
                experts = make_experts(self.folder, base)
                # One expert is of another type than the base.
                other = {name: tensor.bfloat16() for name, tensor in load_file(self.folder / "two.safetensors").items()}
                save_file(other, self.folder / "two.safetensors", {"format": "pt"})
                mixture, plain = self.folder / "moe.safetensors", self.folder / "plain.safetensors"
                mixture.unlink(missing_ok=True)
                smelt("upscale", *experts, *options, "-o", mixture, "--dry-run")
                self.assertFalse(mixture.exists())
                smelt("upscale", *experts, *options, "-o", mixture)
                modules = json.loads(json.loads(smelt("inspect", mixture, "--json"))["metadata"]["wemoe"])["modules"]
                self.assertEqual(len(modules), 4 if family.startswith("t5") else 2)

                recorded = self.folder / "recorded.safetensors"
                capture = [sys.executable, CAPTURE, config, self.folder / "inputs.safetensors", "-o", recorded]
                subprocess.run(list(map(str, capture)), check=True, capture_output=True)
                smelt("calibrate", mixture, "--activations", recorded, "-o", self.folder / "fitted.safetensors")

                for name in ("one", "two"):
                    smelt("collapse", self.folder / "fitted.safetensors", "--expert", name, "-o", plain)
                    found, own = load_file(plain), load_file(self.folder / f"{name}.safetensors")
                    self.assertEqual(set(found), set(load_file(base)))
                    stored = load_file(mixture)
                    count = 0
                    for module in modules:
                        prefix = f"{module['prefix']}.base_model."
                        for key in (key for key in stored if key.startswith(prefix)):
                            tensor = f"{module['original']}.{key[len(prefix):]}"
                            count += 1
                            self.assertTrue(torch.equal(found[tensor], own[tensor].to(found[tensor].dtype)), tensor)
                    self.assertGreaterEqual(count, 2 * len(modules))

                routed = make_mixture(self.folder, base, *options, weights=[1.0, 0.0])
                smelt("collapse", routed, "--expert", "one", "-o", plain)
                configuration = transformers.AutoConfig.from_pretrained(config)
                configuration = configuration.vision_config if family == "clip" else configuration
                dense = model_class.from_pretrained(None, config=configuration, state_dict=load_file(plain))
                if family.startswith("t5"):
                    inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
                assert_close(
                    self, wemoe.load(routed, configuration, model_class)(**inputs)[0], dense.eval()(**inputs)[0]
                )


class MixtralTests(unittest.TestCase):
    @torch.no_grad()
    def test_transformers_loads_it(self):
        """All weights find their places, and whatever expert a gate picks computes as it did alone."""
        for family, model_class, auto in (
            ("llama", transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM),
            ("mistral", transformers.MistralModel, transformers.AutoModel),
        ):
            for own in (0, 1):
                with self.subTest(family=family, expert=own), tempfile.TemporaryDirectory() as folder:
                    folder = Path(folder)
                    experts = make_experts(folder, FORWARD / family / "model.safetensors")
                    inputs = folder / "inputs.npz"
                    ids = np.random.default_rng(4).integers(3, 40, (16, 6))
                    np.savez(inputs, input_ids=ids, task=np.arange(16) % 2)
                    recorded = folder / "recorded.safetensors"
                    smelt("activations", FORWARD / family, inputs, "--tokens", "-o", recorded)
                    smelt(
                        "upscale", *experts, "--format", "mixtral", "--activations", recorded,
                        "--experts-per-token", 1, "-o", folder / "mixtral",
                    )  # fmt: skip
                    smelt("upscale", *experts, "-o", folder / "moe.h5")
                    name = ("one", "two")[own]
                    smelt("collapse", folder / "moe.h5", "--expert", name, "-o", folder / "plain.safetensors")
                    # Gates have no bias with which to always pick the same expert: the others become it.
                    tensors = load_file(folder / "mixtral" / "model.safetensors")
                    for key in [key for key in tensors if f".experts.{1 - own}." in key]:
                        tensors[key] = tensors[key.replace(f".experts.{1 - own}.", f".experts.{own}.")].clone()
                    save_file(tensors, folder / "mixtral" / "model.safetensors", {"format": "pt"})
                    mixtral, report = auto.from_pretrained(folder / "mixtral", output_loading_info=True)
                    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                        self.assertFalse(report[problem])
                    plain = model_class.from_pretrained(
                        None, config=transformers.AutoConfig.from_pretrained(FORWARD / family),
                        state_dict=load_file(folder / "plain.safetensors"),
                    )  # fmt: skip
                    tokens = torch.from_numpy(ids[:3])
                    assert_close(self, mixtral.eval()(tokens)[0], plain.eval()(tokens)[0])


if __name__ == "__main__":
    unittest.main()
