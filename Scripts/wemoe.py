"""Run a mixture of experts made by `smelt upscale` with PyTorch and transformers.

    import wemoe
    model = wemoe.load("moe.safetensors", "folder/of/the/base/model")
    model(pixel_values=...)                     # every image gets weights of its own
    model.generate(**tokenizer(prompts, ...))   # for language models load(..., AutoModelForCausalLM)

The mixture may be safetensors (a file, or a folder of shards), HDF5, or a zstd bundle (for that
`smelt` must be on the PATH, or $SMELT name it). Of the base model only `config.json` is read.

Every linear map of an MLP becomes `W0 + sum_j w_j T_j` with weights w from a router that sees what
the MLP sees, averaged over a sample's tokens (Tang et al., arXiv 2402.00433). Padding does not
count. A decoder routes on the prompt: what the first call with a key-value cache brings decides,
and later calls with the cache keep it. Where a prompt and its continuation come in one call (as
for likelihoods), say how long prompts are, so that continuations do not route themselves:

    model.mixture.prompt_lengths = [12, 9]

Needs torch, transformers and safetensors; for HDF5 h5py (and hdf5plugin if it is compressed).
The file stands alone: copy it into your project.
"""

import inspect
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

# The linear map that sees the module's input first and therefore asks the router, in every
# architecture: of an MLP, and of an attention.
FIRST_MAPS = {"fc1", "intermediate.dense", "gate_proj", "gate_up_proj", "wi", "wi_0", "c_fc"}
FIRST_MAPS |= {"lin1", "dense_h_to_4h"}
FIRST_MAPS |= {"q_proj", "self.query", "attention.query", "q_lin", "qkv", "q", "qkv_proj", "query_key_value", "c_attn"}


# --- Reading mixtures ---


