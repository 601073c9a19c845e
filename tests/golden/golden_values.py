"""What the golden scripts share: values the C tests can compute too, and how files are written."""

import json
import os

import numpy as np
import safetensors.numpy
import timm
import torch
import transformers

# ---------------------------------------------------------------- values both sides can compute


def philox(seed, step, index, stream=0, word=0):
    """A word of Philox4x32-10 as src/rng.h counts: block 0, index an array."""
    index = np.asarray(index, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c = [np.zeros_like(index), index & low, index >> np.uint64(32), np.full_like(index, step)]
    c[2] |= np.uint64(stream << 16)
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            p0 & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[word]


def fnv1a(name):
    h = 0x811C9DC5
    for byte in name.encode():
        h = (h ^ byte) * 0x01000193 & 0xFFFFFFFF
    return h


def formula(seed, name, shape, scale, offset=0.0):
    """float32 offset + scale * (2 u - 1), u = 24 bits keyed by (seed, FNV-1a of name, element index).
    scale is a power of two, so the product is exact and the sum rounds once on any machine."""
    count = int(np.prod(shape))
    u = (philox(seed, fnv1a(name), np.arange(count)) >> np.uint64(8)).astype(np.float32)
    centred = u * np.float32(2.0**-23) - np.float32(1)
    return (np.float32(offset) + np.float32(scale) * centred).reshape(shape)


def fill_rule(name, shape):
    """(scale, offset): gains around 1, layer scale around 1/2, matrices about unit gain."""
    if len(shape) <= 1:
        gain = name.endswith("weight")
        return 0.25, 1.0 if gain else 0.5 if "gamma" in name else 0.0
    fan, scale = int(np.prod(shape[1:])), 1.0
    while scale * scale * fan > 4:
        scale /= 2
    return scale, 0.0


def picture(seed, name, batch, side):
    """u8 [batch, side, side, 3]: a slow wave with noise on it, so that neighbours correlate."""
    shape = (batch, side, side, 3)
    noise = (philox(seed, fnv1a(name), np.arange(int(np.prod(shape)))) >> np.uint64(25)).reshape(
        shape
    )
    b, y, x, c = np.indices(shape)
    wave = 64 * (1 + np.sin(0.13 * x * (1 + c) + 0.07 * y * (1 + b)))
    return np.clip(noise + wave, 0, 255).astype(np.uint8)


def normalised(image, stats):
    """u8 [B, S, S, 3] -> float64 [B, 3, S, S]."""
    mean, std = (torch.tensor(s, dtype=torch.float64) for s in stats)
    return ((torch.from_numpy(image).double() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def choose_mask(seed, batch, patches, count):
    """u8 [batch, patches] with exactly count ones in each row."""
    order = (
        philox(seed, fnv1a("mask"), np.arange(batch * patches))
        .reshape(batch, patches)
        .argsort(axis=1)
    )
    mask = np.zeros((batch, patches), np.uint8)
    np.put_along_axis(mask, order[:, :count], 1, axis=1)
    return mask


# ---------------------------------------------------------------- writing


def fp32(t):
    return np.ascontiguousarray(t.detach().numpy().astype(np.float32))


def f64(*values):
    return np.array([torch.as_tensor(v).detach().item() for v in values], np.float64)


def sort_metadata(data):
    """The package writes metadata in the order of a hash table; sorted, equal runs give equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(size) + data[8 + size :]


def save(folder, name, tensors, **facts):
    path = os.path.join(folder, name)
    meta = {
        "generator": "tests/golden/make_golden.py",
        "reference": "float64",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": timm.__version__,
    }
    meta.update({k: str(v) for k, v in facts.items()})
    with open(path, "wb") as f:
        f.write(sort_metadata(safetensors.numpy.save(tensors, metadata=meta)))
    print(f"{os.path.getsize(path):8d}  {name}")


def store_gradients(out, gradients, keep):
    """Small gradients whole, shape and all. Of a larger one every step-th element (step prime to its
    size, so that all rows and columns are met), and the sum and sum of squares of all of it."""
    for name, g in gradients.items():
        flat = g.detach().flatten()
        if flat.numel() <= keep:
            out["grad." + name] = fp32(g)
            continue
        step = flat.numel() // (keep // 4)
        while np.gcd(step, flat.numel()) != 1:
            step += 1
        out["grad." + name] = fp32(flat[::step])
        out["step." + name] = np.array([step], np.int32)
        out["moments." + name] = f64(flat.sum(), (flat * flat).sum())
