"""Scripts/wemoe.py against numpy, against `smelt activations`, and against itself.

Needs torch and transformers beside what the other interop tests need; skipped without them.
"""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DIGITS, FORWARD = ROOT / "Fixtures" / "digits", ROOT / "Fixtures" / "forward"
sys.path[:0] = [str(ROOT / "Scripts"), str(DIGITS)]

try:
    import torch
    import transformers
    import wemoe
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise unittest.SkipTest(f"needs torch and transformers: {error}") from error

import evaluate  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES = {
    "clip": transformers.CLIPVisionModel,
    "vit": transformers.ViTModel,
    "bert": transformers.BertModel,
    "roberta": transformers.RobertaModel,
    "llama": transformers.LlamaModel,
    "mistral": transformers.MistralModel,
    "qwen2": transformers.Qwen2Model,
    "qwen3": transformers.Qwen3Model,
    "gemma": transformers.GemmaModel,
}


def smelt(*arguments):
    """Run the built command."""
    subprocess.run([os.environ["SMELT"], *map(str, arguments)], check=True, capture_output=True)


def make_mixture(folder, base, depth=2):
    """Upscale a model and two copies with noise, and give the routers weights that differ by sample."""
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(base)
    experts = []
    for name in ("one", "two"):
        noisy = {k: t + 0.3 * t.std().nan_to_num() * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
        save_file(noisy, folder / f"{name}.safetensors", {"format": "pt"})
        experts += ["--expert", f"{name}={folder / name}.safetensors"]
    mixture = folder / "mixture.safetensors"
    smelt("upscale", "--base", base, *experts, "--router-depth", depth, "-o", mixture)
    tensors, metadata = wemoe.read_safetensors(mixture)
    for name, tensor in tensors.items():
        if ".gate." in name:
            tensors[name] = 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, mixture, metadata)
    return mixture


def digits_config():
    """Return the configuration of the digits' encoder."""
    return transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=evaluate.HEADS,
        num_channels=1,
        image_size=8,
        patch_size=2,
        layer_norm_eps=evaluate.EPSILON,
        hidden_act="quick_gelu",
    )


