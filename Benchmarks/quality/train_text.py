"""Train a BERT over bytes and three experts, for measuring mixtures on more than digits.

    python train_text.py FOLDER

Texts, tasks and training are those of train_encoder.py; the encoder is
transformers' BertModel, so that `smelt activations` and wemoe.py can run it. FOLDER gets
config.json, base, experts and heads as safetensors, test.npz, and inputs.safetensors: 64 unlabelled
training texts a task, for calibration.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

import train_encoder

SAMPLES = 64
CONFIG = BertConfig(
    vocab_size=257,
    hidden_size=train_encoder.WIDTH,
    intermediate_size=train_encoder.MLP_WIDTH,
    num_hidden_layers=train_encoder.LAYERS,
    num_attention_heads=train_encoder.HEADS,
    max_position_embeddings=train_encoder.LENGTH,
    type_vocab_size=1,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


class Encoder(BertModel):
    """Bytes in, one vector a byte out."""

    def __init__(self):
        super().__init__(CONFIG, add_pooling_layer=False)

    def forward(self, texts):
        return super().forward(input_ids=texts).last_hidden_state


def tasks():
    """Return the three tasks, as train_encoder makes them."""
    classes = train_encoder.kinds()
    python = [text for c in classes["package"] for text in c] + classes["language"][0]
    whole = [train_encoder.Task(name, c) for name, c in classes.items()]
    return [*whole, train_encoder.TokenTask(python)]


def main(folder):
    """Train, and save what the measurements need."""
    train_encoder.Encoder = Encoder
    train_encoder.main(folder)
    CONFIG.save_pretrained(folder)
    generator = np.random.default_rng(7)
    texts = [task.batch(generator, test=False, size=SAMPLES)[0] for task in tasks()]
    task = torch.arange(len(texts)).repeat_interleave(SAMPLES)
    save_file({"input_ids": torch.cat(texts), "task": task}, folder / "inputs.safetensors")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
