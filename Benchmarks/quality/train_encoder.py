"""Train a text encoder and three experts, for measuring mixtures on more than digits.

    python train_encoder.py FOLDER

A BERT-like encoder over bytes (4 layers, width 160; 1.3 million parameters) learns to fill in
masked bytes of the text files that every Linux machine with Python has: the standard library, the
system's headers and scripts. Three experts are fine-tuned from it, head and encoder, to tell

    language   what kind of file 32 bytes are from (Python, C, Perl, shell, ...),
    package    which package of Python's standard library they are from,
    token      what kind of token byte 16 of Python code belongs to (keyword, name, string, ...).

FOLDER gets base, experts and heads as safetensors, and test.npz. Train and test texts come from
different files (`package`: every fifth file is for testing). Seeds are fixed, but the texts are
the machine's own: another machine gives other models.
"""

import io
import keyword
import sys
import sysconfig
import time
import tokenize
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

LAYERS, WIDTH, MLP_WIDTH, HEADS, LENGTH = 4, 160, 640, 4, 32
MASK = 256
BATCH = 16
PRETRAIN_STEPS, FINETUNE_STEPS = 300, 200
SEED = 2024


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, MLP_WIDTH), nn.Linear(MLP_WIDTH, WIDTH)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = (
            part.view(n, length, HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    """Bytes in, one vector a byte out; the middle vector also stands for the whole text."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(257, WIDTH)
        self.position_embed = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = self.embed(x) + self.position_embed
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def features(encoder, texts, task):
    """What the head of a task sees: the byte in question, or the mean over the text."""
    x = encoder(texts)
    return x[:, LENGTH // 2] if task == "token" else x.mean(dim=1)


# --- Texts ---


def files(folder, *patterns):
    found = sorted(path for pattern in patterns for path in Path(folder).rglob(pattern))
    return [path for path in found if path.is_file() and 500 < path.stat().st_size < 400_000]


def kinds():
    """Return {task: [[bytes of a file, ...] for each class]}."""
    library = Path(sysconfig.get_path("stdlib"))
    language = [
        files(library, "*.py"),
        files("/usr/include", "*.h"),
        files("/usr/share/perl", "*.pm", "*.pl"),
        [path for path in files("/usr/bin", "*") + files("/etc", "*") if shebang(path)],
        files("/usr/share/doc", "copyright"),
        files("/usr/lib/x86_64-linux-gnu/pkgconfig", "*.pc") + files("/usr/share/cmake", "*.cmake"),
        files("/usr/share", "*.xml", "*.html"),
    ]
    names = ["asyncio", "email", "unittest", "encodings", "json", "http", "xml", "multiprocessing",
             "concurrent", "logging", "idlelib", "tkinter", "distutils", "lib2to3", "importlib", "ctypes"]
    package = [files(library / name, "*.py") for name in names if (library / name).is_dir()]
    keep = lambda classes: [[path.read_bytes() for path in c[:400]] for c in classes if len(c) >= 10]
    return {"language": keep(language), "package": keep(package)}


def shebang(path):
    try:
        return path.open("rb").read(9) in (b"#!/bin/sh", b"#!/bin/ba")
    except OSError:
        return False


def token_classes(text):
    """Return the kind of token every byte of some Python code belongs to; -1 for space."""
    classes = np.full(len(text), -1)
    lines = np.cumsum([0] + [len(line) for line in text.splitlines(keepends=True)])
    kind = {tokenize.NAME: 1, tokenize.NUMBER: 2, tokenize.STRING: 3, tokenize.COMMENT: 4, tokenize.OP: 5}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.decode("ascii")).readline):
            if token.type not in kind:
                continue
            value = kind[token.type]
            if token.type == tokenize.NAME and keyword.iskeyword(token.string):
                value = 0
            begin = lines[token.start[0] - 1] + token.start[1]
            end = lines[token.end[0] - 1] + token.end[1]
            classes[begin:end] = value
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError, IndexError):
        return None
    return classes


class Task:
    """Samples of one task; every fifth file is for testing."""

    def __init__(self, name, classes):
        self.name = name
        self.classes = [([f for i, f in enumerate(c) if i % 5], c[::5]) for c in classes]
        self.count = len(classes)

    def batch(self, generator, test, size=BATCH):
        texts, labels = [], generator.integers(self.count, size=size)
        for label in labels:
            pool = self.classes[label][int(test)]
            text = pool[generator.integers(len(pool))]
            start = generator.integers(max(1, len(text) - LENGTH))
            texts.append(window(text, start))
        return torch.tensor(np.stack(texts)), torch.tensor(labels)


class TokenTask:
    name, count = "token", 6

    def __init__(self, sources):
        marked = [(text, token_classes(text)) for text in sources if text.isascii()]
        marked = [(text, classes) for text, classes in marked if classes is not None]
        self.parts = [[m for i, m in enumerate(marked) if i % 5], marked[::5]]

    def batch(self, generator, test, size=BATCH):
        texts, labels = [], []
        part = self.parts[int(test)]
        while len(texts) < size:
            text, classes = part[generator.integers(len(part))]
            wanted = generator.integers(self.count)
            places = np.flatnonzero(classes[LENGTH : -LENGTH] == wanted)
            if len(places) == 0:
                continue
            place = places[generator.integers(len(places))] + LENGTH
            texts.append(window(text, place - LENGTH // 2))
            labels.append(wanted)
        return torch.tensor(np.stack(texts)), torch.tensor(labels)


def window(text, start):
    part = np.frombuffer(text[start : start + LENGTH], np.uint8).astype(np.int64)
    return np.pad(part, (0, LENGTH - len(part)), constant_values=32)


# --- Training ---


def optimise(parameters, steps, rate, loss_of):
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps)
    )
    start = time.time()
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"  step {step}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)


def pretrain(texts, generator):
    encoder, head = Encoder(), nn.Linear(WIDTH, 256)

    def loss_of():
        chosen = [texts[generator.integers(len(texts))] for _ in range(BATCH)]
        clean = torch.tensor(np.stack([window(t, generator.integers(max(1, len(t) - LENGTH))) for t in chosen]))
        hidden = torch.rand(clean.shape) < 0.15
        scores = head(encoder(torch.where(hidden, MASK, clean)))
        return F.cross_entropy(scores[hidden], clean[hidden])

    optimise([*encoder.parameters(), *head.parameters()], PRETRAIN_STEPS, 6e-4, loss_of)
    return encoder


def finetune(base, task, generator):
    encoder, head = Encoder(), nn.Linear(WIDTH, task.count)
    encoder.load_state_dict(base)

    def loss_of():
        texts, labels = task.batch(generator, test=False)
        return F.cross_entropy(head(features(encoder, texts, task.name)), labels)

    def head_loss_of():
        texts, labels = task.batch(generator, test=False, size=64)
        with torch.no_grad():
            x = features(encoder, texts, task.name)
        return F.cross_entropy(head(x), labels)

    # The head first, alone, so that the encoder is not moved for its sake.
    optimise(list(head.parameters()), 100, 1e-2, head_loss_of)
    optimise([*encoder.parameters(), *head.parameters()], FINETUNE_STEPS, 3e-4, loss_of)
    return encoder.state_dict() | {f"head.{name}": t for name, t in head.state_dict().items()}


def main(folder):
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    generator = np.random.default_rng(SEED)
    classes = kinds()
    tasks = [Task(name, c) for name, c in classes.items()]
    python = [text for c in classes["package"] for text in c] + classes["language"][0]
    tasks.append(TokenTask(python))
    texts = [text for c in classes.values() for files in c for i, text in enumerate(files) if i % 5]
    print(f"{len(texts)} texts, {', '.join(f'{t.name}: {t.count} classes' for t in tasks)}")
    base = stored(folder / "base.safetensors", lambda: pretrain(texts, generator).state_dict())
    print(f"{sum(p.numel() for p in base.values()):,} parameters")
    heads, test = {}, {}
    for task in tasks:
        print(task.name)
        state = stored(folder / f"{task.name}-and-head.safetensors", lambda: finetune(base, task, generator))
        head = {name.removeprefix("head."): t for name, t in state.items() if name.startswith("head.")}
        save_file({n: t for n, t in state.items() if not n.startswith("head.")}, folder / f"{task.name}.safetensors")
        heads |= {f"{task.name}.{name}": t for name, t in head.items()}
        texts, labels = task.batch(np.random.default_rng(SEED), test=True, size=1000)
        test |= {f"{task.name}.texts": texts.numpy().astype(np.uint8), f"{task.name}.labels": labels.numpy()}
    save_file(heads, folder / "heads.safetensors")
    np.savez(folder / "test.npz", **test)


def stored(path, make):
    """Return what `make` makes, or what an earlier, interrupted run has made."""
    if not path.exists():
        state = {name: tensor.detach().contiguous() for name, tensor in make().items()}
        save_file(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return load_file(path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
