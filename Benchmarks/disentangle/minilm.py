"""Measure what AWD does to merges of the MiniLM experts of ../minilm.

    SMELT=path/to/smelt python minilm.py FOLDER        (FOLDER made by ../minilm/finetune.py)

Every row is `smelt merge` with a recipe; cleaning is the recipe's `task_vectors`. λ is chosen for each
method on validation texts, the same for all, and the accuracies are those of the test texts.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "minilm"))
from evaluate import Judge  # noqa: E402

LAMBDAS = [0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
METHODS = {
    "task arithmetic": ("task_arithmetic", None),
    "awd-row + task arithmetic": ("task_arithmetic", "awd-row"),
    "awd-row converged + task arithmetic": ("task_arithmetic", "{scope: row, optimizer: converged}"),
    "awd-model + task arithmetic": ("task_arithmetic", "awd-model"),
    "awd-model converged + task arithmetic": ("task_arithmetic", "{scope: model, optimizer: converged}"),
    "ties": ("ties", None),
}


def merge(folder, tasks, method, cleaning, scaling, place):
    """Merge with weight 1 and `scaling` as λ; return the file and what the command said."""
    lines = [f"merge_method: {method}", f"base_model: {folder}/f32/base", "models:"]
    lines += [f"  - model: {folder}/f32/{task}" for task in tasks]
    density = ", density: 0.2, normalize: true" if method == "ties" else ""
    lines += [f"parameters: {{weight: 1, lambda: {scaling}{density}}}"]
    if cleaning:
        lines += [f"task_vectors: {{clean: {cleaning}}}"]
    recipe, output = place / "recipe.yml", place / "merged.safetensors"
    recipe.write_text("\n".join(lines) + "\n")
    output.unlink(missing_ok=True)
    done = subprocess.run(
        [os.environ["SMELT"], "merge", recipe, output], check=True, capture_output=True, text=True
    )
    said = [line for line in done.stdout.splitlines() if "|cos|" in line]
    return output, said[0] if said else ""


def main(folder, texts, methods):
    folder = folder.absolute()
    validation, test = Judge(folder, "validation"), Judge(folder, "test")
    for part in validation.parts:
        part.update({name: array[:texts] for name, array in part.items()})
    tasks = test.tasks
    print(f"\n{'mean validation accuracy at λ =':40}" + "".join(f"{x:7}" for x in LAMBDAS))
    chosen = []
    with tempfile.TemporaryDirectory() as place:
        for label in methods:
            method, cleaning = METHODS[label]
            means = []
            for scaling in LAMBDAS:
                # TIES with normalisation is a mean; λ up to k makes it as long as a sum.
                used = scaling * len(tasks) if method == "ties" else scaling
                output, said = merge(folder, tasks, method, cleaning, round(used, 3), Path(place))
                validation.open(output)
                accuracies = validation.accuracies()
                means.append(sum(accuracies.values()) / len(tasks))
            print(f"{label:40}" + "".join(f"{100 * x:7.1f}" for x in means) + f"   {said}", flush=True)
            best = LAMBDAS[means.index(max(means))]
            used = round(best * len(tasks) if method == "ties" else best, 3)
            output, _ = merge(folder, tasks, method, cleaning, used, Path(place))
            test.open(output)
            chosen.append((f"{label}, λ {used}", test.accuracies()))
            print(test.row(*chosen[-1]), file=sys.stderr, flush=True)
    print("\n" + test.header("test accuracy in %"))
    for name in ("base", *tasks):
        test.open(folder / "f32" / name)
        label = name if name == "base" else f"expert {name}"
        print(test.row(label, test.accuracies()), flush=True)
    for label, accuracies in chosen:
        print(test.row(label, accuracies))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--validation", type=int, default=480, help="validation texts a task")
    parser.add_argument("--method", action="append", choices=METHODS, help="give it once for each; default: all")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.validation, arguments.method or METHODS)