class WemoeTests(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def assert_close(self, one, other, tolerance=1e-4):
        one, other = np.asarray(one), np.asarray(other)
        self.assertEqual(one.shape, other.shape)
        self.assertLess(np.abs(one - other).max() / np.abs(other).max(), tolerance)

    @torch.no_grad()
    def test_digits_agree_with_numpy_in_every_format(self):
        """A calibrated mixture gives numpy's features and accuracies."""
        experts = [word for task in evaluate.TASKS for word in ("--expert", f"{task}={DIGITS / task}.safetensors")]
        smelt("upscale", "--base", DIGITS / "base.safetensors", *experts, "-o", self.folder / "moe.h5")
        calibrated = self.folder / "calibrated.safetensors"
        smelt("calibrate", self.folder / "moe.h5", "--activations", DIGITS / "calibration.safetensors", "-o", calibrated)
        smelt("convert", calibrated, self.folder / "calibrated.h5")
        smelt("pack", calibrated, self.folder / "calibrated.safetensors.zst")
        test = evaluate.read_safetensors(DIGITS / "test.safetensors")
        images = test["rotated.images"][:50].astype(np.float32) / evaluate.WHITE
        expected = evaluate.Model(evaluate.read_checkpoint(calibrated)).features(images)
        pixels = torch.from_numpy(images)[:, None]
        for name in ("calibrated.safetensors", "calibrated.h5", "calibrated.safetensors.zst"):
            with self.subTest(name):
                model = wemoe.load(self.folder / name, digits_config(), transformers.CLIPVisionModel)
                self.assert_close(model(pixel_values=pixels).pooler_output, expected)

    @torch.no_grad()
    def test_every_family_agrees_with_smelt(self):
        """Two implementations of the mixture's forward pass, PyTorch's and Smelt's, agree."""
        for family, model_class in FAMILIES.items():
            for depth in (0, 1, 2):
                with self.subTest(family=family, depth=depth):
                    mixture = make_mixture(self.folder, FORWARD / family / "model.safetensors", depth)
                    given, recorded = FORWARD / family / "inputs.safetensors", self.folder / "recorded.safetensors"
                    config = FORWARD / family / "config.json"
                    smelt("activations", mixture, given, "--config", config, "--tokens", "--final", "-o", recorded)
                    configuration = transformers.AutoConfig.from_pretrained(FORWARD / family)
                    configuration = configuration.vision_config if family == "clip" else configuration
                    model = wemoe.load(mixture, configuration, model_class)
                    inputs = load_file(given)
                    del inputs["task"]
                    states = model(**inputs).last_hidden_state
                    if "attention_mask" in inputs:
                        states = states * inputs["attention_mask"][..., None]
                    self.assert_close(states, load_file(recorded)["last_hidden_state"])

    @torch.no_grad()
    def test_samples_do_not_see_each_other(self):
        """A sample has the same result alone, in a batch, and with padding."""
        mixture = make_mixture(self.folder, FORWARD / "bert" / "model.safetensors")
        model = wemoe.load(mixture, FORWARD / "bert")
        inputs = load_file(FORWARD / "bert" / "inputs.safetensors")
        del inputs["task"]
        together = model(**inputs).last_hidden_state
        length = int(inputs["attention_mask"][1].sum())
        alone = model(**{name: tensor[1:2, :length] for name, tensor in inputs.items()}).last_hidden_state
        self.assert_close(alone[0], together[1, :length])
        self.assertGreater((model.encoder.layer[1].intermediate.dense.router.weights.std()).item(), 1e-3)

    @torch.no_grad()
    def test_generation_keeps_the_weights_of_the_prompt(self):
        """With a cache, and without one but with the prompt's length known, scores are the same."""
        mixture = make_mixture(self.folder, FORWARD / "llama" / "model.safetensors")
        model = wemoe.load(mixture, FORWARD / "llama", transformers.LlamaForCausalLM)
        prompts = load_file(FORWARD / "llama" / "inputs.safetensors")["input_ids"][:, :5]
        generated = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            pad_token_id=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        model.mixture.prompt_lengths = [5] * len(prompts)
        whole = model(generated.sequences, use_cache=False).logits
        self.assert_close(torch.stack(generated.logits, dim=1), whole[:, 4:8])
        model.mixture.prompt_lengths = None
        other = model(generated.sequences, use_cache=False).logits
        self.assertGreater((other - whole).abs().max().item(), 1e-3)

    def test_coded_task_vectors(self):
        """Every storage of task vectors gives back what was stored."""
        shape = torch.Size([3, 130])
        dense = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        mask = dense.abs() > 1
        bits = np.packbits(mask.numpy().ravel(), bitorder="little")
        sparse = {"t#bitmap": torch.from_numpy(bits), "t#values": dense[mask]}
        self.assert_close(wemoe.task_vector(sparse, "t", shape), dense * mask)
        codes = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(4))
        nibbles = (codes & 15).to(torch.uint8)
        scale = torch.tensor([[0.5, 2.0]] * 3)
        int4 = {"t#values": nibbles[:, ::2] | nibbles[:, 1::2] << 4, "t#scale": scale}
        wanted = codes * torch.cat([scale[:, :1].expand(3, 128), scale[:, 1:].expand(3, 2)], dim=1)
        self.assert_close(wemoe.task_vector(int4, "t", shape), wanted)
        int8 = {"t#values": codes.to(torch.int8), "t#scale": torch.tensor([1.0, 2.0, 3.0])}
        self.assert_close(wemoe.task_vector(int8, "t", shape), codes * torch.tensor([[1.0], [2.0], [3.0]]))
        left, right = dense[:, :2], dense[:2]
        self.assert_close(wemoe.task_vector({"t#left": left, "t#right": right}, "t", shape), left @ right)


if __name__ == "__main__":
    unittest.main()
