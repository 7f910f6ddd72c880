"""Merging beside mergekit, or beside reading the inputs and writing the output with plain tools.

    Scripts/setup --python && swift build -c release --product smelt
    python3 -m venv .venv-mergekit && .venv-mergekit/bin/pip install mergekit==0.1.5
    .venv/bin/python Benchmarks/merge.py --mergekit .venv-mergekit/bin/mergekit-yaml [FOLDER]

Makes a base and three fine-tunes of 1 GB each (--gigabytes) in FOLDER (default: a temporary one)
unless they are there, and merges them by each method; without --mergekit the plain tools are timed
beside it. The caches are warm, unless --cold drops them before every run.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from pairs import Side, compare

SMELT = Path(__file__).parents[1] / ".build" / "release" / "smelt"

RECIPES = {
    "linear": (None, "weight: 0.3", (1, 2, 3)),
    "task_arithmetic": (0, "weight: 0.3", (1, 2, 3)),
    "slerp": (0, None, (0, 1)),
    "ties": (0, "weight: 0.3, density: 0.5", (1, 2, 3)),
    "dare_ties": (0, "weight: 0.3, density: 0.5", (1, 2, 3)),
}


def recipe(folder, method, output):
    """Write the method's recipe to the folder `output`; return its path and the inputs' files."""
    base, parameters, models = RECIPES[method]
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if base is not None:
        lines.append(f"base_model: {folder}/model{base}")
    lines.append("models:")
    for model in models:
        lines.append(f"  - model: {folder}/model{model}")
        if parameters:
            lines.append(f"    parameters: {{{parameters}}}")
    if method == "slerp":
        lines.append("parameters: {t: 0.4}")
    path = output / f"{method}.yml"
    path.write_text("\n".join(lines) + "\n")
    inputs = sorted(set(models) | ({base} - {None}))
    return path, [folder / f"model{model}" / "model.safetensors" for model in inputs]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--methods", nargs="*", default=list(RECIPES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="pairs that are not counted")
    parser.add_argument("--memory", default="160MiB")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--output", type=Path, help="where the results go; default: FOLDER")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    if not (folder / "model3" / "model.safetensors").exists():
        maker = Path(__file__).parent / "merge_models.py"
        subprocess.run(
            [sys.executable, maker, folder, "--gigabytes", str(options.gigabytes)], check=True
        )
    output = options.output or folder
    output.mkdir(parents=True, exist_ok=True)
    for method in options.methods:
        path, inputs = recipe(folder, method, output)
        smelt = Side(
            f"smelt {method}", [
                SMELT, "merge", "--quiet", "--memory", options.memory, path, output / "by-smelt",
            ],
            outputs=[output / "by-smelt"],
        )
        if options.mergekit:
            other = Side(
                f"mergekit {method}", [options.mergekit, path, output / "by-mergekit"],
                outputs=[output / "by-mergekit"],
            )
        else:
            read, copy = " ".join(map(str, inputs)), output / "copy"
            other = Side(
                "cat inputs, cp and sync one",
                ["sh", "-c", f"cat {read} > /dev/null && cp {inputs[0]} {copy} && sync {copy}"],
                outputs=[copy],
            )
        pairs = {"runs": options.runs, "cold": options.cold, "warmup": options.warmup}
        print(compare(smelt, other, **pairs), flush=True)


if __name__ == "__main__":
    main()
