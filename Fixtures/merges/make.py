"""Makes the models, the recipes and what mergekit makes of them.

    pip install mergekit==0.1.5 torch==2.13.0 transformers==5.9.0 safetensors==0.8.0
    python Fixtures/merges/make.py
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import save_file

here = Path(__file__).parent.resolve()
work = Path(tempfile.mkdtemp())
os.chdir(work)

torch.manual_seed(0)
H, I, V, L = 16, 24, 32, 2
def shapes():
    yield "model.embed_tokens.weight", (V, H)
    for i in range(L):
        p = f"model.layers.{i}."
        for n in "qkvo": yield p + f"self_attn.{n}_proj.weight", (H, H)
        yield p + "mlp.gate_proj.weight", (I, H)
        yield p + "mlp.up_proj.weight", (I, H)
        yield p + "mlp.down_proj.weight", (H, I)
        yield p + "input_layernorm.weight", (H,)
        yield p + "post_attention_layernorm.weight", (H,)
    yield "model.norm.weight", (H,)
    yield "lm_head.weight", (V, H)
base = {n: torch.randn(s) * 0.1 for n, s in shapes()}
config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=H, intermediate_size=I, vocab_size=V,
    num_hidden_layers=L, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, torch_dtype="float32",
    max_position_embeddings=64, tie_word_embeddings=False, hidden_act="silu")

for k in range(4):
    model = base if k == 0 else {
        name: x + 0.02 * torch.randn(x.shape) * (torch.rand(x.shape) < 0.8) for name, x in base.items()
    }
    (work / f"model{k}").mkdir()
    path = work / f"model{k}" / "model.safetensors"
    save_file({name: x.contiguous() for name, x in model.items()}, path, metadata={"format": "pt"})
    (work / f"model{k}" / "config.json").write_text(json.dumps(config))
    shutil.copy(path, here / f"model{k}.safetensors")

based = "base_model: model0\n"
def models(weights=None, extra="", which=(1, 2, 3), weight_of_base=None):
    s = "models:\n"
    for k, w in zip(which, weights or [None] * len(which)):
        s += f"  - model: model{k}\n"
        if w is not None: s += f"    parameters: {{weight: {w}{extra}}}\n"
    return s
R = {
 "linear": "merge_method: linear\n" + models([0.5, 0.3, 0.4]),
 "linear-sum": "merge_method: linear\n" + models([0.5, 0.3, 0.4]) + "parameters: {normalize: false}\n",
 "task_arithmetic": "merge_method: task_arithmetic\n" + based + models([0.5, 0.3, 0.4]) + "parameters: {lambda: 0.7}\n",
 "ties": "merge_method: ties\n" + based + models([0.5, 0.3, 0.4], ", density: 0.4"),
 "ties-sum": "merge_method: ties\n" + based + models([0.5, 0.3, 0.4], ", density: 0.4") + "parameters: {normalize: false, lambda: 0.6}\n",
 "breadcrumbs": "merge_method: breadcrumbs\n" + based + models([0.5, 0.3, 0.4], ", density: 0.5, gamma: 0.1"),
 "breadcrumbs_ties": "merge_method: breadcrumbs_ties\n" + based + models([0.5, 0.3, 0.4], ", density: 0.5, gamma: 0.1"),
 "dare_ties": "merge_method: dare_ties\n" + based + models([0.5, 0.3, 0.4], ", density: 0.5"),
 "dare_linear": "merge_method: dare_linear\n" + based + models([0.5, 0.3, 0.4], ", density: 0.5"),
 "slerp": "merge_method: slerp\n" + based + models(which=(0, 1)) + "parameters:\n  t:\n    - filter: self_attn\n      value: [0, 0.5, 0.3]\n    - filter: mlp\n      value: [1, 0.2]\n    - value: 0.4\n",
 "nuslerp": "merge_method: nuslerp\n" + models([0.5, 0.3], which=(1, 2)),
 "nuslerp-base": "merge_method: nuslerp\n" + based + models([0.5, 0.3], which=(1, 2)),
 "nuslerp-rows": "merge_method: nuslerp\n" + models([0.5, 0.3], which=(1, 2)) + "parameters: {nuslerp_flatten: false}\n",
 "nuslerp-columns": "merge_method: nuslerp\n" + models([0.5, 0.3], which=(1, 2)) + "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
 "multislerp": "merge_method: multislerp\n" + models([0.5, 0.3, 0.4]),
 "multislerp-base": "merge_method: multislerp\n" + based + models([0.5, 0.3, 0.4]),
 "karcher": "merge_method: karcher\n" + models(),
 "model_stock": "merge_method: model_stock\n" + based + models(),
 "model_stock-filters": "merge_method: model_stock\n" + based + models() + "parameters: {filter_wise: true}\n",
 "sce": "merge_method: sce\n" + based + models() + "parameters: {select_topk: 0.5}\n",
 "sce-all": "merge_method: sce\n" + based + models(),
 "nearswap": "merge_method: nearswap\n" + based + models(which=(1,)) + "parameters: {t: 0.01}\n",
 "arcee_fusion": "merge_method: arcee_fusion\n" + based + models(which=(1,)),
 "ram": "merge_method: ram\n" + based + models(),
 "ramplus_tl": "merge_method: ramplus_tl\n" + based + models(),
 "gradients": "merge_method: linear\nmodels:\n  - model: model1\n    parameters:\n      weight:\n        - filter: mlp\n          value: [0.1, 0.9]\n        - value: 0.5\n  - model: model2\n    parameters:\n      weight: [1, 0.25, 0.75]\n",
 "slices": "merge_method: passthrough\nslices:\n  - sources: [{model: model1, layer_range: [0, 2]}]\n  - sources: [{model: model2, layer_range: [1, 2]}]\n  - sources: [{model: model3, layer_range: [0, 1], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]\n",
 "slerp-slices": "merge_method: slerp\nbase_model: model0\nslices:\n  - sources: [{model: model0, layer_range: [0, 2]}, {model: model1, layer_range: [0, 2]}]\n    parameters: {t: [0.2, 0.8]}\n  - sources: [{model: model0, layer_range: [1, 2]}, {model: model2, layer_range: [0, 1]}]\n    parameters: {t: 0.5}\n",
}

for folder in ("recipes", "results"):
    (here / folder).mkdir(exist_ok=True)
for name, text in R.items():
    text += "dtype: float32\n"
    (here / "recipes" / f"{name}.yml").write_text(text)
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(text)), str(work / name),
        MergeOptions(random_seed=7, write_model_card=False),
    )
    shutil.copy(work / name / "model.safetensors", here / "results" / f"{name}.safetensors")
shutil.rmtree(work)
