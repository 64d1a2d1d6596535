"""Train MedShift: one flow-matching network for all domains.

    python train.py                    simulates the five X-ray domains, trains, translates, scores; picks the machine itself
    python train.py --data DIR         your own images, DIR/DOMAIN/*.png
    python train.py --resume           goes on where the last run stopped, exactly

Leaves in out/: checkpoint.pt, log.csv, loss.png, samples.png, translations.png, report.json. Ctrl-C saves and stops.
"""

import hashlib
import inspect
import math
import platform
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minimedshift import UserError, flag, parse, pick_device, run
from minimedshift import checkpoint, data, evaluate, sampler
from minimedshift import coupling as plans
from minimedshift.coupling import COUPLINGS, Semidiscrete, couple
from minimedshift.flow import direct_label, draw_noise, tint
from minimedshift.flow import loss as flow_loss
from minimedshift.model import PRESETS, UNet
from minimedshift.optim import Muon, split


@dataclass(frozen=True)
class Config:
    data: str = flag(None, "folder of images, DIR/DOMAIN/*.png; without it the head phantom is simulated", "data")
    size: int = flag(0, "side of the training images in pixels; 0 is the preset's", "data")
    train_images: int = flag(10000, "simulated training images, all domains together", "data")
    valid_heads: int = flag(64, "simulated validation heads, each in all domains", "data")
    test_heads: int = flag(128, "simulated test heads, each in all domains", "data")
    shift: bool = flag(True, "simulated domains differ in pose, framing and anatomy, not in physics alone", "data")
    check_data: bool = flag(False, "write a picture and a line per domain, then stop", "data")
    preset: str = flag("auto", "network and training settings", "method", ("auto", "cpu", "gpu"))
    coupling: str = flag("semidiscrete", "which noise goes with which image", "method", COUPLINGS)
    coupling_labels: str = flag("keep", "make plans inside each label, or ignore labels (for teaching: it breaks conditional models)", "method", ("keep", "ignore"))
    ot_batch: int = flag(0, "training batches that one plan is made over; 0: 1 for independent, 16 for semidiscrete, 40 with --x0 image, else 8", "method")
    entropy: float = flag(0.0, "normalised entropy of Sinkhorn's plan, which then fixes eps: near 0 exact, near 1 independent; 0: eps = 2 sigma^2", "method")
    sigma: float = flag(0.0, "width of the bridge between noise and image", "method")
    score: bool = flag(False, "learn the score of the bridge too, for --solver sde (needs --sigma)", "method")
    x0: str = flag("noise", "where the flow starts: noise, or an image of another domain (no tau then)", "method", ("noise", "image"))
    colour: float = flag(1.0, "how fast the noise's amplitude falls with frequency: 0 is white, 1 like natural images", "method")
    drop_label: float = flag(0.1, "share of labels replaced by the null label, for guidance", "method")
    steps: int = flag(0, "optimizer steps; 0 is the preset's", "training")
    batch_size: int = flag(0, "images a step; 0 is the preset's", "training")
    lr: float = flag(0.02, "peak learning rate of the convolutions (Muon); the rest (AdamW) has a twentieth", "training")
    ema: float = flag(16.97, "exponent of the EMA profile: 16.97 averages about the last twentieth, 6.94 the last tenth", "training")
    seed: int = flag(0, "all randomness is a function of the seed and the step", "training")
    tau: float = flag(0.4, "how far back a translation goes: near 1 keeps structure, near 0 favours realism", "translation")
    guidance: float = flag(1.0, "guidance scale of the forward leg; 1 is none", "translation")
    end: float = flag(0.97, "time at which an image is taken to be: 1 is the paper's; below 1, faint detail passes untouched", "translation")
    solver_steps: int = flag(5, "solver steps of each leg", "translation")
    solver: str = flag("heun", "ODE solver, or sde: a diffusion with the same images at every t", "translation", tuple(sampler.SOLVERS))
    out: str = flag("out", "folder for everything the run leaves", "run")
    resume: bool = flag(False, "go on from OUT/checkpoint.pt, with the flags of that run", "run")
    device: str = flag("auto", "where to compute", "run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = flag("auto", "number format of the network's arithmetic; auto measures", "run", ("auto", "float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the network", "run")
    evaluate: bool = flag(True, "score the result on simulated test heads at the end", "run")


SCHEDULE = {"cpu": (1400, 16), "gpu": (40000, 64)}  # optimizer steps, images a step
FREE = {"out", "resume", "device", "dtype", "compile", "evaluate", "check_data"}  # flags that may differ on --resume
SAVE_EVERY = 250  # steps


def pick_dtype(name, device):
    """The number format of the network's arithmetic: bfloat16 on CUDA; on a CPU what a convolution is faster in, found out."""
    if name != "auto" or device.type != "cpu":
        return getattr(torch, name if name != "auto" else "bfloat16" if device.type == "cuda" else "float32")
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for shape in ((16, 64, 32, 32), (64, 64, 3, 3)))
        with torch.no_grad():
            for _ in range(5):
                start = time.perf_counter()
                F.conv2d(x, w, padding=1)
                seconds[dtype] = min(seconds.get(dtype, 1e9), time.perf_counter() - start)
    return min(seconds, key=seconds.get)


