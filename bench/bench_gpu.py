#!/usr/bin/env python3
"""The PyTorch peer of `md_hpc bench step --case vit_h14 backend=cuda`, and the limits of a GPU.

  bench_gpu.py step --form eager|compile --batch 64     one training step, timed: one JSON line
  bench_gpu.py limits                                   what the GPU can do at most: a line each

One step = forward of a frozen CLIP ViT-L/14 teacher (bf16), forward of a BEiT-like ViT-H/14 student
(shared relative position bias, layer scale, drop path) with 102 of 256 patches masked, linear head and
smooth-L1 (beta 2) on the masked tokens, backward, clipping to 3.0, fused AdamW. Student: fp32 weights
under bf16 autocast. Random weights and pictures. Attention is scaled_dot_product_attention with the
bias as its mask, as timm does it, which leaves PyTorch its memory-efficient and cuDNN kernels.

--model timm takes timm's Beit and VisionTransformer, --model lean the modules of this file: the same
mathematics with the head at masked tokens only and no teacher work after the last block that is not
used. compile: torch.compile of every block (one compilation serves them all), --mode as there.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

STUDENT = dict(width=1280, layers=32, heads=16, image=224, patch=14, masked=102, drop_path=0.25)
TEACHER = dict(width=1024, layers=24, heads=16)
SMALL = dict(width=64, layers=2, heads=4, image=28, patch=7, masked=6, drop_path=0.25)
SMALL_TEACHER = dict(width=32, layers=2, heads=2)


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("step", "limits"))
    p.add_argument("--form", choices=("eager", "compile"), default="eager")
    p.add_argument("--mode", default="default", help="of torch.compile: max-autotune-no-cudagraphs ...")
    p.add_argument("--model", choices=("lean", "timm"), default="lean")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--warmup", type=int, default=4)
    p.add_argument("--seconds", type=float, default=120, help="no step starts later")
    p.add_argument("--device", default="cuda")
    p.add_argument("--small", action="store_true", help="tiny shapes: does it run at all?")
    return p.parse_args()


# ---- models ----


def relative_index(grid):
    """BEiT's index [T, T] into (2 grid - 1)^2 + 3 rows: pairs of patches, then those with cls."""
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    at = torch.stack([y.flatten(), x.flatten()])
    d = at[:, :, None] - at[:, None, :] + grid - 1
    rows = (2 * grid - 1) ** 2 + 3
    index = torch.empty(grid * grid + 1, grid * grid + 1, dtype=torch.long)
    index[1:, 1:] = d[0] * (2 * grid - 1) + d[1]
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index, rows


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm block. student: no k bias, layer scale, drop path; teacher: neither, QuickGELU."""

    def __init__(self, width, heads, student, drop=0.0):
        super().__init__()
        self.heads, self.drop, self.student = heads, drop, student
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=not student)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if student:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
            self.register_buffer("k_bias", torch.zeros(width), persistent=False)
            self.gamma_1 = nn.Parameter(torch.full((width,), 1e-5))
            self.gamma_2 = nn.Parameter(torch.full((width,), 1e-5))

    def attention(self, x, rel):
        b, t, c = x.shape
        if self.student:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            qkv = F.linear(x, self.qkv.weight, bias)
        else:
            qkv = self.qkv(x)
        q, k, v = qkv.view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=rel)
        return self.proj(o.transpose(1, 2).reshape(b, t, c))

    def residual(self, x, branch, gamma):
        if not self.student:
            return x + branch
        branch = branch * gamma
        if self.training and self.drop > 0.0:
            keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop
            branch = branch * (keep / (1.0 - self.drop))
        return x + branch

    def forward(self, x, rel):
        act = F.gelu if self.student else quick_gelu
        x = self.residual(x, self.attention(self.norm1(x), rel), getattr(self, "gamma_1", None))
        return self.residual(x, self.fc2(act(self.fc1(self.norm2(x)))), getattr(self, "gamma_2", None))


class Student(nn.Module):
    def __init__(self, s, out):
        super().__init__()
        width, grid = s["width"], s["image"] // s["patch"]
        self.heads = s["heads"]
        self.patch = nn.Conv2d(3, width, s["patch"], s["patch"])
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.mask = nn.Parameter(torch.zeros(width))
        index, rows = relative_index(grid)
        self.register_buffer("index", index.flatten(), persistent=False)
        self.table = nn.Parameter(torch.zeros(rows, s["heads"]))
        drops = [s["drop_path"] * i / max(1, s["layers"] - 1) for i in range(s["layers"])]
        self.blocks = nn.ModuleList([Block(width, s["heads"], True, d) for d in drops])
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, out)

    def forward(self, image, mask, rows):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.lerp(x.float(), self.mask, mask[:, :, None])
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1)
        t = x.shape[1]
        rel = self.table[self.index].view(t, t, self.heads).permute(2, 0, 1)[None]
        rel = aligned(rel.to(torch.bfloat16))
        for block in self.blocks:
            x = block(x, rel)
        return self.head(self.norm(x.flatten(0, 1)[rows]))


def aligned(rel):
    """A bias whose rows begin at multiples of 16 bytes, which the memory-efficient kernel wants."""
    t = rel.shape[-1]
    return F.pad(rel, (0, -t % 8))[..., :t]


class Teacher(nn.Module):
    def __init__(self, t, s):
        super().__init__()
        tokens = (s["image"] // s["patch"]) ** 2 + 1
        self.patch = nn.Conv2d(3, t["width"], s["patch"], s["patch"], bias=False)
        self.cls = nn.Parameter(torch.zeros(1, 1, t["width"]))
        self.pos = nn.Parameter(torch.zeros(tokens, t["width"]))
        self.pre, self.post = nn.LayerNorm(t["width"]), nn.LayerNorm(t["width"])
        self.blocks = nn.ModuleList([Block(t["width"], t["heads"], False) for _ in range(t["layers"])])

    def forward(self, image, rows):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = self.pre(torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.pos)
        for block in self.blocks:
            x = block(x, None)
        return self.post(x.flatten(0, 1)[rows])


class TimmStudent(nn.Module):
    def __init__(self, s, out):
        super().__init__()
        from timm.models.beit import Beit

        self.beit = Beit(
            img_size=s["image"], patch_size=s["patch"], num_classes=0, global_pool="token",
            embed_dim=s["width"], depth=s["layers"], num_heads=s["heads"], qkv_bias=True,
            init_values=1e-5, use_abs_pos_emb=False, use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True, drop_path_rate=s["drop_path"],
        )  # fmt: skip
        self.mask, self.head = nn.Parameter(torch.zeros(s["width"])), nn.Linear(s["width"], out)

    @property
    def blocks(self):
        return self.beit.blocks

    def forward(self, image, mask, rows):
        b = self.beit
        x = torch.lerp(b.patch_embed(image).float(), self.mask, mask[:, :, None])
        x = torch.cat((b.cls_token.expand(x.shape[0], -1, -1), x), 1)
        rel = b.rel_pos_bias()
        for block in b.blocks:
            x = block(x, shared_rel_pos_bias=rel)
        return self.head(b.norm(x).flatten(0, 1)[rows])


class TimmTeacher(nn.Module):
    def __init__(self, t, s):
        super().__init__()
        from timm.layers import QuickGELU
        from timm.models.vision_transformer import VisionTransformer

        self.vit = VisionTransformer(
            img_size=s["image"], patch_size=s["patch"], num_classes=0, embed_dim=t["width"],
            depth=t["layers"], num_heads=t["heads"], pre_norm=True, act_layer=QuickGELU,
        )  # fmt: skip

    @property
    def blocks(self):
        return self.vit.blocks

    def forward(self, image, rows):
        return self.vit.forward_features(image).flatten(0, 1)[rows]


# ---- a step ----


def make_models(a, s, t):
    kinds = (TimmStudent, TimmTeacher) if a.model == "timm" else (Student, Teacher)
    with torch.device(a.device):
        student, teacher = kinds[0](s, t["width"]), kinds[1](t, s)
    with torch.no_grad():  # no zeros: nothing may be cheaper than in a real run
        for m in (student, teacher):
            for name, p in m.named_parameters():
                if "gamma" not in name and (p.dim() > 1 or not p.any()):
                    p.normal_(std=0.02)
    teacher = teacher.to(torch.bfloat16).eval().requires_grad_(False)
    if a.form == "compile":
        for block in list(student.blocks) + list(teacher.blocks):
            block.compile(mode=None if a.mode == "default" else a.mode)
    return student.train(), teacher


def make_step(a):
    s, t = (SMALL, SMALL_TEACHER) if a.small else (STUDENT, TEACHER)
    student, teacher = make_models(a, s, t)
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    b, g = a.batch, (s["image"] // s["patch"]) ** 2
    image = torch.randn(b, 3, s["image"], s["image"], device=a.device)
    where = torch.arange(b, device=a.device)[:, None]

    def step():
        order = torch.rand(b, g, device=a.device).argsort(1)[:, : s["masked"]].sort(1).values
        mask = torch.zeros(b, g, device=a.device).scatter_(1, order, 1.0)
        rows = (order + 1 + where * (g + 1)).flatten()
        with torch.no_grad():
            target = teacher(image.to(torch.bfloat16), rows).float()
            target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
        with torch.autocast(torch.device(a.device).type, torch.bfloat16):
            predicted = student(image, mask, rows)
        loss = F.smooth_l1_loss(predicted.float(), target, beta=2.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0, foreach=True)
        optimizer.step()
        return loss

    return step


def wait(a):
    if a.device != "cpu":
        torch.cuda.synchronize()


def bench_step(a):
    end = time.perf_counter() + a.seconds
    step = make_step(a)
    ms, losses = [], []
    for i in range(a.warmup + a.steps):
        if ms and time.perf_counter() > end:
            break
        wait(a)
        start = time.perf_counter()
        losses.append(step())
        wait(a)
        if i >= a.warmup:
            ms.append(1e3 * (time.perf_counter() - start))
    return {
        "what": "step", "form": a.form, "mode": a.mode, "model": a.model, "batch": a.batch,
        "ms": [round(t, 2) for t in ms],
        "images_per_second": round(1e3 * a.batch / min(ms), 3),
        "images_per_second_median": round(1e3 * a.batch / statistics.median(ms), 3),
        "loss": [round(losses[0].item(), 6), round(losses[-1].item(), 6)],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if a.device != "cpu" else 0,
    }  # fmt: skip


# ---- limits ----


def timed(a, call, samples=10, calls=10):
    """Median seconds of a call, from samples of several that follow each other without a pause."""
    for _ in range(3):
        call()
    seconds = []
    for _ in range(2 if a.small else samples):
        wait(a)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(a)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


def limit(name, seconds, flops=0.0, moved=0.0):
    line = {"what": "limit", "name": name, "ms": round(1e3 * seconds, 4)}
    if flops:
        line["tflops"] = round(1e-12 * flops / seconds, 2)
    if moved:
        line["gb_per_second"] = round(1e-9 * moved / seconds, 1)
    return line


def limit_gemm(a, m, n, k):
    x = torch.randn(m, k, device=a.device, dtype=torch.bfloat16)
    w = torch.randn(n, k, device=a.device, dtype=torch.bfloat16)
    return limit(f"gemm {m} {n} {k} bf16", timed(a, lambda: x @ w.T), flops=2.0 * m * n * k)


def limit_copies(a):
    """A large one, and such as move what the residual steps, forward and backward, move."""
    stream = a.batch * (17 if a.small else 257) * (64 if a.small else STUDENT["width"]) * 2
    for tensors in (2, 4, 6):
        x, y = (torch.empty(tensors * stream // 2, dtype=torch.uint8, device=a.device) for _ in range(2))
        seconds = timed(a, lambda: y.copy_(x))
        yield limit(f"copy of as much as {tensors} streams, read + write", seconds, moved=tensors * stream)
    n = 1 << (20 if a.small else 30)
    x, y = (torch.empty(n, dtype=torch.uint8, device=a.device) for _ in range(2))
    host = torch.empty(n, dtype=torch.uint8, pin_memory=a.device != "cpu")
    yield limit("copy on the device, read + write", timed(a, lambda: y.copy_(x)), moved=2.0 * n)
    yield limit("copy to pinned memory", timed(a, lambda: host.copy_(x, non_blocking=True)), moved=n)
    yield limit("copy from pinned memory", timed(a, lambda: x.copy_(host, non_blocking=True)), moved=n)


def limit_attention(a, batch, heads, tokens, width, bias):
    """SDPA forward, and backward with a gradient of the bias: forward and backward less forward."""
    shape = (batch, heads, tokens, width)
    q, k, v = (
        torch.randn(shape, device=a.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    rel = None
    if bias:
        rel = torch.randn(1, heads, tokens, tokens, device=a.device, dtype=torch.bfloat16)
        rel = aligned(rel).requires_grad_()
    inputs = [x for x in (q, k, v, rel) if x is not None]
    d_o = torch.randn(shape, device=a.device, dtype=torch.bfloat16)
    flops = 4.0 * batch * heads * tokens * tokens * width
    name = f"attention {batch} x {heads} x {tokens} x {width}{' with bias' if bias else ''}"

    def forward():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rel)

    def both():
        torch.autograd.grad(forward(), inputs, d_o)

    with torch.no_grad():
        one = timed(a, forward)
    yield limit(name + ", forward", one, flops=flops)
    two = timed(a, both)
    yield limit(name + ", backward", max(two - one, 1e-9), flops=2.5 * flops)


def bench_limits(a):
    m = 256 if a.small else 8192
    yield limit_gemm(a, m, m, m)
    rows = a.batch * 257
    width = 64 if a.small else 1280
    for n, k in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
        yield limit_gemm(a, rows, n, k)
    yield from limit_copies(a)
    for width, bias in ((80, True), (64, True), (64, False)):
        yield from limit_attention(a, a.batch, 16, 17 if a.small else 257, width, bias)


def main():
    a = arguments()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    about = {"program": "torch", "version": torch.__version__}
    if a.device != "cpu":
        about["gpu"] = torch.cuda.get_device_name()
    try:
        for line in bench_limits(a) if a.what == "limits" else [bench_step(a)]:
            print(json.dumps({**about, **line}), flush=True)
    except torch.cuda.OutOfMemoryError:
        print(json.dumps({**about, "what": a.what, "batch": a.batch, "error": "out of memory"}))
        sys.exit(3)


if __name__ == "__main__":
    main()
