"""Write the models of Benchmarks/upscale/run into the current folder: random, with the names and sizes of real ones."""

import json

import numpy as np

rng = np.random.default_rng(0)
def bf16(x): return ((x.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
def write(path, shapes, seed, noise):
    off = 0; head = {}
    for n, s in shapes.items():
        c = int(np.prod(s)) * 2; head[n] = {"dtype": "BF16", "shape": list(s), "data_offsets": [off, off + c]}; off += c
    h = json.dumps(head).encode(); h += b" " * (-len(h) % 8)
    base = np.random.default_rng(1).standard_normal(1 << 22).astype(np.float32) * 0.02
    delta = np.random.default_rng(seed).standard_normal((1 << 22) - 77).astype(np.float32) * noise
    with open(path, "wb") as f:
        f.write(len(h).to_bytes(8, "little")); f.write(h)
        for n, s in shapes.items():
            c = int(np.prod(s)); 
            b = np.resize(base, c)
            if noise: b = b + np.resize(delta, c)
            f.write(bf16(b).tobytes())
def llama(d, f, L, v):
    s = {"model.embed_tokens.weight": (v, d)}
    for i in range(L):
        p = f"model.layers.{i}."
        s[p + "input_layernorm.weight"] = (d,)
        for n, sh in {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}.items(): s[p + f"mlp.{n}.weight"] = sh
        for n in "qkvo": s[p + f"self_attn.{n}_proj.weight"] = (d, d)
    return s
def vit(d, f, L):
    s = {}
    for i in range(L):
        p = f"encoder.layers.{i}.mlp."
        s[p + "fc1.weight"] = (f, d); s[p + "fc1.bias"] = (f,); s[p + "fc2.weight"] = (d, f); s[p + "fc2.bias"] = (d,)
    return s
S = llama(2048, 5632, 9, 32000)
write("base.safetensors", S, 0, 0)
for e in range(4): write(f"e{e}.safetensors", S, e + 2, 0.002)
S = vit(768, 3072, 12)
write("vbase.safetensors", S, 0, 0)
for e in range(8): write(f"v{e}.safetensors", S, e + 2, 0.004)
n = 8 * 256; head = {}; off = 0; blobs = []
centres = rng.standard_normal((8, 768)).astype(np.float32)
task = np.repeat(np.arange(8), 256).astype(np.int64)
for i in range(12):
    x = (0.5 * centres[task] + rng.standard_normal((n, 768))).astype(np.float32)
    blobs.append(x.tobytes()); head[f"encoder.layers.{i}.mlp"] = {"dtype": "F32", "shape": [n, 768], "data_offsets": [off, off + x.nbytes]}; off += x.nbytes
blobs.append(task.tobytes()); head["task"] = {"dtype": "I64", "shape": [n], "data_offsets": [off, off + task.nbytes]}
h = json.dumps(head).encode(); h += b" " * (-len(h) % 8)
open("acts.safetensors", "wb").write(len(h).to_bytes(8, "little") + h + b"".join(blobs))
