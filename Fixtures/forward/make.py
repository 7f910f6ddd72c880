"""Make tiny random Transformers, inputs for them, and what transformers says they compute.

    python make.py [OUTPUT_FOLDER]

Every folder holds `config.json`, `model.safetensors`, `inputs.safetensors` and
`expected.safetensors`: each MLP's inputs and the last hidden states, for every token, recorded by
Scripts/capture-activations. Weights are drawn so that every part matters: norms are not ones,
biases not zeros.
"""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

HERE = Path(__file__).parent
CAPTURE = HERE.parent.parent / "Scripts" / "capture-activations"
SEED = 2024
SAMPLES, TOKENS, VOCABULARY = 3, 9, 40
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
IMAGE = {**SIZE, "image_size": 12, "patch_size": 4, "num_channels": 3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def models():
    """Yield (folder, model) for every architecture."""
    yield "clip", CLIPModel(CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8))
    yield "vit", ViTModel(ViTConfig(**IMAGE), add_pooling_layer=False)
    yield "bert", BertModel(BertConfig(**TEXT), add_pooling_layer=False)
    yield "roberta", RobertaModel(RobertaConfig(**TEXT, pad_token_id=1, type_vocab_size=1), add_pooling_layer=False)
    yield "llama", LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2, rope_parameters=LLAMA3))
    yield "mistral", MistralModel(MistralConfig(**TEXT, num_key_value_heads=2, head_dim=6, sliding_window=4))
    yield "qwen2", Qwen2Model(Qwen2Config(**TEXT, num_key_value_heads=1))
    yield "qwen3", Qwen3Model(Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8))
    yield "gemma", GemmaModel(GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=8))


@torch.no_grad()
def randomise(model):
    """Draw all parameters anew: weights by their width, norms around what leaves things as they are."""
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape)
        if parameter.ndim > 1:
            parameter.copy_(draw * (0.6 if "embed" in name else 1.2 / parameter.shape[-1] ** 0.5))
        elif "norm" in name.lower() and name.endswith("weight"):
            parameter.copy_(parameter + 0.3 * draw)
        else:
            parameter.copy_(0.2 * draw)


def inputs(name):
    """Return random inputs: pixels, or token ids of which some are padding."""
    task = torch.arange(SAMPLES)
    if name in ("clip", "vit"):
        return {"pixel_values": torch.randn(SAMPLES, 3, 12, 12), "task": task}
    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.int64)
    ids = torch.randint(3, VOCABULARY, (SAMPLES, TOKENS))
    mask[1, TOKENS - 3 :] = 0  # padded on the right
    ids[mask == 0] = 1
    result = {"input_ids": ids, "attention_mask": mask, "task": task}
    if name == "bert":
        result["token_type_ids"] = (torch.arange(TOKENS) > 4).to(torch.int64).repeat(SAMPLES, 1)
    return result


def main():
    """Write a folder for every architecture."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    torch.manual_seed(SEED)
    for name, model in models():
        folder = output / name
        randomise(model)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        texts = {"clip": ["", "-text"]}.get(name, [""])
        for text in texts:
            given, expected = folder / f"inputs{text}.safetensors", folder / f"expected{text}.safetensors"
            save_file(inputs("text" if text else name), given)
            command = [sys.executable, CAPTURE, folder, given, "-o", expected, "--tokens", "--final"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
