#!/usr/bin/env python3
"""Writes the golden files of the model, teacher, loss and optimizer tests.

Outputs, losses and gradients come from public implementations (transformers, timm, torch), run in
float64 and rounded once to what is stored, so that the error a test sees is ours alone. Tests read
the committed files; only making them again needs Python. See README.md beside this script.

    python3 make_golden.py [folder to write to; default: this script's]
"""

import functools
import os
import sys

import numpy as np
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from golden_values import (
    choose_mask,
    f64,
    fill_rule,
    formula,
    fp32,
    normalised,
    picture,
    save,
    store_gradients,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# ---------------------------------------------------------------- students


class Joined:
    """Canonical (BEiT) parameter names over a module's own: name -> (parameters to join along rows,
    sizes of the parts). Fills parameters by formula and reads gradients back."""

    def __init__(self, rows):
        self.rows = rows

    def shape(self, name):
        parts = self.rows[name]
        shape = list(parts[0].shape)
        while shape[0] == 1 and len(shape) > 1:  # tokens are [1, 1, C] in PyTorch, [C] here
            shape = shape[1:]
        return (
            tuple([sum(p.shape[0] for p in parts)] + shape[1:]) if len(parts) > 1 else tuple(shape)
        )

    def fill(self, seed, out):
        for name, parts in self.rows.items():
            shape = self.shape(name)
            scale, offset = fill_rule(name, shape)
            value = torch.from_numpy(formula(seed, name, shape, scale, offset)).double()
            out["fill." + name] = np.array([offset, scale], np.float32)
            with torch.no_grad():
                for p, v in zip(parts, value.chunk(len(parts))):
                    p.copy_(v.reshape(p.shape))

    def gradients(self):
        return {
            name: torch.cat([p.grad for p in parts]).reshape(self.shape(name))
            for name, parts in self.rows.items()
        }


def rename_block(module, names):
    own = dict(module.named_parameters())
    return {to: [own.pop(n) for n in of] for to, of in names.items()}, own


def transformers_names(model):
    """Canonical rows of a BeitForMaskedImageModeling."""
    top = {
        "cls_token": ["beit.embeddings.cls_token"],
        "mask_token": ["beit.embeddings.mask_token"],
        "patch_embed.proj.weight": ["beit.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": ["beit.embeddings.patch_embeddings.projection.bias"],
        "rel_pos_bias.relative_position_bias_table": [
            "beit.shared_position_bias.relative_position_bias_table"
        ],
        "norm.weight": ["layernorm.weight"],
        "norm.bias": ["layernorm.bias"],
        "lm_head.weight": ["lm_head.weight"],
        "lm_head.bias": ["lm_head.bias"],
    }
    if model.config.use_absolute_position_embeddings:
        top["pos_embed"] = ["beit.embeddings.position_embeddings"]
    for i in range(model.config.num_hidden_layers):
        at, to = f"beit.layers.{i}.", f"blocks.{i}."
        top[to + "gamma_1"], top[to + "gamma_2"] = [at + "lambda_1"], [at + "lambda_2"]
        top[to + "attn.qkv.weight"] = [at + f"attention.{c}_proj.weight" for c in "qkv"]
        top[to + "attn.q_bias"] = [at + "attention.q_proj.bias"]
        top[to + "attn.v_bias"] = [at + "attention.v_proj.bias"]
        for of, name in (
            ("attention.o_proj", "attn.proj"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            for kind in ("weight", "bias"):
                top[f"{to}{name}.{kind}"] = [f"{at}{of}.{kind}"]
    rows, left = rename_block(model, top)
    assert not left, f"parameters without a canonical name: {sorted(left)}"
    return Joined(rows)


def target_features(seed, batch, patches, width):
    """Un-normalised teacher features with a mean and spread of their own in every row."""
    raw = torch.from_numpy(formula(seed, "target", (batch, patches, width), 2.0)).double()
    gain = torch.from_numpy(formula(seed, "target.gain", (batch, patches, 1), 0.5, 1.0)).double()
    return (raw * gain + gain).float().double()


def student_facts(cfg):
    return {
        k: cfg[k]
        for k in (
            "width",
            "layers",
            "heads",
            "mlp",
            "patch",
            "image",
            "batch",
            "head_width",
            "abs_pos",
            "rel_pos",
            "loss",
            "beta",
            "seed",
        )
    }


def make_student(folder, name, masked, keep, **cfg):
    """transformers' BeitForMaskedImageModeling, its head D -> D_T, smooth-L1 on the masked tokens."""
    model = (
        transformers.BeitForMaskedImageModeling(
            transformers.BeitConfig(
                vocab_size=cfg["head_width"],
                hidden_size=cfg["width"],
                num_hidden_layers=cfg["layers"],
                num_attention_heads=cfg["heads"],
                intermediate_size=cfg["mlp"],
                image_size=cfg["image"],
                patch_size=cfg["patch"],
                use_mask_token=True,
                use_absolute_position_embeddings=cfg["abs_pos"],
                use_shared_relative_position_bias=True,
                layer_scale_init_value=0.1,
                layer_norm_eps=1e-6,
                drop_path_rate=0.0,
                attn_implementation="sdpa",
            )
        )
        .double()
        .train()
    )
    patches = (cfg["image"] // cfg["patch"]) ** 2
    seed, batch, width = cfg["seed"], cfg["batch"], cfg["head_width"]
    out, names = {}, transformers_names(model)
    names.fill(seed, out)
    image = picture(seed, "image", batch, cfg["image"])
    mask = choose_mask(seed, batch, patches, masked)
    where = torch.from_numpy(mask).bool()
    logits = model(normalised(image, IMAGENET), bool_masked_pos=where).logits
    raw = target_features(seed, batch, patches, width)
    target = F.layer_norm(raw, (width,), eps=1e-6)[where]
    prediction = logits[where]
    loss = F.smooth_l1_loss(prediction, target, beta=cfg["beta"])
    loss.backward()
    out.update(
        {
            "image": image,
            "mask": mask,
            "target_raw": fp32(raw),
            "target": fp32(target),
            "prediction": fp32(prediction),
            "loss": f64(loss),
        }
    )
    store_gradients(out, names.gradients(), keep)
    save(folder, name, out, masked=masked, **student_facts(cfg))


def make_beit(folder, name, keep, **cfg):
    """timm's BEiT without masks, a linear head on every patch token, loss on all of them."""
    shared = cfg["rel_pos"] == "shared"
    model = Beit(
        img_size=cfg["image"],
        patch_size=cfg["patch"],
        num_classes=0,
        global_pool="token",
        embed_dim=cfg["width"],
        depth=cfg["layers"],
        num_heads=cfg["heads"],
        qkv_bias=True,
        mlp_ratio=cfg["mlp"] / cfg["width"],
        init_values=0.1,
        use_abs_pos_emb=cfg["abs_pos"],
        use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared,
        norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-6),
    )
    model.lm_head = torch.nn.Linear(cfg["width"], cfg["head_width"])
    model = model.double().train()
    patches = (cfg["image"] // cfg["patch"]) ** 2
    seed, batch, width = cfg["seed"], cfg["batch"], cfg["head_width"]
    out, names = {}, Joined({n: [p] for n, p in model.named_parameters()})
    names.fill(seed, out)
    image = picture(seed, "image", batch, cfg["image"])
    tokens = model.forward_features(normalised(image, IMAGENET))
    prediction = model.lm_head(tokens[:, 1:]).flatten(0, 1)
    raw = target_features(seed, batch, patches, width)
    target = F.layer_norm(raw, (width,), eps=1e-6).flatten(0, 1)
    loss = (
        F.mse_loss(prediction, target)
        if cfg["loss"] == "l2"
        else F.smooth_l1_loss(prediction, target, beta=cfg["beta"])
    )
    loss.backward()
    out.update(
        {
            "image": image,
            "target_raw": fp32(raw),
            "target": fp32(target),
            "tokens": fp32(tokens),
            "prediction": fp32(prediction),
            "loss": f64(loss),
        }
    )
    store_gradients(out, names.gradients(), keep)
    save(folder, name, out, masked=0, **student_facts(cfg))


# ---------------------------------------------------------------- teachers


def fill_module(model, seed, half):
    """Random weights; half: values that float16 holds exactly, as the published CLIP weights are."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale, offset = fill_rule(name, p.shape)
            value = formula(seed, name, tuple(p.shape), scale, offset)
            p.copy_(
                torch.from_numpy(value.astype(np.float16).astype(np.float32) if half else value)
            )


def openai_names(clip):
    """The state dict of OpenAI's CLIP with the weights of a transformers CLIPModel, float16."""
    own, out = {k: v.half().numpy() for k, v in clip.state_dict().items()}, {}
    plain = {
        "logit_scale": "logit_scale",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    }
    for of, to in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        for kind in ("weight", "bias"):
            plain[f"vision_model.{of}.{kind}"] = f"visual.{to}.{kind}"
    for of, to in plain.items():
        out[to] = own[of]
    out["visual.proj"] = np.ascontiguousarray(own["visual_projection.weight"].T)
    out["text_projection"] = np.ascontiguousarray(own["text_projection.weight"].T)
    for tower, prefix, layers in (
        ("vision_model", "visual.", clip.config.vision_config.num_hidden_layers),
        ("text_model", "", clip.config.text_config.num_hidden_layers),
    ):
        for i in range(layers):
            at, to = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                out[f"{to}attn.in_proj_{kind}"] = np.concatenate(
                    [own[f"{at}self_attn.{c}_proj.{kind}"] for c in "qkv"]
                )
                for of, name in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    out[f"{to}{name}.{kind}"] = own[f"{at}{of}.{kind}"]
    return out


@torch.no_grad()
def clip_features(clip, image, exact, out, prefix):
    """Patch tokens at every stage: after each block, after post_layernorm, after the projection."""
    vision = clip.vision_model
    run = vision(normalised(image, CLIP), interpolate_pos_encoding=exact, output_hidden_states=True)
    for i, hidden in enumerate(run.hidden_states[1:]):
        out[f"{prefix}.block.{i}"] = fp32(hidden[:, 1:])
    post = vision.post_layernorm(run.hidden_states[-1][:, 1:])
    out[prefix + ".ln_post"], out[prefix + ".ln_post_proj"] = fp32(post), fp32(
        clip.visual_projection(post)
    )


@torch.no_grad()
def resize_positions_beit2(clip, grid):
    """The position rule of BEiT v2's CLIP teacher: bicubic by the scale (grid + 0.1) / old grid."""
    table = clip.vision_model.embeddings.position_embedding
    old = int((table.weight.shape[0] - 1) ** 0.5)
    patch = table.weight[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patch = F.interpolate(patch, scale_factor=(grid + 0.1) / old, mode="bicubic")
    patch = patch.permute(0, 2, 3, 1).flatten(0, 2)
    assert patch.shape[0] == grid * grid
    return torch.cat([table.weight[:1], patch])


def make_clip(folder):
    """transformers' CLIP: 16 x 16 positions, used at 16 x 16 and at 14 x 14 by both rules."""

    def build(side):
        text = dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=20,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
        )
        vision = dict(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side,
            patch_size=4,
        )
        return transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=text,
                vision_config=vision,
                projection_dim=24,
                attn_implementation="sdpa",
            )
        ).eval()

    seed, clip = 11, build(64)
    fill_module(clip, seed, half=True)
    clip.save_pretrained(os.path.join(folder, "clip_hf"))
    print(
        f"{os.path.getsize(os.path.join(folder, 'clip_hf', 'model.safetensors')):8d}  clip_hf/model.safetensors"
    )
    save(folder, "clip_openai.safetensors", openai_names(clip))
    out = {"image64": picture(seed, "image64", 1, 64), "image56": picture(seed, "image56", 1, 56)}
    clip = clip.double()
    clip_features(clip, out["image64"], False, out, "native")
    clip_features(clip, out["image56"], True, out, "exact")
    beit2 = build(56).double()
    weights = clip.state_dict()
    weights["vision_model.embeddings.position_embedding.weight"] = resize_positions_beit2(clip, 14)
    beit2.load_state_dict(weights)
    out["beit2.positions"] = fp32(weights["vision_model.embeddings.position_embedding.weight"])
    clip_features(beit2, out["image56"], False, out, "beit2")
    save(folder, "clip_features.safetensors", out, heads=2, patch=4)


@torch.no_grad()
def make_vit(folder):
    """timm's VisionTransformer: the architecture of DINO, MAE's encoder and timm's own weights."""
    seed = 12
    vit = VisionTransformer(
        img_size=40,
        patch_size=8,
        num_classes=10,
        embed_dim=48,
        depth=2,
        num_heads=3,
        mlp_ratio=2,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()
    fill_module(vit, seed, half=False)
    save(folder, "vit_timm.safetensors", {k: v.numpy() for k, v in vit.state_dict().items()})
    out, vit = {"image": picture(seed, "image", 2, 40)}, vit.double()
    pixels = normalised(out["image"], IMAGENET)
    for i, hidden in enumerate(vit.get_intermediate_layers(pixels, n=2)):
        out[f"native.block.{i}"] = fp32(hidden)
    out["native.ln_post"] = fp32(vit.forward_features(pixels)[:, 1:])
    save(folder, "vit_features.safetensors", out, heads=3, patch=8)


# ---------------------------------------------------------------- losses, targets, optimizer


def store_losses(out):
    p = torch.from_numpy(formula(21, "prediction", (37, 24), 4.0)).double().requires_grad_()
    t = torch.from_numpy(formula(21, "target", (37, 24), 2.0)).double()
    out["loss.prediction"], out["loss.target"] = fp32(p), fp32(t)
    for name, fn in (
        ("smooth_l1_1", functools.partial(F.smooth_l1_loss, beta=1.0)),
        ("smooth_l1_2", functools.partial(F.smooth_l1_loss, beta=2.0)),
        ("l1", F.l1_loss),
        ("l2", F.mse_loss),
    ):
        loss = fn(p, t)
        out[f"loss.{name}"] = f64(loss)
        out[f"loss.{name}.grad"] = fp32(torch.autograd.grad(loss, p)[0])


def store_targets(out):
    """Target normalisations, and pixel targets as transformers' MAE cuts and normalises them."""
    x = torch.from_numpy(formula(22, "features", (19, 40), 8.0, 3.0)).double()
    out["norm.features"] = fp32(x)
    out["norm.layernorm"] = fp32(F.layer_norm(x, (40,), eps=1e-6))
    mae = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=16,
            image_size=24,
            patch_size=8,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=1,
            decoder_intermediate_size=16,
        )
    )
    out["pixel.image"] = picture(22, "image", 2, 24)
    patches = mae.patchify(normalised(out["pixel.image"], IMAGENET))

    def patch_norm(rows):  # forward_loss of the same class, norm_pix_loss
        return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + 1e-6) ** 0.5

    out["pixel.patches"], out["pixel.patch_norm"] = fp32(patches), fp32(patch_norm(patches))
    out["norm.patch_norm"] = fp32(patch_norm(x))


def store_adamw(out):
    """Five steps of clip_grad_norm_(3.0) and AdamW, one group with weight decay and one without."""
    start = torch.from_numpy(formula(23, "param", (2, 29), 1.0)).double()
    decay, plain = (torch.nn.Parameter(start[i].clone()) for i in range(2))
    optimizer = torch.optim.AdamW(
        [{"params": [decay], "weight_decay": 0.05}, {"params": [plain], "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    rates = np.array([0.0, 1.5e-3, 0.02, 1e-5, 0.3], np.float32)
    grads = np.stack([formula(23, f"grad.{i}", (2, 29), 2.0 ** (i % 3 - 2)) for i in range(5)])
    norms, params = [], []
    for rate, grad in zip(rates, grads):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        decay.grad, plain.grad = (torch.from_numpy(g).double() for g in grad)
        norms.append(torch.nn.utils.clip_grad_norm_([decay, plain], 3.0))
        optimizer.step()
        params.append(torch.stack([decay, plain]))
    assert min(norms) < 3 < max(norms)
    state = [optimizer.state[p] for p in (decay, plain)]
    out.update(
        {
            "adamw.start": fp32(start),
            "adamw.lr": rates,
            "adamw.grad": grads,
            "adamw.norm": f64(*norms),
            "adamw.param": fp32(torch.stack(params)),
            "adamw.m": fp32(torch.stack([s["exp_avg"] for s in state])),
            "adamw.v": fp32(torch.stack([s["exp_avg_sq"] for s in state])),
        }
    )


def make_numerics(folder):
    out = {}
    store_losses(out)
    store_targets(out)
    store_adamw(out)
    save(folder, "numerics.safetensors", out)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}"
    )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    b16 = dict(
        width=32,
        layers=2,
        heads=2,
        mlp=128,
        patch=16,
        image=64,
        batch=2,
        head_width=24,
        rel_pos="shared",
        loss="smooth_l1",
        beta=2.0,
    )
    make_student(folder, "student_b16.safetensors", 6, keep=32768, abs_pos=False, seed=1, **b16)
    make_student(folder, "student_b16_abs.safetensors", 6, keep=4096, abs_pos=True, seed=2, **b16)
    make_student(
        folder,
        "student_h14.safetensors",
        7,
        keep=16384,
        width=160,
        layers=2,
        heads=2,
        mlp=160,
        patch=14,
        image=56,
        batch=2,
        head_width=40,
        rel_pos="shared",
        loss="smooth_l1",
        beta=2.0,
        abs_pos=False,
        seed=3,
    )
    small = dict(
        width=48,
        layers=2,
        heads=3,
        mlp=96,
        patch=8,
        image=32,
        batch=3,
        head_width=20,
        abs_pos=False,
    )
    make_beit(
        folder,
        "beit_shared.safetensors",
        16384,
        rel_pos="shared",
        loss="l2",
        beta=1.0,
        seed=4,
        **small,
    )
    make_beit(
        folder,
        "beit_per_layer.safetensors",
        16384,
        rel_pos="per_layer",
        loss="smooth_l1",
        beta=1.0,
        seed=5,
        **small,
    )
    make_clip(folder)
    make_vit(folder)
    make_numerics(folder)


if __name__ == "__main__":
    main()
