"""Speed, measured side by side on this machine: medians, and ratios to what they are part of.

    python -m minimedshift.bench                  everything; bench.json in OUT
    python -m minimedshift.bench --only couplings
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import UserError, evaluate, flag, parse, pick_device, run
from .coupling import Semidiscrete, couple, exact
from .flow import draw_noise
from .flow import loss as flow_loss
from .model import PRESETS, UNet
from .optim import Muon, split


@dataclass(frozen=True)
class Config:
    only: str = flag("", "one part: couplings (default: all)", "bench")
    out: str = flag("out", "folder of bench.json", "bench")
    repeats: int = flag(7, "repeats of each measurement, whose median counts", "bench")
    device: str = flag("auto", "where to compute", "bench", ("auto", "cuda", "mps", "cpu"))


def clock(function, repeats, device):
    """Seconds of each of `repeats` calls of function(), after one that does not count: a sorted list."""
    wait, seconds = (torch.cuda.synchronize if device.type == "cuda" else lambda: None), []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])


def entry(seconds, **more):
    """Median, fastest and slowest, in milliseconds."""
    return dict(ms=1e3 * float(np.median(seconds)), fastest_ms=1e3 * seconds[0], slowest_ms=1e3 * seconds[-1], **more)


def couplings(repeats, device, images_each=2000):
    """What a coupling costs beside the training step it serves: the preset's network on random images, batches of 16 on a CPU and 256 on
    a GPU. A plan is made over 8 batches (semidiscrete 16), as by default, and its time divided by as many. Semidiscrete knows 2,000 images a label."""
    preset, batch = ("gpu", 256) if device.type == "cuda" else ("cpu", 16)
    size, shape = PRESETS[preset]
    torch.manual_seed(0)
    model, g = UNet(shape).to(device, memory_format=torch.channels_last), torch.Generator(device).manual_seed(0)
    inside, rest = split(model)
    optimizers = [Muon(inside, .02), torch.optim.AdamW(rest, .001)]
    x0, x1 = (draw_noise((16 * batch, 1, size, size), g, 1.0, device) for _ in range(2))
    y, t, part = torch.arange(16 * batch) % 5, torch.rand(batch, generator=g, device=device), slice(8 * batch)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow_loss(model, x0[:batch], x1[:batch], y[:batch].to(device), t).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    semidiscrete = Semidiscrete([.5 * draw_noise((images_each, 1, size, size), g, 1.0, device).cpu() for _ in range(5)],
                                [torch.zeros(images_each) for _ in range(5)], device)
    batch_plan = lambda name, *more: lambda: couple(name, x0[part], x1[part], y[part], *more)
    plans = dict(independent=(1, batch_plan("independent")), sinkhorn=(8, batch_plan("sinkhorn", 2.0, g)), exact=(8, batch_plan("exact")),
                 semidiscrete=(16, lambda: semidiscrete.pick(x0, y)))
    trained = entry(clock(step, repeats, device))
    result = {"training step": dict(trained, preset=preset, batch=batch)}
    for name, (window, plan) in plans.items():
        seconds = [s / window for s in clock(plan, repeats, device)]
        result[name] = entry(seconds, share=np.median(seconds) / (np.median(seconds) + trained["ms"] / 1e3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    noises, images, one = torch.randn(512, 4096), torch.randn(512, 4096), torch.zeros(512, dtype=torch.long)
    result["exact, n = 512, d = 4096, one core"] = entry(clock(lambda: exact(noises, images, one), repeats, torch.device("cpu")))
    torch.set_num_threads(threads)
    return result


PARTS = {"couplings": couplings}


def main(argv=None):
    c = parse(Config, __doc__, argv)
    if c.only not in ("", *PARTS):
        raise UserError(f"--only {c.only} is no part: choose from {', '.join(PARTS)}")
    if c.repeats < 1:
        raise UserError("--repeats must be at least 1")
    device, results = pick_device(c.device), {}
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in [c.only] if c.only else PARTS:
        results[name] = PARTS[name](c.repeats, device)
        print(f"{name}, {device.type}: median of {c.repeats} (fastest to slowest)")
        for row, r in results[name].items():
            print(f"  {row:<40} {r['ms']:9.2f} ms ({r['fastest_ms']:.2f} to {r['slowest_ms']:.2f})" + (f"  {r['share']:.2%} of a step" if "share" in r else ""), flush=True)
    evaluate.write_json(out / "bench.json", dict(device=device.type, torch=torch.__version__, **results))
    return 0


if __name__ == "__main__":
    run(main)
