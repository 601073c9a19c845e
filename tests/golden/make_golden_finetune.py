#!/usr/bin/env python3
"""Writes finetune_beit.safetensors and finetune_beit_cls.safetensors: two steps of fine-tuning a
classifier, mixup in one and CutMix in the other, by timm (model, mixing, soft labels, layer-wise
learning rates) and torch (AdamW), in float64; and the rate and decay of every parameter of the three
published sizes. See README.md.

    python3 make_golden_finetune.py [folder to write to; default: this script's]
"""

import os
import sys
import types
import unittest.mock

import numpy as np
import timm.data.mixup
import torch
import torch.nn.functional as F
import transformers
from golden_values import f64, fp32, normalised, picture, save, store_gradients
from make_golden import IMAGENET, Joined
from timm.loss import SoftTargetCrossEntropy
from timm.models.beit import Beit
from timm.optim import param_groups_layer_decay

SIZE = dict(width=48, layers=3, heads=3, mlp=96, patch=8, image=32, batch=4, classes=7)
SMOOTHING, WEIGHT_DECAY, KEEP = 0.1, 0.05, 1024

# What this program draws for the batch of steps 0 and 1: lambda of mixup, or the box of CutMix as x,
# y, width, height. The test checks that it does.
CASES = {
    "finetune_beit.safetensors": dict(
        pool="avg", seed=53, draws=[0.55395693326825124, (14, 8, 18, 24)]
    ),
    "finetune_beit_cls.safetensors": dict(
        pool="token", seed=127, draws=[(0, 0, 18, 23), 0.38443192643852209]
    ),
}
# Blocks and layer decay of ViT-B, L and H.
DEPTHS = [(12, 0.65), (24, 0.8), (32, 0.85)]


def beit(pool, width, layers, heads, mlp, patch, image, classes, **_):
    return Beit(
        img_size=image,
        patch_size=patch,
        num_classes=classes,
        global_pool=pool,
        embed_dim=width,
        depth=layers,
        num_heads=heads,
        mlp_ratio=mlp / width,
        init_values=0.1,
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
        norm_layer=lambda dim, **dd: timm.layers.LayerNorm(dim, eps=1e-6, **dd),
    ).double()


def mix(images, labels, draw):
    """timm's Mixup on the whole batch with its random numbers replaced: (pictures, target, lambda)."""
    by = timm.data.mixup.Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=SMOOTHING, num_classes=SIZE["classes"]
    )
    cut = isinstance(draw, tuple)
    x, y, w, h = draw if cut else (0, 0, 0, 0)
    by._params_per_batch = types.MethodType(lambda self: (0.5 if cut else draw, cut), by)
    with unittest.mock.patch("timm.data.mixup.rand_bbox", lambda *a, **k: (y, y + h, x, x + w)):
        mixed, target = by(images, labels)
    lam = 1 - w * h / images.shape[-1] ** 2 if cut else draw
    expected = timm.data.mixup.mixup_target(labels, SIZE["classes"], lam, SMOOTHING)
    assert torch.equal(target, expected)
    return mixed, target, lam


def groups_of(model, weight_decay, layer_decay):
    """timm's groups, but for two things in which its model and unilm's differ: relative position
    tables are decayed (unilm exempts pos_embed and cls_token only), and the final norm of a model
    that looks at cls belongs to the head, not to the last block."""
    groups = param_groups_layer_decay(
        model,
        weight_decay=weight_decay,
        no_weight_decay_list={"pos_embed", "cls_token"},
        layer_decay=layer_decay,
    )
    final = {id(p) for n, p in model.named_parameters() if n.startswith("norm.")}
    out = []
    for g in groups:
        for own, scale in ((False, g["lr_scale"]), (True, 1.0)):
            params = [p for p in g["params"] if (id(p) in final) == own]
            if params:
                out.append({**g, "params": params, "lr_scale": scale})
    return out


