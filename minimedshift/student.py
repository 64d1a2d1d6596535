"""The student: what the flow does mostly, learned by a small local network that needs one evaluation.

The teacher, a flow translated at low tau, is right on most heads and wrong on few, but there by much: it redraws an outline some pixels
off. The physics between two domains is local: grey values here depend on what is near. So the student sees a neighbourhood only. It cannot
know which outline the teacher would move, or where to; to places that look alike it gives one answer, and with the L1 loss that
answer is the median of what the teacher gave. Rare errors do not move a median. With the L2 loss it would be the mean, which they do move.

    student(x, s, t) = argmin_f  E | f(x) - teacher(x, s, t) |          over training images x of domain s

A median has no noise of its own, and a local network passes some of the source's on. `Grain` gives the target's back: it is fitted to
training images of the target, without pairs, and touches fine bands alone, so that tone stays as it is.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import sampler
from .checkpoint import EMA


@dataclass(frozen=True)
class Shape:
    """What fixes the student's tensors."""
    num_domains: int = 5
    channels: int = 1
    width: int = 64
    blocks: int = 6
    stem: int = 2  # pixels of one side that become channels


def view(shape):
    """How far a pixel of the student looks, in pixels up, down, left and right: 3x3 convolutions, two a block and one at each end."""
    return shape.stem * (2 * shape.blocks + 2)


class Block(nn.Module):
    """x + conv2(silu(conv1(silu(x)) (1 + scale) + shift)), scale and shift from emb; conv2 is zero at the start."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(width, 2 * width)
        for zero in (self.conv2, self.film):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, x, emb):  # (B, C, H, W), (B, C)
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(x)) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Student(nn.Module):
    """x (B, C, H, W) of domains y_source, in domains y_target (B,) int64: x + net(x). One network for all ordered pairs.

    No normalisation and no attention: nothing looks at the whole image. Any height and width divisible by `stem`.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        pixels = shape.channels * shape.stem**2
        self.pair = nn.Embedding(shape.num_domains**2, shape.width)
        self.enter = nn.Conv2d(pixels, shape.width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(shape.width) for _ in range(shape.blocks)])
        self.leave = nn.Conv2d(shape.width, pixels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x, y_source, y_target):
        emb = self.pair(y_source * self.shape.num_domains + y_target)
        h = self.enter(F.pixel_unshuffle(x, self.shape.stem))
        for block in self.blocks:
            h = block(h, emb)
        return x + F.pixel_shuffle(self.leave(F.silu(h)), self.shape.stem).float()


# ---------------------------------------------------------------- lessons: what the teacher makes of training images

@torch.no_grad()
def lessons(model, images, tau, how, say=lambda done, total: None, batch=64):
    """The teacher's translations (D, D, N, C, H, W) float16 of images (D, N, C, H, W), N of each domain: [s, t] is domain s made t.

    how: steps, solver, end, colour (sampler.py). The way back is made once for all targets. Rows [s, s] stay empty.
    """
    D, N = images.shape[:2]
    device = next(model.parameters()).device
    out = torch.zeros(D, D, *images.shape[1:], dtype=torch.float16)
    for s in range(D):
        for start in range(0, N, batch):
            some = slice(start, start + batch)
            z = sampler.encode(model, images[s, some].to(device, torch.float32), s, tau, **how)
            for t in range(D):
                if t != s:
                    out[s, t, some] = sampler.decode(model, z, t, tau, 1.0, **how).half().cpu()
            say(s * N + min(N, start + batch), D * N)
    return out


def turned(x, way):
    """x (..., H, W), square, mirrored and transposed in one of eight ways: physics knows no up."""
    if way & 1:
        x = x.flip(-1)
    if way & 2:
        x = x.flip(-2)
    return x.transpose(-1, -2) if way & 4 else x


def learn(shape, images, answers, steps, batch=32, lr=1.5e-3, seed=0, dtype=torch.float32, device="cpu", power=1.0, say=lambda step, loss: None):
    """A Student that has learned answers (D, D, N, C, H, W) to images (D, N, C, H, W); its running mean of weights, in eval mode.

    Loss mean |student(x) - teacher(x)|^power: 1 seeks the median, 2 the mean. AdamW, one cycle, gradients of at most length 1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(shape)
    student.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    ema, draw, (D, N) = EMA(student, 16.97), torch.Generator().manual_seed(seed), images.shape[:2]
    for step in range(1, steps + 1):
        s = torch.randint(D, (batch,), generator=draw)
        t = (s + torch.randint(1, D, (batch,), generator=draw)) % D
        i, way = torch.randint(N, (batch,), generator=draw), int(torch.randint(8, (), generator=draw))
        x, answer = (turned(z, way).to(device, torch.float32) for z in (images[s, i], answers[s, t, i]))
        with torch.autocast(device if isinstance(device, str) else device.type, dtype, enabled=dtype != torch.float32):
            made = student(x.contiguous(memory_format=torch.channels_last), s.to(device), t.to(device))
        loss = (made - answer).abs().pow(power).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update(step)
        say(step, loss.detach())
    student.load_state_dict(ema.mean)
    return student.eval().requires_grad_(False)
