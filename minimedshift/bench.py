"""Speed, measured side by side on this machine: medians, spreads, and ratios to a reference in the same run.

    python -m minimedshift.bench                  everything: bench.json and bench.png in OUT
    python -m minimedshift.bench --quick          the same on smaller shapes, in under a minute on two cores
    python -m minimedshift.bench --only steps     one part: steps, ops, couplings, data, growth or sizes

The reference is the same network as a first version would have it: float32, contiguous memory, eager, ops unfused, guidance in two calls. Both
sides run in processes of their own, one call of each in turn, so that a noisy machine is noisy to both.
"""

import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from . import UserError, data, evaluate, flag, ops, parse, phantom, run, sampler, whole
from .coupling import Semidiscrete, couple, exact
from .flow import draw_noise
from .flow import loss as flow_loss
from .machine import can_compile, keep_memory, machine, pick_device, pick_formats
from .model import PRESETS, Shape, UNet
from .optim import Muon, split


@dataclass(frozen=True)
class Config:
    only: str = flag("", "one part: steps, ops, couplings, data, growth or sizes (default: all)", "bench")
    quick: bool = flag(False, "smaller shapes: under a minute on two cores", "bench")
    out: str = flag("out", "folder of bench.json and bench.png", "bench")
    repeats: int = flag(0, "repeats of each measurement, whose median counts; 0 is 7, or 5 with --quick", "bench", low=0)
    device: str = flag("auto", "where to compute", "bench", ("auto", "cuda", "mps", "cpu"))


# The networks measured: pixels a side, shape, images a step on a CPU and on a GPU. The third is the size of network that public flow-matching code
# trains on small images: 64 channels, mult (1, 2, 2), 2 blocks, at full resolution.
NETWORKS = {"cpu": (*PRESETS["cpu"], 16, 256), "gpu": (*PRESETS["gpu"], 2, 64), "64 channels": (64, Shape(stem=1, widths=(64, 128, 128), blocks=(2, 2, 2)), 16, 64)}


WHAT = dict(gradients="forward and backward", step="training step", translation="translation", short_translation="translation, 1 step a leg")


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
    return dict(ms=1e3 * float(np.median(seconds)), fastest_ms=1e3 * min(seconds), slowest_ms=1e3 * max(seconds), **more)


# ---------------------------------------------------------------- training step and translation, beside the reference

class TwoCalls(sampler.Velocity):
    """Guidance as it is written down: one call of the network for each label."""

    def evaluate(self, x, t, y):
        null = self.model(x, t, torch.full_like(y, self.model.shape.num_domains)) if self.guidance != 1 else 0
        out = self.model(x, t, y)
        return null + self.guidance * (out - null)


