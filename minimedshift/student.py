"""The student: what the flow usually does, learned by a small local network in one evaluation.

Why is it better than its teacher? The flow's errors are rare and large (RESULTS.md, section 3): it redraws
an outline some pixels off, here in one head and there in another. A small network without attention hardly
learns where. What remains is the median of all its lessons, which rare errors do not move:

    student(x, s, t) = argmin_f  E | f(x) - teacher(x, s, t) |          over training images x of domain s

The L2 loss would give the mean, which they do move. What differs between two domains is local, so the student
may be. A view of 16 pixels each way is too narrow; one as wide as the image does not hurt. A median has no
noise of its own, and a tone that is wrong in all lessons stays wrong: finish.py mends both.
"""

import itertools
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minimedshift import finish, sampler
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from minimedshift.optim import EMA
from minimedshift.support.machine import autocast
from minimedshift.support.log import progress
import time

AVERAGED = 16.97  # exponent of the EMA: about the last twentieth of the steps


@dataclass(frozen=True)
class LocalShape:
    """What fixes the student's tensors."""
    num_domains: int = 5
    channels: int = 1
    width: int = 64
    stem: int = 2  # pixels of a side that become channels
    dilations: tuple = (1,) * 6  # of each block's first convolution: 1 keeps the view narrow


def shape_for(size, num_domains, channels):
    """The LocalShape for images of `size` pixels: at 64, 128 and 256 pixels the view is the same share of it."""
    if size >= 256:
        return LocalShape(num_domains, channels, width=128, stem=8)
    return LocalShape(num_domains, channels, width=64, stem=2 if size < 128 else 4)


def view(shape):
    """How many pixels the student looks each way: 3x3 convolutions, two a block and one at each end."""
    return shape.stem * (2 + sum(dilation + 1 for dilation in shape.dilations))


# ---------------------------------------------------------------- the network

def zero(layer):
    """The layer with all weights zero, so that an untrained student changes nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Block(nn.Module):
    """x + conv2(silu(conv1(silu(x)) (1 + scale) + shift)), scale and shift from emb: 0 at the start."""

    def __init__(self, width, dilation):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = zero(nn.Conv2d(width, width, 3, padding=1))
        self.film = zero(nn.Linear(width, 2 * width))

    def forward(self, x, emb):  # (B, C, H, W), (B, C)
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(x)) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class LocalNet(nn.Module):
    """x (B, C, H, W) in [-1, 1] from domains y_source to y_target, both (B,) int64: x + net(x), not clipped.

    One network for all ordered pairs. No normalisation and no attention: nothing looks at the whole image.
    H and W are divisible by `stem`."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        pixels = shape.channels * shape.stem**2
        self.pair = nn.Embedding(shape.num_domains**2, shape.width)
        self.enter = nn.Conv2d(pixels, shape.width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(shape.width, dilation) for dilation in shape.dilations])
        self.leave = zero(nn.Conv2d(shape.width, pixels, 3, padding=1))

    def forward(self, x, y_source, y_target):
        emb = self.pair(y_source * self.shape.num_domains + y_target)
        h = self.enter(F.pixel_unshuffle(x, self.shape.stem))
        for block in self.blocks:
            h = block(h, emb)
        return x + F.pixel_shuffle(self.leave(F.silu(h)), self.shape.stem).float()


# ---------------------------------------------------------------- lessons

QUIET = lambda done, total: None  # says nothing of how far it has come


def spread_out(dataset, count):
    """`count` training images of each domain, as often as drawn in training: (D, N, C, H, W) float16."""
    at = (np.arange(count) + .5) / count
    drawn = [images[dataset.pick(d, at)] for d, images in enumerate(dataset.train_images)]
    return torch.from_numpy(np.stack(drawn))


@torch.inference_mode()
def lessons(model, images, tau, say=QUIET, batch=64, **how):
    """What the teacher makes of images (D, N, C, H, W), N of each domain: (D, D, N, C, H, W) float16.

    [s, t] is domain s translated to domain t; [s, s] stays empty. how: steps, solver, end, colour."""
    D, N = images.shape[:2]
    device = next(model.parameters()).device
    answers = torch.zeros(D, D, *images.shape[1:], dtype=torch.float16)
    for s in range(D):
        for start in range(0, N, batch):
            some = slice(start, start + batch)
            x = images[s, some].to(device, torch.float32)
            z = sampler.encode(model, x, s, tau, **how)  # the way back is the same for all targets
            decode = lambda t: sampler.decode(model, z, t, tau, **how)
            for t in range(D):
                if t != s:
                    answers[s, t, some] = decode(t).half().cpu()
            say(s * N + min(N, start + batch), D * N)
    return answers


def turned(x, way):
    """Square images x (..., H, H), mirrored and transposed in one of eight ways: none changes the physics."""
    x = x.flip(-1) if way & 1 else x
    x = x.flip(-2) if way & 2 else x
    return x.transpose(-1, -2) if way & 4 else x


