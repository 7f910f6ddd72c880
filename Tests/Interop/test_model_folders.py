"""Model folders that Smelt wrote, read as transformers reads them."""

import json
import math
import os
import subprocess
import tempfile
import unittest
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

SMELT = os.environ["SMELT"]
TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "I64": np.int64}


def llama(hidden=8, middle=12, vocabulary=20, layers=2):
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (middle, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, middle)
        for name in ("input", "post_attention"):
            shapes[f"{prefix}{name}_layernorm.weight"] = (hidden,)
    return shapes | {"lm_head.weight": (vocabulary, hidden)}


def bert(hidden=8, middle=12, vocabulary=20, layers=2):
    shapes = {f"embeddings.{name}_embeddings.weight": (count, hidden)
              for name, count in (("word", vocabulary), ("position", 16), ("token_type", 2))}  # fmt: skip
    dense = {"pooler.dense": (hidden, hidden)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            dense[f"{prefix}attention.{name}"] = (hidden, hidden)
        dense[f"{prefix}intermediate.dense"] = (middle, hidden)
        dense[f"{prefix}output.dense"] = (hidden, middle)
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return shapes


def read_folder(folder):
    """The state dict of a folder: by its index if there is one, else of the one file."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_file(folder / "model.safetensors")
    index = json.loads(index.read_text())
    state = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = read_file(folder / file)
        listed = {name for name, home in index["weight_map"].items() if home == file}
        assert shard.keys() == listed, f"{file} holds {shard.keys() ^ listed} against its index"
        state |= shard
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in state.values())
    return state


def read_file(path):
    with safe_open(path, "numpy") as file:
        # transformers refuses a file that does not say this.
        assert (file.metadata() or {}).get("format") == "pt", path
    return {
        name: np.frombuffer(bytes(tensor["data"]), TYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in deserialize(path.read_bytes())
    }


class ModelFolders(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = Path(folder.name)

    def make(self, name, shapes, files, buffers=None):
        """A folder as a user has it: weights in one file, and side files."""
        random = np.random.default_rng(1)
        state = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        state |= buffers or {}
        folder = self.out / name
        folder.mkdir()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        for file, text in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text)
        return folder, state

    def convert(self, source, target, *options):
        subprocess.run(
            [SMELT, "convert", str(source), f"{target}/", *options],
            check=True, capture_output=True)  # fmt: skip

    def expect(self, folder, state):
        ours = read_folder(folder)
        self.assertEqual(ours.keys(), state.keys())
        for name, array in state.items():
            self.assertEqual(ours[name].dtype, array.dtype, name)
            self.assertEqual(ours[name].shape, array.shape, name)
            self.assertEqual(ours[name].tobytes(), array.tobytes(), name)

    def test_a_llama_in_shards_is_read_by_its_index(self):
        files = {
            "config.json": json.dumps({"model_type": "llama", "torch_dtype": "float32"}),
            "generation_config.json": "{}", "tokenizer.json": '{"version": "1.0"}',
            "tokenizer_config.json": "{}", "special_tokens_map.json": "{}",
            "tokenizer.model": "pieces",
        }  # fmt: skip
        source, state = self.make("llama", llama(), files)
        limit = 1000
        self.convert(source, self.out / "sharded", "--max-shard-size", str(limit))
        folder = self.out / "sharded"
        self.expect(folder, state)
        shards = sorted(folder.glob("*.safetensors"))
        self.assertGreater(len(shards), 3)
        self.assertEqual(
            [shard.name for shard in shards],
            [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))])  # fmt: skip
        for shard in shards:
            arrays = read_file(shard).values()
            self.assertTrue(len(arrays) == 1 or sum(a.nbytes for a in arrays) <= limit, shard)
        for file, text in files.items():
            self.assertEqual((folder / file).read_text(), text, file)
        # And together again, from the folder or its index.
        for number, path in enumerate([folder, folder / "model.safetensors.index.json"]):
            self.convert(path, self.out / f"whole{number}")
            self.expect(self.out / f"whole{number}", state)

    def test_a_bert_in_bf16_keeps_its_whole_numbers(self):
        files = {
            "config.json": json.dumps({"model_type": "bert", "torch_dtype": "float32"}),
            "vocab.txt": "[PAD]\n[UNK]\n", "modules.json": "[]",
            "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        }  # fmt: skip
        positions = {"embeddings.position_ids": np.arange(16).reshape(1, 16)}
        source, state = self.make("bert", bert(), files, positions)
        self.convert(source, self.out / "half", "--dtype", "BF16")
        folder = self.out / "half"
        self.expect(
            folder,
            {n: a.astype(ml_dtypes.bfloat16) if a.dtype == np.float32 else a
             for n, a in state.items()})  # fmt: skip
        config = json.loads((folder / "config.json").read_text())
        self.assertEqual(config, {"model_type": "bert", "torch_dtype": "bfloat16"})
        for file in files.keys() - {"config.json"}:
            self.assertEqual((folder / file).read_text(), files[file], file)

    def test_a_folder_comes_back_through_every_format(self):
        source, state = self.make("llama", llama(), {"config.json": "{}"})
        original = (source / "model.safetensors").read_bytes()
        for name in ("model.h5", "model.npz", "model.safetensors.zst"):
            path = self.out / name
            subprocess.run([SMELT, "convert", str(source), str(path)], check=True, capture_output=True)
            self.convert(path, self.out / f"from-{name}")
            self.expect(self.out / f"from-{name}", state)
            self.assertEqual(
                (self.out / f"from-{name}" / "model.safetensors").read_bytes(), original, name)

    def test_a_replaced_folder_and_its_files_keep_their_permissions(self):
        source, _ = self.make("llama", llama(), {"config.json": "{}", "extra.json": "{}"})
        target = self.out / "target"
        subprocess.run([SMELT, "convert", str(source), f"{target}/"], check=True, capture_output=True)
        (target / "model.safetensors").chmod(0o600)
        (target / "config.json").chmod(0o640)
        (target / "extra.json").unlink()
        target.chmod(0o2750)
        subprocess.run([SMELT, "convert", str(source), f"{target}/", "--force"], check=True, capture_output=True)
        modes = {name: (target / name).stat().st_mode & 0o7777 for name in ("model.safetensors", "config.json", ".")}
        self.assertEqual(modes, {"model.safetensors": 0o600, "config.json": 0o640, ".": 0o2750})
        self.assertTrue((target / "extra.json").stat().st_mode & 0o200)

    def test_sizes_are_what_the_shapes_say(self):
        _, state = self.make("bert", bert(), {"config.json": "{}"})
        path = self.out / "bert"
        listed = json.loads(
            subprocess.run([SMELT, "inspect", "--json", str(path)],
                           check=True, capture_output=True).stdout)  # fmt: skip
        self.assertEqual(
            {t["name"]: math.prod(t["shape"]) for t in listed["tensors"]},
            {n: a.size for n, a in state.items()})  # fmt: skip


if __name__ == "__main__":
    unittest.main()
