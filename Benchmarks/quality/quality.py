"""Measure what mixtures of experts are worth: accuracy and size, beside merges of the same models.

    SMELT=path/to/smelt python quality.py digits [--results FILE.json] [--picture FILE.svg] [--routing FILE.svg]
    SMELT=path/to/smelt python quality.py minilm FOLDER [--texts N]    (from ../minilm/finetune.py)
    SMELT=path/to/smelt python quality.py text FOLDER                  (from train_text.py)

A long run can be several, on a core each: `--only EXPRESSION --results PART.json`, and then one
with `--known PART.json …` for the whole table.

Every model is made by `smelt` alone, from the fine-tuned models and unlabelled texts or images that
are not among the test's, and is run by PyTorch (mixtures through Scripts/wemoe.py) on test samples
that nothing else has seen. Printed are accuracies in %, the mean in % of the experts' own, with
standard errors, and the size in models of the file as it is and of the bundle that `smelt pack`
makes of it (of the experts: with the base, as a family).
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

EXPERTS = "experts, each on its own task"
ROUTING_SHOWN = "the same, λ chosen"
# Which activations the routers are fitted to: the mixture's own, those of more samples, the base's.
PROGRESSIVE, MORE, RECORDED = "progressive", "progressive, more samples", "recorded"
OUTPUT, RIDGE, CHOSEN = ["--method", "output"], ["--method", "ridge"], ["--choose-lambda"]
# What calibrate reads of the MiniLM texts: the labels are none of it.
INPUTS = ("input_ids", "attention_mask", "task")
ATTENTION = ["--attention", "--store"]
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
    ("int8 task vectors", ["--store", "int8"], OUTPUT, PROGRESSIVE),
    ("int4 task vectors", ["--store", "int4"], OUTPUT, PROGRESSIVE),
    ("rank 16 task vectors", ["--store", "lowrank", "--rank", "16"], OUTPUT, PROGRESSIVE),
    ("AWD + WEMoE", ["--clean", "awd-row"], OUTPUT, PROGRESSIVE),
    ("attention too, int8", [*ATTENTION, "int8"], OUTPUT, PROGRESSIVE),
    ("attention too, int4", [*ATTENTION, "int4"], OUTPUT, PROGRESSIVE),
    ("attention too, int4, λ chosen", [*ATTENTION, "int4"], OUTPUT + CHOSEN, PROGRESSIVE),
    ("attention too, int4, linear routers", [*ATTENTION, "int4", "--router-depth", "1"], OUTPUT, PROGRESSIVE),
    (
        "attention too, int4, linear routers, more samples",
        [*ATTENTION, "int4", "--router-depth", "1"],
        [*OUTPUT, "--samples", "100000"],
        MORE,
    ),
]


class Digits:
    """The digits' encoders: four tasks, 500 test images each."""

    name = "digits, CLIP vision encoder of 4 layers"
    folder = ROOT / "Fixtures" / "digits"
    model_class = transformers.CLIPVisionModel
    flags = ["--heads", "4"]
    batch = 25  # samples at a time: a mixture makes every linear map anew for each of them

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
        self.inputs, self.more_inputs = scratch / "inputs.safetensors", None
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
    batch = 10

    def __init__(self, folder):
        self.folder = Path(folder)
        self.tasks = ("language", "package", "token")
        self.config = transformers.AutoConfig.from_pretrained(self.folder)
        self.inputs, self.more_inputs = self.folder / "inputs.safetensors", None
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
    batch = 10

    def __init__(self, folder, texts, samples, scratch):
        self.folder = Path(folder)
        self.tasks = tuple(json.loads((self.folder / "tasks.json").read_text()))
        self.config = transformers.AutoConfig.from_pretrained(self.folder / "f32" / "base")
        given = np.load(self.folder / "calibration.npz")
        rows = np.concatenate([np.flatnonzero(given["task"] == n)[:samples] for n in range(len(self.tasks))])
        self.inputs = scratch / "inputs.npz"
        np.savez(self.inputs, **{key: given[key][rows] for key in INPUTS})
        more = np.load(self.folder / "validation.npz")
        self.more_inputs = scratch / "more-inputs.npz"
        np.savez(self.more_inputs, **{key: np.concatenate([given[key], more[key]]) for key in INPUTS})
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
def answers(suite, model, tasks=None):
    """Return which of every task's test samples (or of some tasks') a model gets right, [samples] each."""
    result = {}
    for task in tasks or suite.tasks:
        inputs, labels = suite.samples(task)
        hits = []
        for start in range(0, len(labels), suite.batch):
            batch = {name: tensor[start : start + suite.batch] for name, tensor in inputs.items()}
            if "attention_mask" in batch:
                length = int(batch["attention_mask"].sum(dim=1).max())
                batch = {name: tensor[:, :length] for name, tensor in batch.items()}
            features = suite.features(task, batch, model(**batch))
            scores = features @ suite.heads[f"{task}.weight"].T + suite.heads[f"{task}.bias"]
            hits.append(scores.argmax(1) == labels[start : start + suite.batch])
        result[task] = torch.cat(hits).numpy()
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
    given = ["--progressive", suite.more_inputs if activations == MORE else suite.inputs, *flags]
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


