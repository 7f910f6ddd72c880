"""Scripts/wemoe.py against numpy, `smelt activations`, `smelt collapse`, and itself.

Needs torch and transformers beside what the other interop tests need; skipped without them.
Tests/Interop/README.md tells how to run it with them.
"""

import itertools
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
    from torch.nn.attention.flex_attention import create_block_mask
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
    """Run the built command and return what it printed."""
    command = [os.environ["SMELT"], *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_experts(folder, base):
    """Return the arguments for a model and two copies of it with noise."""
    generator = torch.Generator().manual_seed(7)
    arguments = ["--base", base]
    for name in ("one", "two"):
        noisy = {}
        for key, tensor in load_file(base).items():
            noise = torch.randn(tensor.shape, generator=generator)
            noisy[key] = tensor + 0.3 * tensor.std(correction=0) * noise
        save_file(noisy, folder / f"{name}.safetensors", {"format": "pt"})
        arguments += ["--expert", f"{name}={folder / name}.safetensors"]
    return arguments


def make_mixture(folder, base, *options, weights=None):
    """Upscale a model and two noisy copies, with constant routers or such as tell samples apart."""
    generator = torch.Generator().manual_seed(8)
    mixture = folder / "mixture.safetensors"
    if weights is not None:
        options = ("--router-depth", 0, *options)
    smelt("upscale", *make_experts(folder, base), *options, "-o", mixture)
    tensors, metadata = wemoe.read_safetensors(mixture)
    for name, tensor in tensors.items():
        if "gate." in name and "gate_proj" not in name:
            tensors[name] = 0.3 * torch.randn(tensor.shape, generator=generator)
            if weights is not None:
                tensors[name] = torch.tensor(weights)
    del metadata["checksums"]  # They are those of other routers.
    save_file(tensors, mixture, metadata)
    return mixture


def tiny_model(folder, kind):
    """Save a tiny random language model that Smelt cannot run itself, and return (file, class)."""
    torch.manual_seed(3)
    size = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **size)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "phi3":
        config = transformers.Phi3Config(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            **size
        )  # fmt: skip
        model = transformers.Phi3ForCausalLM(config)
    else:
        config = transformers.T5Config(
            d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu" if kind == "t5 1.1" else "relu", **size
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder / "model.safetensors", type(model)


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
            for options in (["--router-depth", 0], ["--router-depth", 1], [], ["--attention"]):
                with self.subTest(family=family, options=options):
                    base = FORWARD / family / "model.safetensors"
                    mixture = make_mixture(self.folder, base, *options)
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
    def test_every_storage_agrees_with_smelt(self):
        """Coded task vectors and shared gates, in every format, are to both the same mixture."""
        given, recorded = FORWARD / "bert" / "inputs.safetensors", self.folder / "recorded.safetensors"
        inputs = load_file(given)
        del inputs["task"]
        for options in (
            ("--store", "sparse", "--prune", "0.5", "--shared-gate"),
            ("--store", "int8"),
            ("--store", "int4", "--shared-gate", "--duplicate-gate"),
            ("--store", "lowrank", "--rank", "3"),
        ):
            mixture = make_mixture(self.folder, FORWARD / "bert" / "model.safetensors", *options)
            smelt("convert", mixture, self.folder / "mixture.h5")
            smelt("pack", mixture, self.folder / "mixture.safetensors.zst")
            for name in ("mixture.safetensors", "mixture.h5", "mixture.safetensors.zst"):
                with self.subTest(options=options, name=name):
                    config = FORWARD / "bert" / "config.json"
                    smelt(
                        "activations", self.folder / name, given, "--config", config, "--tokens", "--final",
                        "-o", recorded,
                    )  # fmt: skip
                    states = wemoe.load(self.folder / name, FORWARD / "bert")(**inputs).last_hidden_state
                    states = states * inputs["attention_mask"][..., None]
                    self.assert_close(states, load_file(recorded)["last_hidden_state"])

    @torch.no_grad()
    def test_constant_routers_are_a_collapsed_model(self):
        """Of every architecture, what `smelt collapse` writes computes what the mixture does."""
        kinds = ("gpt2", "t5", "t5 1.1", "phi3", "llama", "bert")
        for kind, options in itertools.product(kinds, ([], ["--attention"])):
            with self.subTest(kind=kind, options=options):
                if kind in FAMILIES:
                    base, model_class = FORWARD / kind / "model.safetensors", FAMILIES[kind]
                    config = FORWARD / kind
                else:
                    base, model_class = tiny_model(self.folder / kind, kind)
                    config = self.folder / kind
                mixture = make_mixture(self.folder, base, *options, weights=[0.7, -0.2])
                smelt("collapse", mixture, "--weights", "0.7,-0.2", "-o", self.folder / "plain.safetensors")
                plain = model_class.from_pretrained(
                    None, config=transformers.AutoConfig.from_pretrained(config),
                    state_dict=load_file(self.folder / "plain.safetensors"),
                )  # fmt: skip
                model = wemoe.load(mixture, config, model_class)
                inputs = {"input_ids": torch.randint(3, 40, (2, 6))}
                if kind.startswith("t5"):
                    inputs["decoder_input_ids"] = torch.randint(3, 40, (2, 6))
                self.assert_close(model(**inputs)[0], plain.eval()(**inputs)[0])

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

    def decoders(self):
        """Yield a mixture of every kind of model that generates."""
        base = FORWARD / "llama" / "model.safetensors"
        yield wemoe.load(make_mixture(self.folder, base), FORWARD / "llama", transformers.LlamaForCausalLM)
        for kind in ("gpt2", "t5"):
            base, model_class = tiny_model(self.folder / kind, kind)
            yield wemoe.load(make_mixture(self.folder, base), self.folder / kind, model_class)

    def generate(self, model, prompts, mask=None, **options):
        """Return the tokens and logits of four generated tokens."""
        mask = torch.ones_like(prompts) if mask is None else mask
        made = model.generate(
            prompts, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
        return made.sequences, torch.stack(made.logits, dim=1)

    @torch.no_grad()
    def test_generation_keeps_the_weights_of_the_prompt(self):
        """With a cache, and without one but with the prompt's length known, scores are the same."""
        prompts = torch.randint(3, 40, (3, 5), generator=torch.Generator().manual_seed(5))
        for model in self.decoders():
            with self.subTest(type(model).__name__):
                sequences, logits = self.generate(model, prompts)
                if model.config.is_encoder_decoder:
                    inputs = {"input_ids": prompts, "decoder_input_ids": sequences}
                    prompt = 1
                else:
                    inputs, prompt = {"input_ids": sequences}, 5
                model.mixture.prompt_lengths = [prompt] * len(prompts)
                whole = model(**inputs, use_cache=False).logits[:, prompt - 1 : prompt + 3]
                self.assert_close(logits, whole)
                model.mixture.prompt_lengths = None
                other = model(**inputs, use_cache=False).logits[:, prompt - 1 : prompt + 3]
                self.assertGreater((other - whole).abs().max().item(), 1e-3)

    def padded_prompts(self):
        """Return two prompts, the first padded on the left, and their mask."""
        prompts = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(6))
        mask = torch.ones_like(prompts)
        mask[0, :3] = 0
        prompts[0, :3] = 0
        return prompts, mask

    @torch.no_grad()
    def test_generation_is_the_same_alone_padded_and_after_another(self):
        """Neither padding, nor the rest of the batch, nor what was generated before, matters."""
        prompts, mask = self.padded_prompts()
        for model in self.decoders():
            with self.subTest(type(model).__name__):
                _, together = self.generate(model, prompts, mask)
                _, second = self.generate(model, prompts[1:])
                _, first = self.generate(model, prompts[:1, 3:])
                self.assert_close(first[0], together[0])
                self.assert_close(second[0], together[1])

    @torch.no_grad()
    def test_generation_is_the_same_with_a_static_cache(self):
        """The masks that generate() prepares for such a cache tell padding as the plain one does."""
        prompts, mask = self.padded_prompts()
        classes = {
            "llama": transformers.LlamaForCausalLM,
            "mistral": transformers.MistralForCausalLM,  # Its window is shorter than the prompt.
            "qwen3": transformers.Qwen3ForCausalLM,
        }
        for (family, model_class), attention in itertools.product(classes.items(), ("sdpa", "eager")):
            mixture = make_mixture(self.folder, FORWARD / family / "model.safetensors")
            config = transformers.AutoConfig.from_pretrained(FORWARD / family)
            config._attn_implementation = attention
            model = wemoe.load(mixture, config, model_class)
            for given in (None, mask):
                with self.subTest(family=family, attention=attention, padded=given is not None):
                    sequences, logits = self.generate(model, prompts, given)
                    static, other = self.generate(model, prompts, given, cache_implementation="static")
                    self.assertEqual(static.tolist(), sequences.tolist())
                    self.assert_close(other, logits)

    def test_padding_masks(self):
        """Of every form of attention mask, the same tokens count."""
        plain = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        causal = torch.ones(4, 6, dtype=torch.bool).tril()
        keys = torch.nn.functional.pad(plain, (0, 2)).bool()
        sees = (keys[:, None] & causal)[:, None]
        added = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
        shared = plain.bool()[:, None, None]
        flex = create_block_mask(lambda b, h, q, k: (k <= q) & keys[b, k], 2, None, 4, 6, device="cpu")
        forms = (plain, sees, added, shared, flex, {"full_attention": sees}, {"full_attention": None, "other": added})
        for form in forms:
            self.assertEqual(wemoe.padding_mask(form, 4).int().tolist(), plain.tolist())
        self.assertEqual(wemoe.padding_mask(sees[1:, :, :1], 1).tolist(), [[True]])
        unpadded = create_block_mask(lambda b, h, q, k: k <= q, 2, None, 4, 6, device="cpu")
        self.assertTrue(wemoe.padding_mask(unpadded, 4).all())
        self.assertIsNone(wemoe.padding_mask({"full_attention": None}, 4))
        with self.assertRaisesRegex(ValueError, "use another attention"):
            wemoe.padding_mask("mask", 4)

    @torch.no_grad()
    def test_every_first_map_asks_its_router(self):
        """Models whose MLPs name their linear maps like no others run too."""
        size = {"vocab_size": 40, "max_position_embeddings": 32}
        distilbert = transformers.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, **size)
        neox = transformers.GPTNeoXConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **size
        )
        kinds = ((transformers.DistilBertModel, distilbert), (transformers.GPTNeoXModel, neox))
        for model_class, config in kinds:
            with self.subTest(config.model_type):
                torch.manual_seed(3)
                model_class(config).save_pretrained(self.folder / config.model_type)
                base = self.folder / config.model_type / "model.safetensors"
                mixture = make_mixture(self.folder, base, weights=[0.7, -0.2])
                smelt("collapse", mixture, "--weights", "0.7,-0.2", "-o", self.folder / "plain.safetensors")
                plain = model_class.from_pretrained(
                    None, config=config, state_dict=load_file(self.folder / "plain.safetensors")
                )
                inputs = torch.randint(3, 40, (2, 6))
                model = wemoe.load(mixture, config, model_class)
                self.assert_close(model(inputs)[0], plain.eval()(inputs)[0])

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
