"""Measure what mixtures of experts are worth: accuracy and size, beside merges of the same models.

    SMELT=path/to/smelt python quality.py digits
    SMELT=path/to/smelt python quality.py text FOLDER      (from train_text.py)

Every model is made by `smelt` alone, from the fine-tuned models and 64 unlabelled training samples
a task, and is run by PyTorch (mixtures through Scripts/wemoe.py) on test samples that nothing
else has seen. Printed are accuracies in %, the mean in % of the experts' own, and the size of the
file in models. What this build of smelt cannot do yet is named and left out.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.dont_write_bytecode = True
sys.path[:0] = [str(ROOT / "Scripts"), str(ROOT / "Fixtures" / "digits")]
import wemoe  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PROGRESSIVE, RECORDED = "progressive", "recorded"
# Label, what upscale is told, what calibrate is told, and which activations it gets.
MIXTURES = [
    ("WEMoE, untrained", [], None, None),
    ("WEMoE, ridge, base's activations", [], ["--method", "ridge"], RECORDED),
    ("WEMoE, ridge, progressive", [], ["--method", "ridge"], PROGRESSIVE),
    ("WEMoE, outputs, base's activations", [], ["--method", "output"], RECORDED),
    ("WEMoE, outputs, progressive", [], ["--method", "output"], PROGRESSIVE),
    ("AWD + WEMoE, outputs, progressive", ["--clean", "awd-row"], ["--method", "output"], PROGRESSIVE),
    *(
        (f"E-WEMoE, {share} pruned, {method}", ["--prune", share, "--store", "sparse"], ["--method", method], PROGRESSIVE)
        for share in ("0.5", "0.9", "0.95")
        for method in ("ridge", "output")
    ),
    ("one gate for all layers", ["--shared-gate"], ["--method", "ridge"], RECORDED),
    ("int8 task vectors", ["--store", "int8"], ["--method", "output"], PROGRESSIVE),
    ("int4 task vectors", ["--store", "int4"], ["--method", "output"], PROGRESSIVE),
    ("rank 16 task vectors", ["--store", "lowrank", "--rank", "16"], ["--method", "output"], PROGRESSIVE),
]


class Digits:
    """The digits' encoders: four tasks, 500 test images each."""

    folder = ROOT / "Fixtures" / "digits"
    model_class = transformers.CLIPVisionModel
    flags = ["--heads", "4"]

    def __init__(self, scratch):
        import evaluate
        import train

        self.tasks = evaluate.TASKS
        self.config = transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=evaluate.HEADS,
            num_channels=1,
            image_size=8,
            patch_size=2,
            hidden_act="quick_gelu",
        )
        (images, _), _ = train.load_tasks()
        chosen = [
            torch.randperm(len(images[task]), generator=torch.Generator().manual_seed(train.SEED + number))[:64]
            for number, task in enumerate(self.tasks)
        ]
        pixels = torch.cat([train.to_input(images[task][c]) for task, c in zip(self.tasks, chosen)])[:, None]
        self.inputs = scratch / "inputs.safetensors"
        task = torch.arange(len(self.tasks)).repeat_interleave(64)
        save_file({"pixel_values": pixels.contiguous(), "task": task}, self.inputs)
        self.heads = load_file(self.folder / "heads.safetensors")
        self.test = load_file(self.folder / "test.safetensors")

    def samples(self, task):
        images = self.test[f"{task}.images"].to(torch.float32)[:, None] / 16
        return {"pixel_values": images}, self.test[f"{task}.labels"]

    def features(self, task, answer):
        return answer.pooler_output


