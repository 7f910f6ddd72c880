"""Makes a base and fine-tunes of it: Llama-shaped, BF16 or F32, random weights.

usage: merge_models.py FOLDER [--gigabytes 1] [--models 3] [--hidden 2048] [--float32]
"""
import argparse
import json
import os

import numpy

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--gigabytes", type=float, default=1)
parser.add_argument("--models", type=int, default=3)
parser.add_argument("--hidden", type=int, default=2048)
parser.add_argument("--float32", action="store_true")
options = parser.parse_args()

hidden = options.hidden
inner, vocabulary = 11 * hidden // 4, 125 * hidden // 8
width = 4 if options.float32 else 2
per_layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
layers = max(1, round((options.gigabytes * 1e9 / width - 2 * vocabulary * hidden) / per_layer))


def shapes():
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def bfloat16(values):
    bits = values.view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)


def write(path, model):
    # safetensors.numpy has no BF16: the header is written here.
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes():
        size = width * int(numpy.prod(shape))
        dtype = "F32" if options.float32 else "BF16"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(shapes()):
            base = numpy.random.default_rng(number).standard_normal(shape, numpy.float32) * 0.02
            if model:
                own = numpy.random.default_rng([number, model])
                base += own.standard_normal(shape, numpy.float32) * 0.001
            file.write((base if options.float32 else bfloat16(base)).tobytes())


config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
    "intermediate_size": inner, "vocab_size": vocabulary, "num_hidden_layers": layers,
    "num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5,
    "torch_dtype": "float32" if options.float32 else "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
}
for model in range(options.models + 1):
    folder = f"{options.folder}/model{model}"
    os.makedirs(folder, exist_ok=True)
    write(f"{folder}/model.safetensors", model)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file, indent=2)
