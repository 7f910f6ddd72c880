"""Measure what AWD does to the accuracy of merges of the digit experts.

    SMELT=path/to/smelt python accuracy.py

Task vectors are cleaned by `smelt disentangle`, as they are and with every cleaning of the list
below; numpy merges base + λ·Σ v for the same λ for all. Printed is the mean accuracy in % over
the tasks for every λ, and the best one. λ is chosen on the test split, alike for all methods, so
the best figures flatter all of them alike.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

DIGITS = Path(__file__).parent.parent.parent / "Fixtures" / "digits"
sys.path.insert(0, str(DIGITS))
from evaluate import TASKS, accuracies  # noqa: E402

LAMBDAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]
CLEANINGS = [
    "awd-row",
    "awd-row,rate=1e-2",
    "awd-row,optimizer=converged",
    "awd-model",
    "awd-model,penalty=0.01",
    "awd-model,optimizer=converged",
    "awd-model,scope=tensor,optimizer=converged",
    "awd-model,scope=block,optimizer=converged",
]


def main():
    base = load_file(DIGITS / "base.safetensors")
    family = ["--base", DIGITS / "base.safetensors"]
    for task in TASKS:
        family += ["--expert", f"{task}={DIGITS / task}.safetensors"]

    def row(label, found):
        values = [found[task] for task in TASKS]
        print(f"{label:48}" + "".join(f"{v:10.1f}" for v in [*values, np.mean(values)]), flush=True)
        return np.mean(values)

    print(f"{'accuracy in %':48}" + "".join(f"{name:>10}" for name in [*TASKS, "mean"]))
    row("base", accuracies(base))
    for task in TASKS:
        row(f"expert {task}", accuracies(load_file(DIGITS / f"{task}.safetensors")))

    plain = [
        {name: expert[name] - base[name] for name in base}
        for expert in (load_file(DIGITS / f"{task}.safetensors") for task in TASKS)
    ]
    candidates = {"task arithmetic": (plain, "")}
    with tempfile.TemporaryDirectory() as folder:
        for cleaning in CLEANINGS:
            out = Path(folder) / cleaning
            command = [os.environ["SMELT"], "disentangle", *family, "-o", out, "--clean", cleaning, "--dtype", "F32"]
            done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
            whole = json.loads(done.stdout)["whole"]
            kept = min(whole["retainedNorms"].values())
            note = f"|cos| {whole['meanCosineBefore']:.4f} -> {whole['meanCosineAfter']:.4f}, kept >= {kept:.3f}"
            candidates[cleaning] = ([load_file(out / f"{task}.safetensors") for task in TASKS], note)
        print(f"\n{'mean accuracy at λ =':48}" + "".join(f"{s:7}" for s in LAMBDAS) + "   cosines, norms")
        best = {}
        for label, (vectors, note) in candidates.items():
            means = []
            for scaling in LAMBDAS:
                merged = {n: base[n] + np.float32(scaling) * sum(v[n] for v in vectors) for n in base}
                found = accuracies(merged)
                means.append(np.mean(list(found.values())))
                if label not in best or means[-1] > best[label][0]:
                    best[label] = (means[-1], scaling, found)
            print(f"{label:48}" + "".join(f"{m:7.1f}" for m in means) + f"   {note}", flush=True)
    print(f"\n{'at the best λ of each':48}" + "".join(f"{name:>10}" for name in [*TASKS, "mean"]))
    for label, (_, scaling, found) in best.items():
        row(f"{label}, λ = {scaling}", found)


if __name__ == "__main__":
    main()