def learn(shape, images, answers, steps, pairs=None, batch=32, lr=1.5e-3, seed=0,
          dtype=torch.float32, device="cpu", power=1.0, say=QUIET):
    """A LocalNet, in eval mode, that has learned answers (D, D, N, C, H, W) to images (D, N, C, H, W).

        loss = mean |student(x) - teacher(x)|^power        power 1 seeks the median, 2 the mean

    pairs: the ordered pairs (s, t) it learns, by default all. The weights are their running mean."""
    D, N = images.shape[:2]
    pairs = torch.tensor(pairs or list(itertools.permutations(range(D), 2)))
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = LocalNet(shape)
    student.to(device, memory_format=torch.contiguous_format if device.type == "mps" else torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps))
    ema, draw = EMA(student, AVERAGED), torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        s, t = pairs[torch.randint(len(pairs), (batch,), generator=draw)].T
        i, way = torch.randint(N, (batch,), generator=draw), int(torch.randint(8, (), generator=draw))
        x, answer = (turned(z, way).to(device, torch.float32) for z in (images[s, i], answers[s, t, i]))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = student(x.contiguous(), s.to(device), t.to(device))
        loss = ((out - answer).abs() + 1e-6).pow(power).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update(step)
        say(step, steps)
    return ema.model


# ---------------------------------------------------------------- the student and its finish

def fresh_noise(x, seed=0):
    """White noise like images x (B, C, H, W), a function of the seed and of each image alone."""
    noise = []
    for image in x.float().cpu().contiguous():
        generator = torch.Generator().manual_seed(zlib.crc32(image.numpy().tobytes(), seed) + seed)
        noise.append(torch.randn(image.shape, generator=generator))
    return torch.stack(noise).to(x.device)


class Student:
    """The student with the `finish.Finish` of every pair: translates x (B, C, H, W), not clipped.

    y_source, y_target: ints or (B,) int64. seed: of the noise that is added where the target has more.
    finished=False gives the student's own answer."""

    def __init__(self, student, finishes):
        self.student, self.finishes = student, finishes

    @torch.inference_mode()
    def __call__(self, x, y_source, y_target, seed=0, finished=True):
        y_source = torch.as_tensor(y_source, device=x.device).expand(len(x))
        y_target = torch.as_tensor(y_target, device=x.device).expand(len(x))
        same = (y_source == y_target).view(-1, 1, 1, 1)  # never taught: such an image stays as it is
        out = torch.where(same, x, self.student(x, y_source, y_target))
        if not finished:
            return out
        noise = fresh_noise(x, seed)
        for (s, t), finish_pair in self.finishes.items():
            mine = (y_source == s) & (y_target == t)
            if mine.any():
                out[mine] = finish_pair(out[mine], noise[mine])
        return out

    def state(self):
        """All of it as plain types and tensors, for the checkpoint."""
        finishes = {f"{s} {t}": part.state() for (s, t), part in self.finishes.items()}
        return dict(shape=asdict(self.student.shape), weights=self.student.state_dict(), finishes=finishes)


def restore(state, device="cpu", path="the checkpoint"):
    """The Student of Student.state(). Raises UserError where it is none, or does not fit its shape."""
    try:
        shape, weights = LocalShape(**state["shape"]), state["weights"]
        if max(shape.num_domains, shape.width, shape.stem, len(shape.dilations), *shape.dilations) > 4096:
            raise ValueError
        with torch.device("meta"):  # without memory: what the shape claims may not be in the file
            student = LocalNet(shape)
        finishes = {}
        for pair, part in state["finishes"].items():
            s, t = map(range(shape.num_domains).index, map(int, pair.split()))
            finishes[s, t] = finish.restore(part)
    except Exception as error:  # a stranger's file can hold anything
        raise UserError(f"{path} holds a student that cannot be read ({type(error).__name__})") from None
    checkpoint.fill(student, weights, path)
    student = student.to(device)
    return Student(student.eval().requires_grad_(False), finishes)


def teach(model, dataset, count, steps, dtype, device, seed=0):
    """The Student that `model`, a trained flow, has taught on `count` training images of each domain."""
    def say(what, unit):
        start = time.time()
        return lambda done, total: progress(done, total, start, what, unit)

    images = spread_out(dataset, count)
    with autocast(device, dtype):
        answers = lessons(model, images, 0.1, say("the flow translates", "images"), steps=5, t_image=0.99)
    shape = shape_for(dataset.size, len(dataset.domains), dataset.channels)
    net = learn(shape, images, answers, steps, seed=seed, dtype=dtype, device=device,
                say=say("the student learns", "steps"))
    enough = min(finish.IMAGES, max(map(len, dataset.train_images)))
    return Student(net, finish.fit(net, spread_out(dataset, enough), dtype, say("its finish", "pairs")))
