"""Measure the accuracy of digit models, dense or mixtures of experts, on the four tasks.

    python evaluate.py [--json] [--data FOLDER] LABEL=PATH [LABEL=PATH ...]

reads safetensors (`.safetensors`) or HDF5 checkpoints with numpy and h5py alone and prints one
row of accuracies (in percent) per model. FOLDER holds `heads.safetensors` and
`test.safetensors`; by default it is the folder of this script.

An MLP may be dense (`P.fc1.weight` ...) or a weight-ensembling mixture of experts (WEMoE, arXiv
2402.00433): `P.gate...`, `P.base_model...` and `P.task_vectors.{j}...`.
"""

import argparse
import json
import sys
from pathlib import Path

import h5py
import numpy as np

TASKS = ("upright", "rotated", "inverted", "shuffled")
HEADS = 4  # attention heads of the encoder
PATCH = 2
WHITE = 16  # grey levels go from 0 to 16
EPSILON = 1e-5  # of the layer norms
BATCH = 125  # images at a time
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "u1"}


# --- Reading checkpoints ---


def read_safetensors(path):
    """Return {name: array} of a safetensors file: 8-byte length, JSON header, data."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {name: decode(data, start, entry) for name, entry in header.items()}


def decode(data, start, entry):
    """Return the tensor a header entry describes; BF16 widens to F32."""
    begin, end = (start + offset for offset in entry["data_offsets"])
    if entry["dtype"] == "BF16":
        bits = np.frombuffer(data[begin:end], "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(entry["shape"])
    return np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])


def read_hdf5(path):
    """Return {name: array} of the datasets at the root of an HDF5 file."""
    with h5py.File(path) as file:
        return {name: item[...] for name, item in file.items() if isinstance(item, h5py.Dataset)}


def read_checkpoint(path):
    """Return {name: array} of a checkpoint, its format told by the extension."""
    return read_safetensors(path) if str(path).endswith(".safetensors") else read_hdf5(path)


# --- The encoder ---


def linear(x, weight, bias):
    """Apply a linear layer whose weight and bias are shared, or one pair per sample."""
    if weight.ndim == 2:
        return x @ weight.T + bias
    return x @ weight.transpose(0, 2, 1) + bias[:, None]


def quick_gelu(x):
    """Return x * sigmoid(1.702 x)."""
    return x / (1 + np.exp(-1.702 * x))


class Model:
    """An encoder made of the tensors of a checkpoint."""

    def __init__(self, tensors):
        self.tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
        self.prefix = "vision_model."
        layers = f"{self.prefix}encoder.layers."
        self.layers = sorted(
            {int(name[len(layers) :].split(".")[0]) for name in self.tensors if name.startswith(layers)}
        )

    def norm(self, x, name):
        """Apply the layer norm `name`."""
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
        return centred / scale * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def embed(self, images):
        """Return class token and patch embeddings of [n, 8, 8] images."""
        kernel = self.tensors[f"{self.prefix}embeddings.patch_embedding.weight"]
        n, side = len(images), images.shape[-1] // PATCH
        patches = (
            images.reshape(n, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4).reshape(n, side * side, -1)
        )
        token = self.tensors[f"{self.prefix}embeddings.class_embedding"]
        tokens = np.broadcast_to(token, (n, 1, token.size))
        x = np.concatenate([tokens, patches @ kernel.reshape(len(kernel), -1).T], axis=1)
        return x + self.tensors[f"{self.prefix}embeddings.position_embedding.weight"]

    def attention(self, x, name):
        """Apply the multi-head self-attention `name`."""
        n, tokens, width = x.shape

        def project(part):
            y = linear(
                x, self.tensors[f"{name}.{part}_proj.weight"], self.tensors[f"{name}.{part}_proj.bias"]
            )
            return y.reshape(n, tokens, HEADS, width // HEADS).transpose(0, 2, 1, 3)

        scores = project("q") @ project("k").transpose(0, 1, 3, 2) / np.sqrt(width // HEADS)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = (shares @ project("v")).transpose(0, 2, 1, 3).reshape(x.shape)
        return linear(mixed, self.tensors[f"{name}.out_proj.weight"], self.tensors[f"{name}.out_proj.bias"])

    def routing(self, x, name):
        """Return the weights [n, k] the router of the MLP `name` gives to its task vectors."""
        gate = {key[len(name) + 6 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.gate.")}
        if "fc1.weight" in gate:
            hidden = np.maximum(linear(x, gate["fc1.weight"], gate["fc1.bias"]), 0)
            return linear(hidden, gate["fc2.weight"], gate["fc2.bias"]).mean(axis=1)
        if "fc.weight" in gate:
            return linear(x, gate["fc.weight"], gate["fc.bias"]).mean(axis=1)
        return np.broadcast_to(gate["weight"], (len(x), gate["weight"].size))

    def mlp_parameters(self, x, name):
        """Return the function that gives a parameter of the MLP `name`, merged per sample in a mixture."""
        if f"{name}.fc1.weight" in self.tensors:
            return lambda part: self.tensors[f"{name}.{part}"]
        weights = self.routing(x, name)

        def merge(part):
            vectors = [self.tensors[f"{name}.task_vectors.{j}.{part}"] for j in range(weights.shape[1])]
            return self.tensors[f"{name}.base_model.{part}"] + np.tensordot(
                weights, np.stack(vectors), axes=1
            )

        return merge

    def mlp(self, x, name):
        """Apply the MLP `name`, dense or mixture of experts."""
        parameter = self.mlp_parameters(x, name)
        hidden = quick_gelu(linear(x, parameter("fc1.weight"), parameter("fc1.bias")))
        return linear(hidden, parameter("fc2.weight"), parameter("fc2.bias"))

    def features(self, images):
        """Return the normalised class token of every image."""
        x = self.norm(self.embed(images), f"{self.prefix}pre_layrnorm")
        for index in self.layers:
            layer = f"{self.prefix}encoder.layers.{index}"
            x = x + self.attention(self.norm(x, f"{layer}.layer_norm1"), f"{layer}.self_attn")
            x = x + self.mlp(self.norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp")
        return self.norm(x[:, 0], f"{self.prefix}post_layernorm")


# --- Accuracy ---


def accuracies(tensors, data=Path(__file__).parent):
    """Return {task: accuracy in percent} of the model that {name: array} describes."""
    model = Model(tensors)
    heads, test = (read_safetensors(Path(data) / f"{name}.safetensors") for name in ("heads", "test"))
    result = {}
    for task in TASKS:
        images, labels = test[f"{task}.images"].astype(np.float32) / WHITE, test[f"{task}.labels"]
        batches = [model.features(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        scores = linear(np.concatenate(batches), heads[f"{task}.weight"], heads[f"{task}.bias"])
        result[task] = float((scores.argmax(axis=1) == labels).mean() * 100)
    return result


def table(results):
    """Return {label: {task: accuracy}} as lines of text."""
    width = max(map(len, [*results, "accuracy in %"]))
    lines = [f"{'accuracy in %':{width}}" + "".join(f"{column:>10}" for column in [*TASKS, "mean"])]
    for label, values in results.items():
        row = [*values.values(), sum(values.values()) / len(values)]
        lines.append(f"{label:{width}}" + "".join(f"{value:10.1f}" for value in row))
    return "\n".join(lines)


def main():
    """Evaluate the models named on the command line."""
    parser = argparse.ArgumentParser(description="Accuracy of digit models on the four tasks.")
    parser.add_argument("models", nargs="+", metavar="LABEL=PATH")
    parser.add_argument(
        "--data", default=Path(__file__).parent, metavar="FOLDER", help="holds the heads and the test split"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    results = {}
    for model in arguments.models:
        label, separator, path = model.partition("=")
        if not separator:
            sys.exit(f"evaluate.py: {model!r} is not of the form LABEL=PATH")
        try:
            results[label] = accuracies(read_checkpoint(path), arguments.data)
        except (OSError, KeyError, ValueError) as error:
            sys.exit(f"evaluate.py: cannot evaluate {path}: {error}")
    print(json.dumps(results, indent=2) if arguments.json else table(results))


if __name__ == "__main__":
    main()
