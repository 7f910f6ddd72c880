"""Every method on Llama-shaped models, tensor by tensor beside mergekit: the largest differences.

    .venv/bin/python Benchmarks/agreement.py --mergekit .venv-mergekit/bin/mergekit-yaml [FOLDER]

Makes F32 models (80 MB each unless --gigabytes says more) in FOLDER, merges them by both, and exits with
1 where they differ by more than the arithmetic explains. mergekit computes in F32 where the results
should be the same bits, and in F64 for methods that sum over whole tensors: its F32 sums of millions of
squares are less exact than what is compared. DELLA is left out: its draws are not
mergekit's. Of equal magnitudes at the threshold TIES and breadcrumbs keep the first, mergekit any: the
share of differing elements is shown. Nor is there an agreement on Arcee Fusion where mergekit samples its quantiles, in tensors
of more than a million elements: their share of differing elements is shown. dare_* run with --rng mergekit.

With --bfloat16 models and results are BF16: what differs in the last bits of F32 may round to neighbours.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

SMELT = Path(__file__).parents[1] / ".build" / "release" / "smelt"
SEED = "7"
WEIGHTS = "weight: [0.2, 0.7]"
SPARSE = "weight: 0.7, density: 0.4"
FILTERS = "weight: [{filter: mlp, value: [0.1, 0.9]}, {filter: q_proj, value: 0.3}, {value: 0.6}]"

# Recipe: method, base, models, parameters, largest difference. Model 0 is the base of the others.
RECIPES = {
    "linear": ("linear", None, (0, 1, 2), WEIGHTS, 0),
    "linear, filters": ("linear", None, (0, 1, 2), FILTERS, 0),
    "linear, sum": ("linear", 0, (0, 1, 2), "weight: 0.3, normalize: false", 0),
    "task_arithmetic": ("task_arithmetic", 0, (1, 2, 3), WEIGHTS + ", lambda: 0.9", 0),
    "ties": ("ties", 0, (1, 2, 3), SPARSE, None),
    "ties, int8_mask": ("ties", 0, (1, 2, 3), SPARSE + ", int8_mask: true, normalize: false", None),
    "breadcrumbs": ("breadcrumbs", 0, (1, 2, 3), SPARSE + ", gamma: 0.05", None),
    "breadcrumbs_ties": ("breadcrumbs_ties", 0, (1, 2, 3), SPARSE + ", gamma: 0.05", None),
    "dare_linear": ("dare_linear", 0, (1, 2, 3), SPARSE, 6e-8),
    "dare_ties": ("dare_ties", 0, (1, 2, 3), SPARSE, 6e-8),
    "slerp": ("slerp", 0, (0, 1), "t: [{filter: mlp, value: [0, 1]}, {value: 0.4}]", 6e-8),
    "nuslerp": ("nuslerp", None, (1, 2), WEIGHTS, 2.4e-7),
    "nuslerp, base": ("nuslerp", 0, (1, 2), WEIGHTS, 2.4e-7),
    "nuslerp, rows": ("nuslerp", 0, (1, 2), WEIGHTS + ", nuslerp_flatten: false", 2.4e-7),
    "multislerp": ("multislerp", None, (1, 2, 3), WEIGHTS, 2.4e-7),
    "multislerp, base": ("multislerp", 0, (1, 2, 3), WEIGHTS, 2.4e-7),
    "karcher": ("karcher", None, (1, 2, 3), "", 1e-6),
    "model_stock": ("model_stock", 0, (1, 2, 3), "", 2.4e-7),
    "model_stock, rows": ("model_stock", 0, (1, 2, 3), "filter_wise: true", 2.4e-7),
    "nearswap": ("nearswap", 0, (0, 1), "t: 0.0005", 2.4e-7),
    "sce": ("sce", 0, (1, 2, 3), "select_topk: 0.4", 1e-6),
    "ram": ("ram", 0, (1, 2, 3), "epsilon: 0.0005", 0),
    "ramplus_tl": ("ramplus_tl", 0, (1, 2, 3), "epsilon: 0.0005", 2.4e-7),
    "arcee_fusion": ("arcee_fusion", 0, (0, 1), "", None),
}


def write_recipe(path, dtype, out, folder, method, base, models, parameters):
    lines = [f"merge_method: {method}", f"dtype: {dtype}", f"out_dtype: {out}", f"parameters: {{{parameters}}}", "models:"]
    lines += [f"  - model: {folder}/model{model}" for model in models]
    if base is not None:
        lines.append(f"base_model: {folder}/model{base}")
    path.write_text("\n".join(lines) + "\n")


def run(*command):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stderr[-2000:]}")


def tensors(path):
    """Return the tensors of a safetensors file of F32 or BF16 by name; BF16 as 16-bit codes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    types = {"F32": numpy.float32, "BF16": numpy.uint16}
    return {
        name: numpy.memmap(path, types[entry["dtype"]], "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def numbers(values):
    return values if values.dtype == numpy.float32 else (values.astype(numpy.uint32) << 16).view(numpy.float32)


def differences(ours, theirs):
    """Return the largest difference, its tensor, how many elements differ, and how many there are."""
    largest, worst, different, count = 0.0, "", 0, 0
    ours, theirs = tensors(ours), tensors(theirs)
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    for name, one in ours.items():
        other = theirs[name]
        assert one.shape == other.shape and one.dtype == other.dtype, name
        gap = numpy.abs(numbers(one) - numbers(other))
        if not gap.max() <= largest:  # NaN as well
            largest, worst = float(gap.max()), name
        different += int((gap != 0).sum())
        count += one.size
    return largest, worst, different, count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--mergekit", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=0.08)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--bfloat16", action="store_true")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    if not (folder / "model3" / "model.safetensors").exists():
        run(sys.executable, Path(__file__).parent / "merge_models.py", folder,
            "--gigabytes", options.gigabytes, "--hidden", options.hidden,
            *([] if options.bfloat16 else ["--float32"]))  # fmt: skip
    out = "bfloat16" if options.bfloat16 else "float32"
    failed = False
    for name in options.recipes:
        *recipe, allowed = RECIPES[name]
        path, ours, theirs = folder / "recipe.yml", folder / "ours", folder / "theirs"
        for output in (ours, theirs):
            shutil.rmtree(output, ignore_errors=True)
        write_recipe(path, "float32", out, folder, *recipe)
        run(SMELT, "merge", "--quiet", "--rng", "mergekit", "--seed", SEED, path, ours)
        if allowed and not name.startswith("dare"):
            write_recipe(path, "float64", out, folder, *recipe)
        run(options.mergekit, path, theirs, "--random-seed", SEED)
        largest, worst, different, count = differences(
            ours / "model.safetensors", next(theirs.glob("*.safetensors"))
        )
        # Rounding to BF16 makes a unit of the smallest difference.
        if options.bfloat16 and allowed:
            allowed = None
        is_far = allowed is not None and not largest <= allowed
        failed |= is_far
        print(
            f"{name:20} {largest:8.1e}  {100 * different / count:7.4f} % of {count} elements differ  "
            f"{f'TOO FAR: {allowed:.1e} is allowed' if is_far else ''}  {worst}",
            flush=True,
        )
        for output in (ours, theirs):
            shutil.rmtree(output)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
