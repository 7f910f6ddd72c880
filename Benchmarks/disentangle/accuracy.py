"""Measure what AWD does to the accuracy of merged models.

    SMELT=path/to/smelt python accuracy.py digits
    SMELT=path/to/smelt python accuracy.py encoder FOLDER      (from train_encoder.py)

Task vectors are cleaned by `smelt disentangle`, as they are and with every cleaning of the list
below; numpy merges base + λ·Σ v for the same λ for all. Printed is the mean accuracy in % over
the tasks for every λ, and the best one. λ is chosen on the test split, alike for all methods, so
the best figures flatter all of them alike.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
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


class Digits:
    def __init__(self):
        self.folder = HERE.parent.parent / "Fixtures" / "digits"
        sys.path.insert(0, str(self.folder))
        import evaluate

        self.tasks, self.accuracies = evaluate.TASKS, evaluate.accuracies


class Text:
    def __init__(self, folder):
        import torch
        import train_encoder

        self.folder, self.torch, self.module = Path(folder), torch, train_encoder
        self.tasks = ("language", "package", "token")
        self.heads = {k: torch.tensor(v) for k, v in load_file(self.folder / "heads.safetensors").items()}
        self.test = np.load(self.folder / "test.npz")
        self.encoder = train_encoder.Encoder()

    def accuracies(self, tensors):
        torch = self.torch
        self.encoder.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
        result = {}
        with torch.no_grad():
            for task in self.tasks:
                texts = torch.tensor(self.test[f"{task}.texts"].astype(np.int64))
                parts = [self.module.features(self.encoder, part, task) for part in texts.split(250)]
                scores = torch.cat(parts) @ self.heads[f"{task}.weight"].T + self.heads[f"{task}.bias"]
                right = scores.argmax(dim=1).numpy() == self.test[f"{task}.labels"]
                result[task] = 100 * right.mean()
        return result


def main(models):
    base = load_file(models.folder / "base.safetensors")
    family = ["--base", models.folder / "base.safetensors"]
    for task in models.tasks:
        family += ["--expert", f"{task}={models.folder / task}.safetensors"]

    def row(label, accuracies):
        values = [accuracies[task] for task in models.tasks]
        print(f"{label:48}" + "".join(f"{v:10.1f}" for v in [*values, np.mean(values)]), flush=True)
        return np.mean(values)

    print(f"{'accuracy in %':48}" + "".join(f"{name:>10}" for name in [*models.tasks, "mean"]))
    row("base", models.accuracies(base))
    for task in models.tasks:
        row(f"expert {task}", models.accuracies(load_file(models.folder / f"{task}.safetensors")))

    plain = [
        {name: expert[name] - base[name] for name in base}
        for expert in (load_file(models.folder / f"{task}.safetensors") for task in models.tasks)
    ]
    candidates = {"task arithmetic": (plain, "")}
    with tempfile.TemporaryDirectory() as folder:
        for cleaning in CLEANINGS:
            out = Path(folder) / cleaning
            command = [os.environ["SMELT"], "disentangle", *family, "-o", out, "--clean", cleaning, "--dtype", "F32"]
            done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
            import json

            whole = json.loads(done.stdout)["whole"]
            kept = min(whole["retainedNorms"].values())
            note = f"|cos| {whole['meanCosineBefore']:.4f} -> {whole['meanCosineAfter']:.4f}, kept >= {kept:.3f}"
            candidates[cleaning] = ([load_file(out / f"{task}.safetensors") for task in models.tasks], note)
        print(f"\n{'mean accuracy at λ =':48}" + "".join(f"{s:7}" for s in LAMBDAS) + "   cosines, norms")
        best = {}
        for label, (vectors, note) in candidates.items():
            means = []
            for scaling in LAMBDAS:
                merged = {n: base[n] + np.float32(scaling) * sum(v[n] for v in vectors) for n in base}
                accuracies = models.accuracies(merged)
                means.append(np.mean(list(accuracies.values())))
                if label not in best or means[-1] > best[label][0]:
                    best[label] = (means[-1], scaling, accuracies)
            print(f"{label:48}" + "".join(f"{m:7.1f}" for m in means) + f"   {note}", flush=True)
    print(f"\n{'at the best λ of each':48}" + "".join(f"{name:>10}" for name in [*models.tasks, "mean"]))
    for label, (_, scaling, accuracies) in best.items():
        row(f"{label}, λ = {scaling}", accuracies)


if __name__ == "__main__":
    main(Digits() if sys.argv[1] == "digits" else Text(sys.argv[2]))
