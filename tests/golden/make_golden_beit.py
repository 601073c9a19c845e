#!/usr/bin/env python3
"""Writes the golden files of BEiT teachers: beit_timm.safetensors, beit_hf/ and their features.

A pretrained BEiT (timm's Beit, shared relative positions, final norm) and a fine-tuned one
(transformers' BeitForImageClassification, relative positions in every block and absolute ones, norm
behind the mean of the tokens), small, with random weights. Features in float64, rounded once.

    python3 make_golden_beit.py [folder to write to; default: this script's]
"""

import functools
import os
import sys

import timm
import torch
import transformers
from timm.models.beit import Beit

from golden_values import formula, fill_rule, fp32, normalised, picture, save

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WIDTH, LAYERS, HEADS, MLP, PATCH, SIDE = 32, 2, 2, 64, 4, 20
MAKER = "tests/golden/make_golden_beit.py"


@torch.no_grad()
def fill(model, seed):
    for name, p in model.named_parameters():
        scale, offset = fill_rule(name, p.shape)
        if "lambda" in name:
            offset = 0.5
        p.copy_(torch.from_numpy(formula(seed, name, tuple(p.shape), scale, offset)))


@torch.no_grad()
def make_timm(folder):
    model = Beit(
        img_size=SIDE,
        patch_size=PATCH,
        num_classes=0,
        global_pool="token",
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        mlp_ratio=MLP / WIDTH,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-6),
    ).eval()
    fill(model, 14)
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    save(folder, "beit_timm.safetensors", weights, generator=MAKER)
    out, blocks = {"image": picture(14, "image", 2, SIDE)}, []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, got: blocks.append(got))
    post = model.double().forward_features(normalised(out["image"], IMAGENET))
    for i, hidden in enumerate(blocks):
        out[f"native.block.{i}"] = fp32(hidden[:, 1:])
    out["native.ln_post"] = fp32(post[:, 1:])
    save(folder, "beit_timm_features.safetensors", out, heads=HEADS, patch=PATCH, generator=MAKER)


@torch.no_grad()
def make_hf(folder):
    model = transformers.BeitForImageClassification(
        transformers.BeitConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=MLP,
            image_size=SIDE,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
            use_relative_position_bias=True,
            use_absolute_position_embeddings=True,
            num_labels=3,
        )
    ).eval()
    fill(model, 15)
    model.save_pretrained(os.path.join(folder, "beit_hf"))
    out, model = {"image": picture(15, "image", 2, SIDE)}, model.double()
    run = model.beit(normalised(out["image"], IMAGENET), output_hidden_states=True)
    for i, hidden in enumerate(run.hidden_states[1:]):
        out[f"native.block.{i}"] = fp32(hidden[:, 1:])
    out["native.ln_post"] = fp32(model.beit.pooler.layernorm(run.hidden_states[-1][:, 1:]))
    save(folder, "beit_hf_features.safetensors", out, heads=HEADS, patch=PATCH, generator=MAKER)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    make_timm(folder)
    make_hf(folder)


if __name__ == "__main__":
    main()
