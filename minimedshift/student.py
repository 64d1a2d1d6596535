"""The student: what the flow usually does, learned by a small local network in one evaluation.

The flow's errors are rare and large: it redraws an outline some pixels off, here in one head and there in
another. A small network hardly learns where. What remains is the median of all its lessons, which rare errors
do not move (an L2 loss would give the mean, which they do):

    student = argmin_f  E | f(x, s, t) - a | + 3 E | f(a, t, s) - x |       a = flow(x, s, t), x an image of s

Three of four lessons are read backwards, from the flow's answer a to x, which is real. What differs between
two domains is local, so the student may be. The flow goes back further here than on its own, and is guided:
its answers show more of the target, and redraw more, which the median undoes. Where bands (baselines.py)
change less than .38 of the target's contrast, they write the lessons instead: they redraw nothing. A
median has no noise of its own, and a tone that is wrong in all lessons stays wrong: finish.py mends both."""

import itertools
import math
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minimedshift import finish, sampler
from minimedshift.bands import low_pass
from minimedshift.baselines import fit_tone, spread
from minimedshift.model import embedding
from minimedshift.optim import EMA, Muon
from minimedshift.sizes import resize
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from minimedshift.support.log import progress
from minimedshift.support.machine import autocast, keep_memory, scorer, to_device

TAU, GUIDANCE = .05, 1.25  # The flow writes lessons with these.
SIDE = 64  # Of larger images it works on copies of so many pixels a side.
LITTLE, ROUNDS = .38, 6  # Bands that change so little of the target's contrast, in so many rounds, teach.


@dataclass(frozen=True)
class LocalShape:
    """What fixes the student's tensors."""
    num_domains: int = 5
    channels: int = 1
    width: int = 64
    stem: int = 4  # pixels of a side that become channels
    blocks: int = 3
    shrink: float = 1  # It works on a copy that is so many times smaller, if that is above 1.


