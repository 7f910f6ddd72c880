"""Train the digit fixtures: one small Vision Transformer and four fine-tuned experts.

The 8x8 digit images of scikit-learn become four tasks whose inputs differ (see `task_images`).
A base encoder is pre-trained to read randomly distorted digits. Every task then gets a fixed
head made from the base's features of a few training images, much as CLIP classifies with
fixed text embeddings. Last, the encoder is fine-tuned once per task while the head stays as
it is.

    python train.py [OUTPUT_FOLDER]

writes base, experts, heads, test split and calibration activations as safetensors files.
All seeds are fixed and one thread is used: a second run on the same machine with the same
versions writes the same bytes.
"""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

SEED = 2024
TASKS = ("upright", "rotated", "inverted", "shuffled")
WHITE = 16  # grey levels go from 0 to 16
NOISE = 1.5  # standard deviation of the noise in task "inverted", in grey levels
COLUMN_ORDER = [3, 6, 1, 4, 7, 0, 5, 2]  # the fixed permutation of task "shuffled"
TEST_SIZE = 500

SIDE, PATCH, CLASSES = 8, 2, 10
LAYERS, WIDTH, MLP_WIDTH, HEADS = 4, 64, 256, 4

BATCH = 64
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 40
PRETRAIN_EPOCHS, PRETRAIN_RATE = 120, 2e-3
FINETUNE_EPOCHS, FINETUNE_RATE = 40, 5e-4
OTHER_RATE_FACTOR = 0.2  # fine-tuning moves everything but the MLPs at this share of the rate
SHOTS = 3  # labelled images per class that a head is made from

LAMBDA = 0.3  # coefficient of task arithmetic
CALIBRATION_SAMPLES = 64  # per task


# --- The encoder, with the parameter names of Hugging Face's CLIP vision model ---


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value projections."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        def split(y):
            return y.view(*y.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        mixed = scores.softmax(dim=-1) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Two linear layers with QuickGELU between them."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, MLP_WIDTH)
        self.fc2 = nn.Linear(MLP_WIDTH, WIDTH)

    def forward(self, x):
        y = self.fc1(x)
        return self.fc2(y * torch.sigmoid(1.702 * y))


class Layer(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.layer_norm1 = nn.LayerNorm(WIDTH)
        self.mlp = MLP()
        self.layer_norm2 = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patch embeddings behind one class token, plus positions."""

    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.patch_embedding = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH, bias=False)
        self.position_embedding = nn.Embedding((SIDE // PATCH) ** 2 + 1, WIDTH)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, images):
        patches = self.patch_embedding(images[:, None]).flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(len(images), 1, WIDTH)
        return torch.cat([token, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """Embeddings, encoder and the normalised class token as the image's feature."""

    def __init__(self):
        super().__init__()
        self.embeddings = Embeddings()
        self.pre_layrnorm = nn.LayerNorm(WIDTH)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(LAYERS))})
        self.post_layernorm = nn.LayerNorm(WIDTH)

    def forward(self, images):
        x = self.pre_layrnorm(self.embeddings(images))
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class Encoder(nn.Module):
    """Holds the vision model under the prefix `vision_model.`."""

    def __init__(self):
        super().__init__()
        self.vision_model = VisionModel()

    def forward(self, images):
        return self.vision_model(images)


# --- Data ---


def task_images(task, images, rng):
    """Return 8x8 images with grey levels 0...16 the way `task` shows them."""
    if task == "upright":
        return images
    if task == "rotated":
        return np.rot90(images, axes=(1, 2))  # a quarter turn, counter-clockwise
    if task == "inverted":
        noisy = WHITE - images + rng.normal(0, NOISE, images.shape)
        return np.clip(np.rint(noisy), 0, WHITE)
    return images[:, :, COLUMN_ORDER]


def load_tasks():
    """Return ({task: images}, labels) of the training split and of the test split."""
    digits = load_digits()
    splits = train_test_split(
        digits.images, digits.target, test_size=TEST_SIZE, stratify=digits.target, random_state=SEED
    )
    rng = np.random.default_rng(SEED)

    def prepare(images, labels):
        shown = {task: task_images(task, images, rng).astype(np.uint8) for task in TASKS}
        return {task: torch.tensor(shown[task].copy()) for task in TASKS}, torch.tensor(labels)

    return prepare(splits[0], splits[2]), prepare(splits[1], splits[3])


def to_input(images):
    """Scale grey levels to 0...1."""
    return images.float() / WHITE


def distort(images, generator):
    """Zoom, shift and turn every image at random; invert half and shuffle the columns of a quarter."""
    n = len(images)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    zoom = 0.8 + 0.4 * uniform(n, 1, 1)
    shift = 0.4 * uniform(n, 2, 1) - 0.2
    angle = 2 * math.pi * uniform(n)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([zoom * turn, shift], dim=2), (n, 1, SIDE, SIDE), align_corners=False)
    images = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]

    images = torch.where(uniform(n, 1, 1) < 0.5, 1 - images, images)
    order = uniform(n, 1, SIDE).argsort(dim=2).expand(n, SIDE, SIDE)
    return torch.where(uniform(n, 1, 1) < 0.25, images.gather(2, order), images)


# --- Training ---


