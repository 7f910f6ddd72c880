"""Writes the PyTorch files of this folder: python make.py (torch 2.13)."""

import argparse
import collections

import numpy as np
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

state = linear.state_dict()
optimizer = torch.optim.Adam(linear.parameters(), lr=1e-3)
linear(torch.ones(1, 3)).sum().backward()
optimizer.step()
torch.save(
    {
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"milestones": collections.Counter([30, 60]), "last": 2**70},
        "logs": collections.defaultdict(list, {"loss": [0.5, 0.25]}),
        "best": np.float64(0.9),
        "history": np.arange(3.0),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "seen": {1, 2},
        "raw": b"\x00\xff",
        "none": None,
        "flag": True,
        ("a", "b"): "a tuple as a key",
        "parameter": torch.nn.Parameter(torch.ones(2)),
    },
    "training.ckpt")
torch.save({"f8": torch.arange(4).to(torch.float8_e4m3fn), "shared": [base[1, 2:4], base[2:3, 1:]]}, "odd.pt")

refused = {
    "namespace": argparse.Namespace(lr=0.1),
    "complex128": torch.ones(2, dtype=torch.complex128),
    "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "sparse": torch.eye(2).to_sparse(),
    "sparse_csr": torch.eye(2).to_sparse_csr(),
    "meta": torch.ones(2, device="meta"),
    "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
}
for name, value in refused.items():
    torch.save({"t": value}, f"{name}.pt")