class Block(nn.Module):
    """x + conv2(silu(conv1(silu(x)) (1 + scale) + shift)), scale and shift from emb: 0 at the start."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(width, 2 * width)

    def forward(self, x, emb):  # (B, C, H, W), (B, C)
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(x)) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class LocalNet(nn.Module):
    """One network for all ordered pairs: images x (B, C, H, W) in [-1, 1] -> x + net(x), not clipped.
    y_source, y_target: (B,) int64. The change is made on a copy `shrink` (above 0) times smaller."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        assert shape.shrink > 0
        pixels = shape.channels * shape.stem**2
        self.pair = embedding(shape.num_domains**2, shape.width)
        self.enter = nn.Conv2d(pixels, shape.width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(shape.width) for _ in range(shape.blocks)])
        self.leave = nn.Conv2d(shape.width, pixels, 3, padding=1)
        for name, p in self.named_parameters():  # an untrained student changes nothing
            if name.startswith("leave") or "conv2" in name or "film" in name:
                nn.init.zeros_(p)

    def forward(self, x, y_source, y_target):
        emb = self.pair(y_source * self.shape.num_domains + y_target)
        stem, sides = self.shape.stem, [int(side / max(1, self.shape.shrink)) for side in x.shape[-2:]]
        small = resize(x, [max(stem, side // stem * stem) for side in sides])
        h = self.enter(F.pixel_unshuffle(small, stem))
        for block in self.blocks:
            h = block(h, emb)
        change = F.pixel_shuffle(self.leave(F.silu(h)), stem).float()
        return x + resize(change, x.shape[-2:])


def spread_out(dataset, count):
    """`count` training images of each domain, as often as drawn in training: (D, N, C, H, W) as stored."""
    return torch.from_numpy(np.stack([dataset.drawn(d, count) for d in range(len(dataset.domains))]))


def bands_between(images, distances):
    """{(s, t): translation of x} by bands, fitted to images (D, N, C, H, W), as much of it as is certain.
    Only of pairs in which they change less than LITTLE of the target's contrast, both low-passed."""
    contrast, found = [low_pass(spread(target, finish.SOME)).std() for target in images], {}
    for s, t in itertools.permutations(range(len(images)), 2):
        if distances.changes[s, t] < LITTLE * contrast[t]:
            chain = fit_tone(images[s], images[t], ROUNDS, finish.IMAGES, distances.log)
            found[s, t] = finish.Finish(chain, float(distances.certain[s, t])).tone
    return found


@torch.inference_mode()
def lessons(flow, images, bands=None, seed=0, batch=32, tau=TAU, guidance=GUIDANCE, **how):
    """What the flow makes of images (D, N, C, H, W), N of each domain: targets (D, N) int64, the domain to
    which each is translated, and answers like images, float16. bands: {(s, t): translation} of the pairs that
    are not the flow's. how: the sampler's steps, t_image. Of a flow without null label guidance must be 1."""
    start, (D, N), draw = time.time(), images.shape[:2], torch.Generator().manual_seed(seed)
    device, answers, done = next(flow.parameters()).device, torch.zeros_like(images), 0
    targets = (torch.arange(D)[:, None] + torch.randint(1, D, (D, N), generator=draw)) % D
    for s, t in itertools.permutations(range(D), 2):
        by_flow = lambda x: sampler.translate(flow, x.to(device), s, t, tau, guidance, **how)
        translate = (bands or {}).get((s, t), by_flow)
        for i in (targets[s] == t).nonzero()[:, 0].split(batch):
            if len(i):  # an image drew this target
                answers[s, i] = translate(images[s, i].float()).to(images)
                done += len(i)
                progress(done, D * N, start, "writing lessons")
    return targets, answers


def turned(x, way):
    """Square images x (..., H, H), mirrored and transposed in one of eight ways: none changes the physics."""
    x = x.flip(-1) if way & 1 else x
    x = x.flip(-2) if way & 2 else x
    return x.transpose(-1, -2) if way & 4 else x


def one_cycle(step, steps):
    """The share of the peak rate at step 1, 2, ..., steps: in the first .3 of them up from .04, then down,
    both along half a cosine (arXiv:1708.07120)."""
    top = 0.3 * steps
    least, way = (0.04, (step - 1) / (top - 1)) if step <= top else (0, (steps - step) / (steps - top))
    return least + (1 - least) * (1 - math.cos(math.pi * way)) / 2


def learn(shape, images, targets, answers, steps, batch=32, forth=8, lr=0.015, seed=0, dtype=torch.float32,
          device="cpu"):
    """A LocalNet, in eval mode, that has learned answers to images, (D, N, C, H, W) both, which show them in
    domains targets (D, N). `forth` lessons of a batch are read so, the others backwards."""
    start, device, draw = time.time(), torch.device(device), torch.Generator().manual_seed(seed)
    images, targets, answers = (part.to(device) for part in (images, targets, answers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LocalNet(shape)
    net.to(device, memory_format=torch.contiguous_format if device.type == "mps" else torch.channels_last)
    optimizer, ema = Muon(net, slower=0.1, betas=(0.9, 0.999)), EMA(net)
    for step in range(1, steps + 1):
        s, i = (to_device(torch.randint(n, (batch,), generator=draw), device) for n in targets.shape)
        way = int(torch.randint(8, (), generator=draw))
        x, answer = (turned(part, way).float().contiguous() for part in (images[s, i], answers[s, i]))
        t, a, b = targets[s, i], slice(forth), slice(forth, batch)
        x, answer = torch.cat([x[a], answer[b]]), torch.cat([answer[a], x[b]])
        s, t = torch.cat([s[a], t[b]]), torch.cat([t[a], s[b]])
        with autocast(device, dtype):
            out = net(x, s, t)
        loss = (out - answer).abs().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step(torch.full((), lr * one_cycle(step, steps), device=device))
        ema.update(step)
        progress(step, steps, start, "the student learns", "steps")
    return ema.model


class Student:
    """A LocalNet with the `finish.Finish` of every ordered pair: translates x (B, C, H, W), not clipped.
    y_source, y_target: ints or (B,) int64. seed: of the noise that is added where the target has more.
    finished=False gives the network's own answer."""

    def __init__(self, net, finishes):
        self.net, self.finishes = net, finishes

    @torch.inference_mode()
    def __call__(self, x, y_source, y_target, seed=0, finished=True):
        y_source = torch.as_tensor(y_source, device=x.device).expand(len(x))
        y_target = torch.as_tensor(y_target, device=x.device).expand(len(x))
        same = (y_source == y_target).view(-1, 1, 1, 1)  # no lesson: such an image stays as it is
        out = torch.where(same, x, self.net(x, y_source, y_target))
        if not finished:
            return out
        noise = finish.fresh_noise(x, seed)
        for (s, t), finish_pair in self.finishes.items():
            of_pair = (y_source == s) & (y_target == t)
            if of_pair.any():
                out[of_pair] = finish_pair(out[of_pair], noise[of_pair])
        return out

    def state(self):
        """All of it as plain types and tensors, for the checkpoint."""
        finishes = {f"{s} {t}": asdict(part) for (s, t), part in self.finishes.items()}
        return dict(shape=asdict(self.net.shape), weights=self.net.state_dict(), finishes=finishes)


def restore(state, device="cpu", path="the checkpoint"):
    """The Student of Student.state(). Raises UserError where it is none, or does not fit its shape."""
    try:
        shape, weights = LocalShape(**state["shape"]), state["weights"]
        with torch.device("meta"):  # without memory: what the shape claims may not be in the file
            net = LocalNet(shape)
        parts = state["finishes"].items()
        finishes = {tuple(map(int, pair.split())): finish.restore(part) for pair, part in parts}
    except Exception as error:  # a damaged file can hold anything
        raise UserError(f"{path} holds a student that cannot be read ({type(error).__name__})") from None
    checkpoint.fill(net, weights, path)
    return Student(net.to(device).eval().requires_grad_(False), finishes)


def teach(model, dataset, count, steps, dtype, device, seed=0, size=64, guidance=GUIDANCE):
    """The Student of a trained flow: `steps` of the optimizer on `count` images a domain, then its finish.
    size: the flow's, and the lessons'; the finish is about the data set's. guidance: see `lessons`."""
    small, enough = dataset.shrunk(size), min(finish.IMAGES, max(map(len, dataset.train_images)))
    images, many = spread_out(small, count), spread_out(small, enough).to(scorer(device))
    keep_memory(dataset.train_images)
    distances = finish.measure(many, dataset.counts())
    keep_memory()
    bands = bands_between(many, distances)
    with autocast(device, dtype):
        targets, answers = lessons(model, images, bands, seed, guidance=guidance)
    shape = LocalShape(len(dataset.domains), dataset.channels, shrink=small.size / SIDE)
    net = learn(shape, images, targets, answers, steps, seed=seed, dtype=dtype, device=device)
    net.shape = replace(shape, shrink=dataset.size / SIDE)  # now for images of the data set's size
    del images, answers, many
    many = spread_out(dataset, enough).to(scorer(device))
    keep_memory(dataset.train_images, dataset.size)
    return Student(net, finish.fit(net, many, distances, dtype))