class Text:
    """The byte encoders of train_text.py: three tasks, 1000 test texts each."""

    model_class = transformers.BertModel
    flags = []

    def __init__(self, folder):
        self.folder = Path(folder)
        self.tasks = ("language", "package", "token")
        self.config = transformers.AutoConfig.from_pretrained(self.folder)
        self.inputs = self.folder / "inputs.safetensors"
        self.heads = load_file(self.folder / "heads.safetensors")
        self.test = np.load(self.folder / "test.npz")

    def samples(self, task):
        texts = torch.from_numpy(self.test[f"{task}.texts"].astype(np.int64))
        return {"input_ids": texts}, torch.from_numpy(self.test[f"{task}.labels"])

    def features(self, task, answer):
        states = answer.last_hidden_state
        return states[:, states.shape[1] // 2] if task == "token" else states.mean(1)


class NotInThisBuild(Exception):
    """The command does not know what it was asked."""


def smelt(*arguments):
    """Run the command; wrong usage means that this build lacks something."""
    result = subprocess.run([os.environ["SMELT"], *map(str, arguments)], capture_output=True, text=True)
    if result.returncode == 64:
        raise NotInThisBuild(result.stderr.strip().splitlines()[0])
    if result.returncode:
        sys.exit(result.stderr)


@torch.no_grad()
def accuracies(suite, model):
    """Return the accuracy of a model on every task, in %."""
    result = []
    for task in suite.tasks:
        inputs, labels = suite.samples(task)
        hits = 0
        for start in range(0, len(labels), 100):
            here = slice(start, start + 100)
            answer = model(**{name: tensor[here] for name, tensor in inputs.items()})
            scores = suite.features(task, answer) @ suite.heads[f"{task}.weight"].T + suite.heads[f"{task}.bias"]
            hits += int((scores.argmax(1) == labels[here]).sum())
        result.append(100 * hits / len(labels))
    return result


def dense(suite, state):
    """Return a plain model with these tensors."""
    return suite.model_class.from_pretrained(None, config=suite.config, state_dict=state).eval()


def mixture(suite, scratch, upscaling, calibration, activations):
    """Make a mixture as a row of the table says; return its path."""
    models = ["--base", suite.folder / "base.safetensors"]
    experts = [word for task in suite.tasks for word in ("--expert", f"{task}={suite.folder / task}.safetensors")]
    raw, fitted = scratch / "raw.safetensors", scratch / "fitted.safetensors"
    smelt("upscale", *models, *experts, *upscaling, "-o", raw)
    if calibration is None:
        return raw
    given = ["--progressive", suite.inputs, *suite.flags]
    if (suite.folder / "config.json").exists():
        given += ["--config", suite.folder / "config.json"]
    if activations == RECORDED:
        base, given = scratch / "base-activations.safetensors", ["--activations", scratch / "base-activations.safetensors"]
        smelt("activations", models[1], suite.inputs, *suite.flags, "--tokens", "-o", base)
    if "output" in calibration and ("--prune" in upscaling or "--store" in upscaling):
        calibration = [*calibration, *experts]
    try:
        smelt("calibrate", raw, *given, *calibration, "-o", fitted)
    except NotInThisBuild:
        # Before there was a choice of methods, all calibration was by ridge.
        if calibration != ["--method", "ridge"]:
            raise
        smelt("calibrate", raw, *given, "-o", fitted)
    return fitted


def main():
    """Measure everything and print a Markdown table."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        suite = Digits(scratch) if sys.argv[1] == "digits" else Text(sys.argv[2])
        base = load_file(suite.folder / "base.safetensors")
        experts = {task: load_file(suite.folder / f"{task}.safetensors") for task in suite.tasks}
        model_size = (suite.folder / "base.safetensors").stat().st_size
        own = [accuracies(suite, dense(suite, experts[task]))[n] for n, task in enumerate(suite.tasks)]

        print("| model | " + " | ".join(suite.tasks) + " | mean | of experts' | models |")
        print("|---|" + "--:|" * (len(suite.tasks) + 3))

        def row(label, values, size):
            mean = np.mean(values)
            cells = [*values, mean, 100 * mean / np.mean(own)]
            print(f"| {label} | " + " | ".join(f"{cell:.1f}" for cell in cells) + f" | {size:.2f} |", flush=True)

        row("base", accuracies(suite, dense(suite, base)), 1)
        row("experts, each on its own task", own, len(experts))
        for scaling in (0.3, 0.5):
            merged = {k: b + scaling * sum(e[k] - b for e in experts.values()) for k, b in base.items()}
            row(f"task arithmetic {scaling}", accuracies(suite, dense(suite, merged)), 1)
        oracle = [
            accuracies(suite, dense(suite, routed(base, experts, task)))[number]
            for number, task in enumerate(suite.tasks)
        ]
        row("oracle routing", oracle, float("nan"))
        for label, *steps in MIXTURES:
            try:
                path = mixture(suite, scratch, *steps)
            except NotInThisBuild as reason:
                print(f"| {label}: not in this build ({reason}) |", flush=True)
                continue
            model = wemoe.load(path, suite.config, suite.model_class)
            row(label, accuracies(suite, model), path.stat().st_size / model_size)


def routed(base, experts, task):
    """Return task arithmetic with the MLPs of one expert: a mixture whose routers never err."""
    merged = {k: b + 0.3 * sum(e[k] - b for e in experts.values()) for k, b in base.items()}
    parts = (".mlp.", ".intermediate.dense.", "output.dense.")
    is_mlp = lambda name: any(part in name for part in parts) and ".attention.output." not in name
    return {k: experts[task][k] if is_mlp(k) else tensor for k, tensor in merged.items()}


if __name__ == "__main__":
    main()
