#!/usr/bin/env python3
"""Writes probe_beit.safetensors and probe_mae.safetensors: a linear probe trained for some epochs on
made-up features, by torch (Linear, BatchNorm1d, AdamW, CosineAnnealingLR) and timm (Lars), in float64;
and probe_blocks.safetensors: what the blocks of timm's BEiT give a probe. See README.md.

    python3 make_golden_probe.py [folder to write to; default: this script's]
"""

import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from golden_values import f64, formula, fp32, normalised, philox, picture, save
from make_golden import IMAGENET, Joined
from make_golden_finetune import beit
from timm.optim import Lars

PROBE = 14  # MD_RNG_PROBE of src/rng.h
STEPS, BATCH, CLASSES, WIDTH, TESTED = 3, 8, 5, 12, 6
CASES = {
    "probe_beit.safetensors": dict(recipe="beit", heads=3, epochs=4, lr=0.25, scale=1.0, seed=71),
    "probe_mae.safetensors": dict(recipe="mae", heads=1, epochs=9, lr=1.0, scale=2.0**-4, seed=72),
}
ENCODER = dict(width=24, layers=3, heads=3, mlp=48, patch=8, image=24, classes=2)
ENCODER_SEED, IMAGES = 73, 2


def normals(seed, head, count):
    """What the program draws for the first weights of a head."""
    w0, w1 = (philox(seed, head, np.arange(count), PROBE, word) for word in (0, 1))
    radius = np.sqrt(-2 * np.log(((w0 >> np.uint64(8)) + np.uint64(1)).astype(np.float64) / 2**24))
    turn = ((w1 << np.uint64(2)) & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)
    quarters = (w1 >> np.uint64(30)).astype(np.float64)
    return radius * np.cos(math.pi / 2 * (turn / 2.0**32 + quarters))


def linear(seed, head):
    layer = torch.nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        start = 0.01 * normals(seed, head, CLASSES * WIDTH)
        layer.weight.copy_(torch.from_numpy(start).reshape(CLASSES, WIDTH))
        layer.bias.zero_()
    return layer


def features(case, name, count):
    """f64 [count, heads, width] around 1/2, so that biases and batch norm have something to do; close
    to it where batch norm's eps should show."""
    shape = (count, case["heads"], WIDTH)
    return torch.from_numpy(formula(case["seed"], name, shape, case["scale"], 0.5)).double()


def make_heads(case):
    heads = torch.nn.ModuleList(linear(case["seed"], k) for k in range(case["heads"]))
    if case["recipe"] == "beit":
        return heads, heads
    norm = torch.nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6)
    return torch.nn.ModuleList([torch.nn.Sequential(norm, heads[0])]), heads


def make_optimizer(case, heads):
    """The optimizer, and a function that sets the rate of a step."""
    if case["recipe"] == "beit":
        optimizer = torch.optim.AdamW(heads.parameters(), case["lr"], weight_decay=1e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case["epochs"], eta_min=0)

        def set_rate(step):
            if step and step % STEPS == 0:
                cosine.step()

        return optimizer, set_rate
    # Weights are adapted, vectors are not.
    groups = [
        {"params": [p for p in heads.parameters() if (p.ndim > 1) == adapt], "always_adapt": adapt}
        for adapt in (True, False)
    ]
    optimizer = Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001, eps=0.0, weight_decay=0.0)
    warmup = case["epochs"] / 9

    def set_rate(step):
        epoch = step / STEPS
        done = (epoch - warmup) / (case["epochs"] - warmup)
        factor = epoch / warmup if epoch < warmup else 0.5 * (1 + math.cos(math.pi * done))
        for g in optimizer.param_groups:
            g["lr"] = case["lr"] * factor

    return optimizer, set_rate


def make(case):
    out, rates, losses = {}, [], []
    models, heads = make_heads(case)
    optimizer, set_rate = make_optimizer(case, heads)
    steps = case["epochs"] * STEPS
    labels = (philox(case["seed"], 0, np.arange(steps * BATCH)) % np.uint64(CLASSES)).astype(
        np.int32
    )
    labels = labels.reshape(steps, BATCH)
    models.train()
    for step in range(steps):
        set_rate(step)
        rates.append(optimizer.param_groups[0]["lr"])
        x, y = features(case, f"feature.{step}", BATCH), torch.from_numpy(labels[step]).long()
        loss = [F.cross_entropy(model(x[:, k]), y) for k, model in enumerate(models)]
        optimizer.zero_grad()
        sum(loss).backward()
        optimizer.step()
        losses.append(torch.stack(loss))
    models.eval()
    x = features(case, "test", TESTED)
    out["label"] = labels
    out["rate"] = f64(*rates)
    out["loss"] = fp32(torch.stack(losses))
    for k, head in enumerate(heads):
        out[f"weight.{k}"] = fp32(head.weight)
        out[f"bias.{k}"] = fp32(head.bias)
        out[f"logits.{k}"] = fp32(models[k](x[:, k]))
    return out


def make_blocks():
    """[images, layers, 2 width]: cls token and mean of the patch tokens behind every block."""
    out, seen = {}, []
    model = beit("token", **ENCODER).eval()
    names = Joined({n: [p] for n, p in model.named_parameters() if not n.startswith("head.")})
    names.fill(ENCODER_SEED, out)
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, x: seen.append(x))
    out["image"] = picture(ENCODER_SEED, "image", IMAGES, ENCODER["image"])
    with torch.no_grad():
        model(normalised(out["image"], IMAGENET))
    out["blocks"] = fp32(
        torch.stack([torch.cat((x[:, 0], x[:, 1:].mean(1)), dim=1) for x in seen], dim=1)
    )
    return out


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    sizes = dict(steps=STEPS, batch=BATCH, classes=CLASSES, width=WIDTH, tested=TESTED)
    for name, case in CASES.items():
        out = make(case)
        save(folder, name, out, **sizes, **case, generator="tests/golden/make_golden_probe.py")
    save(
        folder,
        "probe_blocks.safetensors",
        make_blocks(),
        **ENCODER,
        seed=ENCODER_SEED,
        images=IMAGES,
        generator="tests/golden/make_golden_probe.py",
    )


if __name__ == "__main__":
    main()
