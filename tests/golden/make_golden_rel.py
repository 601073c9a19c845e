#!/usr/bin/env python3
"""Writes rel_positions.safetensors: relative position bias tables resized as BEiT does
(microsoft/unilm, beit2/run_class_finetuning.py), for the test of md_rel_pos_resize.

For each case A -> B (sides of the windows) the file holds "A" [(2A-1)^2 + 3, 2], a random table,
and "A_B", the table resized to [(2B-1)^2 + 3, 2]. The original calls scipy's interp2d(kind="cubic"),
which scipy 1.14 removed; RectBivariateSpline calls the same two FITPACK routines, regrid and bispev.
With an older scipy the two are compared, and must agree to the last bit. Run in float64 and rounded
once.

    python3 make_golden_rel.py [folder to write to; default: this script's]
"""

import os
import sys

import numpy as np
import safetensors.numpy
import scipy
import scipy.interpolate

CASES = [(14, 24), (16, 32), (7, 4), (3, 5)]
HEADS, EXTRA = 2, 3


def ratio(source, target):
    """The q of the original, found as there; sizes are sides of the tables."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2.0
        if (1.0 - q ** (source // 2)) / (1.0 - q) > target // 2:
            right = q
        else:
            left = q
    return q


def knots(source, q):
    distances, at = [], 1
    for i in range(source // 2):
        distances.append(at)
        at += q ** (i + 1)
    return [-d for d in reversed(distances)] + [0] + distances


def spline(x, z, at):
    # interp2d hands over the transposed values: the sums are then rounded in the same order.
    out = scipy.interpolate.RectBivariateSpline(x, x, z.T, kx=3, ky=3, s=0)(at, at).T
    if tuple(int(n) for n in scipy.__version__.split(".")[:2]) < (1, 14):
        assert np.array_equal(out, scipy.interpolate.interp2d(x, x, z, kind="cubic")(at, at))
    return out


def resize(table, old, new):
    source, target = 2 * old - 1, 2 * new - 1
    x = knots(source, ratio(source, target))
    at = np.arange(-(target // 2.0), target // 2.0 + 0.1, 1.0)
    grid = table[:-EXTRA].astype(np.float64).reshape(source, source, HEADS)
    heads = [spline(x, grid[:, :, h], at).reshape(-1) for h in range(HEADS)]
    return np.concatenate([np.stack(heads, 1), table[-EXTRA:]]).astype(np.float32)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    out = {}
    for old, new in CASES:
        shape = ((2 * old - 1) ** 2 + EXTRA, HEADS)
        table = np.random.RandomState(old).standard_normal(shape).astype(np.float32)
        out[f"{old}"] = table
        out[f"{old}_{new}"] = resize(table, old, new)
    meta = {"scipy": scipy.__version__, "made by": "make_golden_rel.py"}
    safetensors.numpy.save_file(out, os.path.join(folder, "rel_positions.safetensors"), meta)


if __name__ == "__main__":
    main()
