"""Writes the numpy archives of this folder: python make.py (numpy 2, ml_dtypes)."""

import ml_dtypes
import numpy as np

names = [
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
    "uint32", "uint64", "bool", "complex64",
]
arrays = {name: np.arange(6).reshape(2, 3).astype(name) for name in names}
arrays["bfloat16"] = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
arrays["scalar"] = np.float32(7)
arrays["empty"] = np.zeros((0, 3), np.float32)
arrays["vector"] = np.ones(4, np.float64)
arrays["layers.0.weight"] = np.ones(1, np.float32)
arrays["fortran"] = np.asfortranarray(np.arange(24, dtype=np.int32).reshape(2, 3, 4))
arrays["zeros"] = np.zeros(1000, np.uint8)
np.savez("plain.npz", **arrays)
np.savez_compressed("compressed.npz", **arrays)
np.savez("big.npz", big=np.ones(2, ">f4"))
np.savez("object.npz", object=np.array([None, {}], dtype=object))
np.savez("text.npz", text=np.array(["ab", "c"]))