def randomness(seed, step, device="cpu"):
    """A generator that is a function of (seed, step): nothing to save, and resume is exact."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


def resolve(config):
    """The config with everything automatic filled in, and the device. Raises UserError for the first flag that makes no sense."""
    device = pick_device(config.device)
    preset = config.preset if config.preset != "auto" else "gpu" if device.type == "cuda" else "cpu"
    size, shape = PRESETS[preset]
    steps, batch = SCHEDULE[preset]
    config = replace(config, preset=preset, size=config.size or size, steps=config.steps or steps, batch_size=config.batch_size or batch)
    config = replace(config, ot_batch=config.ot_batch or {"independent": 1, "semidiscrete": 16}.get(config.coupling, 40 if config.x0 == "image" else 8))
    stride = shape.stem * 2 ** (len(shape.widths) - 1)
    for name, good, allowed in (("size", config.size >= 16 and config.size % stride == 0, f"at least 16 and divisible by {stride}"),
                                ("train_images", config.train_images >= 5, "at least 5"), ("valid_heads", config.valid_heads >= 1, "at least 1"),
                                ("test_heads", config.test_heads >= 1, "at least 1"), ("sigma", config.sigma >= 0, "at least 0"),
                                ("entropy", 0 <= config.entropy < 1, "in [0, 1)"), ("ot_batch", config.ot_batch >= 1, "at least 0"),
                                ("colour", 0 <= config.colour <= 2, "in [0, 2]"), ("drop_label", 0 <= config.drop_label < 1, "in [0, 1)"),
                                ("steps", config.steps >= 1, "at least 1"), ("batch_size", config.batch_size >= 1, "at least 1"),
                                ("lr", config.lr > 0, "above 0"), ("ema", config.ema >= 0, "at least 0"), ("seed", config.seed >= 0, "at least 0"),
                                ("tau", 0 <= config.tau < config.end, f"at least 0 and below --end, {config.end}"),
                                ("end", config.end <= 1, "at most 1"), ("solver_steps", config.solver_steps >= 1, "at least 1")):
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} is not allowed: it must be {allowed}")
    plain = config.coupling == "independent"
    for wrong, says in ((config.coupling == "sinkhorn" and not config.sigma and not config.entropy, "--coupling sinkhorn needs --sigma or --entropy above 0"),
                        (config.entropy and config.coupling != "sinkhorn", "--entropy is for --coupling sinkhorn"),
                        (plain and config.ot_batch > 1, "--ot-batch has no meaning for --coupling independent"),
                        (plain and config.coupling_labels == "ignore", "--coupling-labels ignore has no meaning for --coupling independent"),
                        (config.score and not config.sigma, "--score needs --sigma above 0"),
                        (config.x0 == "image" and config.coupling == "semidiscrete", "--coupling semidiscrete needs noise: with --x0 image choose another, such as --coupling exact"),
                        (config.solver == "sde" and (config.x0 == "image" or not (config.score or plain and not config.sigma)),
                         "--solver sde needs a score: --score, or --coupling independent with --sigma 0, and --x0 noise")):
        if wrong:
            raise UserError(says)
    return config, device


@torch.no_grad()
def draw_samples(path, model, ema, dataset, tau, settings, device, count=4):
    """samples.png: held-out images of the first domain and their translations to every other one, by the EMA weights."""
    live = {name: p.clone() for name, p in model.named_parameters()}
    model.load_state_dict(ema.mean)
    x1 = evaluate.load(dataset.held_out[0][:count] if len(dataset.held_out[0]) else dataset.train[0][:count], device)
    columns = [x1] + [sampler.translate(model, x1, 0, y, tau, **settings) for y in range(1, len(dataset.domains))]
    model.load_state_dict(live)
    data.figure(path, [list(row) for row in zip(*(x.cpu() for x in columns))], [f"source\n{dataset.domains[0]}", *[f"\n{d}" for d in dataset.domains[1:]]],
                [""] * len(x1))


def main(argv=None):
    # ---- config: every flag is checked before any long work
    config, device = resolve(parse(Config, __doc__, argv))
    out = Path(config.out)
    file = out / "checkpoint.pt"
    then = checkpoint.load(file, device) if config.resume else None
    for name, value in asdict(config).items() if then else ():
        if name not in FREE and then["config"].get(name) != value:
            raise UserError(f"--resume needs the flags of the stopped run: --{name.replace('_', '-')} was {then['config'].get(name)}, is {value}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror})") from None

    # ---- data
    if config.data:
        dataset = data.folder_set(config.data, config.size, config.seed)
    else:
        dataset = data.phantom_set(config.size, config.train_images, config.valid_heads, config.test_heads, config.seed, config.shift)
    if config.check_data:
        data.check(dataset, out / "data.png")
        return 0

    # ---- model
    dtype = getattr(torch, then["machine"]["dtype"]) if then else pick_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    domains = len(dataset.domains)
    null = domains**2 if config.x0 == "image" else domains  # the label of no label; with --x0 image a label is a pair of domains
    shape = replace(PRESETS[config.preset][1], num_domains=null, channels=dataset.channels, score=config.sigma if config.score else 0.0)
    model = UNet(shape).to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if config.compile else model
    inside, rest = split(model)
    optimizers = [Muon(inside, config.lr), torch.optim.AdamW(rest, config.lr / 20, betas=(0.9, 0.99), weight_decay=0.01)]
    ema = checkpoint.EMA(model, config.ema)
    if then:
        checkpoint.load_weights(model, then["model"], file)
        for optimizer, state in zip(optimizers, then["optimizer"]):
            optimizer.load_state_dict(state)
        ema.load(then["ema"])
    first = then["step"] if then else 0
    settings = dict(guidance=config.guidance, steps=config.solver_steps, solver=config.solver, end=config.end, colour=config.colour, x0=config.x0)
    print(f"{device.type}, {str(dtype)[6:]}, {config.preset} preset: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{domains} domains, {sum(map(len, dataset.train))} images of {config.size}x{config.size}, "
          f"steps {first} to {config.steps} of {config.batch_size}", flush=True)

    def save(step):
        checkpoint.save(file, dict(
            config=asdict(config), shape=asdict(shape), domains=list(dataset.domains), step=step,
            image=dict(size=config.size, channels=dataset.channels, range=[-1.0, 1.0]), translate=dict(tau=config.tau, **settings),
            machine=dict(dtype=str(dtype)[6:], memory_format="channels_last"),
            model=model.state_dict(), ema=ema.mean, optimizer=[optimizer.state_dict() for optimizer in optimizers]))

    # ---- pairs of noise and image, with their labels
    semidiscrete = Semidiscrete(*learn_potentials(dataset, config, device)) if config.coupling == "semidiscrete" else None

    def draw(step):
        """What is random in a step, a function of (seed, step): x0, x1, y (on the host), which labels to drop, t, the bridge's noise e."""
        host, there = randomness(config.seed, step), randomness(config.seed, step, device)
        y = torch.randint(domains, (config.batch_size,), generator=host)
        x1 = dataset.batch(y, host).to(device)  # (B, C, H, W)
        dropped = torch.rand(len(y), generator=host) < config.drop_label
        t = torch.rand(len(y), generator=there, device=device)  # (B,)
        x0 = draw_noise(x1.shape, there, config.colour, device)
        if config.x0 == "image":
            source = (y + torch.randint(1, domains, y.shape, generator=host)) % domains
            x0, y = dataset.batch(source, host).to(device), direct_label(source, y, domains)
        e = torch.randn(x1.shape, generator=there, device=device)
        return x0, x1, y, dropped, t, e

    def pairs(step):
        """For this step and all after it: x0, x1, y, dropped, t, e, and the coupling's Plan and seconds. A plan is made over ot_batch steps,
        and made again on --resume."""
        for step in range(step, config.steps):
            k = step % config.ot_batch
            if k == 0 or step == first:
                x0, x1, y, dropped, t, e = (torch.cat(parts) for parts in zip(*map(draw, range(step - k, step - k + config.ot_batch))))
                watch = Stopwatch(device)
                if semidiscrete:
                    x1, y, plan = semidiscrete.pick(x0, y)
                else:
                    plan = couple(config.coupling, x0, x1, y * keep, eps, randomness(config.seed, k - step - 1, device))
                    x0 = x0[plan.index]
                seconds = watch.stop(config.ot_batch)
            part = slice(k * config.batch_size, (k + 1) * config.batch_size)
            yield *(z[part] for z in (x0, x1, y, dropped, t, e)), plan, seconds

    keep, eps = int(config.coupling_labels == "keep"), 2 * config.sigma**2
    if config.entropy:
        x0, x1, y = (torch.cat(parts) for parts in list(zip(*map(draw, range(config.ot_batch))))[:3])
        eps = plans.find_eps(x0, x1, y * keep, config.entropy)
        print(f"sinkhorn: entropy {config.entropy:g} is eps = {eps:.4g}, as of a bridge of sigma {math.sqrt(eps / 2):.3g}", flush=True)

    # ---- loop
    stopping = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopping.append(True))  # finish the step, save, stop
    log = Log(out, first, config.steps, config.batch_size)
    steps = pairs(first) if device.type == "cpu" or config.coupling != "exact" else ahead(pairs(first), device)
    for step, (x0, x1, y, dropped, t, e, plan, seconds) in enumerate(steps, first):
        lr = config.lr * min((step + 1) / 50, (1 + math.cos(math.pi * step / config.steps)) / 2)  # warm-up, cosine
        for optimizer, share in zip(optimizers, (1, 1 / 20)):
            optimizer.param_groups[0]["lr"] = lr * share
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = flow_loss(network, x0, x1, y.masked_fill(dropped, null).to(device), t, config.sigma, e).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(step + 1)
        log(step + 1, loss.detach(), lr, plan, seconds)
        if stopping or (step + 1) % SAVE_EVERY == 0 or step + 1 == config.steps:
            save(step + 1)
            log.draw()
            draw_samples(out / "samples.png", model, ema, dataset, config.tau, settings, device)
        if stopping:
            print(f"\nstopped and saved after step {step + 1}: the same command with --resume goes on", flush=True)
            return 130
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(log.coupling(), flush=True)

    # ---- report and pictures, from the EMA weights
    model.load_state_dict(ema.mean)
    model.eval()
    if config.evaluate and dataset.test is not None:
        seconds = time.time() - log.start
        report, columns = evaluate.report(model, dataset, config.tau, settings, device)
        evaluate.write_json(out / "report.json", dict(
            command=" ".join(["python", *sys.argv]), seed=config.seed, machine=machine(device), torch=torch.__version__, dtype=str(dtype)[6:],
            weights="EMA", steps=config.steps, training_seconds=seconds, coupling=log.means(), **report))
        evaluate.picture(out / "translations.png", dataset, report["main_pair"], columns)
        print(f"{out}/: checkpoint.pt, log.csv, loss.png, samples.png, translations.png, report.json")
    return 0