def train(parameter_groups, logits, images, labels, epochs, seed):
    """Minimise cross entropy of `logits(images, generator)` by AdamW, cosine schedule with warm-up."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameter_groups, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * s / steps)) / 2
    )
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
            loss = F.cross_entropy(logits(images[batch], generator), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def pretrain(images, labels):
    """Train the base encoder on distorted digits; its own classifier is thrown away."""
    encoder, classifier = Encoder(), nn.Linear(WIDTH, CLASSES)
    parameters = [*encoder.parameters(), *classifier.parameters()]
    train(
        [{"params": parameters, "lr": PRETRAIN_RATE}],
        lambda x, generator: classifier(encoder(distort(x, generator))),
        images,
        labels,
        PRETRAIN_EPOCHS,
        SEED,
    )
    return encoder


@torch.no_grad()
def make_head(encoder, images, labels):
    """Return weight and bias that score a feature along the direction of each class's mean.

    The directions are unit vectors from the mean of all classes, where every score is 0.
    """
    features = encoder(images)
    shots = [torch.nonzero(labels == c)[:SHOTS, 0] for c in range(CLASSES)]
    means = torch.stack([features[shot].mean(dim=0) for shot in shots])
    centre = means.mean(dim=0)
    weight = F.normalize(means - centre, dim=1)
    return weight, -weight @ centre


def finetune(base, head, images, labels, seed):
    """Return a copy of the base encoder fine-tuned under a frozen head."""
    encoder = copy.deepcopy(base)
    mlp = [p for name, p in encoder.named_parameters() if ".mlp." in name]
    other = [p for name, p in encoder.named_parameters() if ".mlp." not in name]
    train(
        [{"params": mlp, "lr": FINETUNE_RATE}, {"params": other, "lr": FINETUNE_RATE * OTHER_RATE_FACTOR}],
        lambda x, _: F.linear(encoder(x), *head),
        images,
        labels,
        FINETUNE_EPOCHS,
        seed,
    )
    return encoder


# --- Reference merges, calibration activations and accuracies ---


def build(parameters):
    """Return an encoder with the given state dict."""
    encoder = Encoder()
    encoder.load_state_dict(parameters)
    return encoder


def task_arithmetic(base, experts):
    """Return base + LAMBDA * (sum of the experts' differences from it)."""
    start, ends = base.state_dict(), [experts[task].state_dict() for task in TASKS]
    return build({key: start[key] + LAMBDA * sum(end[key] - start[key] for end in ends) for key in start})


def perfectly_routed(merged, expert):
    """Return the merged model with the expert's MLPs: a mixture of experts whose routers never err."""
    static, own = merged.state_dict(), expert.state_dict()
    return build({key: own[key] if ".mlp." in key else static[key] for key in static})


@torch.no_grad()
def mlp_inputs(encoder, images):
    """Return {MLP name: its input averaged over tokens, one row per image}."""
    captured = {}
    modules = {name: module for name, module in encoder.named_modules() if isinstance(module, MLP)}
    hooks = [
        module.register_forward_hook(
            lambda _, args, __, name=name: captured.update({name: args[0].mean(dim=1)})
        )
        for name, module in modules.items()
    ]
    encoder(images)
    for hook in hooks:
        hook.remove()
    return captured


def calibration(models, images):
    """Return the MLP inputs of a few unlabelled training images per task, and their task numbers.

    `models[task]` is the model that sees the images of the task.
    """
    parts = []
    for number, task in enumerate(TASKS):
        chosen = torch.randperm(len(images[task]), generator=torch.Generator().manual_seed(SEED + number))
        parts.append(mlp_inputs(models[task], to_input(images[task][chosen[:CALIBRATION_SAMPLES]])))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["task"] = torch.arange(len(TASKS)).repeat_interleave(CALIBRATION_SAMPLES)
    return tensors


@torch.no_grad()
def accuracy(encoder, head, images, labels):
    """Return the percentage of images classified correctly."""
    return (F.linear(encoder(to_input(images)), *head).argmax(dim=1) == labels).double().mean().item() * 100


def print_table(rows, heads, images, labels):
    """Print the test accuracy of every row {label: {task: encoder}} on every task."""
    print(
        f"{'accuracy in %, n = ' + str(len(labels)):28}"
        + "".join(f"{task:>10}" for task in TASKS)
        + f"{'mean':>10}"
    )
    for label, encoders in rows.items():
        values = [accuracy(encoders[task], heads[task], images[task], labels) for task in TASKS]
        print(f"{label:28}" + "".join(f"{value:10.1f}" for value in [*values, sum(values) / len(values)]))


def main():
    """Train everything and write the fixtures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    (train_images, train_labels), (test_images, test_labels) = load_tasks()
    inputs = {task: to_input(train_images[task]) for task in TASKS}

    base = pretrain(inputs["upright"], train_labels)
    heads = {task: make_head(base, inputs[task], train_labels) for task in TASKS}
    experts = {
        task: finetune(base, heads[task], inputs[task], train_labels, SEED + number)
        for number, task in enumerate(TASKS, start=1)
    }
    merged = task_arithmetic(base, experts)
    routed = {task: perfectly_routed(merged, experts[task]) for task in TASKS}

    def save(name, tensors):
        save_file(
            {key: value.clone().contiguous() for key, value in tensors.items()},
            folder / f"{name}.safetensors",
            {"format": "pt"},
        )

    for name, encoder in {"base": base, **experts}.items():
        save(name, encoder.state_dict())
    save(
        "heads",
        {f"{task}.{part}": value for task in TASKS for part, value in zip(("weight", "bias"), heads[task])},
    )
    save(
        "test",
        {f"{task}.images": test_images[task] for task in TASKS}
        | {f"{task}.labels": test_labels for task in TASKS},
    )
    save("calibration", calibration(routed, train_images))

    same = {"base": base, **experts, f"task arithmetic {LAMBDA}": merged}
    rows = {label: dict.fromkeys(TASKS, encoder) for label, encoder in same.items()}
    print_table({**rows, "merged, own expert's MLPs": routed}, heads, test_images, test_labels)


if __name__ == "__main__":
    main()
