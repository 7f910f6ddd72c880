"""Writes the PyTorch files of this folder: python make.py (torch 2.13)."""

import torch

torch.manual_seed(0)
dtypes = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "bool", "complex64", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
]


def values(name):
    """0 … 5 as each type, so that the bytes are easy to tell."""
    return torch.arange(6).reshape(2, 3).to(getattr(torch, name))


torch.save({name: values(name) for name in dtypes}, "types.pt")

base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
torch.save(
    {
        "whole": base,
        "transposed": base.t(),
        "rows": base[1:3],
        "columns": base[:, 2:4],
        "steps": base[::2, ::3],
        "permuted": base.reshape(2, 3, 4).permute(2, 0, 1),
        "scalar": base[3, 5],
        "empty": base[:0],
        "expanded": base[0, :1].expand(3, 4),
    },
    "views.pt")

linear = torch.nn.Linear(3, 2)
with torch.no_grad():
    linear.weight.copy_(torch.arange(6).reshape(2, 3))
    linear.bias.copy_(torch.tensor([-1.0, 1.0]))
torch.save(linear.state_dict(), "pytorch_model.bin")
torch.save(dict(linear.named_parameters()), "parameters.pth")
torch.save(linear.state_dict(), "protocol4.pt", pickle_protocol=4)
torch.save(
    {"epoch": 3, "state_dict": linear.state_dict(), "list": [torch.ones(1), "text"], 7: torch.zeros(1)},
    "nested.ckpt")
torch.save(linear.state_dict(), "old.pt", _use_new_zipfile_serialization=False)
torch.save(linear, "module.pt")
torch.jit.script(linear).save("script.pt")