def machine(device):
    """The name of the processor or GPU, for the report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def learn_potentials(dataset, config, device):
    """The training images of each label (of all together with --coupling-labels ignore) and their potentials, learned once and kept in the
    cache; says how evenly images are picked."""
    groups = dataset.train if config.coupling_labels == "keep" else [np.concatenate(dataset.train)]
    digest = [hashlib.sha256(np.ascontiguousarray(images)).hexdigest() for images in groups]

    def build(folder):
        start = time.time()
        for i, images in enumerate(groups):
            tinted = tint(torch.from_numpy(np.array(images, np.float32)), config.colour)
            g, share = plans.learn_potentials(tinted, seed=config.seed, device=device)
            np.save(folder / f"{i}.npy", torch.stack([g, share]).cpu().numpy())
            data.progress(i + 1, len(groups), start, "learning potentials, once", "labels")

    content = [inspect.getsource(plans), inspect.getsource(tint), torch.__version__, digest, config.colour, config.seed]
    folder = data.cached(None, "potentials", content, build)
    found = [np.load(folder / f"{i}.npy") for i in range(len(groups))]
    share = np.concatenate([each[1] for each in found])
    print(f"semidiscrete: of {plans.TRIALS} times each image should be picked, it is picked {plans.TRIALS * share.min():.0f} to {plans.TRIALS * share.max():.0f} "
          f"times; spread {share.std():.2f} of the mean, {plans.TRIALS**-.5:.2f} of it chance", flush=True)
    labels = None if config.coupling_labels == "keep" else torch.repeat_interleave(torch.tensor([len(images) for images in dataset.train]))
    return groups, [each[0] for each in found], device, labels


class Stopwatch:
    """Seconds from now to `stop`, over a number of steps: a function that tells them, by the host's clock or by the GPU's."""

    def __init__(self, device):
        self.stream = torch.cuda.current_stream() if device.type == "cuda" else None
        self.start = self.stream.record_event(torch.cuda.Event(enable_timing=True)) if self.stream else time.perf_counter()

    def stop(self, steps):
        if not self.stream:
            seconds = (time.perf_counter() - self.start) / steps
            return lambda: seconds
        end = self.stream.record_event(torch.cuda.Event(enable_timing=True))
        return lambda: end.synchronize() or self.start.elapsed_time(end) / 1000 / steps


def ahead(items, device):
    """The same items, each made in a thread (and on a CUDA stream of its own) while the one before is in use."""
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream() if cuda else None

    def make():
        with torch.cuda.stream(stream):
            item = next(items, None)
            return item, stream.record_event() if cuda else None

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(make)
        while (made := waiting.result())[0] is not None:
            item, ready = made
            waiting = thread.submit(make)
            if cuda:
                torch.cuda.current_stream().wait_event(ready)
                for z in item:
                    if isinstance(z, torch.Tensor) and z.is_cuda:
                        z.record_stream(torch.cuda.current_stream())
            yield item


class Log:
    """log.csv, loss.png and the progress line. A loss is read one step late, so that no step waits for it."""
    COLUMNS = ("step", "loss", "lr", "entropy", "cost", "marginal_error", "coupling_seconds", "seconds")

    def __init__(self, out, first, steps, batch_size):
        self.out, self.first, self.steps, self.batch_size = out, first, steps, batch_size
        path = out / "log.csv"
        lines = path.read_text().splitlines()[1:first + 1] if first and path.exists() else []
        self.rows = [[float(cell) for cell in line.split(",")] for line in lines]
        self.file = open(path, "w", buffering=1)
        self.file.write("\n".join([",".join(self.COLUMNS), *lines, ""]))
        self.start, self.shown, self.pending = time.time(), 0.0, None

    def __call__(self, step, loss, lr, plan, coupling_seconds):
        seconds = time.time() - self.start
        self.flush()
        self.pending = step, loss, lr, *plan[1:], coupling_seconds, seconds
        every = 1 if sys.stdout.isatty() else 30
        if seconds - self.shown > every or step == self.steps:
            self.flush()
            self.shown, rate = seconds, (step - self.first) / seconds
            recent, left = self.column("loss")[-100:], round((self.steps - step) / rate)
            print(f"step {step}/{self.steps}  loss {sum(recent) / len(recent):.4f}  {rate * self.batch_size:.0f} images/s  "
                  f"{left // 60}:{left % 60:02d} left  ", end="\r" if sys.stdout.isatty() and step < self.steps else "\n", flush=True)

    def flush(self):
        if self.pending:
            step, loss, lr, *plan, coupling_seconds, seconds = self.pending
            self.rows.append([step, loss.item(), lr, *(z.item() for z in plan), coupling_seconds(), seconds])
            self.file.write(",".join(f"{cell:.6g}" for cell in self.rows[-1]) + "\n")
            self.pending = None

    def column(self, name):
        return [row[self.COLUMNS.index(name)] for row in self.rows]

    def means(self):
        """What the coupling was and cost, for the report: means over the run, and its share of the time of this process's steps."""
        self.flush()
        mean = lambda name: float(np.mean(self.column(name) or [0.0]))
        spent = sum(self.column("coupling_seconds")[self.first:]) / self.column("seconds")[-1] if self.rows else 0.0
        return dict(entropy=mean("entropy"), cost=mean("cost"), marginal_error=mean("marginal_error"), share_of_time=spent)

    def coupling(self):
        m = self.means()
        return (f"coupling: normalised entropy {m['entropy']:.3f}, transport cost {m['cost']:.3f} of independent, marginal error {m['marginal_error']:.1g}, "
                f"{m['share_of_time']:.1%} of the time")

    def draw(self):
        """loss.png: every step's loss and its running mean."""
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        self.flush()
        losses = torch.tensor(self.column("loss"))
        width = min(50, len(losses))
        figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
        axes.plot(range(1, len(losses) + 1), losses, lw=.5, alpha=.4, label="each step")
        axes.plot(range(width, len(losses) + 1), losses.unfold(0, width, 1).mean(1), label=f"mean of {width} steps")
        axes.set(xlabel="step", ylabel=r"loss  $|v - u_t|^2$", yscale="log", title="flow-matching loss")
        axes.legend()
        figure.savefig(self.out / "loss.png", dpi=100)
        plt.close(figure)


if __name__ == "__main__":
    run(main)
