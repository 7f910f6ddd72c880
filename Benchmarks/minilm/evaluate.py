"""Judge models by the heads and texts that finetune.py made.

    python evaluate.py FOLDER MODEL... [--split test]

MODEL is a model's folder or a safetensors file with the names of BertModel. Prints the accuracy in %
for each task, their mean and its standard error.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

# Tokens of a text at most; longer ones are cut.
LENGTH = 48


def batches(part, size):
    """Yield ids, mask [texts, tokens] and labels [texts], without common padding."""
    for start in range(0, len(part["labels"]), size):
        ids, mask, labels = (
            torch.from_numpy(part[name][start : start + size])
            for name in ("input_ids", "attention_mask", "labels")
        )
        length = int(mask.sum(dim=1).max())
        yield ids[:, :length], mask[:, :length], labels


def pooled(model, ids, mask):
    """The last hidden state's mean over tokens, [texts, width]."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def features(model, part, mask=None):
    """`pooled` of a batch (ids and mask), or of all texts of {name: array}."""
    if mask is not None:
        return pooled(model, part, mask)
    # Texts of like length together need less padding.
    order = np.argsort(part["attention_mask"].sum(axis=1), kind="stable")
    inputs = {name: array[order] for name, array in part.items()}
    rows = torch.cat([pooled(model, ids, mask) for ids, mask, _ in batches(inputs, 64)])
    return rows[torch.from_numpy(np.argsort(order))]


class Judge:
    """The tasks, heads and texts of a folder made by finetune.py."""

    def __init__(self, folder, split="test"):
        folder = Path(folder)
        self.tasks = list(json.loads((folder / "tasks.json").read_text()))
        self.heads = load_file(folder / "heads.safetensors")
        arrays = np.load(folder / f"{split}.npz")
        arrays = {name: arrays[name] for name in arrays.files}
        self.parts = [
            {name: array[arrays["task"] == number] for name, array in arrays.items()}
            for number in range(len(self.tasks))
        ]
        self.model = AutoModel.from_config(AutoConfig.from_pretrained(folder / "f32" / "base")).eval()

    def load(self, tensors):
        """Take the weights {name: tensor}; BertModel's names, all of them."""
        self.model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})

    def open(self, path):
        """Take the weights of a model's folder or file."""
        path = Path(path)
        self.load(load_file(path / "model.safetensors" if path.is_dir() else path))

    def accuracies(self):
        """Share of right answers, by task, of the weights taken last."""
        result = {}
        with torch.no_grad():
            for task, part in zip(self.tasks, self.parts, strict=True):
                scores = features(self.model, part) @ self.heads[f"{task}.weight"].T
                answers = (scores + self.heads[f"{task}.bias"]).argmax(dim=1).numpy()
                result[task] = float((answers == part["labels"]).mean())
        return result

    def mean_error(self, accuracies):
        """Standard error of the mean over tasks, as a share."""
        variances = [
            accuracies[task] * (1 - accuracies[task]) / len(part["labels"])
            for task, part in zip(self.tasks, self.parts, strict=True)
        ]
        return math.sqrt(sum(variances)) / len(variances)

    def header(self, label="accuracy in %"):
        return f"{label:48}" + "".join(f"{n:>10}" for n in [*self.tasks, "mean"]) + "  s.e."

    def row(self, label, accuracies):
        mean = sum(accuracies.values()) / len(accuracies)
        values = [accuracies[task] for task in self.tasks] + [mean]
        error = self.mean_error(accuracies)
        return f"{label:48}" + "".join(f"{100 * v:10.1f}" for v in values) + f"{100 * error:6.2f}"


def report(folder, models, split):
    """Print a row of accuracies for each model."""
    judge = Judge(folder, split)
    print(judge.header())
    for model in models:
        judge.open(model)
        print(judge.row(Path(model).name, judge.accuracies()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--split", default="test")
    arguments = parser.parse_args()
    report(arguments.folder, arguments.models, arguments.split)