def read_safetensors(path):
    """Return ({name: tensor}, metadata) of a safetensors file, or of all in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors, metadata = {}, {}
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata |= opened.metadata() or {}
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors, metadata


def read_hdf5(path):
    """Return ({name: tensor}, metadata) of an HDF5 file written by Smelt; BF16 becomes F32."""
    import h5py

    try:
        import hdf5plugin  # noqa: F401  registers the zstd filter
    except ImportError:
        pass  # Only compressed files need it, and h5py will say so.
    tensors, metadata = {}, {}

    def visit(path, item):
        if not isinstance(item, h5py.Dataset) or path.startswith("__metadata__"):
            return
        name = item.attrs.get("safetensors_name", path)
        name = name.decode() if isinstance(name, bytes) else name
        tensors[name] = torch.from_numpy(item[...]).reshape(item.shape)

    with h5py.File(path) as file:
        file.visititems(visit)
        if "__metadata__" in file:
            metadata = {key: value for key, value in file["__metadata__"].attrs.items() if isinstance(value, str)}
    return tensors, metadata


def read_mixture(path):
    """Return ({name: tensor}, description) of a mixture; its first bytes tell the format."""
    path = Path(path)
    beginning = b""
    if path.is_file():
        with path.open("rb") as file:
            beginning = file.read(8)
    if beginning.startswith(b"\x28\xb5\x2f\xfd"):
        with tempfile.TemporaryDirectory() as folder:
            unpacked = Path(folder) / "mixture.safetensors"
            smelt = os.environ.get("SMELT", "smelt")
            subprocess.run([smelt, "unpack", path, "-o", unpacked], check=True, stdout=subprocess.DEVNULL)
            return read_mixture(unpacked)
    tensors, metadata = (read_hdf5 if beginning == b"\x89HDF\r\n\x1a\n" else read_safetensors)(path)
    if "wemoe" not in metadata:
        raise ValueError(f"{path}: is not a mixture of experts: its metadata has no 'wemoe'")
    return tensors, json.loads(metadata["wemoe"])


def task_vector(tensors, name, shape):
    """Return a task vector as a dense tensor, however it is stored.

    Sparse: a bitmap (lowest bit first) and the stored elements. int8: a scale a row. int4: two
    numbers a byte, the lower first, a scale for every 128. Low rank: two factors.
    """
    if name in tensors:
        return tensors[name].to(torch.float32)
    parts = {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}#")}
    if "bitmap" in parts:
        bits = (parts["bitmap"][:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        vector = torch.zeros(shape.numel())
        vector[bits.flatten()[: shape.numel()].bool()] = parts["values"].to(torch.float32)
        return vector.reshape(shape)
    if "left" in parts:
        return (parts["left"].to(torch.float32) @ parts["right"].to(torch.float32)).reshape(shape)
    if "scale" not in parts:
        raise ValueError(f"the mixture has no task vector {name!r}")
    values, scale = parts["values"], parts["scale"]
    if values.dtype == torch.int8:
        return (values.to(torch.float32) * scale[:, None]).reshape(shape)
    nibbles = torch.stack([values & 15, values >> 4], dim=-1).flatten(1)[:, : shape[-1]].to(torch.float32)
    nibbles = torch.where(nibbles > 7, nibbles - 16, nibbles)
    return (nibbles * scale.repeat_interleave(128, dim=1)[:, : shape[-1]]).reshape(shape)


# --- The mixture in a model ---


def padding_mask(mask, tokens):
    """Return, of a prompt's attention mask in any form a model takes, who counts [batch, tokens], or None.

    With a compilable cache generate() prepares what the attentions themselves need: who sees whom
    [batch, 1 or heads, tokens, keys], as booleans, as numbers to add to the scores (0: seen) or, for
    flex attention, as a function of the places; or a dictionary of these, an entry for every kind
    of attention.
    """
    if isinstance(mask, dict):
        mask = next((entry for entry in mask.values() if entry is not None), None)
    if mask is None:
        return None
    if hasattr(mask, "mask_mod"):
        sample = torch.arange(mask.shape[0], device=mask.kv_indices.device)[:, None]
        token = torch.arange(tokens, device=sample.device)
        return mask.mask_mod(sample, sample.new_zeros(()), token, token).expand(len(sample), tokens)
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"the attention mask is a {type(mask).__name__}, which cannot be read: use another attention")
    if mask.ndim == 4:
        mask = mask >= 0 if mask.is_floating_point() else mask != 0
        # Causal or not, within a window or not, a token sees itself, unless it is padding. A mask
        # of one row for all is not to be mistaken for that of a prompt of one token.
        is_shared = mask.shape[2] == 1 and tokens > 1
        mask = mask[:, 0, 0] if is_shared else mask[:, 0].diagonal(dim1=1, dim2=2)
    return mask


class Mixture:
    """What the routers of one model have in common: who of a call's tokens decides."""

    def __init__(self, experts):
        self.experts = experts
        self.routers = {}  # by the module's prefix; `.weights` is what the last samples got
        self.prompt_lengths = None
        self.keeps_weights = False
        self.mask = None
        self.is_encoder = False  # of a model that has a decoder besides

    def before_call(self, model, arguments, keywords):
        """See, before a stack of layers runs, whether this call continues one whose prompt has routed."""
        given = inspect.signature(model.forward).bind_partial(*arguments, **keywords).arguments
        given |= given.get("kwargs", {})
        # A key-value cache is known by what it can do: its argument's name has changed over time.
        lengths = [value.get_seq_length() for value in given.values() if hasattr(value, "get_seq_length")]
        self.keeps_weights = any(length > 0 for length in lengths)
        self.mask = given.get("attention_mask")
        self.is_encoder = getattr(model, "is_decoder", None) is False

    def shares(self, states):
        """Return how much each token [batch, tokens] counts for its sample; rows add up to one."""
        batch, tokens = states.shape[:2]
        counts = torch.ones(batch, tokens, device=states.device)
        mask = padding_mask(self.mask, tokens)
        if mask is not None:
            if mask.shape != counts.shape:
                raise ValueError(f"the attention mask is {list(mask.shape)} for tokens {list(counts.shape)}")
            counts = mask.to(counts)
        if self.prompt_lengths is not None and not self.is_encoder:
            lengths = torch.as_tensor(self.prompt_lengths, device=states.device)
            counts = counts * (counts.cumsum(1) <= lengths[:, None])
        return counts / counts.sum(1, keepdim=True)


class Router(nn.Module):
    """What gives every sample the weights of its task vectors: a constant, or one or two layers."""

    def __init__(self, mixture, tensors):
        super().__init__()
        self.mixture = mixture
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor.to(torch.float32))
        self.weights = None  # [batch, experts]: what the last prompt got

    def decide(self, states):
        """Set the weights for the samples whose tokens these are."""
        if self.mixture.keeps_weights and self.weights is not None:
            return
        states = states.to(torch.float32)
        if hasattr(self, "weight"):
            self.weights = self.weight.expand(len(states), -1)
        else:
            if hasattr(self, "fc1_weight"):
                hidden = nn.functional.linear(states, self.fc1_weight, self.fc1_bias).relu()
                answers = nn.functional.linear(hidden, self.fc2_weight, self.fc2_bias)
            else:
                answers = nn.functional.linear(states, self.fc_weight, self.fc_bias)
            self.weights = torch.einsum("bt,btk->bk", self.mixture.shares(states), answers)


