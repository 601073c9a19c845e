#!/usr/bin/env python3
"""The PyTorch peer of `md_hpc bench step`: the same training step in the fastest form found.

One step = target of the masked patches (their own pixels, LayerNorm without affine), forward of a
BEiT (shared relative position bias, layer scale, pre-norm), linear head and smooth-L1 (beta 2) on the
masked tokens, backward, gradient clipping to 3.0, AdamW; fp32, synthetic normalised pictures, no drop
path. Prints one JSON line. Model variants, all the same mathematics:

  lean    modules of this file: what timm computes, without its copies (unfold + one matrix product
          for patches, head at masked tokens only)
  timm    timm.models.beit.Beit as it is, head at masked tokens
  compile lean through torch.compile (needs a C++ compiler)

PyTorch's fp32 matrix products run in MKL, which leaves half of an AMD core's AVX-512 unused. --linear
onednn sends the linear layers of lean, forward and backward, to PyTorch's own oneDNN instead: nobody's
default, but the strongest PyTorch on such a machine.
"""

import argparse
import json
import os
import statistics
import sys
import time

# Fewer page faults for PyTorch's large, short-lived tensors; has to be set before the process starts.
TUNED = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}

CASES = {
    "vit_b16": dict(width=768, layers=12, heads=12, image=224, patch=16, masked=75, batch=4),
    "small": dict(width=192, layers=12, heads=3, image=32, patch=4, masked=26, batch=128),
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--case", choices=CASES, default="vit_b16")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--model", choices=("lean", "timm", "compile"), default="lean")
    p.add_argument("--linear", choices=("stock", "onednn"), default="stock")
    p.add_argument("--attention", choices=("manual", "sdpa"), default="manual")
    p.add_argument("--optimizer", choices=("fused", "foreach", "loop"), default="fused")
    p.add_argument("--plain", action="store_true", help="leave the allocator's settings alone")
    a = p.parse_args()
    if a.linear == "onednn" and a.model != "lean":
        p.error("--linear onednn is for --model lean")
    return a