class Job:
    """One side of a comparison: a network, and what is done with it. plain: the reference."""

    def __init__(self, network, batch, device, plain, compiled=None, graph=False):
        size, shape = NETWORKS[network][:2]
        self.device, self.plain, self.batch = device, plain, batch
        if plain:
            sampler.Velocity = TwoCalls  # each side has a process of its own
        else:
            keep_memory()
        self.dtype, memory = (torch.float32, torch.contiguous_format) if plain else pick_formats("auto", device)
        torch.manual_seed(0)
        self.model = UNet(shape).to(device, memory_format=memory)
        if (can_compile(device) and not plain) if compiled is None else compiled:
            self.model.compile_blocks(dynamic=False)
        inside, rest = split(self.model)
        self.optimizers = [Muon(inside, .02), torch.optim.AdamW(rest, .001, fused=not plain)]
        g = torch.Generator(device).manual_seed(0)
        self.x0, self.x1 = (draw_noise((batch, 1, size, size), g, 1.0, device) for _ in range(2))
        self.y, self.t = torch.arange(batch, device=device) % 5, torch.rand(batch, generator=g, device=device)
        if graph:
            self.model.capture(batch, size, self.dtype)

    def gradients(self):
        self.model.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = flow_loss(self.model, self.x0, self.x1, self.y, self.t).mean()
        loss.backward()

    def step(self):
        """A training step: forward, backward, optimizers."""
        self.gradients()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def translation(self, steps=5):
        """Heun's steps on each leg, the forward leg guided: 6 evaluations an image for each."""
        self.model.eval()
        sampler.translate(self.model, self.x1, 0, 1, guidance=1.5, steps=steps)
        self.model.train()

    def short_translation(self):
        self.translation(1)

    def profile(self):
        """The share of a training step's time in convolutions and matrix products, and the most costly kernels, by the profiler."""
        activity = torch.profiler.ProfilerActivity.CUDA if self.device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
        self.step()
        with torch.profiler.profile(activities=[activity]) as found:
            for _ in range(3):
                self.step()
        spent = {e.key: e.self_device_time_total if self.device.type == "cuda" else e.self_cpu_time_total for e in found.key_averages()}
        total, words = sum(spent.values()) or 1, ("conv", "gemm", "addmm", "::mm", "bmm", "attention", "matmul", "cutlass", "xmma", "nvjet", "flash", "fmha", "winograd", "cudnn")
        top = sorted(spent, key=spent.get, reverse=True)[:12]
        return dict(share=sum(v for k, v in spent.items() if any(word in k.lower() for word in words)) / total, top={k: spent[k] / total for k in top})


def work(pipe, threads, *arguments):
    """The life of a process that does a Job: it takes names of methods, and gives back the seconds they took and what they returned."""
    torch.set_num_threads(threads)
    job = Job(*arguments)
    while name := pipe.recv():
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = getattr(job, name)()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, result))


def side_by_side(names, repeats, *sides):
    """For each method in `names` the seconds on each side, taken in turn after two calls that do not count: {name: [[seconds] a side]}; and
    what `profile` returned on the first side. sides: arguments of Job."""
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for arguments in sides:
        mine, its = context.Pipe()
        processes.append(context.Process(target=work, args=(its, torch.get_num_threads(), *arguments), daemon=True))
        processes[-1].start()
        its.close()  # its copy here would keep a dead process's pipe open
        pipes.append(mine)

    def call(pipe, name):
        pipe.send(name)
        return pipe.recv()

    found = {name: np.array([[call(pipe, name)[0] for pipe in pipes] for _ in range(repeats + 2)][2:]).T.tolist() for name in names}
    profile = call(pipes[0], "profile")[1]
    for pipe, process in zip(pipes, processes):
        pipe.send("")
        process.join()
    return found, profile


def images_a_step(device, cpu, gpu):
    """So many on a CPU and on a GPU; on a GPU of less than 60 GB, which could not hold all sides of a comparison at once, an eighth."""
    return cpu if device.type != "cuda" else gpu if torch.cuda.get_device_properties(device).total_memory > 60e9 else gpu // 8


def steps(repeats, device, quick):
    """Training step and translation of every network against the reference; the profile of the CPU preset's or GPU preset's step."""
    result, gpu = {}, device.type == "cuda"
    for name, (size, shape, *batches) in NETWORKS.items():
        if quick and name != "cpu":
            continue
        batch, main = images_a_step(device, *batches), name == ("gpu" if gpu else "cpu")
        sides = [(name, batch, device, False), (name, batch, device, True)]
        more_sides = {"eager_ratio": (False, False), "graph_ratio": (False, None, True), **({"compiled_ratio": (True, True)} if can_compile(device) else {})} if gpu else {}
        sides += [(name, batch, device, *kind) for kind in more_sides.values()]
        found, profile = side_by_side(["gradients"] if name == "64 channels" else ["step", "short_translation" if quick or not (main or gpu) else "translation"], repeats, *sides)
        for what, (ours, reference, *others) in found.items():
            ratios = np.divide(reference, ours)
            more = dict(images_per_second=batch / np.median(ours), reference_ms=1e3 * float(np.median(reference)), ratio=float(np.median(ratios)),
                        ratio_low=float(ratios.min()), ratio_high=float(ratios.max()), batch=batch, size=size)
            result[f"{name}: {WHAT[what]}"] = entry(
                ours, **more, **{key: float(np.median(np.divide(other, ours))) for key, other in zip(more_sides, others)})
        if main:
            result[f"{name}: profile"] = profile
    return result


