"""The network v(xt, t, y): one U-Net for all domains.

    xt (B, 1, 64, 64)                                             vt (B, 1, 64, 64)      shapes: preset cpu
       | unshuffle 4, stem                                           | out, shuffle 4
    down[0] (B, 64, 16, 16)  ------------- skip -------------->  up[1] (B, 64, 16, 16)
       | unshuffle 2                                                 | shuffle 2
    down[1] (B, 96, 8, 8)  ----------- skip and attention ---->  up[0] (B, 96, 8, 8)
    knows t                                                      knows t and y

Only the way up knows the label: the way down describes what is in the picture, whatever its domain, and the
way up draws it in one domain. Fully convolutional: any height and width that the levels can halve."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from minimedshift.ops import norm_film_silu
from minimedshift.support import checkpoint


@dataclass(frozen=True)
class Shape:
    """What fixes the network's tensors."""
    num_domains: int = 5
    channels: int = 1
    stem: int = 2  # pixels of one side that become channels
    widths: tuple = (64, 128)  # channels of each level; each level halves the resolution
    blocks: tuple = (2, 3)  # residual blocks of each level, on the way down and again on the way up
    head_width: int = 32  # channels of an attention head


def time_features(t, dim=128):
    """Sinusoids of 1000 t, frequencies 1 to 1e-4 (arXiv:1706.03762, 3.5). t (B,) in [0, 1] -> (B, dim)."""
    w = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(1e4) / (dim // 2)))
    angle = 1000 * t.float()[:, None] * w
    return torch.cat([angle.cos(), angle.sin()], 1)


def act(norm, x, scale=None, shift=None):
    """silu(norm(x) (1 + scale) + shift): norm a GroupNorm, x (B, C, H, W), scale and shift (B, C) or None."""
    return norm_film_silu(x, norm.weight, norm.bias, norm.num_groups, scale, shift, norm.eps)


def embedding(count, width):
    """An nn.Embedding of variance 1. A normal one takes a second on "meta", importing torch's compiler."""
    return nn.Embedding.from_pretrained(torch.empty(count, width).uniform_(-3**.5, 3**.5), freeze=False)


class Block(nn.Module):
    """x + conv2(act(norm2, conv1(act(norm1, x, scale, shift)))), scale and shift from emb: x at the start."""

    def __init__(self, width, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(width // 16, width)
        self.norm2 = nn.GroupNorm(width // 16, width)
        self.film = nn.Linear(emb, 2 * width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, emb):  # (B, C, H, W), (B, emb)
        scale, shift = self.film(emb).chunk(2, 1)  # (B, C) each
        h = self.conv1(act(self.norm1, x, scale, shift))
        return x + self.conv2(act(self.norm2, h))


class Attention(nn.Module):
    """x + self-attention over all positions, heads of `head_width` channels."""

    def __init__(self, width, head_width):
        super().__init__()
        self.head_width = head_width
        self.norm = nn.GroupNorm(width // 16, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, C // self.head_width, self.head_width, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, H W, head_width) each
        if x.device.type == "cpu":  # whose attention takes five times as long in bfloat16
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class UNet(nn.Module):
    """v(xt, t, y) -> vt. xt, vt (B, C, H, W) float, t (B,) in [0, 1], y (B,) int64 in 0..num_domains.
    Label num_domains means no label. Raises ValueError where `stride` does not divide H and W."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.stride = shape.stem * 2 ** (len(shape.widths) - 1)
        widths = shape.widths
        emb = 2 * widths[-1]
        pixels = shape.channels * shape.stem**2
        self.time = nn.Sequential(nn.Linear(128, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = embedding(shape.num_domains + 1, emb)
        self.stem = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        levels = list(enumerate(zip(widths, shape.blocks)))
        for i, (width, count) in levels:
            enter = nn.Conv2d(4 * widths[i - 1], width, 1) if i else nn.Identity()
            self.down.append(nn.ModuleList([enter, *[Block(width, emb) for _ in range(count)]]))
        for i, (width, count) in reversed(levels):
            merge = nn.Conv2d(2 * width, width, 1)
            blocks = [Block(width, emb) for _ in range(count)]
            leave = nn.Conv2d(width, 4 * widths[i - 1], 1) if i else nn.Identity()
            self.up.append(nn.ModuleList([merge, *blocks, leave]))
        self.attention = Attention(widths[-1], shape.head_width)
        self.norm = nn.GroupNorm(widths[0] // 16, widths[0])
        self.out = nn.Conv2d(widths[0], pixels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, xt, t, y):
        H, W = xt.shape[-2:]
        if H % self.stride or W % self.stride:
            raise ValueError(f"height and width must be divisible by {self.stride}, got {H} x {W}")
        time = self.time(time_features(t))   # (B, emb)
        emb_down = F.silu(time)
        emb_up = F.silu(time + self.label(y).to(time.dtype))  # here the label enters
        x = self.stem(F.pixel_unshuffle(xt, self.shape.stem))
        skips = []
        for i, (enter, *blocks) in enumerate(self.down):
            x = enter(F.pixel_unshuffle(x, 2) if i else x)  # (B, widths[i], h, w), h = H / stem / 2^i
            for block in blocks:
                x = block(x, emb_down)
            skips.append(x)
        x = self.attention(x)
        for merge, *blocks, leave in self.up:
            x = merge(torch.cat([x, skips.pop()], 1))  # (B, widths[i], h, w), i from the last to 0
            for block in blocks:
                x = block(x, emb_up)
            x = F.pixel_shuffle(leave(x), 2) if skips else x
        return self.head(x)

    def head(self, x):
        return F.pixel_shuffle(self.out(act(self.norm, x)), self.shape.stem)

    def compile_blocks(self, **options):
        """torch.compile blocks, attention and head, in place; blocks of one width share their code.
        dynamic=False makes code for each shape met, the fastest; True makes code for all shapes at once."""
        from torch._inductor import config as inductor  # not before: it takes two seconds
        torch._dynamo.config.recompile_limit = 64  # shapes; beyond, a block would run uncompiled
        inductor.realize_reads_threshold, inductor.realize_opcount_threshold = 16, 100  # for ops.by_channels
        for module in self.modules():
            if isinstance(module, (Block, Attention)):
                module.compile(**options)
        self.head = torch.compile(UNet.head.__get__(self), **options)


@dataclass(frozen=True)
class Preset:
    """What `python train.py --preset NAME` trains."""
    size: int           # side in pixels of the images that it learns; larger ones are shrunk
    shape: Shape        # of the network
    steps: int          # optimizer steps
    batch_size: int     # images a step
    lessons: int        # images of each domain that become lessons of the student
    student_steps: int  # the student's optimizer steps, 32 images each
    after: tuple        # how long lessons, the student's steps, its finish and scores take, in training steps

    def steps_after(self, config):
        """{what follows: its training steps' time}. The work of the finish grows with an image's pixels."""
        lessons, steps, fit, scores = self.after
        return {"writing lessons": lessons * config.student_images / self.lessons,
                "the student learns": steps * config.student_steps / self.student_steps,
                "its finish": fit * max(1, config.size / self.size) ** 2,
                "scoring all pairs": scores * config.evaluate}


PRESETS = {  # GFLOPs: of one evaluation of one image, a multiply-add counted as two
    # 1.40M parameters, 0.27 GFLOPs
    "cpu": Preset(64, Shape(stem=4, widths=(64, 96), blocks=(2, 2)), 700, 32, 300, 600, (160, 130, 80, 110)),
    # 24.09M parameters, 27.11 GFLOPs
    "gpu": Preset(256, Shape(stem=4, widths=(128, 256, 384), blocks=(2, 2, 2)), 5000, 32, 500, 1000,
                  (375, 15, 100, 110)),
}


def load_model(path, device="cpu"):
    """The network of a checkpoint with its EMA weights, in eval mode, and the checkpoint itself."""
    state = checkpoint.load(path, device)
    checkpoint.check_settings(state, path)
    with torch.device("meta"):  # without memory: what the shape claims may not be in the file
        model = UNet(Shape(**state["shape"]))
    checkpoint.fill(model, state.get("ema"), path)
    if torch.device(device).type != "mps":
        model = model.to(memory_format=torch.channels_last)
    return model.eval(), state