def models(suite, scratch, routing):
    """Yield (label, function) for every row; the function makes and judges the model.

    It returns {task: right answers}, the size in bytes, packed as a bundle too, and the λ chosen.
    """
    base = suite.path("base")

    def judged(path):
        return answers(suite, dense(suite, path)), path.stat().st_size, packed(scratch, path), None

    def each_on_its_own():
        family = scratch / "family.safetensors.zst"
        smelt("pack", "--base", base, *(f"{task}={suite.path(task)}" for task in suite.tasks), family)
        hits = {task: answers(suite, dense(suite, suite.path(task)), [task])[task] for task in suite.tasks}
        return hits, sum(suite.path(task).stat().st_size for task in suite.tasks), family.stat().st_size, None

    def routed_by_hand(upscaling):
        raw, collapsed = scratch / "raw.safetensors", scratch / "collapsed.safetensors"
        smelt("upscale", "--base", base, *experts(suite), *upscaling, "-o", raw)
        hits = {}
        for task in suite.tasks:
            smelt("collapse", raw, "--expert", task, "-o", collapsed)
            hits |= answers(suite, dense(suite, collapsed), [task])
        return hits, raw.stat().st_size, packed(scratch, raw), None

    def routed(label, steps):
        path, said = mixture(suite, scratch, *steps)
        chosen = [line.split()[0] for line in said.splitlines() if line.endswith("←")]
        if routing and label == ROUTING_SHOWN:
            routing.write_text((scratch / "report.svg").read_text())
        model = wemoe.load(path, suite.config, suite.model_class)
        return answers(suite, model), path.stat().st_size, packed(scratch, path), (*chosen, None)[0]

    yield EXPERTS, each_on_its_own
    yield "base", lambda: judged(base)
    for scaling in (0.3, 0.5):
        yield (
            f"task arithmetic {scaling}",
            lambda scaling=scaling: judged(merged(suite, scratch, "task_arithmetic", **{"lambda": scaling})),
        )
    yield "TIES, density 0.2", lambda: judged(merged(suite, scratch, "ties", **{"lambda": 1.0, "density": 0.2}))
    yield "WEMoE, routed by hand", lambda: routed_by_hand([])
    yield "attention too, routed by hand", lambda: routed_by_hand(["--attention"])
    for label, *steps in MIXTURES:
        if steps[-1] == MORE and suite.more_inputs is None:
            continue
        yield label, lambda label=label, steps=steps: routed(label, steps)


def packed(scratch, path):
    """Return the size in bytes of a model as a bundle."""
    bundle = scratch / "packed.safetensors.zst"
    smelt("pack", path, bundle)
    return bundle.stat().st_size


def measure(suite, scratch, known, only, routing):
    """Yield the table's rows: {model, λ, right answers by task, sizes}; those known are not measured again."""
    size = suite.path("base").stat().st_size
    for label, judge in models(suite, scratch, routing):
        if label in known:
            yield known[label]
        elif label == EXPERTS or re.search(only, label):
            hits, own, bundle, scaling = judge()
            bits = {task: "".join(map(str, right.astype(int))) for task, right in hits.items()}
            yield {"model": label, "lambda": scaling, "models": own / size, "packed": bundle / size, "right": bits}


