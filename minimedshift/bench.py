"""How fast it is, measured on this machine. What is compared takes turns. Leaves OUT/bench.json.

steps       training step and translation, beside the same network as a first version would have it: float32,
            contiguous memory, eager, ops unfused, guidance in two calls
ops         each fused op beside its compiled reference (where there is no GPU, the reference alone)
couplings   what a plan costs beside the training step that it serves
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.autograd import grad

from minimedshift import flow, ops, sampler
from minimedshift.coupling import Semidiscrete, couple
from minimedshift.model import UNet
from minimedshift.support.command import flag, parse, run
from minimedshift.support.files import explain_os_error, write_json
from minimedshift.support.machine import can_compile, keep_memory, machine_name, pick_device, pick_formats
from minimedshift.optim import Muon, split
from minimedshift.presets import PRESETS


@dataclass(frozen=True)
class Config:
    only: str = flag("", "one part (default: all)", "bench", ("steps", "ops", "couplings"))
    quick: bool = flag(False, "3 repeats instead of 9", "bench")
    out: str = flag("out", "folder of bench.json", "bench")
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
    """Median, fastest and slowest; beside a reference also the ratio of speeds, turn by turn."""
    row = dict(ms=np.median(ms), fastest_ms=ms.min(), slowest_ms=ms.max())
    if reference is not None:
        ratio = reference / ms
        row.update(ratio=np.median(ratio), ratio_low=ratio.min(), ratio_high=ratio.max())
    return row


class TwoCalls(sampler.Velocity):
    """Guidance as it is written down: one call of the network for each label, in float32."""

    def evaluate(self, x, t, y):
        out = self.model(x, t, y)
        if self.guidance == 1:
            return out
        null = self.model(x, t, torch.full_like(y, self.model.shape.num_domains))
        return null + self.guidance * (out - null)


class Side:
    """The preset of this device, and what is done with it. plain: the reference."""

    def __init__(self, device, plain=False):
        preset = PRESETS["gpu" if device.type == "cuda" else "cpu"]
        batch = 64 if device.type == "cuda" else 16
        self.dtype, memory = pick_formats("auto", device)
        self.velocity = sampler.Velocity
        if plain:
            self.dtype, memory, self.velocity = torch.float32, torch.contiguous_format, TwoCalls
        torch.manual_seed(0)
        self.model = UNet(preset.shape).to(device, memory_format=memory)
        if can_compile(device) and not plain:
            self.model.compile_blocks(dynamic=False)
        inside, rest = split(self.model)
        self.optimizers = [Muon(inside, .02), torch.optim.AdamW(rest, .001, fused=not plain)]
        self.noise = lambda count: flow.draw_noise((count, 1, preset.size, preset.size), None, 1.0, device)
        self.x0, self.x1 = self.noise(batch), self.noise(batch)
        self.t, self.y = torch.rand(batch, device=device), torch.arange(batch, device=device) % 5

    def step(self):
        """A training step: forward, backward, optimizers."""
        self.model.zero_grad()
        with torch.autocast(self.x1.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = flow.loss(self.model, self.x0, self.x1, self.y, self.t).mean()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.inference_mode()
    def translation(self):
        """Three FireFlow steps a leg, the forward leg guided: 4 evaluations an image back and 8 forward."""
        times = sampler.grid(.3, 3, .97)
        z = sampler.last(sampler.fireflow(self.velocity(self.model, 0), self.x1, times))
        return sampler.last(sampler.fireflow(self.velocity(self.model, 1, 1.5), z, times[::-1]))


def steps(repeats, device):
    ours, plain = Side(device), Side(device, plain=True)
    return {
        "step": entry(*clock([ours.step, plain.step], repeats, device)),
        "translation": entry(*clock([ours.translation, plain.translation], repeats, device)),
    }


def fused(repeats, device):
    B, C, n = 64, 128, 4096
    randn = partial(torch.randn, device=device)
    dtype, memory = pick_formats("auto", device)
    x, dy = [randn(B, C, 64, 64).to(dtype, memory_format=memory) for _ in range(2)]
    inputs = [z.requires_grad_() for z in (x, randn(C), randn(C), randn(B, C), randn(B, C))]
    matrix, g = randn(n, n), randn(n)
    calls = {
        "norm_film_silu": lambda op: grad(op(*inputs[:3], C // 16, *inputs[3:]), inputs, dy),
        "row_lse": lambda op: op(matrix, g, 2.0),
    }
    result = {}
    for name, call in calls.items():
        sides = [getattr(ops, f"{name}_reference")]
        if device.type == "cuda":
            sides = [torch.compile(sides[0], dynamic=False), getattr(ops, f"fused_{name}")]
        ms = clock([partial(call, op) for op in sides], repeats, device)
        result[name] = entry(ms[-1], ms[0])
    return result


def couplings(repeats, device):
    """Plans over as many steps as by default in training, their time divided by as many, on random images:
    2,000 of each label for semidiscrete."""
    side = Side(device)
    count = 16 * len(side.y)
    x0, x1, y = side.noise(count), side.noise(count), side.y.cpu().repeat(16)
    eight = [part[:count // 2] for part in (x0, x1, y)]
    images = [.5 * side.noise(2000).cpu() for _ in range(5)]
    semidiscrete = Semidiscrete(images, torch.zeros(5, 2000), device, dtype=side.dtype)
    generator = torch.Generator(device).manual_seed(0)
    plans = {  # steps, and how the plan is made
        "independent": (8, lambda: couple("independent", *eight)),
        "sinkhorn": (8, lambda: couple("sinkhorn", *eight, 2.0, generator)),
        "exact": (8, lambda: couple("exact", *eight)),
        "semidiscrete": (16, lambda: semidiscrete.pick(x0, y)),
    }
    result = {"training step": entry(clock([side.step], repeats, device))}
    step = result["training step"]["ms"]
    side.dtype = torch.float32  # as that of the plans of a batch
    result["training step, float32"] = entry(clock([side.step], repeats, device))
    for name, (served, plan) in plans.items():
        row = entry(clock([plan], repeats, device) / served)
        result[name] = dict(row, of_a_step=row["ms"] / (row["ms"] + step))
    return result


PARTS = dict(steps=steps, ops=fused, couplings=couplings)


def main(argv=None):
    c = parse(Config, __doc__, argv)
    keep_memory()
    device, repeats = pick_device(c.device), 3 if c.quick else 9
    results = dict(machine=machine_name(device), torch=torch.__version__, threads=torch.get_num_threads())
    print(*results.values())
    for part in [c.only] if c.only else PARTS:
        results[part] = PARTS[part](repeats, device)
        for name, row in results[part].items():
            numbers = [f"{key} {value:.4g}" for key, value in row.items()]
            print(f"{part}, {name}: {', '.join(numbers)}", flush=True)
    with explain_os_error(f"--out {c.out}", "cannot be made"):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(c.out) / "bench.json", results)


if __name__ == "__main__":
    run(main)
