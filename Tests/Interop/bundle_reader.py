import functools, json, ml_dtypes, numpy as np

TYPES = dict(F64="f8", F32="f4", F16="f2", BF16="bfloat16", C64="c8", BOOL="?", F8_E8M0="float8_e8m0fnu",
             F8_E4M3="float8_e4m3fn", F8_E5M2="float8_e5m2", F8_E4M3FNUZ="float8_e4m3fnuz",
             F8_E5M2FNUZ="float8_e5m2fnuz", F4="u1", F6_E2M3="u1", F6_E3M2="u1")  # the last three stay packed
TYPES |= {f"{kind.upper()}{8 * w}": f"{kind}{w}" for kind in "iu" for w in (1, 2, 4, 8)}
PARTS = {"sparse": ["#gaps", "#values"], "sparseulp": ["#gaps", "#values"], "lowrank": ["#left", "#right"],
         "int8": ["", "#scale"], "int4": ["", "#scale"], "sign1": ["", "#scale"]}
CODES = {"int8": lambda q: q.ravel(), "sign1": lambda q: np.unpackbits(q, bitorder="little").astype("i1") * 2 - 1,
         "int4": lambda q: np.stack([q & 15, q >> 4], 1).ravel().astype("i1") - 8}
BLOCK = 1 << 20

def join(planes, rotation):  # planes of bytes, most significant first, to unsigned integers
    w, u = len(planes), planes[::-1].T.copy().view(f"u{len(planes)}").ravel()
    return u >> rotation | u << (8 * w - rotation) if rotation else u

def add_steps(codes, reference):  # steps from float to float, sorted by the reference's leading byte
    bits, out, top = 8 * codes.itemsize, reference.copy(), np.array(1 << (8 * codes.itemsize - 1), codes.dtype)
    for b in range(0, out.size, BLOCK):
        r, code, steps = out[b:b + BLOCK], codes[b:b + BLOCK], np.empty_like(codes[b:b + BLOCK])
        steps[np.argsort((r << 1 | r >> (bits - 1)) >> (bits - 8), kind="stable")] = code >> 1 ^ -(code & 1)
        value = np.where(r & top, ~r, r | top) + steps
        out[b:b + BLOCK] = np.where(value & top, value & ~top, ~value)
    return out

def fill(gaps, values, out):  # runs of zeros before values; 254 is a run without one, 255 ends a block
    for b, g in enumerate(np.split(gaps, np.flatnonzero(gaps == 255) + 1)[:-1]):
        at = b * BLOCK + (np.cumsum(np.where(g == 254, 254, g.astype("i8") + 1)) - 1)[g < 254]
        out[at], values = values[:len(at)], values[len(at):]
    return out

def load(file, names=None, base={}):
    """Tensors by name, of a bundle opened by pyzstd.SeekableZstdFile or decompressed by zstd -d."""
    read = lambda begin, end: (file.seek(begin), file.read(end - begin))[1]
    shaped = lambda x, t: x.reshape(-1 if t["dtype"][:2] in ("F4", "F6") else t["shape"])
    start = 8 + int.from_bytes(read(0, 8), "little")
    header = json.loads(read(8, start))
    models = ((m["name"], t) for m in json.loads(header["__metadata__"]["bundle"])["models"] for t in m["tensors"])
    recipe = {"/".join(filter(None, [model, t["name"]])): t for model, t in models}

    def part(name):
        begin, end = header[name]["data_offsets"]
        return shaped(np.frombuffer(read(start + begin, start + end), TYPES[header[name]["dtype"]]), header[name])

    @functools.cache
    def tensor(name):
        t = recipe[name]
        codec, dtype, count = t["codec"], np.dtype(TYPES[t["dtype"]]), int(np.prod(t["shape"]))
        p = [part(k) for k in t.get("parts", [name + s for s in PARTS.get(codec, [""])])]
        other = tensor(t["reference"]) if "reference" in t else base[t["base"]] if "base" in t else np.zeros(0)
        other, rotation = other.ravel().view(f"u{dtype.itemsize}"), t.get("rotation", 1)
        thin = lambda: fill(p[0], join(p[1], rotation), np.zeros(count, other.dtype))
        if codec in CODES: x = (CODES[codec](p[0])[:count].astype("f4") * np.repeat(p[1], t["group"])[:count]).astype(dtype)
        elif codec == "lowrank": x = sum((l[:, None] * r for l, r in zip(p[0].T, p[1])), np.float32(0)).astype(dtype)
        else: x = {"raw": lambda: p[0], "planes": lambda: join(p[0], rotation), "xor": lambda: join(p[0], 0) ^ other,
                   "ulp": lambda: add_steps(join(p[0], 0), other), "sparse": thin,
                   "sparseulp": lambda: add_steps(thin(), other)}[codec]()
        return shaped(x.view(dtype), t)
    return {name: tensor(name) for name in names or recipe}
