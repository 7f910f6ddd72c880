"""Reads Smelt's bundles with numpy and zstandard alone: NAME.safetensors.zst to arrays."""

import json

import ml_dtypes  # noqa: F401  (gives numpy the names of the small floats)
import numpy as np
import zstandard

TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bfloat16", "I64": "i8", "I32": "i4",
         "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?",
         "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "c8"}
BLOCK = 1 << 20


def join(planes, rotation):
    """Planes of bytes, most significant first, to unsigned integers rotated back."""
    w = len(planes)
    u = planes[::-1].T.copy().view(f"u{w}").ravel()
    return u if rotation == 0 else (u >> rotation) | (u << (8 * w - rotation))


def add_steps(planes, reference):
    """The floats so many steps from the reference's; steps are sorted by its leading byte."""
    w, out = len(planes), reference.copy()
    top = np.array(1 << (8 * w - 1), f"u{w}")
    for b in range(0, out.size, BLOCK):
        r, code = out[b:b + BLOCK], join(planes[:, b:b + BLOCK], 0)
        order = np.argsort(((r << 1) | (r >> (8 * w - 1))) >> (8 * w - 8), kind="stable")
        steps = np.empty_like(code)
        steps[order] = (code >> 1) ^ -(code & 1)
        value = np.where(r & top, ~r, r | top) + steps
        out[b:b + BLOCK] = np.where(value & top, value & ~top, ~value)
    return out


def fill(gaps, values, count):
    """Values between runs of zeros: gap 254 is a run without a value, 255 ends a block."""
    places = []
    for b, g in enumerate(np.split(gaps, np.flatnonzero(gaps == 255) + 1)[:-1]):
        at = np.cumsum(np.where(g == 254, 254, g.astype(np.int64) + 1)) - 1
        places.append(b * BLOCK + at[g < 254])
    out = np.zeros(count, values.dtype)
    out[np.concatenate(places)] = values
    return out


def load(path, base=None):
    with open(path, "rb") as file:
        raw = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    n = int.from_bytes(raw[:8], "little")
    header, body, result = json.loads(raw[8:8 + n]), memoryview(raw)[8 + n:], {}
    part = lambda k: np.frombuffer(body[slice(*header[k]["data_offsets"])], TYPES[header[k]["dtype"]]).reshape(header[k]["shape"])
    for model in json.loads(header["__metadata__"]["bundle"])["models"]:
        for t in model["tensors"]:
            name = "/".join(filter(None, [model["name"], t["name"]]))
            dtype, shape, codec = np.dtype(TYPES[t["dtype"]]), t["shape"], t["codec"]
            uint, count = f"u{dtype.itemsize}", int(np.prod(shape))
            other = {"reference": result, "base": base or {}}
            other = next((o[t[k]].view(uint).ravel() for k, o in other.items() if k in t), None)
            suffixes = {"sparse": ["#gaps", "#values"], "int8": ["", "#scale"], "int4": ["", "#scale"], "sign1": ["", "#scale"]}
            p = [part(k) for k in t.get("parts", [name + s for s in suffixes.get(codec, [""])])]
            if codec == "raw": x = p[0]
            elif codec == "planes": x = join(p[0], t.get("rotation", 1))
            elif codec == "xor": x = join(p[0], 0) ^ other
            elif codec == "ulp": x = add_steps(p[0], other)
            elif codec == "sparse": x = fill(p[0], join(p[1], t.get("rotation", 1)), count)
            else:
                q = {"int8": lambda: p[0].ravel(),
                     "int4": lambda: np.stack([p[0] & 15, p[0] >> 4], 1).ravel()[:count].astype("i1") - 8,
                     "sign1": lambda: np.unpackbits(p[0], bitorder="little")[:count].astype("i1") * 2 - 1}[codec]()
                x = (q.astype("f4") * np.repeat(p[1], t["group"])[:count]).astype(dtype)
            result[name] = x.view(dtype).reshape(shape)
    return result
