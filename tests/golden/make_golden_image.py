#!/usr/bin/env python3
"""Writes tests/golden/image_golden.h: small coded pictures and the hashes of what Pillow makes of
them. Needs Pillow and NumPy; the tests need neither. Run: python3 tests/golden/make_golden_image.py

Hashes are FNV-1a (64 bit) over packed RGB bytes. Synthetic pictures are drawn by `picture` here and
by the same formula in the tests."""

import io
import os
import struct
import zlib

import numpy as np
import PIL
from PIL import Image, features

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


def main():
    with open(os.path.join(HERE, "image_golden.h"), "w") as out:
        out.write("/* Written by make_golden_image.py with Pillow %s (libjpeg-turbo %s, zlib %s). */\n"
                  % (PIL.__version__, features.version("libjpeg_turbo"), features.version("zlib")))
        out.write("/* clang-format off */\n#include <stddef.h>\n#include <stdint.h>\n\n")
        write_coded(out)


if __name__ == "__main__":
    main()
