#!/usr/bin/env python3
"""Writes positions.safetensors: position tables resized by torch, for the test of md_pos_resize.

For each case "A_B_rule" the file holds "A" [A*A+1, 3], a random table with cls first, and the same
table resized to B x B. Rule beit2 gives torch the scale (B + 0.1) / A, exact gives it the size B.
Run in float64 and rounded once.

    python3 make_golden_weights.py [folder to write to; default: this script's]
"""

import os
import sys

import safetensors.numpy
import torch
import torch.nn.functional as F

CASES = [(16, 14), (5, 8), (7, 3), (4, 9)]


def resize(table, old, new, rule):
    grid = table[1:].double().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if rule == "beit2":
        grid = F.interpolate(grid, scale_factor=(new + 0.1) / old, mode="bicubic")
    else:
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    assert grid.shape[2:] == (new, new)
    rows = grid.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([table[:1].double(), rows]).float().numpy()


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    out = {}
    for old, new in CASES:
        table = torch.randn(old * old + 1, 3, generator=torch.Generator().manual_seed(old))
        out[f"{old}"] = table.numpy()
        for rule in ("beit2", "exact"):
            out[f"{old}_{new}_{rule}"] = resize(table, old, new, rule)
    meta = {"torch": torch.__version__, "made by": "make_golden_weights.py"}
    safetensors.numpy.save_file(out, os.path.join(folder, "positions.safetensors"), meta)


if __name__ == "__main__":
    main()
