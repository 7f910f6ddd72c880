"""Measure what mixtures of experts are worth: accuracy and size, beside merges of the same models.

    SMELT=path/to/smelt python quality.py digits [--results FILE.json] [--picture FILE.svg] [--texts N]
    SMELT=path/to/smelt python quality.py minilm FOLDER    (from ../minilm/finetune.py)
    SMELT=path/to/smelt python quality.py text FOLDER      (from train_text.py)

Every model is made by `smelt` alone, from the fine-tuned models and unlabelled texts or images that
are not among the test's, and is run by PyTorch (mixtures through Scripts/wemoe.py) on test samples
that nothing else has seen. Printed are accuracies in %, the mean in % of the experts' own, and the
size of the file in models.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from html import escape
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
OUTPUT, RIDGE, CHOSEN = ["--method", "output"], ["--method", "ridge"], ["--choose-lambda"]
# Label, what upscale is told, what calibrate is told, and which activations it gets.
MIXTURES = [
    ("WEMoE, untrained", [], None, None),
    ("WEMoE, ridge", [], RIDGE, RECORDED),
    ("WEMoE, output matching", [], OUTPUT, RECORDED),
    ("WEMoE, output matching, progressive", [], OUTPUT, PROGRESSIVE),
    ("the same, λ chosen", [], OUTPUT + CHOSEN, PROGRESSIVE),
    ("one gate for all layers", ["--shared-gate"], RIDGE, RECORDED),
    *(
        (f"E-WEMoE, {share} pruned", ["--prune", share, "--store", "sparse"], OUTPUT + CHOSEN, PROGRESSIVE)
        for share in ("0.5", "0.9", "0.95")
    ),
    ("int8 task vectors", ["--store", "int8"], OUTPUT + CHOSEN, PROGRESSIVE),
    ("int4 task vectors", ["--store", "int4"], OUTPUT + CHOSEN, PROGRESSIVE),
    ("attention too, int4", ["--attention", "--store", "int4"], OUTPUT, PROGRESSIVE),
    ("the same, linear routers", ["--attention", "--store", "int4", "--router-depth", "1"], OUTPUT, PROGRESSIVE),
    ("rank 16 task vectors", ["--store", "lowrank", "--rank", "16"], OUTPUT + CHOSEN, PROGRESSIVE),
    ("AWD + WEMoE", ["--clean", "awd-row"], OUTPUT + CHOSEN, PROGRESSIVE),
]


class Digits:
    """The digits' encoders: four tasks, 500 test images each."""

    name = "digits, CLIP vision encoder of 4 layers"
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
            torch.randperm(len(images[task]), generator=torch.Generator().manual_seed(train.SEED + number))[:256]
            for number, task in enumerate(self.tasks)
        ]
        pixels = torch.cat([train.to_input(images[task][c]) for task, c in zip(self.tasks, chosen)])[:, None]
        self.inputs = scratch / "inputs.safetensors"
        task = torch.cat([torch.full((len(c),), number) for number, c in enumerate(chosen)])
        save_file({"pixel_values": pixels.contiguous(), "task": task}, self.inputs)
        self.heads = load_file(self.folder / "heads.safetensors")
        self.test = load_file(self.folder / "test.safetensors")

    def path(self, name):
        return self.folder / f"{name}.safetensors"

    def samples(self, task):
        images = self.test[f"{task}.images"].to(torch.float32)[:, None] / 16
        return {"pixel_values": images}, self.test[f"{task}.labels"]

    def features(self, task, inputs, answer):
        return answer.pooler_output


