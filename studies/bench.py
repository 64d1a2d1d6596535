"""How fast it is, measured on this machine. What is compared takes turns.

    python studies/bench.py

steps       training step and translation, beside the same network as a first version would have it: float32,
            contiguous memory, eager, ops unfused, guidance in two calls
ops         the fused op beside its compiled reference (where there is no GPU, the reference alone)
couplings   what a plan costs beside the training step that it serves
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.autograd import grad

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a study finds the package

from minimedshift import flow, ops, sampler
from minimedshift.coupling import PAIRINGS, Minibatch, Semidiscrete
from minimedshift.model import PRESETS, UNet
from minimedshift.optim import Muon
from minimedshift.support.command import flag, parse, run
from minimedshift.support.machine import autocast, can_compile, keep_memory, machine_name, pick_device
from minimedshift.support.machine import pick_formats
from studies.plane import show


@dataclass(frozen=True)
class Config:
    only: str = flag("", "one part (default: all)", "bench", ("steps", "ops", "couplings"))
    repeats: int = flag(9, "times that each is measured", "bench", low=1)
    out: str = flag("out/studies", "folder of the tables", "bench")
    device: str = flag("auto", "where to compute", "bench", ("auto", "cuda", "mps", "cpu"))


def clock(functions, repeats, device):
    """Milliseconds of each function's calls, (functions, repeats). Two rounds before do not count."""
    ms = np.zeros((len(functions), repeats + 2))
    for turn in range(repeats + 2):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            ms[i, turn] = 1e3 * (time.perf_counter() - start)
    return ms[:, 2:]


def entry(ms, reference=None):
    """A row: median, fastest and slowest; beside a reference also the ratio of speeds, turn by turn."""
    row = dict(ms=np.median(ms), fastest=ms.min(), slowest=ms.max())
    if reference is not None:
        ratio = reference / ms
        row.update(ratio=np.median(ratio), lowest=ratio.min(), highest=ratio.max())
    return row


class TwoCalls(sampler.Velocity):
    """Guidance as it is written down: one call of the network for each label, in float32."""

    def __call__(self, x, t):
        t, y = torch.full((len(x),), t, device=x.device), torch.full((len(x),), self.y, device=x.device)
        out = self.model(x, t, y)
        if self.guidance == 1:
            return out
        null = self.model(x, t, torch.full_like(y, self.model.shape.num_domains))
        return null + self.guidance * (out - null)


class Side:
    """The preset of this device, and what is done with it. plain: the reference."""

    def __init__(self, device, plain=False):
        preset = PRESETS["gpu" if device.type == "cuda" else "cpu"]
        self.dtype, memory = pick_formats("auto", device)
        self.velocity = sampler.Velocity
        if plain:
            self.dtype, memory, self.velocity = torch.float32, torch.contiguous_format, TwoCalls
        torch.manual_seed(0)
        self.model = UNet(preset.shape).to(device, memory_format=memory)
        if can_compile(device) and not plain:
            self.model.compile_blocks(dynamic=False)
        self.optimizer, self.lr = Muon(self.model), torch.tensor(.02, device=device)
        self.noise = lambda count: flow.draw_noise((count, 1, preset.size, preset.size), None, 1.0, device)
        self.x0, self.x1 = self.noise(preset.batch_size), self.noise(preset.batch_size)
        self.y = torch.arange(preset.batch_size, device=device) % 5
        self.t = torch.rand(preset.batch_size, device=device)

    def step(self):
        """A training step: forward, backward, optimizer."""
        with autocast(self.x1.device, self.dtype):
            loss = flow.loss(self.model, self.x0, self.x1, self.y, self.t).mean()
        loss.backward()
        self.optimizer.step(self.lr)

    @torch.inference_mode()
    def translation(self):
        """Three FireFlow steps a leg, the forward leg guided: 4 evaluations an image back and 8 forward."""
        times = sampler.grid(.3, 3, .97)
        z = sampler.last(sampler.fireflow(self.velocity(self.model, 0), self.x1, times))
        return sampler.last(sampler.fireflow(self.velocity(self.model, 1, 1.5), z, times[::-1]))


def steps(repeats, device):
    ours, plain = Side(device), Side(device, plain=True)
    return {"step": entry(*clock([ours.step, plain.step], repeats, device)),
            "translation": entry(*clock([ours.translation, plain.translation], repeats, device))}


def fused(repeats, device):
    B, C = 64, 128
    randn = partial(torch.randn, device=device)
    dtype, memory = pick_formats("auto", device)
    x, dy = [randn(B, C, 64, 64).to(dtype, memory_format=memory) for _ in range(2)]
    inputs = [z.requires_grad_() for z in (x, randn(C), randn(C), randn(B, C), randn(B, C))]
    sides = [ops.norm_film_silu_reference]
    if device.type == "cuda":
        sides = [torch.compile(sides[0], dynamic=False), ops.fused_norm_film_silu]
    call = lambda op: grad(op(*inputs[:3], C // 16, *inputs[3:]), inputs, dy)
    ms = clock([partial(call, op) for op in sides], repeats, device)
    return {"norm_film_silu": entry(ms[-1], ms[0])}


def couplings(repeats, device):
    """Plans over as many steps as by default in training, their time divided by as many, on random images:
    2,000 of each label for semidiscrete."""
    side = Side(device)
    count, generator = len(side.y), torch.Generator().manual_seed(0)
    x0, x1, y = side.noise(16 * count), side.noise(8 * count), side.y.cpu().repeat(16)
    images = [.5 * side.noise(2000).cpu().half() for _ in range(5)]  # float16 as in training
    plans = {}  # steps that a plan serves, and the coupling
    for name in PAIRINGS:
        plans[name] = 8, Minibatch(name, lambda y, generator: x1, 2.0)
    plans["semidiscrete"] = 16, Semidiscrete(images, torch.zeros(5, 2000), device, side.dtype)
    step = entry(clock([side.step], repeats, device))
    result = {"training step": dict(step, share=1)}
    for name, (served, couple) in plans.items():
        call = partial(couple, x0[:served * count], y[:served * count], generator)
        row = entry(clock([call], repeats, device) / served)
        result[name] = dict(row, share=row["ms"] / (row["ms"] + step["ms"]))
    return result


PARTS = dict(steps=steps, ops=fused, couplings=couplings)


def main(argv=None):
    c = parse(Config, __doc__, argv)
    keep_memory()
    device = pick_device(c.device)
    print(f"{machine_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for part in [c.only] if c.only else PARTS:
        found = {name: [row] for name, row in PARTS[part](c.repeats, device).items()}
        show(Path(c.out) / f"bench-{part}.md", found)


if __name__ == "__main__":
    run(main)