class MixedLinear(nn.Module):
    """A linear map whose weights are put together anew for every sample."""

    def __init__(self, base, router, is_first, weights, biases):
        super().__init__()
        self.router = router
        self.is_first = is_first
        # Conv1D (GPT-2) keeps [inputs, outputs] where nn.Linear has [outputs, inputs].
        self.is_outputs_first = isinstance(base, nn.Linear)
        self.base = base
        self.register_buffer("task_weights", weights.to(base.weight.dtype))
        self.register_buffer("task_biases", None if biases is None else biases.to(base.weight.dtype))

    @property
    def weight(self):
        """The base's: some models look at a layer's weight to learn its type."""
        return self.base.weight

    def forward(self, x):
        """Map tokens [batch, tokens, inputs], each sample by its own weights."""
        if self.is_first:
            self.router.decide(x)
        w = self.router.weights.to(x.dtype)
        weight = self.base.weight + torch.einsum("bk,kij->bij", w, self.task_weights)
        y = x @ (weight.transpose(1, 2) if self.is_outputs_first else weight)
        if self.task_biases is not None:
            y = y + (self.base.bias + w @ self.task_biases)[:, None]
        return y


def modules_of(tensors, description):
    """Yield (prefix, prefix in the dense model, gate) of every module, in the order of the file."""
    if "modules" in description:
        for module in description["modules"]:
            yield module["prefix"], module["original"], module["gate"]
        return
    seen = {}
    for name in tensors:
        if match := re.fullmatch(r"(.*)\.base_model\.(.*)", name):
            seen.setdefault(match[1], match[2])
    for prefix, key in seen.items():
        # BERT's MLP is two parts of its layer and has no name: the mixture adds `.mlp`.
        is_layer = key.split(".")[0] in ("intermediate", "output")
        yield prefix, prefix.removesuffix(".mlp") if is_layer else prefix, f"{prefix}.gate"


def dense_state(tensors, modules):
    """Return the state dict of a plain model: static parts, and the modules' bases as MLPs."""
    state = {}
    originals = {prefix: original for prefix, original, _ in modules}
    for name, tensor in tensors.items():
        prefix, found, key = name.partition(".base_model.")
        if found and prefix in originals:
            state[f"{originals[prefix]}.{key}"] = tensor
        elif not any(name.startswith(f"{p}.{part}.") for p in originals for part in ("gate", "task_vectors")):
            state[name] = tensor
    return state


def replace_module(model, old, new):
    """Put a module in another's place."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
                return


def attach(model, tensors, description):
    """Make a model with the modules' bases as MLPs a mixture, in place.

    Modules are named differently in memory and in files, and by every version of transformers
    differently again; so a linear map is found by its weights.
    """
    model.mixture = mixture = Mixture(description["experts"])
    linears = [m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    for prefix, _, gate in list(modules_of(tensors, description)):
        start = f"{gate}."
        router = Router(mixture, {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)})
        start = f"{prefix}.base_model."
        names = [n for n in tensors if n.startswith(start) and n.endswith(".weight")]
        found = {name: find(linears, tensors[name]) for name in names}
        if not any(found.values()):
            continue  # The other tower of a model that has two.
        for name, linear in found.items():
            if linear is None:
                raise ValueError(f"the model has no linear map with the weights of {name!r}")
            linears.remove(linear)
            key = name[len(start) :].removesuffix(".weight")

            def vectors(part, key=key):
                base = tensors.get(f"{prefix}.base_model.{key}.{part}")
                if base is None:
                    return None
                names = [f"{prefix}.task_vectors.{j}.{key}.{part}" for j in range(len(mixture.experts))]
                return torch.stack([task_vector(tensors, name, base.shape) for name in names])

            mixed = MixedLinear(linear, router, key in FIRST_MAPS, vectors("weight"), vectors("bias"))
            replace_module(model, linear, mixed.to(linear.weight.device))
            mixture.routers[prefix] = router
    if not mixture.routers:
        raise ValueError("the model has none of the mixture's MLPs")
    # Every stack of layers is told its own mask and cache, innermost last: generate() calls T5's
    # encoder alone, and of CLIP only the text tower has a mask.
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.register_forward_pre_hook(mixture.before_call, with_kwargs=True)
    return model


def find(linears, weight):
    """Return the linear map that has this weight, or None."""
    for linear in linears:
        if linear.weight.shape == weight.shape and torch.equal(linear.weight, weight.to(linear.weight)):
            return linear
    return None


def load(path, config, model_class=AutoModel, dtype=torch.float32):
    """Return the mixture at `path` as a transformers model.

    `config` is a transformers configuration, or the folder or Hub name of a model that has it.
    """
    tensors, description = read_mixture(path)
    if not hasattr(config, "model_type"):
        config = AutoConfig.from_pretrained(config)
    state = dense_state(tensors, list(modules_of(tensors, description)))
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if hasattr(model_class, "from_config"):  # An Auto class: it cannot do without files itself.
        with torch.device("meta"):
            model_class = type(model_class.from_config(config))
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return attach(model.eval(), tensors, description)
