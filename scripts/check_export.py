#!/usr/bin/env python3
"""Checks what `md_hpc weights export` wrote by loading it where it is meant to be used.

    python3 scripts/check_export.py --timm DIR --hf DIR [--beit2 DIR] [PICTURE...]
    python3 scripts/check_export.py --timm DIR --hf DIR --features FILE.safetensors

Every export is loaded strictly: a tensor that is missing, left over or of another shape is an
error. timm and transformers must then agree on the output of the last block, and on the logits of a
classifier, for the pictures given (else for noise). --beit2 compares the tensors with timm's, name
by name.

A features file holds what md_hpc itself computed; `md_hpc evaluate RUN evaluate.kind=features`
writes one. Its tensors: "image", u8 [B, S, S, 3] with the metadata mean and std, or f32
[B, 3, S, S], normalised; "features" f32 [B, C], the mean of the normalised patch tokens (or, with
--feature cls, the class token); "logits" f32 [B, K] of a classifier or [B, T - 1, K] of a
pretraining head; "tokens" f32 [B, T, C], the output of the last block, class token first. Of these
only "image" must be there.

Prints one line a comparison and ends with 1 when one fails, 2 when an argument is wrong. Needs
torch, timm, transformers, safetensors, numpy, and Pillow for pictures:

    pip install torch timm transformers safetensors numpy pillow
"""

import argparse
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
import transformers
from timm.models.beit import Beit, gen_relative_position_index

FAILURES = []


def report(name, good, detail):
    print(f"{'ok  ' if good else 'FAIL'}  {name}: {detail}")
    if not good:
        FAILURES.append(name)


def compare(name, got, want, tolerance):
    """Largest difference over the largest value."""
    if tuple(got.shape) != tuple(want.shape):
        report(name, False, f"shape {list(got.shape)}, not {list(want.shape)}")
        return
    error = ((got - want).abs().max() / want.abs().max()).item()
    report(name, error <= tolerance, f"relative error {error:.2g} (allowed {tolerance:g})")


def read_config(folder):
    with open(os.path.join(folder, "config.json")) as f:
        return json.load(f)


def read_tensors(folder):
    return safetensors.torch.load_file(os.path.join(folder, "model.safetensors"))


# ---------------------------------------------------------------- loading


def load_timm(folder):
    """By the class itself and by timm.create_model, which must be the same model."""
    tensors, config = read_tensors(folder), read_config(folder)
    model = Beit(**config["model_args"])
    model.load_state_dict(tensors, strict=True)
    made = timm.create_model(f"local-dir:{folder}", pretrained=True)
    same = made.state_dict().keys() == model.state_dict().keys() and all(
        torch.equal(v, made.state_dict()[k]) for k, v in model.state_dict().items()
    )
    report("timm loads", same, f"{len(tensors)} tensors, num_classes {model.num_classes}")
    return model.float().eval(), config["pretrained_cfg"]


