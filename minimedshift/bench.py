"""Speed, measured side by side on this machine: medians, spreads, and ratios to a reference in the same run.

    python -m minimedshift.bench                  everything: bench.json and bench.png in OUT
    python -m minimedshift.bench --quick          the same on smaller shapes, in under a minute on two cores
    python -m minimedshift.bench --only steps     one part: steps, ops, couplings, data, growth or sizes

The reference is the same network as a first version would have it: float32, contiguous memory, eager, ops
unfused, guidance in two calls. Both sides run in processes of their own, one call of each in turn, so that a
noisy machine is noisy to both.
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

from minimedshift import data, ops, phantom, sampler
from minimedshift.support.command import UserError, flag, parse, run
from minimedshift.support.files import whole, write_json
from minimedshift.coupling import Semidiscrete, couple, exact
from minimedshift.flow import draw_noise
from minimedshift.flow import loss as flow_loss
from minimedshift.support.machine import can_compile, keep_memory, machine, pick_device, pick_formats
from minimedshift.model import PRESETS, Shape, UNet
from minimedshift.support.optim import Muon, split


@dataclass(frozen=True)
class Config:
    only: str = flag("", "one part: steps, ops, couplings, data, growth or sizes (default: all)", "bench")
    quick: bool = flag(False, "smaller shapes: under a minute on two cores", "bench")
    out: str = flag("out", "folder of bench.json and bench.png", "bench")
    repeats: int = flag(
        0, "repeats of each measurement, whose median counts; 0 is 7, or 5 with --quick", "bench", low=0)
    device: str = flag("auto", "where to compute", "bench", ("auto", "cuda", "mps", "cpu"))


# The networks measured: pixels a side, shape, images a step on a CPU and on a GPU. The third has
# the size that public flow-matching code trains at full resolution: 64 channels, mult (1, 2, 2), 2 blocks.
NETWORKS = {
    "cpu": (*PRESETS["cpu"], 16, 256),
    "gpu": (*PRESETS["gpu"], 2, 64),
    "64 channels": (64, Shape(stem=1, widths=(64, 128, 128), blocks=(2, 2, 2)), 16, 64),
}
WHAT = dict(gradients="forward and backward", step="training step", translation="translation",
            short_translation="translation, 1 step a leg")


def timed(function, device):
    """The seconds that function() takes, and what it returns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def clock(function, repeats, device):
    """Seconds of each of `repeats` calls of function(), after one that does not count: a sorted list."""
    return sorted([timed(function, device)[0] for _ in range(repeats + 1)][1:])


def entry(seconds, **more):
    """Median, fastest and slowest, in milliseconds."""
    ms = 1e3 * float(np.median(seconds))
    return dict(ms=ms, fastest_ms=1e3 * min(seconds), slowest_ms=1e3 * max(seconds), **more)


# ---------------------------------------------------------------- training step and translation

class TwoCalls(sampler.Velocity):
    """Guidance as it is written down: one call of the network for each label."""

    def evaluate(self, x, t, y):
        null = 0
        if self.guidance != 1:
            null = self.model(x, t, torch.full_like(y, self.model.shape.num_domains))
        out = self.model(x, t, y)
        return null + self.guidance * (out - null)


# In the names of kernels that are convolutions or matrix products.
PRODUCTS = ("conv", "gemm", "addmm", "::mm", "bmm", "attention", "matmul", "cutlass", "xmma", "nvjet",
            "flash", "fmha", "winograd", "cudnn")


class Job:
    """One side of a comparison: a network, and what is done with it. plain: the reference."""

    def __init__(self, network, batch, device, plain, compiled=None, graph=False):
        size, shape = NETWORKS[network][:2]
        self.device, self.plain, self.batch = device, plain, batch
        if plain:
            sampler.Velocity = TwoCalls  # each side has a process of its own
            self.dtype, memory = torch.float32, torch.contiguous_format
        else:
            keep_memory()
            self.dtype, memory = pick_formats("auto", device)
        if compiled is None:
            compiled = can_compile(device) and not plain
        torch.manual_seed(0)
        self.model = UNet(shape).to(device, memory_format=memory)
        if compiled:
            self.model.compile_blocks(dynamic=False)
        inside, rest = split(self.model)
        self.optimizers = [Muon(inside, .02), torch.optim.AdamW(rest, .001, fused=not plain)]
        g = torch.Generator(device).manual_seed(0)
        self.x0, self.x1 = [draw_noise((batch, 1, size, size), g, 1.0, device) for _ in range(2)]
        self.t = torch.rand(batch, generator=g, device=device)
        self.y = torch.arange(batch, device=device) % 5
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
        """By the profiler: the share of a training step's time in convolutions and matrix products, and the
        most costly kernels."""
        gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
        self.step()
        with torch.profiler.profile(activities=[activity]) as found:
            for _ in range(3):
                self.step()
        seconds = lambda event: event.self_device_time_total if gpu else event.self_cpu_time_total
        spent = {event.key: seconds(event) for event in found.key_averages()}
        total = sum(spent.values()) or 1
        products = sum(v for kernel, v in spent.items() if any(word in kernel.lower() for word in PRODUCTS))
        top = sorted(spent, key=spent.get, reverse=True)[:12]
        return dict(share=products / total, top={kernel: spent[kernel] / total for kernel in top})


