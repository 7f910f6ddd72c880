"""Print the demo's table: sizes, cosines of the task vectors, and accuracies.

    python demo-report.py FOLDER

FOLDER is what Scripts/demo wrote. Nothing here knows of Smelt's code: the files are read with
numpy and h5py alone.
"""

import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

DIGITS = Path(__file__).parent.parent / "Fixtures" / "digits"
sys.path.insert(0, str(DIGITS))
import evaluate  # noqa: E402

SCALING = 0.3


def task_vectors(path):
    """Return {task: {tensor: array}} of a checkpoint of task vectors named task/tensor."""
    vectors = {task: {} for task in evaluate.TASKS}
    for name, array in evaluate.read_checkpoint(path).items():
        task, tensor = name.split("/", 1)
        vectors[task][tensor] = array
    return vectors


def task_arithmetic(base, vectors):
    """Return base + SCALING * the sum of the task vectors."""
    return {
        name: array + np.float32(SCALING) * sum(vector[name] for vector in vectors.values())
        for name, array in base.items()
    }


def mean_cosine(vectors, names):
    """Return the mean |cos| between the tasks' vectors over all tensors in `names`."""
    flat = [np.concatenate([v[n].ravel().astype(np.float64) for n in names]) for v in vectors.values()]
    pairs = combinations([vector / np.linalg.norm(vector) for vector in flat], 2)
    return np.mean([abs(one @ other) for one, other in pairs])


def size(*paths):
    return f"{sum(os.path.getsize(path) for path in paths) / 1e6:6.2f} MB"


def main(folder):
    base = evaluate.read_checkpoint(DIGITS / "base.safetensors")
    plain, cleaned = (task_vectors(folder / f"{n}.safetensors") for n in ("vectors", "cleaned"))
    changed = [name for name in base if not np.array_equal(plain["upright"][name], cleaned["upright"][name])]

    inputs = [DIGITS / f"{name}.safetensors" for name in ("base", *evaluate.TASKS)]
    print(f"base and {len(evaluate.TASKS)} experts      {size(*inputs)}")
    print(f"mixture of experts      {size(folder / 'calibrated.h5')}")
    print(f"mixture, packed         {size(folder / 'calibrated.safetensors.zst')}")
    print()
    print(f"mean |cos| of the task vectors, {len(changed)} cleaned matrices together:")
    print(f"  before cleaning {mean_cosine(plain, changed):.4f}, after {mean_cosine(cleaned, changed):.4f}")
    print()

    rows = {"base": base}
    for task in evaluate.TASKS:
        rows[f"expert {task}"] = evaluate.read_checkpoint(DIGITS / f"{task}.safetensors")
    rows["task arithmetic"] = task_arithmetic(base, plain)
    rows["AWD + task arithmetic"] = task_arithmetic(base, cleaned)
    rows["mixture, uncalibrated"] = evaluate.read_checkpoint(folder / "moe.h5")
    rows["mixture, calibrated"] = evaluate.read_checkpoint(folder / "calibrated.h5")
    print(evaluate.table({label: evaluate.accuracies(tensors) for label, tensors in rows.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
