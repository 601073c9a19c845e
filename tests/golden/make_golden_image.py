#!/usr/bin/env python3
"""Writes tests/golden/image_golden.h: small coded pictures and the hashes of what Pillow makes of
them. Needs Pillow and NumPy; the tests need neither. Run:
python3 tests/golden/make_golden_image.py FOLDER, which holds imagenet-samples/<class>/<photo>.JPEG of
the public collection EliSchwartz/imagenet-sample-images.

Hashes are FNV-1a (64 bit) over packed RGB bytes. Synthetic pictures are drawn by `picture` here and
by the same formula in the tests."""

import io
import math
import os
import struct
import sys
import zlib

import numpy as np
import PIL
from PIL import Image, ImageEnhance, features

HERE = os.path.dirname(os.path.abspath(__file__))


def fnv(data):
    h = 0xCBF29CE484222325
    for b in bytes(data):
        h = ((h ^ b) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def picture(w, h):
    """Smooth colour waves with a hard checker on top; integer arithmetic only."""
    y, x = np.mgrid[0:h, 0:w].astype(np.int64)
    r = (x * 7 + y * 3) % 256
    g = (x * x // 16 + y * 5) % 256
    b = (x * y // 8 + 40) % 256
    checker = ((x // 9 + y // 7) % 2) * 60
    rgb = np.stack([r, g, b], -1) * 3 // 4 + checker[..., None]
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8), "RGB")


def hash_rgb(image):
    return fnv(image.convert("RGB").tobytes())


# ---- coded pictures ----

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def png(w, h, depth, colour, pixels, interlaced=False, extra=b""):
    """A PNG by hand: what Pillow cannot write. pixels: [h][w] of bytes objects."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    raw = b""
    for x0, y0, dx, dy in passes:
        for row in pixels[y0::dy]:
            line = b"".join(row[x0::dx])
            if line:
                raw += b"\0" + line
    head = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, int(interlaced))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(raw, 9))
            + chunk(b"IEND", b""))


def coded():
    im = picture(43, 29)
    small = picture(19, 11)

    inks = np.asarray(small.convert("CMYK")).copy()
    inks[..., 3] = np.arange(19) * 13
    inks = Image.fromarray(inks, "CMYK")

    def save(image, fmt, **kw):
        f = io.BytesIO()
        image.save(f, fmt, **kw)
        return f.getvalue()

    yield "jpeg_444", save(im, "JPEG", quality=90, subsampling=0)
    yield "jpeg_422", save(im, "JPEG", quality=80, subsampling=1)
    yield "jpeg_420", save(im, "JPEG", quality=75, subsampling=2)
    yield "jpeg_420_progressive", save(im, "JPEG", quality=60, subsampling=2, progressive=True)
    yield "jpeg_restart", save(im, "JPEG", quality=50, subsampling=2, restart_marker_blocks=1)
    yield "jpeg_rgb", save(small, "JPEG", quality=70, keep_rgb=True)
    yield "jpeg_gray", save(im.convert("L"), "JPEG", quality=70)
    yield "jpeg_cmyk", save(inks, "JPEG", quality=70)
    yield "jpeg_one_pixel", save(im.crop((5, 5, 6, 6)), "JPEG")
    yield "png_rgb", save(small, "PNG")
    yield "png_palette", save(small.quantize(16), "PNG")
    yield "png_palette_transparent", save(small.quantize(16), "PNG", transparency=3)
    yield "png_gray", save(small.convert("L"), "PNG")
    yield "png_bilevel", save(small.convert("1"), "PNG")
    rgba = small.copy()
    rgba.putalpha(small.convert("L"))
    yield "png_rgba", save(rgba, "PNG")
    yield "png_gray_alpha", save(rgba.convert("LA"), "PNG")
    gray = np.asarray(small.convert("L")).astype(int)
    rgb = np.asarray(small).astype(int)
    h, w = gray.shape
    # values on both sides of 255: Pillow clips 16-bit grey
    yield "png_gray16", png(w, h, 16, 0, [[struct.pack(">H", int(v) * 3) for v in row] for row in gray])
    yield "png_rgb16", png(w, h, 16, 2, [[struct.pack(">HHH", *(int(c) * 257 - (c > 99) for c in p))
                                         for p in row] for row in rgb])
    yield "png_interlaced", png(w, h, 8, 2, [[bytes(int(c) for c in p) for p in row] for row in rgb], True)
    yield "png_gray_interlaced_keyed", png(w, h, 8, 0, [[bytes([int(v)]) for v in row] for row in gray],
                                           True, struct.pack(">I", 2) + b"tRNS" + b"\0\x30"
                                           + struct.pack(">I", zlib.crc32(b"tRNS\0\x30")))


def write_coded(out):
    rows = []
    for name, data in coded():
        image = Image.open(io.BytesIO(data))
        out.write(f"static const uint8_t {name}[] = {{\n")
        for i in range(0, len(data), 25):
            out.write(",".join(str(b) for b in data[i:i + 25]) + ",\n")
        out.write("};\n")
        kind = 0 if name.startswith("jpeg") else 1
        rows.append(f'    {{"{name}", {name}, sizeof {name}, {kind}, {image.width}, {image.height}, '
                    f"0x{hash_rgb(image):016x}u}},\n")
    out.write("\n/* name, bytes, count, kind, width, height, hash of convert(\"RGB\") */\n"
              "static const struct golden_coded {\n    const char *name;\n    const uint8_t *bytes;\n"
              "    size_t n;\n    int kind, w, h;\n    uint64_t hash;\n} golden_coded[] = {\n")
    out.writelines(rows)
    out.write("};\n")


# ---- augmentation ----

class Rng:
    """src/rng.h in Python: Philox4x32-10."""

    def __init__(self, seed, stream, step, index):
        self.key, self.block, self.words = (seed, stream, step, index), 0, []

    def u32(self):
        if not self.words:
            seed, stream, step, index = self.key
            m = 0xFFFFFFFF
            c = [self.block, index & m, (index >> 32) | (stream << 16), step]
            k = [seed & m, seed >> 32]
            for _ in range(10):
                p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
                c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & m, (p0 >> 32) ^ c[3] ^ k[1], p0 & m]
                k = [(k[0] + 0x9E3779B9) & m, (k[1] + 0xBB67AE85) & m]
            self.words, self.block = c, self.block + 1
        return self.words.pop(0)

    def double(self):
        hi, lo = self.u32() >> 5, self.u32() >> 6
        return (hi * 67108864.0 + lo) * (1.0 / 9007199254740992.0)

    def uniform(self, lo, hi):
        return lo + (hi - lo) * self.double()

    def below(self, n):
        hi, lo = self.u32(), self.u32()
        return ((hi * n + ((lo * n) >> 32)) & 0xFFFFFFFFFFFFFFFF) >> 32


CROP, FLIP, JITTER = 3, 4, 5
ENHANCERS = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]


def draw_jitter(seed, epoch, sample, strength):
    rng = Rng(seed, JITTER, epoch, sample)
    factor = [rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength) for _ in range(3)]
    order = [0, 1, 2]
    for i in (2, 1):
        j = rng.below(i + 1)
        order[i], order[j] = order[j], order[i]
    return order, factor


def draw_box(seed, epoch, sample, w, h, scale, ratio):
    rng = Rng(seed, CROP, epoch, sample)
    for _ in range(10):
        area = rng.uniform(*scale) * (w * h)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        bw, bh = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < bw <= w and 0 < bh <= h:
            y = rng.below(h - bh + 1)
            return rng.below(w - bw + 1), y, bw, bh
    bw, bh = w, h
    if w / h < ratio[0]:
        bh = round(w / ratio[0])
    elif w / h > ratio[1]:
        bw = round(h * ratio[1])
    return (w - bw) // 2, (h - bh) // 2, bw, bh


def cut(image, box, size):
    """Crop and resize, across first and then down. One call does just this in Pillow up to 12.1; later
    ones swap the passes of tall boxes (python-pillow/Pillow pull requests 9524, 9549)."""
    x, y, w, h = box
    ow, oh = (size, size) if isinstance(size, int) else size
    part = image.crop((x, y, x + w, y + h))
    return part.resize((ow, h), Image.BICUBIC).resize((ow, oh), Image.BICUBIC)


RESIZE = [  # picture, box, result
    ((43, 29), (0, 0, 43, 29), (16, 16)), ((43, 29), (3, 2, 31, 17), (31, 17)),
    ((43, 29), (5, 1, 7, 11), (64, 33)), ((43, 29), (42, 28, 1, 1), (5, 9)),
    ((43, 29), (0, 0, 43, 29), (1, 1)), ((300, 4), (1, 0, 299, 3), (7, 7)),
    ((3, 400), (0, 7, 3, 390), (24, 24)), ((500, 375), (0, 0, 500, 375), (224, 224)),
    ((500, 375), (17, 31, 333, 287), (196, 196)), ((160, 120), (9, 8, 100, 111), (224, 224)),
]
JITTERS = [  # order, factors of brightness, contrast, saturation
    ((0, 1, 2), (0.6, 1.0, 1.0)), ((0, 1, 2), (1.4, 1.0, 1.0)), ((0, 1, 2), (1.0, 0.6, 1.0)),
    ((0, 1, 2), (1.0, 1.4, 1.0)), ((0, 1, 2), (1.0, 1.0, 0.6)), ((0, 1, 2), (1.0, 1.0, 1.4)),
    ((0, 1, 2), (0.0, 0.0, 0.0)), ((1, 2, 0), (1.37, 0.71, 1.23)), ((2, 1, 0), (0.83, 1.19, 0.64)),
    ((2, 0, 1), (1.21, 1.33, 0.77)), ((1, 0, 2), (0.9, 0.8, 1.3)), ((0, 2, 1), (1.01, 0.99, 1.07)),
]
CHAINS = [  # seed, epoch, sample, picture, size, size2, strength, scale
    (1, 0, 0, (500, 375), 224, 196, 0.4, (0.2, 1.0)), (1, 0, 1, (375, 500), 224, 196, 0.4, (0.2, 1.0)),
    (1, 1, 1, (375, 500), 224, 196, 0.4, (0.2, 1.0)), (7, 299, 1281166, (99, 101), 64, 32, 0.4, (0.08, 1.0)),
    (2**40 + 5, 3, 2**33 + 1, (32, 32), 32, 48, 0.8, (0.2, 1.0)),
    (3, 0, 5, (600, 20), 32, 0, 0.4, (0.9, 1.0)),
    (3, 0, 6, (20, 600), 32, 0, 0.4, (0.9, 1.0)), (9, 2, 77, (1, 1), 16, 8, 0.4, (0.2, 1.0)),
    (11, 4, 78, (640, 480), 224, 0, 0.0, (0.2, 1.0)),
]


def chain(im, seed, epoch, sample, sizes, strength, scale):
    """All of io/augment.h's steps; the hash of each crop, 0 for size 0."""
    w, h = im.size
    if strength > 0:
        order, factor = draw_jitter(seed, epoch, sample, strength)
        for op in order:
            im = ENHANCERS[op](im).enhance(factor[op])
    if Rng(seed, FLIP, epoch, sample).double() < 0.5:
        im = im.transpose(Image.FLIP_LEFT_RIGHT)
    box = draw_box(seed, epoch, sample, w, h, scale, (0.75, 4 / 3))
    return [hash_rgb(cut(im, box, s)) if s else 0 for s in sizes]


def write_augment(out):
    out.write("\n/* picture w, h; box; result w, h; hash; hash when mirrored */\n"
              "static const struct golden_resize {\n    int w, h, box[4], out[2];\n"
              "    uint64_t hash, mirrored;\n} golden_resize[] = {\n")
    for (w, h), box, size in RESIZE:
        im = picture(w, h)
        straight = cut(im, box, size)
        x, y, bw, bh = box
        turned = cut(im.transpose(Image.FLIP_LEFT_RIGHT), (w - x - bw, y, bw, bh), size)
        out.write(f"    {{{w}, {h}, {{{x}, {y}, {bw}, {bh}}}, {{{size[0]}, {size[1]}}}, "
                  f"0x{hash_rgb(straight):016x}u, 0x{hash_rgb(turned):016x}u}},\n")
    out.write("};\n\n/* order; factors; hash of the jittered 61 x 47 picture */\n"
              "static const struct golden_jitter {\n    int order[3];\n    double factor[3];\n"
              "    uint64_t hash;\n} golden_jitter[] = {\n")
    for order, factor in JITTERS:
        im = picture(61, 47)
        for op in order:
            im = ENHANCERS[op](im).enhance(factor[op])
        out.write("    {{%d, %d, %d}, {%r, %r, %r}, 0x%016xu},\n" % (*order, *factor, hash_rgb(im)))
    out.write("};\n\n/* seed, epoch, sample; picture w, h; size, size2; strength; scale; hash of each crop */\n"
              "static const struct golden_chain {\n    uint64_t seed;\n    uint32_t epoch;\n"
              "    uint64_t sample;\n    int w, h, size, size2;\n    double jitter, crop_min, crop_max;\n"
              "    uint64_t hash, hash2;\n} golden_chain[] = {\n")
    for seed, epoch, sample, (w, h), size, size2, strength, scale in CHAINS:
        hashes = chain(picture(w, h), seed, epoch, sample, (size, size2), strength, scale)
        out.write("    {%du, %d, %du, %d, %d, %d, %d, %r, %r, %r, 0x%016xu, 0x%016xu},\n"
                  % (seed, epoch, sample, w, h, size, size2, strength, *scale, *hashes))
    out.write("};\n")


# ---- photos: hashes only; the test runs where the pictures are ----

PHOTOS = ["n02096051/n02096051_Airedale", "n03884397/n03884397_panpipe", "n04336792/n04336792_stretcher",
          "n03838899/n03838899_oboe", "n01943899/n01943899_conch", "n03692522/n03692522_loupe",
          "n02102480/n02102480_Sussex_spaniel", "n03417042/n03417042_garbage_truck"]


def write_photos(out, folder):
    out.write("\n/* file below imagenet-samples; hashes of its crops of 224 and 196 pixels by seed 1,\n"
              " * epoch 2, sample = row */\n"
              "static const struct golden_photo {\n    const char *file;\n"
              "    uint64_t crop, crop2;\n} golden_photo[] = {\n")
    for i, name in enumerate(PHOTOS):
        im = Image.open(os.path.join(folder, "imagenet-samples", name + ".JPEG")).convert("RGB")
        crops = chain(im, 1, 2, i, (224, 196), 0.4, (0.2, 1.0))
        out.write('    {"%s.JPEG", 0x%016xu, 0x%016xu},\n' % (name, *crops))
    out.write("};\n")


def main():
    with open(os.path.join(HERE, "image_golden.h"), "w") as out:
        out.write("/* Written by make_golden_image.py with Pillow %s (libjpeg-turbo %s, zlib %s). */\n"
                  % (PIL.__version__, features.version("libjpeg_turbo"), features.version("zlib")))
        out.write("/* clang-format off */\n#ifndef IMAGE_GOLDEN_H\n#define IMAGE_GOLDEN_H\n\n"
                  "#include <stddef.h>\n#include <stdint.h>\n\n")
        write_coded(out)
        write_augment(out)
        write_photos(out, sys.argv[1])
        out.write("\n#endif\n")


if __name__ == "__main__":
    main()