# ---------------------------------------------------------------- ops

def speeds(repeats, device):
    """What this machine can do: GB/s of a large copy (read and written), GFLOP/s of a large matrix product (bfloat16 on CUDA)."""
    a = torch.randn(2**26 if device.type == "cuda" else 2**24, device=device)
    b, n = torch.empty_like(a), 8192 if device.type == "cuda" else 1536
    m = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return dict(copy_GBps=8e-9 * a.numel() / min(clock(lambda: b.copy_(a), repeats, device)), matmul_GFLOPs=2e-9 * n**3 / min(clock(lambda: m @ m, repeats, device)))


def fused(repeats, device, quick):
    """Each op against its reference, with the GB/s (or GFLOP/s) it achieves beside what this machine can do. On a GPU: kernel, compiled reference and eager reference."""
    gpu = device.type == "cuda"
    limit = speeds(repeats, device)
    result = {"this machine": limit}
    B, C, side, n, d = (64, 256, 64, 4096, 4096) if gpu else (16, 96, 16, 512, 1024) if quick else (16, 128, 64, 1024, 4096)
    dtype, g = torch.bfloat16 if gpu else torch.float32, torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(B, C, side, side, generator=g, device=device).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    w, bias, scale, shift = (torch.randn(shape, generator=g, device=device) for shape in ((C,), (C,), (B, C), (B, C)))
    a, b, y, v = torch.randn(n, d, generator=g, device=device), torch.randn(n, d, generator=g, device=device), torch.arange(n, device=device) % 5, torch.zeros(n, device=device)
    matrix = 2 * a @ b.T

    def both_ways(function):
        inputs = [z.detach().requires_grad_() for z in (x, w, bias, scale, shift)]
        forward = lambda: function(inputs[0], *inputs[1:3], C // 16, *inputs[3:])
        out = forward()
        return forward, lambda: torch.autograd.grad(out, inputs, dy, retain_graph=True)

    nbytes = x.numel() * x.element_size()
    for name, public in (("norm_film_silu", ops.norm_film_silu_reference), ("row_lse", ops.row_lse_reference), ("row_lse_dot", ops.row_lse_dot_reference)):
        sides = {"reference": public}
        if gpu:
            sides = {"kernel": getattr(ops, f"fused_{name}"), "compiled reference": torch.compile(public, dynamic=False), **sides}
        for side_name, function in sides.items():
            if name == "norm_film_silu":
                forward, backward = both_ways(function)
                with torch.no_grad():
                    seconds = clock(forward, repeats, device)
                result[f"{name}, forward, {side_name}"] = entry(seconds, GBps=3e-9 * nbytes / np.median(seconds), of_limit=3e-9 * nbytes / np.median(seconds) / limit["copy_GBps"])
                seconds = clock(backward, repeats, device)
                result[f"{name}, backward, {side_name}"] = entry(seconds, GBps=5e-9 * nbytes / np.median(seconds), of_limit=5e-9 * nbytes / np.median(seconds) / limit["copy_GBps"])
            elif name == "row_lse":
                seconds = clock(lambda: function(matrix, v, 2.0), repeats, device)
                result[f"{name}, {side_name}"] = entry(seconds, GBps=4e-9 * n * n / np.median(seconds), of_limit=4e-9 * n * n / np.median(seconds) / limit["copy_GBps"])
            else:
                seconds = clock(lambda: function(a, b, y, y, v, 2.0), repeats, device)
                result[f"{name}, {side_name}"] = entry(seconds, rate_GFLOPs=2e-9 * n * n * d / np.median(seconds), of_limit=2e-9 * n * n * d / np.median(seconds) / limit["matmul_GFLOPs"])
    return result


# ---------------------------------------------------------------- couplings

def couplings(repeats, device, quick):
    """What a coupling costs beside the training step it serves: the preset's network on random images, batches of 16 on a CPU and 256 on
    a GPU. A plan is made over 8 batches (semidiscrete 16), as by default, and its time divided by as many. Semidiscrete knows 2,000 images a label."""
    name = "gpu" if device.type == "cuda" else "cpu"
    batch, images_each, size = images_a_step(device, 16, 256), 200 if quick else 2000, NETWORKS[name][0]
    job, g = Job(name, batch, device, plain=False), torch.Generator(device).manual_seed(0)
    x0, x1 = (draw_noise((16 * batch, 1, size, size), g, 1.0, device) for _ in range(2))
    y, part = torch.arange(16 * batch) % 5, slice(8 * batch)
    semidiscrete = Semidiscrete([.5 * draw_noise((images_each, 1, size, size), g, 1.0, device).cpu() for _ in range(5)],
                                [torch.zeros(images_each) for _ in range(5)], device, dtype=pick_formats("auto", device)[0])
    batch_plan = lambda name, *more: lambda: couple(name, x0[part], x1[part], y[part], *more)
    plans = dict(independent=(1, batch_plan("independent")), sinkhorn=(8, batch_plan("sinkhorn", 2.0, g)), exact=(8, batch_plan("exact")),
                 semidiscrete=(16, lambda: semidiscrete.pick(x0, y)))
    trained = entry(clock(job.step, repeats, device))
    result = {"training step": dict(trained, batch=batch)}
    if job.dtype != torch.float32:  # plans are made in float32: this is their like
        job.dtype = torch.float32
        result["training step, float32"] = dict(entry(clock(job.step, repeats, device)), batch=batch)
    for name, (window, plan) in plans.items():
        seconds = [s / window for s in clock(plan, repeats, device)]
        known = dict(images_a_label=images_each) if name == "semidiscrete" else {}
        result[name] = entry(seconds, of_a_step=np.median(seconds) / (np.median(seconds) + trained["ms"] / 1e3), **known)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    noises, images, one = torch.randn(512, 4096), torch.randn(512, 4096), torch.zeros(512, dtype=torch.long)
    result["exact, n = 512, d = 4096, one core"] = entry(clock(lambda: exact(noises, images, one), repeats, torch.device("cpu")))
    torch.set_num_threads(threads)
    return result


# ---------------------------------------------------------------- loader and simulator

def sources(repeats, device, quick):
    """Where batches come from: drawing noise, reading a batch from a stored set, simulating heads; images a second."""
    batch, g = (64, 256)[device.type == "cuda"], torch.Generator(device).manual_seed(0)
    stored = data.Dataset(domains=phantom.DOMAINS, size=64, channels=1, train=[np.zeros((500, 1, 64, 64), np.float16)] * 5, held_out=[[]] * 5)
    host = torch.Generator().manual_seed(0)
    heads = [phantom.Head(seed) for seed in range(4 if quick else 16)]
    rate = lambda count, seconds: entry(seconds, images_per_second=count / np.median(seconds))
    return {"noise, 64 pixels": rate(batch, clock(lambda: draw_noise((batch, 1, 64, 64), g, 1.0, device), repeats, device)),
            "batch of a stored set, 64 pixels": rate(batch, clock(lambda: stored.batch(torch.arange(batch) % 5, host).to(device), repeats, device)),
            "simulator, 64 pixels": rate(len(heads), clock(lambda: phantom.render(heads, "real-normal", 64), repeats, torch.device("cpu")))}


# ---------------------------------------------------------------- how cost grows

def growth(repeats, device, quick):
    """Forward and backward of the preset's network from 64 to 512 pixels, and over batches from 1 to 256 at 64 pixels, with the exponents fitted to
    the logarithms: time ~ pixels^a, time ~ batch^b. 1 is proportional."""
    name, result = ("gpu" if device.type == "cuda" else "cpu"), {}
    sides, batches = (64, 128, 256) if quick else (64, 128, 256, 512), (1, 4, 16) if quick else (1, 4, 16, 64, 256)

    def measure(size, batch):
        job = Job(name, 1, device, plain=False, compiled=False)
        job.x0, job.x1 = torch.randn(2, batch, 1, size, size, device=device)
        job.y, job.t = torch.arange(batch, device=device) % 5, torch.rand(batch, device=device)
        return entry(clock(job.gradients, repeats, device), batch=batch, size=size)

    for size in sides:
        result[f"{size} pixels, one image"] = measure(size, 1)
    for batch in batches:
        result[f"64 pixels, {batch} image{'s' * (batch > 1)}"] = measure(64, batch)
    slope = lambda rows, of: float(np.polyfit(np.log([of(r) for r in rows]), np.log([r["ms"] for r in rows]), 1)[0])
    rows = list(result.values())
    result["exponents"] = dict(pixels=slope(rows[:len(sides)], lambda r: r["size"]**2), batch=slope(rows[len(sides):], lambda r: r["batch"]))
    return result


# ---------------------------------------------------------------- size

# Denoising networks alone, without autoencoder and text encoder: parameters in millions, GFLOPs of one evaluation of one image (a multiply-add counted
# as two), pixels of the image it stands for, source. arXiv:2212.09748 counts multiply-adds (github.com/facebookresearch/DiT/issues/14); doubled here.
PUBLISHED = {
    "Stable Diffusion 1.x": (860, 678, 512, "parameters: github.com/CompVis/stable-diffusion; GFLOPs: 16.938T multiply-adds over 50 evaluations, github.com/HaozheLiu-ST/T-GATE, attention products left out"),
    "Stable Diffusion 2.1 (CycleGAN-Turbo's)": (865, None, 512, "github.com/Stability-AI/stablediffusion; huggingface.co/stabilityai/sd-turbo"),
    "LDM-4, ImageNet": (400, 208, 256, "arXiv:2112.10752, table 3; arXiv:2212.09748, table 6"),
    "LDM-8, ImageNet": (395, 114, 256, "arXiv:2112.10752, table 13; arXiv:2212.09748, table 6"),
    "LDM-4, CelebA-HQ": (274, None, 256, "arXiv:2112.10752, table 12"),
    "ADM, in pixels": (554, 2240, 256, "arXiv:2112.10752, table 3; arXiv:2212.09748, table 6"),
    "DiT-XL/2": (675, 237, 256, "arXiv:2212.09748, table 4"),
}


def sizes(repeats, device, quick):
    """Parameters, GFLOPs of one evaluation of one image, and what a training step keeps of it for the backward pass, beside published networks."""
    result = {}
    for name, (size, shape, *_) in NETWORKS.items():
        model, kept = UNet(shape), {}
        x, t, y = torch.zeros(1, 1, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.update({z.untyped_storage().data_ptr(): z}) or z, lambda z: z):
            model(x, t, y).sum()
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(x, t, y)
        result[f"minimedshift, {name}"] = dict(
            parameters_M=sum(p.numel() for p in model.parameters()) / 1e6, GFLOPs=flops.get_total_flops() / 1e9, size=size,
            kept_MB=sum(z.untyped_storage().nbytes() for at, z in kept.items() if at not in parameters) / 2**20, source="measured")
    for name, (parameters, gflops, size, source) in PUBLISHED.items():
        result[name] = dict(parameters_M=parameters, **({"GFLOPs": gflops} if gflops else {}), size=size, source=source)
    return result


# ---------------------------------------------------------------- the command

PARTS = {"steps": steps, "ops": fused, "couplings": couplings, "data": sources, "growth": growth, "sizes": sizes}
SHOWN = dict(images_per_second="{:,.1f} images/s", ratio="{:.2f} of the reference's speed", eager_ratio="{:.2f} of eager", compiled_ratio="{:.2f} of the compiled reference", graph_ratio="{:.2f} of ours from a CUDA graph", GBps="{:.3g} GB/s", rate_GFLOPs="{:.4g} GFLOP/s", GFLOPs="{:.4g} GFLOPs", images_a_label="{} images a label",
             of_limit="{:.0%} of this machine's", of_a_step="{:.2%} of a step", parameters_M="{:.2f}M parameters", kept_MB="{:.1f} MB kept for the backward pass",
             copy_GBps="copy {:.3g} GB/s", matmul_GFLOPs="matrix product {:.4g} GFLOP/s", pixels="time ~ pixels^{:.2f}", share="{:.0%} in convolutions and matrix products")


def show(name, r):
    """One row as text."""
    if name == "exponents":
        return f"  time ~ pixels^{r['pixels']:.2f}, time ~ images^{r['batch']:.2f}"
    time = f"{r['ms']:9.2f} ms ({r['fastest_ms']:.2f} to {r['slowest_ms']:.2f})" if "ms" in r else ""
    spread = f" ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})" if "ratio" in r else ""
    top = "".join(f"\n    {share:6.1%}  {kernel[:90]}" for kernel, share in r.get("top", {}).items())
    return f"  {name:<42} {time}  " + ", ".join(form.format(r[key]) + spread * (key == "ratio") for key, form in SHOWN.items() if r.get(key) is not None) + top


def plot(path, results, title):
    """bench.png: ratios to the reference, and how cost grows."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    rows = {name: r for name, r in results.get("steps", {}).items() if "ratio" in r}
    left.barh(list(rows), [r["ratio"] for r in rows.values()], xerr=[[r["ratio"] - r["ratio_low"] for r in rows.values()], [r["ratio_high"] - r["ratio"] for r in rows.values()]], capsize=3)
    left.axvline(1, color="black", lw=.8)
    left.set(xlabel="speed over the reference's", title="beside the reference")
    left.invert_yaxis()
    figure.suptitle(title)
    rows = [r for r in results.get("growth", {}).values() if "ms" in r]
    for of, unit, label in (("size", "pixels", "one image"), ("batch", "images", "64 pixels")):
        some = [r for r in rows if r["size" if of == "batch" else "batch"] == (64 if of == "batch" else 1)]
        if some:
            ends = [pick(r[of] for r in some) for pick in (min, max)]
            right.loglog(*zip(*sorted({r["batch"] * r["size"]**2: r["ms"] for r in some}.items())), "o-", label=f"{label}, {ends[0]} to {ends[1]} {unit}")
            right.legend()
    right.set(xlabel="pixels in the batch", ylabel="forward and backward, ms", title="how cost grows")
    right.xaxis.set_minor_formatter("")
    with whole(path) as work:
        figure.savefig(work, dpi=100)
    plt.close(figure)


def main(argv=None):
    c = parse(Config, __doc__, argv)
    if c.only not in ("", *PARTS):
        raise UserError(f"--only {c.only} is no part: choose from {', '.join(PARTS)}")
    c = replace(c, repeats=c.repeats or (5 if c.quick else 7))
    keep_memory()
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own messages, in processes started from here
    device, results = pick_device(c.device), {}
    out, title = Path(c.out), f"{machine(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    out.mkdir(parents=True, exist_ok=True)
    print(f"{title}; medians of {c.repeats} (fastest to slowest)")
    for name in [c.only] if c.only else PARTS:
        print(f"{name}:", flush=True)
        results[name] = PARTS[name](c.repeats, device, c.quick)
        for row, r in results[name].items():
            print(show(row, r), flush=True)
    evaluate.write_json(out / "bench.json", dict(machine=title, device=device.type, repeats=c.repeats, quick=c.quick, **results))
    if {"steps", "growth"} & set(results):
        plot(out / "bench.png", results, title)
    return 0


if __name__ == "__main__":
    run(main)