def work(pipe, threads, *arguments):
    """The life of a process that does a Job: it takes names of methods and returns what `timed` does."""
    torch.set_num_threads(threads)
    job = Job(*arguments)
    while name := pipe.recv():
        pipe.send(timed(getattr(job, name), job.device))


def side_by_side(names, repeats, *sides):
    """{name: [[seconds] a side]} of each method in `names`, and what `profile` returned on the first side.
    The sides take turns; the first two calls do not count. sides: arguments of Job."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for arguments in sides:
        mine, its = context.Pipe()
        arguments = (its, torch.get_num_threads(), *arguments)
        processes.append(context.Process(target=work, args=arguments, daemon=True))
        processes[-1].start()
        its.close()  # its copy here would keep a dead process's pipe open
        pipes.append(mine)

    def call(pipe, name):
        pipe.send(name)
        return pipe.recv()

    found = {}
    for name in names:
        turns = [[call(pipe, name)[0] for pipe in pipes] for _ in range(repeats + 2)]
        found[name] = np.array(turns[2:]).T.tolist()
    profile = call(pipes[0], "profile")[1]
    for pipe, process in zip(pipes, processes):
        pipe.send("")
        process.join()
    return found, profile


def images_a_step(device, cpu, gpu):
    """So many on a CPU and on a GPU. A GPU of less than 60 GB cannot hold all sides at once: an eighth."""
    if device.type != "cuda":
        return cpu
    return gpu if torch.cuda.get_device_properties(device).total_memory > 60e9 else gpu // 8


def steps(repeats, device, quick):
    """Training step and translation of every network against the reference, and the profile of a step of the
    preset for this device."""
    result, gpu = {}, device.type == "cuda"
    kinds = dict(ours=(False,), reference=(True,))  # the last arguments of Job
    if gpu:
        kinds.update(eager_ratio=(False, False), graph_ratio=(False, None, True))
        if can_compile(device):
            kinds.update(compiled_ratio=(True, True))
    for name, (size, shape, *batches) in NETWORKS.items():
        if quick and name != "cpu":
            continue
        batch = images_a_step(device, *batches)
        main = name == ("gpu" if gpu else "cpu")
        methods = ["step", "short_translation" if quick or not (main or gpu) else "translation"]
        if name == "64 channels":
            methods = ["gradients"]
        sides = [(name, batch, device, *kind) for kind in kinds.values()]
        found, profile = side_by_side(methods, repeats, *sides)
        for what, (ours, reference, *others) in found.items():
            ratios = np.divide(reference, ours)
            row = entry(ours, images_per_second=batch / np.median(ours),
                        reference_ms=1e3 * float(np.median(reference)), ratio=float(np.median(ratios)),
                        ratio_low=float(ratios.min()), ratio_high=float(ratios.max()), batch=batch, size=size)
            for key, other in zip(list(kinds)[2:], others):
                row[key] = float(np.median(np.divide(other, ours)))
            result[f"{name}: {WHAT[what]}"] = row
        if main:
            result[f"{name}: profile"] = profile
    return result


# ---------------------------------------------------------------- ops

def speeds(repeats, device):
    """What this machine can do: GB/s of a large copy (read and written), GFLOP/s of a large matrix product
    (bfloat16 on CUDA)."""
    gpu = device.type == "cuda"
    length, n, dtype = (2**26, 8192, torch.bfloat16) if gpu else (2**24, 1536, torch.float32)
    a = torch.randn(length, device=device)
    b = torch.empty_like(a)
    m = torch.randn(n, n, device=device, dtype=dtype)
    copy = min(clock(lambda: b.copy_(a), repeats, device))
    product = min(clock(lambda: m @ m, repeats, device))
    return dict(copy_GBps=8e-9 * length / copy, matmul_GFLOPs=2e-9 * n**3 / product)


def fused(repeats, device, quick):
    """Each op against its reference, with the GB/s (or GFLOP/s) it achieves beside what this machine can do.
    On a GPU: kernel, compiled reference and eager reference."""
    gpu = device.type == "cuda"
    limit = speeds(repeats, device)
    result = {"this machine": limit}
    B, C, side, n, d = (16, 96, 16, 512, 1024) if quick else (16, 128, 64, 1024, 4096)
    if gpu:
        B, C, side, n, d = 64, 256, 64, 4096, 4096
    g = torch.Generator(device).manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=g, device=device)
    form = dict(dtype=torch.bfloat16 if gpu else torch.float32, memory_format=torch.channels_last)
    x, dy = randn(B, C, side, side).to(**form), randn(B, C, side, side).to(**form)
    inputs = [z.requires_grad_() for z in (x, randn(C), randn(C), randn(B, C), randn(B, C))]
    a, b = randn(n, d), randn(n, d)
    y, v = torch.arange(n, device=device) % 5, torch.zeros(n, device=device)
    matrix = 2 * a @ b.T

    def measure(what, function, giga, unit="GBps", most="copy_GBps"):
        """giga: the GB it moves, or the GFLOP it computes; most: the name of the limit."""
        seconds = clock(function, repeats, device)
        rate = giga / np.median(seconds)
        result[what] = entry(seconds, **{unit: rate}, of_limit=rate / limit[most])

    nbytes = x.numel() * x.element_size()
    for name in ops.FUSED:
        sides = {"reference": getattr(ops, f"{name}_reference")}
        if gpu:
            compiled = torch.compile(sides["reference"], dynamic=False)
            sides = {"kernel": getattr(ops, f"fused_{name}"), "compiled reference": compiled, **sides}
        for side_name, op in sides.items():
            if name == "norm_film_silu":
                forward = lambda: op(*inputs[:3], C // 16, *inputs[3:])
                out = forward()
                backward = lambda: torch.autograd.grad(out, inputs, dy, retain_graph=True)
                with torch.no_grad():
                    measure(f"{name}, forward, {side_name}", forward, 3e-9 * nbytes)
                measure(f"{name}, backward, {side_name}", backward, 5e-9 * nbytes)
            elif name == "row_lse":
                measure(f"{name}, {side_name}", lambda: op(matrix, v, 2.0), 4e-9 * n * n)
            else:
                product = lambda: op(a, b, y, y, v, 2.0)
                measure(f"{name}, {side_name}", product, 2e-9 * n * n * d, "rate_GFLOPs", "matmul_GFLOPs")
    return result


# ---------------------------------------------------------------- couplings

def couplings(repeats, device, quick):
    """What a coupling costs beside the training step it serves: the preset's network on random images.
    Batches of 16 on a CPU and 256 on a GPU. A plan is made over 8 batches (semidiscrete 16), as by default,
    and its time divided by as many. Semidiscrete knows 2,000 images a label."""
    name = "gpu" if device.type == "cuda" else "cpu"
    batch, size = images_a_step(device, 16, 256), NETWORKS[name][0]
    images_each = 200 if quick else 2000
    job = Job(name, batch, device, plain=False)
    g = torch.Generator(device).manual_seed(0)
    noise = lambda count: draw_noise((count, 1, size, size), g, 1.0, device)
    x0, x1 = noise(16 * batch), noise(16 * batch)
    y, part = torch.arange(16 * batch) % 5, slice(8 * batch)
    images = [.5 * noise(images_each).cpu() for _ in range(5)]
    potentials = [torch.zeros(images_each) for _ in range(5)]
    semidiscrete = Semidiscrete(images, potentials, device, dtype=pick_formats("auto", device)[0])
    plans = {  # batches of a plan, and how it is made
        "independent": (1, lambda: couple("independent", x0[part], x1[part], y[part])),
        "sinkhorn": (8, lambda: couple("sinkhorn", x0[part], x1[part], y[part], 2.0, g)),
        "exact": (8, lambda: couple("exact", x0[part], x1[part], y[part])),
        "semidiscrete": (16, lambda: semidiscrete.pick(x0, y)),
    }
    trained = entry(clock(job.step, repeats, device))
    result = {"training step": dict(trained, batch=batch)}
    if job.dtype != torch.float32:  # plans are made in float32: this is their like
        job.dtype = torch.float32
        result["training step, float32"] = dict(entry(clock(job.step, repeats, device)), batch=batch)
    for name, (window, plan) in plans.items():
        seconds = [s / window for s in clock(plan, repeats, device)]
        share = np.median(seconds) / (np.median(seconds) + trained["ms"] / 1e3)
        result[name] = entry(seconds, of_a_step=share)
        if name == "semidiscrete":
            result[name]["images_a_label"] = images_each
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    noises, images, one = torch.randn(512, 4096), torch.randn(512, 4096), torch.zeros(512, dtype=torch.long)
    seconds = clock(lambda: exact(noises, images, one), repeats, torch.device("cpu"))
    result["exact, n = 512, d = 4096, one core"] = entry(seconds)
    torch.set_num_threads(threads)
    return result


# ---------------------------------------------------------------- loader and simulator

def sources(repeats, device, quick):
    """Images a second of what batches come from: noise, a stored set, the simulator."""
    batch = 256 if device.type == "cuda" else 64
    images = [np.zeros((500, 1, 64, 64), np.float16)] * 5
    stored = data.Dataset(domains=phantom.DOMAINS, size=64, channels=1, train=images, held_out=[[]] * 5)
    heads = [phantom.Head(seed) for seed in range(4 if quick else 16)]
    g, host = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)

    def rate(count, function, device=device):
        seconds = clock(function, repeats, device)
        return entry(seconds, images_per_second=count / np.median(seconds))

    draw = lambda: draw_noise((batch, 1, 64, 64), g, 1.0, device)
    read = lambda: stored.batch(torch.arange(batch) % 5, host).to(device)
    simulate = lambda: phantom.render(heads, "real-normal", 64)
    return {"noise, 64 pixels": rate(batch, draw),
            "batch of a stored set, 64 pixels": rate(batch, read),
            "simulator, 64 pixels": rate(len(heads), simulate, torch.device("cpu"))}


# ---------------------------------------------------------------- how cost grows

def growth(repeats, device, quick):
    """Forward and backward of the preset's network from 64 to 512 pixels, and over batches from 1 to 256 at
    64 pixels. Exponents are fitted to the logarithms: time ~ pixels^a, time ~ batch^b. 1 is proportional."""
    result, name = {}, "gpu" if device.type == "cuda" else "cpu"
    sides, batches = (64, 128, 256, 512), (1, 4, 16, 64, 256)
    if quick:
        sides, batches = sides[:3], batches[:3]

    def measure(size, batch):
        job = Job(name, 1, device, plain=False, compiled=False)
        job.x0, job.x1 = torch.randn(2, batch, 1, size, size, device=device)
        job.y = torch.arange(batch, device=device) % 5
        job.t = torch.rand(batch, device=device)
        return entry(clock(job.gradients, repeats, device), batch=batch, size=size)

    for size in sides:
        result[f"{size} pixels, one image"] = measure(size, 1)
    for batch in batches:
        result[f"64 pixels, {batch} image{'s' * (batch > 1)}"] = measure(64, batch)
    ms = [row["ms"] for row in result.values()]
    slope = lambda sizes, ms: float(np.polyfit(np.log(sizes), np.log(ms), 1)[0])
    pixels = [side**2 for side in sides]
    result["exponents"] = dict(pixels=slope(pixels, ms[:len(sides)]), batch=slope(batches, ms[len(sides):]))
    return result


# ---------------------------------------------------------------- size

# Denoising networks alone, without autoencoder and text encoder: parameters in millions, GFLOPs of one
# evaluation of one image (a multiply-add counted as two), pixels of the image it stands for, source.
# arXiv:2212.09748 counts multiply-adds (github.com/facebookresearch/DiT/issues/14); doubled here.
PUBLISHED = {
    "Stable Diffusion 1.x": (
        860, 678, 512, "parameters: github.com/CompVis/stable-diffusion; GFLOPs: 16.938T multiply-adds over "
        "50 evaluations, github.com/HaozheLiu-ST/T-GATE, attention products left out"),
    "Stable Diffusion 2.1 (CycleGAN-Turbo's)": (
        865, None, 512, "github.com/Stability-AI/stablediffusion; huggingface.co/stabilityai/sd-turbo"),
    "LDM-4, ImageNet": (400, 208, 256, "arXiv:2112.10752, table 3; arXiv:2212.09748, table 6"),
    "LDM-8, ImageNet": (395, 114, 256, "arXiv:2112.10752, table 13; arXiv:2212.09748, table 6"),
    "LDM-4, CelebA-HQ": (274, None, 256, "arXiv:2112.10752, table 12"),
    "ADM, in pixels": (554, 2240, 256, "arXiv:2112.10752, table 3; arXiv:2212.09748, table 6"),
    "DiT-XL/2": (675, 237, 256, "arXiv:2212.09748, table 4"),
}


def sizes(repeats, device, quick):
    """Parameters, GFLOPs of one evaluation of one image, and the memory that the backward pass needs of it,
    beside published networks."""
    result = {}
    for name, (size, shape, *_) in NETWORKS.items():
        model = UNet(shape)
        x, t, y = torch.zeros(1, 1, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        kept = {}  # the memory of each tensor by its address

        def keep(z):
            kept[z.untyped_storage().data_ptr()] = z
            return z

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
            model(x, t, y).sum()
        for p in model.parameters():
            kept.pop(p.untyped_storage().data_ptr(), None)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(x, t, y)
        parameters = sum(p.numel() for p in model.parameters())
        nbytes = sum(z.untyped_storage().nbytes() for z in kept.values())
        result[f"minimedshift, {name}"] = dict(
            parameters_M=parameters / 1e6, GFLOPs=flops.get_total_flops() / 1e9, size=size,
            kept_MB=nbytes / 2**20, source="measured")
    for name, (parameters, gflops, size, source) in PUBLISHED.items():
        known = dict(GFLOPs=gflops) if gflops else {}
        result[name] = dict(parameters_M=parameters, **known, size=size, source=source)
    return result


# ---------------------------------------------------------------- the command

PARTS = dict(steps=steps, ops=fused, couplings=couplings, data=sources, growth=growth, sizes=sizes)
SHOWN = dict(  # what a row can hold, and how it is printed
    images_per_second="{:,.1f} images/s",
    ratio="{:.2f} of the reference's speed", eager_ratio="{:.2f} of eager",
    compiled_ratio="{:.2f} of the compiled reference", graph_ratio="{:.2f} of ours from a CUDA graph",
    GBps="{:.3g} GB/s", rate_GFLOPs="{:.4g} GFLOP/s", GFLOPs="{:.4g} GFLOPs",
    images_a_label="{} images a label", of_limit="{:.0%} of this machine's", of_a_step="{:.2%} of a step",
    parameters_M="{:.2f}M parameters", kept_MB="{:.1f} MB kept for the backward pass",
    copy_GBps="copy {:.3g} GB/s", matmul_GFLOPs="matrix product {:.4g} GFLOP/s",
    share="{:.0%} in convolutions and matrix products")


def show(name, r):
    """One row as text."""
    if name == "exponents":
        return f"  time ~ pixels^{r['pixels']:.2f}, time ~ images^{r['batch']:.2f}"
    time = f"{r['ms']:9.2f} ms ({r['fastest_ms']:.2f} to {r['slowest_ms']:.2f})" if "ms" in r else ""
    said = []
    for key, form in SHOWN.items():
        if r.get(key) is not None:
            said.append(form.format(r[key]))
        if key == "ratio" and "ratio" in r:
            said[-1] += f" ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
    top = [f"\n    {share:6.1%}  {kernel[:90]}" for kernel, share in r.get("top", {}).items()]
    return f"  {name:<42} {time}  " + ", ".join(said) + "".join(top)


def plot(path, results, title):
    """bench.png: ratios to the reference, and how cost grows."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    rows = {name: r for name, r in results.get("steps", {}).items() if "ratio" in r}
    low, ratio, high = [[r[key] for r in rows.values()] for key in ("ratio_low", "ratio", "ratio_high")]
    left.barh(list(rows), ratio, xerr=[np.subtract(ratio, low), np.subtract(high, ratio)], capsize=3)
    left.axvline(1, color="black", lw=.8)
    left.set(xlabel="speed over the reference's", title="beside the reference")
    left.invert_yaxis()
    figure.suptitle(title)
    rows = [r for r in results.get("growth", {}).values() if "ms" in r]
    series = [("one image", "size", "pixels", [r for r in rows if r["batch"] == 1]),
              ("64 pixels", "batch", "images", [r for r in rows if r["size"] == 64])]
    for label, of, unit, some in series:
        if some:
            first, last = min(r[of] for r in some), max(r[of] for r in some)
            ms = {r["batch"] * r["size"]**2: r["ms"] for r in some}
            right.loglog(*zip(*sorted(ms.items())), "o-", label=f"{label}, {first} to {last} {unit}")
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # no messages of the profiler in processes started here
    device = pick_device(c.device)
    title = f"{machine(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    results = {}
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{title}; medians of {c.repeats} (fastest to slowest)")
    for name in [c.only] if c.only else PARTS:
        print(f"{name}:", flush=True)
        results[name] = PARTS[name](c.repeats, device, c.quick)
        for row, r in results[name].items():
            print(show(row, r), flush=True)
    told = dict(machine=title, device=device.type, repeats=c.repeats, quick=c.quick, **results)
    write_json(out / "bench.json", told)
    if {"steps", "growth"} & set(results):
        plot(out / "bench.png", results, title)
    return 0


if __name__ == "__main__":
    run(main)
