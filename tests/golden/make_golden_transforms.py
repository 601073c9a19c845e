#!/usr/bin/env python3
"""Writes tests/golden/transforms_golden.h: hashes of what timm's RandAugment and torchvision's
evaluation transform make of pictures drawn by formula and of photos. Needs Pillow, NumPy, timm and
torchvision; the tests need none of them. Run:
python3 tests/golden/make_golden_transforms.py FOLDER, with the FOLDER of make_golden_image.py."""

import math
import os
import random
import sys

import numpy as np
import PIL
import timm
import torchvision
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from make_golden_image import FLIP, HERE, PHOTOS, Rng, cut, draw_box, hash_rgb, picture

RANDAUGMENT = 13  # stream of src/rng.h
FILL = (124, 116, 104)  # 255 * ImageNet's mean
OPS = auto_augment._RAND_INCREASING_TRANSFORMS
SIGNED = {"Rotate", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing",
          "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


def scene(size):
    """Little contrast, some noise, each channel in a range of its own; integers only."""
    y, x = np.mgrid[0:size, 0:size].astype(np.int64)
    noise = ((x * 73856093) ^ (y * 19349663)) // 32 % 16
    rgb = np.stack([70 + x + noise, 60 + (x + y) // 2 + noise, 40 + y * y // 40 + noise], -1)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8), "RGB")


def flat(size):
    return Image.new("RGB", (size, size), (17, 130, 255))


PICTURES = [lambda size: picture(size, size), scene, flat]


# ---- RandAugment ----

def apply_op(im, name, magnitude, negative):
    """timm's op with its sign forced."""
    draw, random.random = random.random, lambda: 0.75 if negative else 0.25
    try:
        level = auto_augment.LEVEL_TO_ARG[name]
        args = level(magnitude, {}) if level else ()
    finally:
        random.random = draw
    if name == "PosterizeIncreasing" and args == (0,):  # Pillow 13 refuses; before it gave black
        return Image.new("RGB", im.size)
    return auto_augment.NAME_TO_OP[name](im, *args, fillcolor=FILL, resample=Image.BICUBIC)


def draw_ops(seed, epoch, sample, ops, magnitude=9.0, deviation=0.5, probability=0.5):
    """io/randaugment.c's draws: (op, magnitude, negative) of those that are applied."""
    rng = Rng(seed, RANDAUGMENT, epoch, sample)
    for _ in range(ops):
        op = rng.below(len(OPS))
        apply = rng.double() < probability
        radius = math.sqrt(-2.0 * math.log(1.0 - rng.double()))
        drawn = magnitude + deviation * (radius * math.cos(2.0 * math.pi * rng.double()))
        negative = rng.double() < 0.5
        if apply:
            yield OPS[op], max(0.0, min(drawn, 10.0)), negative


def randaugment(im, seed, epoch, sample, ops):
    for name, magnitude, negative in draw_ops(seed, epoch, sample, ops):
        im = apply_op(im, name, magnitude, negative)
    return im


def cases():
    """picture, side, op, magnitude, negative"""
    for op, name in enumerate(OPS):
        leveled = auto_augment.LEVEL_TO_ARG[name] is not None
        for magnitude in (0.0, 0.3, 4.37, 8.6, 9.25, 10.0) if leveled else (9.0,):
            for negative in (0, 1) if name in SIGNED else (0,):
                yield 0, 64, op, magnitude, negative
                yield 1, 61, op, magnitude, negative
        for what, size in ((0, 224), (0, 17), (1, 31), (2, 9), (0, 2), (0, 1)):
            yield what, size, op, 8.9, op % 2


CHAINS = [  # seed, epoch, sample; picture; size; size2; ops
    (1, 0, i, (300, 200), 64, 48, 2) for i in range(8)
] + [(2**40 + 5, 299, 2**33 + 1, (99, 101), 32, 0, 8), (7, 3, 5, (500, 375), 224, 0, 4)]


def chain(im, seed, epoch, sample, sizes, ops):
    w, h = im.size
    if Rng(seed, FLIP, epoch, sample).double() < 0.5:
        im = im.transpose(Image.FLIP_LEFT_RIGHT)
    box = draw_box(seed, epoch, sample, w, h, (0.08, 1.0), (0.75, 4 / 3))
    return [hash_rgb(randaugment(cut(im, box, s), seed, epoch, sample, ops)) if s else 0 for s in sizes]


def write_randaugment(out):
    out.write("/* picture, side; op; magnitude, negative; hash */\n"
              "static const struct golden_op {\n    int picture, size, op;\n    double magnitude;\n"
              "    int negative;\n    uint64_t hash;\n} golden_op[] = {\n")
    for what, size, op, magnitude, negative in cases():
        im = apply_op(PICTURES[what](size), OPS[op], magnitude, negative)
        out.write("    {%d, %d, %d, %r, %d, 0x%016xu},\n"
                  % (what, size, op, magnitude, negative, hash_rgb(im)))
    out.write("};\n\n/* seed, epoch, sample; picture w, h; size, size2; ops; hash of each crop */\n"
              "static const struct golden_randaugment {\n    uint64_t seed;\n    uint32_t epoch;\n"
              "    uint64_t sample;\n    int w, h, size, size2, ops;\n"
              "    uint64_t hash, hash2;\n} golden_randaugment[] = {\n")
    for seed, epoch, sample, (w, h), size, size2, ops in CHAINS:
        hashes = chain(picture(w, h), seed, epoch, sample, (size, size2), ops)
        out.write("    {%du, %d, %du, %d, %d, %d, %d, %d, 0x%016xu, 0x%016xu},\n"
                  % (seed, epoch, sample, w, h, size, size2, ops, *hashes))
    out.write("};\n")


# ---- evaluation ----

EVALUATIONS = [  # picture, side of the resize, side of the crop
    ((500, 375), 256, 224), ((375, 500), 256, 224), ((500, 333), 256, 224), ((333, 500), 257, 224),
    ((501, 332), 233, 224), ((101, 99), 64, 64), ((99, 101), 67, 64), ((32, 32), 32, 32),
    ((40, 32), 32, 32), ((32, 41), 32, 32), ((48, 48), 48, 33), ((40, 40), 100, 96),
    ((600, 20), 32, 32), ((20, 600), 40, 32), ((1, 1), 9, 8), ((640, 480), 224, 224),
]


def evaluate(im, resize, size):
    """Resize and CenterCrop, the resize in two passes: see `cut`."""
    w, h = im.size
    ow, oh = (resize, int(resize * h / w)) if w <= h else (int(resize * w / h), resize)
    small = im.resize((ow, h), Image.BICUBIC).resize((ow, oh), Image.BICUBIC)
    crop = CenterCrop(size)(small)
    public = CenterCrop(size)(Resize(resize, InterpolationMode.BICUBIC)(im))
    if w >= h or tuple(int(v) for v in PIL.__version__.split(".")[:2]) < (12, 2):
        assert crop.tobytes() == public.tobytes(), (im.size, resize, size)
    return crop


def write_evaluation(out):
    out.write("\n/* picture w, h; resize; size; hash */\n"
              "static const struct golden_evaluation {\n    int w, h, resize, size;\n"
              "    uint64_t hash;\n} golden_evaluation[] = {\n")
    for (w, h), resize, size in EVALUATIONS:
        out.write("    {%d, %d, %d, %d, 0x%016xu},\n"
                  % (w, h, resize, size, hash_rgb(evaluate(picture(w, h), resize, size))))
    out.write("};\n")


# ---- photos: hashes only; the test runs where the pictures are ----

def write_photos(out, folder):
    out.write("\n/* file below imagenet-samples; hash of its crop of 224 pixels by seed 1, epoch 2,\n"
              " * sample = row with four ops, and evaluated at 256 / 224 */\n"
              "static const struct golden_transformed {\n    const char *file;\n"
              "    uint64_t crop, evaluation;\n} golden_transformed[] = {\n")
    for i, name in enumerate(PHOTOS):
        im = Image.open(os.path.join(folder, "imagenet-samples", name + ".JPEG")).convert("RGB")
        out.write('    {"%s.JPEG", 0x%016xu, 0x%016xu},\n'
                  % (name, chain(im, 1, 2, i, (224,), 4)[0], hash_rgb(evaluate(im, 256, 224))))
    out.write("};\n")


def main():
    with open(os.path.join(HERE, "transforms_golden.h"), "w") as out:
        out.write("/* Written by make_golden_transforms.py with Pillow %s, timm %s and torchvision %s. */\n"
                  % (PIL.__version__, timm.__version__, torchvision.__version__.split("+")[0]))
        out.write("/* clang-format off */\n#ifndef TRANSFORMS_GOLDEN_H\n#define TRANSFORMS_GOLDEN_H\n\n"
                  "#include <stdint.h>\n\n")
        write_randaugment(out)
        write_evaluation(out)
        write_photos(out, sys.argv[1])
        out.write("\n#endif\n")


if __name__ == "__main__":
    main()