def make_steps(case, out):
    """Two steps: all that goes in and comes out, and how far the parameters have moved."""
    seed, rate = case["seed"], case["lr"]
    model = beit(case["pool"], **SIZE).train()
    names = Joined({n: [p] for n, p in model.named_parameters()})
    names.fill(seed, out)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups = groups_of(model, WEIGHT_DECAY, case["layer_decay"])
    optimizer = torch.optim.AdamW([{**g, "lr": rate * g["lr_scale"]} for g in groups])
    for step, draw in enumerate(case["draws"]):
        image = picture(seed, f"image.{step}", SIZE["batch"], SIZE["image"])
        labels = np.array([[3, 0, 6, 1], [5, 2, 2, 4]][step], np.int32)
        mixed, target, lam = mix(
            normalised(image, IMAGENET), torch.from_numpy(labels).long(), draw
        )
        logits = model(mixed)
        if case["pool"] == "avg":
            check_transformers(model, mixed, logits)
        loss = SoftTargetCrossEntropy()(logits, target)
        optimizer.zero_grad()
        loss.backward()
        patches = F.unfold(mixed, SIZE["patch"], stride=SIZE["patch"]).transpose(1, 2)
        part = {
            "image": image,
            "label": labels,
            "lambda": f64(lam),
            "box": np.array(draw if isinstance(draw, tuple) else [0] * 4, np.int32),
            "patches": fp32(patches),
            "target": fp32(target),
            "logits": fp32(logits),
            "loss": f64(loss),
        }
        store_gradients(part, names.gradients(), KEEP)
        out.update({f"{step}.{k}": v for k, v in part.items()})
        optimizer.step()
    moved = {n: (p - start[n]).reshape(names.shape(n)) for n, p in model.named_parameters()}
    part = {}
    store_gradients(part, moved, KEEP)
    out.update({"moved." + k.removeprefix("grad."): v for k, v in part.items() if "grad." in k})


def check_transformers(model, images, logits):
    """transformers' BeitForImageClassification with the same weights gives the same logits."""
    other = transformers.BeitForImageClassification(
        transformers.BeitConfig(
            hidden_size=SIZE["width"],
            num_hidden_layers=SIZE["layers"],
            num_attention_heads=SIZE["heads"],
            intermediate_size=SIZE["mlp"],
            image_size=SIZE["image"],
            patch_size=SIZE["patch"],
            num_labels=SIZE["classes"],
            layer_norm_eps=1e-6,
            drop_path_rate=0.0,
            use_mask_token=False,
            use_absolute_position_embeddings=True,
            use_relative_position_bias=True,
            use_mean_pooling=True,
        )
    ).double()
    own = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    own.update(
        {
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "fc_norm": "pooler.layernorm",
        }
    )
    block = {
        "gamma_1": "lambda_1",
        "gamma_2": "lambda_2",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "attn.relative": "relative_position_bias.relative",
        "mlp": "mlp",
    }
    state = {}
    for name, value in model.state_dict().items():
        of, _, rest = name.removeprefix("blocks.").partition(".")
        if name.startswith("blocks."):
            at = f"beit.layers.{of}."
            if rest == "attn.qkv.weight":
                for c, part in zip("qkv", value.chunk(3)):
                    state[f"{at}attention.{c}_proj.weight"] = part
            elif rest in ("attn.q_bias", "attn.v_bias"):
                state[f"{at}attention.{rest[5]}_proj.bias"] = value
            else:
                for a, b in block.items():
                    if rest.startswith(a):
                        state[at + b + rest.removeprefix(a)] = value
        elif name.startswith("head."):
            state["classifier." + rest] = value
        else:
            for a, b in own.items():
                if name.startswith(a):
                    state["beit." + b + name.removeprefix(a)] = value
    known = dict(other.named_parameters())
    assert set(known) <= set(state), set(known) - set(state)
    other.load_state_dict({n: state[n] for n in known}, strict=False)
    error = (other.eval()(images).logits - logits).abs().max() / logits.abs().max()
    assert error < 1e-12, error


def make_rates(out):
    """Scale of the learning rate, and whether weight decay applies, of each parameter in the order of
    names; the names go into the metadata."""
    names = {}
    for layers, layer_decay in DEPTHS:
        model = beit("avg", width=8, layers=layers, heads=1, mlp=8, patch=4, image=8, classes=2)
        row = {}
        for g in groups_of(model, WEIGHT_DECAY, layer_decay):
            for p in g["params"]:
                row[id(p)] = (g["lr_scale"], g["weight_decay"] > 0)
        rows = [(n, *row[id(p)]) for n, p in model.named_parameters()]
        names[f"names.{layers}"] = ",".join(n for n, _, _ in rows)
        out[f"scale.{layers}"] = f64(*[s for _, s, _ in rows])
        out[f"decay.{layers}"] = np.array([d for _, _, d in rows], np.uint8)
        out[f"layer_decay.{layers}"] = f64(layer_decay)
    return names


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    for name, case in CASES.items():
        out = {}
        case = dict(lr=2.0**-7, layer_decay=0.65, **case)
        make_steps(case, out)
        names = make_rates(out) if case["pool"] == "avg" else {}
        facts = {k: case[k] for k in ("pool", "seed", "lr", "layer_decay")}
        facts["generator"] = "tests/golden/make_golden_finetune.py"
        save(folder, name, out, **SIZE, **facts, weight_decay=WEIGHT_DECAY, **names)


if __name__ == "__main__":
    main()