def load_hf(folder):
    """By the class that config.json names."""
    name = read_config(folder)["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    wrong = [k for keys in info.values() for k in keys]
    report("transformers loads", not wrong, f"{name}; not as expected: {wrong or 'nothing'}")
    return model.float().eval()


def check_beit2(folder, timm_folder):
    """The names are timm's, but for the parts that timm has not and the index buffers."""
    ours, theirs = read_tensors(folder), read_tensors(timm_folder)
    index = [k for k in ours if k.endswith("relative_position_index")]
    extra = sorted(set(ours) - set(theirs) - set(index))
    known = {"mask_token", "lm_head.weight", "lm_head.bias"}
    good = set(theirs) <= set(ours) and set(extra) <= known
    report("beit2 names", good, f"besides timm's {extra}")
    differ = [k for k in theirs if k in ours and not torch.equal(ours[k], theirs[k])]
    report("beit2 values", not differ, f"other than timm's: {differ or 'none'}")
    for k in index:
        side = round((ours[k].shape[0] - 1) ** 0.5)
        good = torch.equal(ours[k], gen_relative_position_index((side, side)))
        if not good or k == index[0]:
            report("beit2 index", good, k)


# ---------------------------------------------------------------- pictures


def read_pictures(paths, side, stats):
    """Squares of the model's side, bicubic, normalised."""
    from PIL import Image

    mean, std = (np.array(stats[k], np.float32).reshape(3, 1, 1) for k in ("mean", "std"))
    out = []
    for path in paths:
        picture = Image.open(path).convert("RGB").resize((side, side), Image.BICUBIC)
        pixels = np.asarray(picture, np.float32).transpose(2, 0, 1) / 255
        out.append((pixels - mean) / std)
    return torch.from_numpy(np.stack(out))


# ---------------------------------------------------------------- running


def feature_of(tokens, norm, behind_mean, feature):
    """As md_hpc evaluate gives it: a fine-tuned model may have its norm behind the mean."""
    if behind_mean:
        return norm(tokens[:, 1:].mean(1)) if feature == "mean" else None
    tokens = norm(tokens)
    return tokens[:, 1:].mean(1) if feature == "mean" else tokens[:, 0]


def run_timm(model, image, feature):
    blocks = []
    hook = model.blocks[-1].register_forward_hook(lambda module, given, got: blocks.append(got))
    logits = model(image)
    hook.remove()
    behind_mean = not isinstance(model.fc_norm, torch.nn.Identity)
    norm = model.fc_norm if behind_mean else model.norm
    return {
        "tokens": blocks[0],
        "features": feature_of(blocks[0], norm, behind_mean, feature),
        "logits": logits if model.num_classes else None,
    }


def run_hf(model, image, feature):
    run = model(image, output_hidden_states=True)
    tokens, base = run.hidden_states[-1], model.base_model
    pooler = getattr(base.pooler, "layernorm", None)
    own = getattr(model, "layernorm", None)  # a pretraining model's is beside its encoder
    norm = pooler if pooler is not None else own if own is not None else base.layernorm
    return {
        "tokens": tokens,
        "features": feature_of(tokens, norm, pooler is not None, feature),
        "logits": getattr(run, "logits", None),
    }


def read_features(path, limit):
    """The first images of a features file, normalised, and what goes with them."""
    with safetensors.safe_open(path, "pt") as f:
        given = {k: f.get_slice(k)[:limit] for k in f.keys()}
        meta = f.metadata() or {}
    image = given["image"]
    if image.dtype == torch.uint8:
        mean, std = (torch.tensor([float(v) for v in meta[k].split()]) for k in ("mean", "std"))
        given["image"] = ((image.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    return given


def check(options):
    given = read_features(options.features, options.images) if options.features else {}
    loaded, stats = {}, None
    if options.timm:
        loaded["timm"], stats = load_timm(options.timm)
    if options.hf:
        loaded["transformers"] = load_hf(options.hf)
        side = loaded["transformers"].config.image_size
    if options.timm:
        side = loaded["timm"].patch_embed.img_size[0]
    if options.beit2:
        check_beit2(options.beit2, options.timm)
    if options.hf and not stats:
        with open(os.path.join(options.hf, "preprocessor_config.json")) as f:
            facts = json.load(f)
        stats = {"mean": facts["image_mean"], "std": facts["image_std"]}
    if given:
        image, source = given["image"], options.features
    elif options.pictures:
        image, source = read_pictures(options.pictures, side, stats), "the pictures"
    else:
        generator = torch.Generator().manual_seed(0)
        image, source = torch.randn(2, 3, side, side, generator=generator), "noise"
    print(f"      on {len(image)} x {side} x {side} of {source}")
    runners = {"timm": run_timm, "transformers": run_hf}
    with torch.no_grad():
        got = {n: runners[n](model, image, options.feature) for n, model in loaded.items()}
    compare_all(got, given, options.tolerance)


def compare_all(got, given, tolerance):
    for what in ("tokens", "features", "logits"):
        if what in given:
            some = [n for n in got if got[n][what] is not None]
            for name in some:
                compare(f"{what} of {name} against md_hpc", got[name][what], given[what], tolerance)
            if not some:
                report(what, False, f"no export computes {what}")
        values = [got[n][what] for n in got]
        if what != "features" and len(values) == 2 and all(v is not None for v in values):
            compare(f"{what} of timm against transformers", *values, tolerance)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timm", help="folder of an export with --names timm")
    parser.add_argument("--hf", help="folder of an export with --names hf")
    parser.add_argument("--beit2", help="folder of an export with --names beit2 (needs --timm)")
    parser.add_argument("--features", help="safetensors file of what md_hpc computed")
    parser.add_argument("--feature", choices=["mean", "cls"], default="mean")
    parser.add_argument("--images", type=int, default=64, help="of the features file (64)")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative error allowed")
    parser.add_argument("pictures", nargs="*", help="picture files")
    options = parser.parse_args()
    if not options.timm and not options.hf or options.beit2 and not options.timm:
        parser.error("say --timm and --hf, or one of them; --beit2 needs --timm")
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, timm, transformers)]
    print(", ".join(versions))
    check(options)
    print(f"{len(FAILURES)} failed" if FAILURES else "all agree")
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