def build(torch, case, a):
    """A module: pictures, masked [B, G] float, rows of masked tokens -> predictions [rows, 3 P^2]."""
    nn, F = torch.nn, torch.nn.functional
    C, H, P = case["width"], case["heads"], case["patch"]
    grid = case["image"] // P
    G, D = grid * grid, C // H

    def rel_index():
        y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        at = torch.stack([y.flatten(), x.flatten()])
        d = at[:, :, None] - at[:, None, :] + grid - 1
        index = torch.empty(G + 1, G + 1, dtype=torch.long)
        rows = (2 * grid - 1) ** 2 + 3
        index[1:, 1:] = d[0] * (2 * grid - 1) + d[1]
        index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
        return index.flatten(), rows

    onednn = torch.ops.mkldnn._linear_pointwise

    class OnednnLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return onednn(x, weight, bias, "none", [], "")

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            dy = dy.contiguous()
            dx = onednn(dy, weight.t(), None, "none", [], "") if ctx.needs_input_grad[0] else None
            return dx, onednn(dy.t(), x.t(), None, "none", [], ""), dy.sum(0)

    def linear(x, weight, bias):
        if a.linear == "stock":
            return F.linear(x, weight, bias)
        y = OnednnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], -1)

    class Linear(nn.Linear):
        def forward(self, x):
            return linear(x, self.weight, self.bias)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = Linear(C, 3 * C, bias=False)
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
            self.register_buffer("k_bias", torch.zeros(C), persistent=False)
            self.proj = Linear(C, C)

        def forward(self, x, rel):
            B, T, _ = x.shape
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            qkv = linear(x, self.qkv.weight, bias).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            if a.attention == "sdpa":
                o = F.scaled_dot_product_attention(q, k, v, attn_mask=rel)
            else:
                o = ((q * D**-0.5) @ k.transpose(-2, -1) + rel).softmax(-1) @ v
            return self.proj(o.transpose(1, 2).reshape(B, T, C))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C, eps=1e-6), nn.LayerNorm(C, eps=1e-6)
            self.attn, self.fc1, self.fc2 = Attention(), Linear(C, 4 * C), Linear(4 * C, C)
            self.gamma_1 = nn.Parameter(torch.full((C,), 0.1))
            self.gamma_2 = nn.Parameter(torch.full((C,), 0.1))

        def forward(self, x, rel):
            x = torch.addcmul(x, self.gamma_1, self.attn(self.norm1(x), rel))
            return torch.addcmul(x, self.gamma_2, self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    class Lean(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.head = Linear(3 * P * P, C), Linear(C, 3 * P * P)
            self.cls, self.mask = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
            index, rows = rel_index()
            self.table = nn.Parameter(torch.zeros(rows, H))
            self.register_buffer("index", index, persistent=False)
            self.blocks = nn.ModuleList([Block() for _ in range(case["layers"])])
            self.norm = nn.LayerNorm(C, eps=1e-6)

        def forward(self, image, mask, rows):
            B = image.shape[0]
            patch = image.view(B, 3, grid, P, grid, P).permute(0, 2, 4, 1, 3, 5)
            x = self.patch(patch.reshape(B, G, 3 * P * P))
            x = torch.lerp(x, self.mask, mask[:, :, None])
            x = torch.cat((self.cls.expand(B, 1, C), x), 1)
            rel = self.table[self.index].view(G + 1, G + 1, H).permute(2, 0, 1)[None].contiguous()
            for block in self.blocks:
                x = block(x, rel)
            return self.head(self.norm(x.flatten(0, 1)[rows]))

    class Timm(nn.Module):
        def __init__(self):
            super().__init__()
            from timm.models.beit import Beit

            self.beit = Beit(
                img_size=case["image"], patch_size=P, num_classes=0, global_pool="token",
                embed_dim=C, depth=case["layers"], num_heads=H, qkv_bias=True, init_values=0.1,
                use_abs_pos_emb=False, use_rel_pos_bias=False, use_shared_rel_pos_bias=True,
            )  # fmt: skip
            self.mask, self.head = nn.Parameter(torch.zeros(C)), nn.Linear(C, 3 * P * P)

        def forward(self, image, mask, rows):
            b = self.beit
            x = torch.lerp(b.patch_embed(image), self.mask, mask[:, :, None])
            x = torch.cat((b.cls_token.expand(x.shape[0], -1, -1), x), 1)
            rel = b.rel_pos_bias()
            for block in b.blocks:
                x = block(x, shared_rel_pos_bias=rel)
            return self.head(b.norm(x).flatten(0, 1)[rows])

    model = Timm() if a.model == "timm" else Lean()
    with torch.no_grad():  # no zeros: nothing may be cheaper than in a real run
        for p in model.parameters():
            if p.dim() > 1 or not p.any():
                p.normal_(std=0.02)
    return model, G


def make_step(torch, case, a):
    F, P, B = torch.nn.functional, case["patch"], case["batch"]
    model, G = build(torch, case, a)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    how = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {}}[a.optimizer]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, **how)
    forward = torch.compile(model) if a.model == "compile" else model
    grid = case["image"] // P
    image = torch.randn(B, 3, case["image"], case["image"])

    def step():
        order = torch.rand(B, G).argsort(1)[:, : case["masked"]].sort(1).values
        mask = torch.zeros(B, G).scatter_(1, order, 1.0)
        where = torch.arange(B)[:, None]
        patch = image.view(B, 3, grid, P, grid, P).permute(0, 2, 4, 3, 5, 1).reshape(B * G, -1)
        target = F.layer_norm(patch[(order + where * G).flatten()], (3 * P * P,), eps=1e-6)
        rows = (order + 1 + where * (G + 1)).flatten()
        loss = F.smooth_l1_loss(forward(image, mask, rows), target, beta=2.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0, foreach=True)
        optimizer.step()
        return loss.item()

    return step


def main():
    a = arguments()
    if not a.plain and any(os.environ.get(k) != v for k, v in TUNED.items()):
        os.execve(sys.executable, [sys.executable] + sys.argv, {**os.environ, **TUNED})
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    import torch

    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    case = CASES[a.case]
    step = make_step(torch, case, a)
    ms, losses = [], []
    for i in range(a.warmup + a.steps):
        start = time.perf_counter()
        losses.append(step())
        if i >= a.warmup:
            ms.append(1e3 * (time.perf_counter() - start))
    result = {"program": "torch", "version": torch.__version__}
    result.update(case=a.case, model=a.model, linear=a.linear, attention=a.attention)
    result.update(threads=a.threads, batch=case["batch"], steps=a.steps)
    result.update(
        ms=[round(t, 1) for t in ms],
        images_per_second=round(1e3 * case["batch"] / min(ms), 3),
        images_per_second_median=round(1e3 * case["batch"] / statistics.median(ms), 3),
        loss=[round(losses[0], 6), round(losses[-1], 6)],
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