class Text:
    """The byte encoders of train_text.py: three tasks, 1000 test texts each."""

    name = "bytes, BERT of train_text.py"
    model_class = transformers.BertModel
    flags = []

    def __init__(self, folder):
        self.folder = Path(folder)
        self.tasks = ("language", "package", "token")
        self.config = transformers.AutoConfig.from_pretrained(self.folder)
        self.inputs = self.folder / "inputs.safetensors"
        self.heads = load_file(self.folder / "heads.safetensors")
        self.test = np.load(self.folder / "test.npz")

    def path(self, name):
        return self.folder / f"{name}.safetensors"

    def samples(self, task):
        texts = torch.from_numpy(self.test[f"{task}.texts"].astype(np.int64))
        return {"input_ids": texts}, torch.from_numpy(self.test[f"{task}.labels"])

    def features(self, task, inputs, answer):
        states = answer.last_hidden_state
        return states[:, states.shape[1] // 2] if task == "token" else states.mean(1)


class MiniLM:
    """all-MiniLM-L6-v2 and its experts from ../minilm/finetune.py."""

    name = "all-MiniLM-L6-v2"
    model_class = transformers.BertModel
    flags = []

    def __init__(self, folder, texts, samples, scratch):
        self.folder = Path(folder)
        self.tasks = tuple(json.loads((self.folder / "tasks.json").read_text()))
        self.config = transformers.AutoConfig.from_pretrained(self.folder / "f32" / "base")
        given = np.load(self.folder / "calibration.npz")
        rows = np.concatenate([np.flatnonzero(given["task"] == n)[:samples] for n in range(len(self.tasks))])
        self.inputs = scratch / "inputs.npz"
        np.savez(self.inputs, **{key: given[key][rows] for key in ("input_ids", "attention_mask", "task")})
        self.heads = load_file(self.folder / "heads.safetensors")
        test = np.load(self.folder / "test.npz")
        self.test = {}
        for number, task in enumerate(self.tasks):
            rows = np.flatnonzero(test["task"] == number)[:texts]
            # Texts of like length together need less padding.
            rows = rows[np.argsort(test["attention_mask"][rows].sum(axis=1), kind="stable")]
            self.test[task] = {key: torch.from_numpy(test[key][rows]) for key in test.files}

    def path(self, name):
        return self.folder / "f32" / name / "model.safetensors"

    def samples(self, task):
        part = self.test[task]
        return {key: part[key] for key in ("input_ids", "attention_mask")}, part["labels"]

    def features(self, task, inputs, answer):
        mask = inputs["attention_mask"][:, :, None]
        return (answer.last_hidden_state * mask).sum(1) / mask.sum(1)


def smelt(*arguments):
    """Run the command."""
    result = subprocess.run([os.environ["SMELT"], *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return result.stdout


@torch.no_grad()
def accuracies(suite, model, tasks=None):
    """Return the accuracy of a model on every task (or some), in %."""
    result = []
    for task in tasks or suite.tasks:
        inputs, labels = suite.samples(task)
        hits = 0
        for start in range(0, len(labels), 100):
            batch = {name: tensor[start : start + 100] for name, tensor in inputs.items()}
            if "attention_mask" in batch:
                length = int(batch["attention_mask"].sum(dim=1).max())
                batch = {name: tensor[:, :length] for name, tensor in batch.items()}
            features = suite.features(task, batch, model(**batch))
            scores = features @ suite.heads[f"{task}.weight"].T + suite.heads[f"{task}.bias"]
            hits += int((scores.argmax(1) == labels[start : start + 100]).sum())
        result.append(100 * hits / len(labels))
    return result


def dense(suite, path):
    """Return the plain model at a path."""
    return suite.model_class.from_pretrained(None, config=suite.config, state_dict=load_file(path)).eval()


def experts(suite):
    """The command's options for all experts."""
    return [word for task in suite.tasks for word in ("--expert", f"{task}={suite.path(task)}")]


def merged(suite, scratch, method, **parameters):
    """Merge the experts by a recipe; return the path."""
    models = [{"model": str(suite.path(task)), "parameters": {"weight": 1, **parameters}} for task in suite.tasks]
    scaling = parameters.pop("lambda")
    for model in models:
        del model["parameters"]["lambda"]
    recipe = {
        "merge_method": method,
        "base_model": str(suite.path("base")),
        "models": models,
        "parameters": {"lambda": scaling, "normalize": False},
    }
    (scratch / "recipe.json").write_text(json.dumps(recipe))
    smelt("merge", scratch / "recipe.json", scratch / "merged.safetensors")
    return scratch / "merged.safetensors"


def mixture(suite, scratch, upscaling, calibration, activations):
    """Make a mixture as a row of the table says; return its path and what calibrate said."""
    base = ["--base", suite.path("base")]
    raw, fitted = scratch / "raw.safetensors", scratch / "fitted.safetensors"
    smelt("upscale", *base, *experts(suite), *upscaling, "-o", raw)
    if calibration is None:
        return raw, ""
    configuration = suite.path("base").parent / "config.json"
    flags = [*suite.flags, *(["--config", configuration] if configuration.exists() else [])]
    given = ["--progressive", suite.inputs, *flags]
    if activations == RECORDED:
        recorded = scratch / "base-activations.safetensors"
        if not recorded.exists():
            smelt("activations", suite.path("base"), suite.inputs, *flags, "--tokens", "-o", recorded)
        given = ["--activations", recorded]
    if "output" in calibration:
        calibration = [*calibration, *experts(suite)]
    if "--choose-lambda" in calibration:
        calibration = [*calibration, *base]
    said = smelt("calibrate", raw, *given, *calibration, "--report", scratch / "report.svg", "-o", fitted)
    return fitted, said


def main():
    """Measure everything and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("digits", "text", "minilm"))
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--results", type=Path, help="write the table as JSON")
    parser.add_argument("--picture", type=Path, help="draw accuracy against size")
    parser.add_argument("--routing", type=Path, help="the report of calibrate for the mixture with λ chosen")
    parser.add_argument("--texts", type=int, default=1200, help="test texts a task (minilm)")
    parser.add_argument("--samples", type=int, default=256, help="calibration texts a task (minilm)")
    parser.add_argument("--only", default="", help="measure the mixtures whose label matches this expression alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        suite = {
            "digits": lambda: Digits(scratch),
            "text": lambda: Text(arguments.folder),
            "minilm": lambda: MiniLM(arguments.folder, arguments.texts, arguments.samples, scratch),
        }[arguments.suite]()
        rows = []
        for row in measure(suite, scratch, arguments.routing, arguments.only):
            # After every row, so that a long run that is stopped leaves what it has measured.
            rows.append(row)
            if arguments.results:
                arguments.results.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
            if arguments.picture:
                arguments.picture.write_text(picture(suite.name, rows))


def measure(suite, scratch, routing, only):
    """Print the table's rows and yield them."""
    model_size = suite.path("base").stat().st_size
    own = [accuracies(suite, dense(suite, suite.path(task)), [task])[0] for task in suite.tasks]
    print("| model | " + " | ".join(suite.tasks) + " | mean | of experts' | models |")
    print("|---|" + "--:|" * (len(suite.tasks) + 3))

    def row(label, values, size):
        mean = float(np.mean(values))
        share = 100 * mean / float(np.mean(own))
        print(f"| {label} | " + " | ".join(f"{v:.1f}" for v in [*values, mean, share]) + f" | {size:.2f} |", flush=True)
        return {"model": label, "accuracies": values, "mean": mean, "share": share, "models": size}

    yield row("base", accuracies(suite, dense(suite, suite.path("base"))), 1)
    yield row("experts, each on its own task", own, len(suite.tasks))
    for scaling in (0.3, 0.5):
        path = merged(suite, scratch, "task_arithmetic", **{"lambda": scaling})
        yield row(f"task arithmetic {scaling}", accuracies(suite, dense(suite, path)), 1)
    path = merged(suite, scratch, "ties", **{"lambda": 1.0, "density": 0.2})
    yield row("TIES, density 0.2", accuracies(suite, dense(suite, path)), 1)
    for label, upscaling in (("WEMoE, routed by hand", []), ("attention too, routed by hand", ["--attention"])):
        raw, collapsed = scratch / "raw.safetensors", scratch / "collapsed.safetensors"
        smelt("upscale", "--base", suite.path("base"), *experts(suite), *upscaling, "-o", raw)
        values = []
        for task in suite.tasks:
            smelt("collapse", raw, "--expert", task, "-o", collapsed)
            values += accuracies(suite, dense(suite, collapsed), [task])
        yield row(label, values, raw.stat().st_size / model_size)
    for label, *steps in MIXTURES:
        if not re.search(only, label):
            continue
        path, said = mixture(suite, scratch, *steps)
        for line in said.splitlines():
            if line.endswith("←"):
                label += f" (λ {line.split()[0]})"
        if routing and label.startswith("the same, λ"):
            routing.write_text((scratch / "report.svg").read_text())
        model = wemoe.load(path, suite.config, suite.model_class)
        yield row(label, accuracies(suite, model), path.stat().st_size / model_size)


def picture(name, rows):
    """Return an SVG of accuracy, in % of the experts', against size."""
    left, top, width, height = 60, 50, 560, 320
    low = 5 * int(min(row["share"] for row in rows) // 5)
    most = max(row["models"] for row in rows) + 0.2
    x = lambda size: left + width * (size - 0.8) / (most - 0.8)
    y = lambda share: top + height * (102 - share) / (102 - low)
    parts = [f'<text class="title" x="{left}" y="24">{escape(name)}: accuracy in % of the experts\' against size in models</text>']
    for share in range(low, 101, 5):
        parts.append(f'<path class="axis" d="M{left} {y(share):.1f} H{left + width}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share}</text>')
    for size in range(1, int(most) + 1):
        parts.append(f'<text x="{x(size):.1f}" y="{top + height + 18}" text-anchor="middle">{size}</text>')
    parts.append(f'<path class="aim" d="M{left} {y(97):.1f} H{x(1.6):.1f} V{top}"/>')
    for number, row in enumerate(rows, 1):
        kind = "same" if row["models"] > 1 else "opposite"
        cx, cy = x(row["models"]), y(row["share"])
        parts.append(f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="8"/>')
        parts.append(f'<text class="on" x="{cx:.1f}" y="{cy + 3:.1f}" text-anchor="middle">{number}</text>')
        label = f'{number}  {row["model"]}: {row["share"]:.1f} % at {row["models"]:.2f}'
        parts.append(f'<text x="{left + width + 30}" y="{top + 18 * number}">{escape(label)}</text>')
    total = max(top + height + 40, top + 18 * len(rows) + 30)
    style = (
        ":root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --line: #d1d9e0; --same: #1f6fd6; --opposite: #d9730d; --on: #fff; }"
        " @media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e6e9ed; --line: #3a424c; --same: #4d94f0; --opposite: #ef8f35; --on: #0b0d10; } }"
        " svg { background: var(--page); font: 12px system-ui, sans-serif; } text { fill: var(--ink); } .title { font-weight: 600; font-size: 14px; }"
        " .same { fill: var(--same); } .opposite { fill: var(--opposite); } .on { fill: var(--on); font-size: 9px; }"
        " .axis { stroke: var(--line); } .aim { stroke: var(--same); stroke-dasharray: 4 3; fill: none; }"
    )
    size = f"{left + width + 430} {total}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}" height="{total}" role="img">\n'
        f"<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