def judged(row, experts_row):
    """Return the row with its accuracies, their mean, its share of the experts' (all in %), and standard errors.

    The share's is of pairs: both models have answered the same samples.
    """
    ours, theirs = (
        [np.array(list(bits), float) for bits in r["right"].values()] for r in (row, experts_row)
    )
    accuracies, own = ([100 * right.mean() for right in part] for part in (ours, theirs))
    mean, count = np.mean(accuracies), len(ours)
    share = mean / np.mean(own)

    def error(parts):
        return 100 * np.sqrt(sum(part.var() / len(part) for part in parts)) / count

    share_error = 100 * error([a - share * b for a, b in zip(ours, theirs, strict=True)]) / np.mean(own)
    label = row["model"] + (f" (λ {row['lambda']})" if row["lambda"] else "")
    return row | {
        "model": label, "accuracies": accuracies, "mean": mean, "mean error": error(ours),
        "share": 100 * share, "share error": share_error,
    }  # fmt: skip


def line(row):
    """Return a row of the Markdown table."""
    cells = [row["model"], *(f"{value:.1f}" for value in row["accuracies"])]
    for name in ("mean", "share"):
        cells.append(f"{row[name]:.1f} ± {row[f'{name} error']:.1f}")
    return "| " + " | ".join([*cells, f"{row['models']:.2f}", f"{row['packed']:.2f}"]) + " |"


def main():
    """Measure everything and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("digits", "text", "minilm"))
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--results", type=Path, help="write what was measured as JSON, after every row")
    parser.add_argument("--known", type=Path, nargs="+", default=[], help="results whose rows are not measured again")
    parser.add_argument("--picture", type=Path, help="draw accuracy against size")
    parser.add_argument("--routing", type=Path, help=f"the report of calibrate for the row '{ROUTING_SHOWN}'")
    parser.add_argument("--texts", type=int, default=1200, help="test texts a task (minilm)")
    parser.add_argument("--samples", type=int, default=256, help="calibration texts a task (minilm)")
    parser.add_argument("--only", default="", help="measure only the models whose label matches this expression")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        suite = {
            "digits": lambda: Digits(scratch),
            "text": lambda: Text(arguments.folder),
            "minilm": lambda: MiniLM(arguments.folder, arguments.texts, arguments.samples, scratch),
        }[arguments.suite]()
        known = {row["model"]: row for path in arguments.known for row in json.loads(path.read_text())}
        counts = {len(bits) for row in known.values() for bits in row["right"].values()}
        if counts - {len(suite.samples(task)[1]) for task in suite.tasks}:
            sys.exit("the known results are of other numbers of test samples")
        print(f"| model | {' | '.join(suite.tasks)} | mean | of experts' | models | packed |")
        print("|---|" + "--:|" * (len(suite.tasks) + 4))
        rows = []
        for row in measure(suite, scratch, known, arguments.only, arguments.routing):
            # After every row, so that a long run that is stopped leaves what it has measured.
            rows.append(row)
            print(line(judged(row, rows[0])), flush=True)
            if arguments.results:
                arguments.results.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
            if arguments.picture:
                arguments.picture.write_text(picture(suite.name, [judged(row, rows[0]) for row in rows]))


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
        kind = "same" if row["models"] > 1.1 else "opposite"  # a mixture or a single model
        cx, cy = x(row["models"]), y(row["share"])
        parts.append(f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="8"/>')
        parts.append(f'<text class="on" x="{cx:.1f}" y="{cy + 3:.1f}" text-anchor="middle">{number}</text>')
        label = f'{number}  {row["model"]}: {row["share"]:.1f} % at {row["models"]:.2f}'
        parts.append(f'<text x="{left + width + 30}" y="{top + 18 * number}">{escape(label)}</text>')
    total = max(top + height + 40, top + 18 * len(rows) + 30)
    # Colours are written out, not variables: not every viewer of SVG knows those.
    style = (
        "svg { background: #fff; font: 12px system-ui, sans-serif; } text { fill: #1b1f24; }"
        " .title { font-weight: 600; font-size: 14px; } .on { fill: #fff; font-size: 9px; }"
        " circle { stroke: #fff; } .same { fill: #1f6fd6; } .opposite { fill: #d9730d; }"
        " .axis { stroke: #d1d9e0; } .aim { stroke: #1f6fd6; stroke-dasharray: 4 3; fill: none; }"
        " @media (prefers-color-scheme: dark) { svg { background: #14171c; } text { fill: #e6e9ed; }"
        " .on { fill: #0b0d10; } circle { stroke: #14171c; } .same { fill: #4d94f0; } .opposite { fill: #ef8f35; }"
        " .axis { stroke: #3a424c; } .aim { stroke: #4d94f0; } }"
    )
    size = f"{left + width + 480} {total}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}" height="{total}" role="img">\n'
        f"<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
