"""Train MedShift: one flow-matching network for all domains, then its student. The loop is in `train`.

    python train.py                simulates the five X-ray domains, trains, translates, scores
    python train.py --data DIR     your own images, DIR/DOMAIN/*.png
    python train.py --resume       goes on where the last run stopped, exactly
    torchrun --nproc_per_node=2 train.py    the same run over two devices

Leaves in out/: checkpoint.pt, log.csv, loss.png, translations.png, report.json. Ctrl-C saves and stops."""

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from minimedshift import batches, data, evaluate, sampler
from minimedshift.flow import loss as flow_loss
from minimedshift.model import PRESETS, UNet
from minimedshift.optim import EMA, Muon
from minimedshift.student import GUIDANCE, restore, teach
from minimedshift.support import checkpoint, ranks
from minimedshift.support.command import UserError, flag, parse, refuse, run
from minimedshift.support.files import lock_folder, write_json
from minimedshift.support.log import AHEAD, Log
from minimedshift.support.machine import (autocast, can_compile, has_bfloat16, keep_memory, machine_name,
    pick_device, pick_formats, try_capture, try_compile)


@dataclass(frozen=True)
class Config:
    data: str = flag(None, "folder of images, DIR/DOMAIN/*.png (default: simulated heads)", "data")
    bits: int = flag(0, "of a grey level in 16-bit files; 0: as the largest needs", "data", low=0, high=16)
    invert: str = flag("", "domains whose files are negatives, with commas between", "data")
    crop: bool = flag(False, "leave out an image's border of one grey level, put it back on writing", "data")
    size: int = flag(0, "side of the training images in pixels; 0 is the preset's", "data", low=0, high=4096)
    train_images: int = flag(10000, "simulated training images, all domains together", "data", low=5)
    valid_heads: int = flag(64, "simulated validation heads, each in all domains", "data", low=1, high=10**6)
    test_heads: int = flag(128, "simulated test heads, each in all domains", "data", low=1, high=10**6)
    shift: float = flag(0.1, "share of training heads from a domain's own population", "data", low=0, high=1)
    balance: bool = flag(True, "draw images less often that are rare in the other domains", "data")
    check_data: bool = flag(False, "write a picture and a line per domain, then stop", "data")
    preset: str = flag("auto", "network and training settings", "method", ("auto", *PRESETS))
    flow_size: int = flag(0, "larger images shrink to this side; 0: the preset's", "method", low=0, high=4096)
    coupling: str = flag("semidiscrete", "which noise gets which image", "method", batches.coupling.COUPLINGS)
    ot_batch: int = flag(0, "batches that are paired at once; 0: as the coupling needs", "method", low=0)
    sigma: float = flag(0.0, "width of the bridge between noise and image", "method", low=0)
    colour: float = flag(1.0, "colour of the noise: 0 white, 1 like natural images", "method", low=0, high=2)
    drop_label: float = flag(0.1, "share of labels that are hidden, for guidance", "method", low=0, below=1)
    steps: int = flag(0, "optimizer steps; 0 is the preset's", "training", low=0)
    batch_size: int = flag(0, "images a step; 0 is the preset's", "training", low=0, high=10**5)
    lr: float = flag(0.02, "peak rate of the convolutions (Muon); AdamW has a twentieth", "training", above=0)
    ema: float = flag(16.97, "EMA exponent; 16.97 averages over a twentieth of the run", "training", low=0)
    seed: int = flag(0, "all randomness is a function of the seed and the step", "training", low=0)
    tau: float = flag(0.3, "how far back: 1 keeps structure, 0 favours realism", "translation", low=0)
    guidance: float = flag(1.0, "guidance scale of the forward leg; 1 is none", "translation")
    t_image: float = flag(0.97, "the t that an image is given; 1 is the paper's", "translation", high=1)
    solver_steps: int = flag(3, "solver steps of each leg", "translation", low=1, high=1000)
    solver: str = flag("fireflow", "ODE solver", "translation", tuple(sampler.SOLVERS))
    student: bool = flag(True, "at the end, teach a small network to translate in one evaluation", "student")
    student_images: int = flag(0, "images of a domain it learns from; 0 is the preset's", "student", low=0)
    student_steps: int = flag(0, "its optimizer steps, 32 images each; 0 is the preset's", "student", low=0)
    out: str = flag("out", "folder for everything the run leaves", "run")
    resume: bool = flag(False, "go on from OUT/checkpoint.pt: give the flags of that run again", "run")
    overwrite: bool = flag(False, "start anew where OUT has a checkpoint", "run")
    device: str = flag("auto", "where to compute: cuda, cuda:1, mps, cpu", "run")
    dtype: str = flag("auto", "number format; GPUs' float32 is TF32", "run", ("auto", "float32", "bfloat16"))
    compile: str = flag("auto", "torch.compile; auto: on a GPU alone", "run", ("auto", "yes", "no"))
    graph: bool = flag(True, "on a GPU launch a step as one CUDA graph, if it does the same", "run")
    evaluate: bool = flag(True, "score the result on simulated test heads at the end", "run")


SAVE_EVERY = 120  # seconds
BAD_STEPS = 10    # steps in a row without a finite gradient: training has failed
LESSONS = ("student_images", "student_steps")
FREE = {"data", "steps", "out", "resume", "overwrite", "device", "dtype", "compile", "graph", "evaluate",
        "check_data", "student", *LESSONS}  # flags that may differ on --resume


def main(argv=None):
    config, device = resolve(parse(Config, __doc__, argv))  # every flag is checked before any long work
    device = ranks.join(device)
    file = Path(config.out) / "checkpoint.pt"
    with nullcontext() if ranks.RANK else lock_folder(file.parent):  # all ranks are one run
        before = stopped_run(config, file)
        if config.check_data:
            data.check(batches.load_dataset(config), file.parent / "data.png")
            return 0
        dtype, memory = ranks.same(formats(config, device, before))
        AHEAD.seconds = try_out(config, device, dtype, memory)
        AHEAD.units = {"training": config.steps}
        if config.student:
            AHEAD.units |= PRESETS[config.preset].steps_after(config)
        if ranks.RANK:
            ranks.same(None)  # waits until rank 0 has filled the cache
        dataset = batches.load_dataset(config)
        keep_memory()
        if not ranks.RANK:
            ranks.same(None)
        if config.data and not ranks.RANK:
            data.check(dataset)
        net = train(config, dataset, device, dtype, memory, file, before)
        return 130 if net is None else finish(config, dataset, net, device, dtype, file)


def train(config, dataset, device, dtype, memory, file, before=None):
    """The training loop; `before` is a checkpoint to go on from. Returns the EMA network, None if stopped."""
    model, optimizer, ema = build(config, len(dataset.domains), dataset.channels, device, dtype, memory)
    image = data.description(dataset)
    first = go_on(before, file, model, optimizer, ema, list(dataset.domains), image) if before else 0
    net = DistributedDataParallel(model) if ranks.COUNT > 1 else model  # as it is called in training
    how, machine = translation_of(config), dict(dtype=str(dtype)[6:], memory_format=str(memory)[6:])
    print(f"{device.type}: {machine_name(device)}, {', '.join(machine.values())}, {config.preset} preset: "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{sum(map(len, dataset.train_images))} images of {config.size}x{config.size}, for the flow "
          f"{config.flow_size}x{config.flow_size}, of {', '.join(dataset.domains)}, steps {first} to "
          f"{config.steps}, {config.batch_size} images each")

    def save(step):
        if ranks.RANK:
            return
        checkpoint.save(file, dict(
            config=asdict(config), shape=asdict(model.shape), domains=list(dataset.domains), step=step,
            image=image, translate=how, machine=machine, model=model.state_dict(), ema=ema.model.state_dict(),
            optimizer=optimizer.state()))
        log.draw()
        draw(file, ema.model, None, how, dataset, device)

    small = dataset.shrunk(config.flow_size)
    steps = batches.batches(small, config, device, first, dtype, ranks.RANK, ranks.COUNT)
    take = partial(take_step, net, optimizer, config, dtype)
    if config.graph and device.type == "cuda" and ranks.COUNT == 1:
        inputs = example(config, len(dataset.domains), dataset.channels, device)
        take = try_capture(take, inputs, [*model.parameters(), *sum(optimizer.state(), [])])
    stopping = []
    for name in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, stop; a second one stops at once
        signal.signal(name, lambda n, _: stopping.append(signal.signal(n, signal.default_int_handler)))
    log = Log(file.parent, first, config.steps, config.batch_size, ranks.RANK > 0)
    saved = time.time()
    for step, (x0, x1, y, t, e, plan, seconds) in enumerate(steps, first + 1):
        warm_up, cosine = step / 50, (1 + math.cos(math.pi * (step - 1) / config.steps)) / 2
        lr = config.lr * min(warm_up, cosine)
        loss, norm = take(torch.full((), lr, device=device), x0, x1, y, t, e)
        ema.update(step)
        asked = torch.tensor([len(stopping), time.time() > saved + SAVE_EVERY], dtype=torch.float32)
        stop, due = (ranks.mean(asked) > 0).tolist()  # in any process
        saving = stop or due or step == config.steps
        log(step, ranks.mean(loss), norm, lr, plan, seconds, now=saving)
        if saving or log.failed(BAD_STEPS):
            save(step)
            saved = time.time()
        refuse(log.failed(BAD_STEPS), f"the last {BAD_STEPS} steps had no finite gradient: start anew with a "
                                      "smaller --lr, or with --dtype float32")
        if stop:
            ranks.leave()
            print(f"\nstopped and saved after step {step}: the same command with --resume goes on")
            return None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks.leave()  # what remains is small, and rank 0's
    return ema.model


def take_step(net, optimizer, config, dtype, lr, x0, x1, y, t, e):
    """One step of the optimizer at rate lr, a tensor: the batch's loss before it, and its gradient's norm.
    A gradient that is not finite counts as zero. Nothing waits for the device to see it."""
    with autocast(x1.device, dtype):
        loss = flow_loss(net, x0, x1, y, t, config.sigma, e).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for p in net.parameters():
        p.grad.masked_fill_(~norm.isfinite(), 0)
    optimizer.step(lr)
    return loss.detach(), norm


def build(config, domains, channels, device, dtype, memory):
    """The network, compiled where that works, its optimizer, and the running mean of its weights."""
    torch.manual_seed(config.seed)
    shape = replace(PRESETS[config.preset].shape, num_domains=domains, channels=channels)
    model = UNet(shape).to(device, memory_format=memory)
    ema = EMA(model, config.ema)
    if config.compile == "yes" or config.compile == "auto" and can_compile(device):
        try_compile(model, example(config, domains, channels, device)[2].shape, dtype)
    return model, Muon(model), ema


def try_out(config, device, dtype, memory):
    """A few steps and a translation at full size, of noise: what fails, fails now. Returns seconds a step."""
    model, optimizer, ema = build(config, 5, 1, device, dtype, memory)
    inputs = example(config, 5, 1, device)
    sampler.translate(ema.model, inputs[2], 0, 1, **translation_of(config) | dict(steps=1))
    seconds = []
    for _ in range(4):  # the first one is slow, and other programs may disturb another
        start = time.time()
        take_step(model, optimizer, config, dtype, *inputs)[0].item()
        seconds.append(time.time() - start)
    return min(seconds)


def example(config, domains, channels, device):
    """What take_step takes, but for what stays in all steps: lr, x0, x1, y, t, e, all noise."""
    B = config.batch_size // ranks.COUNT
    x0, x1, e = torch.randn(3, B, channels, config.flow_size, config.flow_size, device=device)
    y, t = torch.arange(B, device=device) % domains, torch.rand(B, device=device)
    return torch.full((), config.lr, device=device), x0, x1, y, t, e


def finish(config, dataset, net, device, dtype, file):
    """Teach the student, unless the checkpoint has it, then score and draw. Returns the exit status."""
    state = checkpoint.load(file, device)
    how, machine, taught, step = translation_of(config), state["machine"], state.get("student"), state["step"]
    same_lessons = all(state["config"].get(name) == getattr(config, name) for name in LESSONS)
    if config.student and not (taught and same_lessons):
        try:
            taught = teach(net, dataset, config.student_images, config.student_steps, dtype, device,
                           config.seed, config.flow_size, GUIDANCE if config.drop_label else 1).state()
        except KeyboardInterrupt:
            print("\nstopped: the flow is saved, the same command with --resume teaches the student anew")
            return 130
        checkpoint.save(file, state | dict(student=taught, config=asdict(config)))
    student = restore(taught, device) if taught else None
    del state  # its memory
    draw(file, net, student, how, dataset, device)
    if config.evaluate and dataset.test_pairs is not None:
        report = evaluate.report(net, student, dataset, how, device)
        run_of = dict(command=" ".join(["python", *sys.argv]), seed=config.seed, machine=machine_name(device),
                      torch=torch.__version__, weights="EMA", steps=step, **machine)
        write_json(file.parent / "report.json", run_of | report)
    print(f"{file.parent}/: " + ", ".join(sorted(path.name for path in file.parent.glob("[!.]*"))))
    return 0


def draw(file, net, student, how, dataset, device):
    """translations.png: held-out images of the main pair, of a tiny domain training images."""
    own = [test if len(test) else train for test, train in zip(dataset.test_images, dataset.train_images)]
    test = own if dataset.test_pairs is None else dataset.test_pairs
    s, t = evaluate.main_domains(dataset.domains)
    evaluate.picture(file.parent / "translations.png", net, student, how, test, dataset.domains, s, t, device)


def translation_of(config):
    """How the flow translates."""
    return dict(tau=config.tau, guidance=config.guidance, steps=config.solver_steps, solver=config.solver,
                t_image=config.t_image, size=config.flow_size)


def stopped_run(config, file):
    """With --resume the checkpoint to go on from, else None. Raises UserError if one would be lost."""
    if not config.resume:
        refuse(file.exists() and not (config.overwrite or config.check_data),
               f"{file} would be replaced: --resume goes on from it, --overwrite starts anew, "
               "--out names another folder")
        return None
    state = checkpoint.load(file)
    checkpoint.check_settings(state, file)
    was = asdict(config) | state["config"]
    others = [f"--{name.replace('_', '-')} was {was[name]}, is {value}"
              for name, value in asdict(config).items() if name not in FREE and was[name] != value]
    refuse(others, f"--resume needs the flags of the stopped run: {'; '.join(others)}")
    return state


def formats(config, device, before):
    """Number format of arithmetic, memory format of weights: those of the stopped run, or measured."""
    if before is None:
        return pick_formats(config.dtype, device)
    dtype = before["machine"]["dtype"] if config.dtype == "auto" else config.dtype
    return getattr(torch, dtype), getattr(torch, before["machine"]["memory_format"])


def go_on(before, file, model, optimizer, ema, domains, image):
    """Fill model, optimizer and EMA from a checkpoint of the same domains. Returns its step."""
    refuse(before["domains"] != domains, f"{file} knows the domains {', '.join(before['domains'])}; the data "
                                         f"has {', '.join(domains)}")
    if (was := before["image"].get("digests", [])) != image["digests"][:len(was)]:  # older ones know less
        print("warning: these are not the images of the stopped run, or are read otherwise")
    checkpoint.fill(model, before.get("model"), file)
    checkpoint.fill(ema.model, before.get("ema"), file)
    try:
        optimizer.restore(before["optimizer"])
    except Exception as error:
        raise UserError(f"{file} holds an optimizer that cannot be read ({type(error).__name__})") from None
    return before["step"]


def resolve(config):
    """The config with everything automatic filled in, and the device. Raises UserError for wrong flags."""
    device = pick_device(config.device)
    name = config.preset
    if name == "auto":  # in float32 the large preset takes many hours
        name = "gpu" if device.type == "cuda" and has_bfloat16() else "cpu"
    preset = PRESETS[name]
    ot_batch = {"independent": 1, "semidiscrete": 16}.get(config.coupling, 8)
    automatic = dict(size=preset.size, flow_size=min(config.size or preset.size, preset.size),
                     steps=preset.steps, batch_size=preset.batch_size, ot_batch=ot_batch,
                     student_images=preset.lessons, student_steps=preset.student_steps)
    filled = {name: getattr(config, name) or value for name, value in automatic.items()}
    config = replace(config, preset=name, **filled)
    stride = preset.shape.stem * 2 ** (len(preset.shape.widths) - 1)
    refuse(not 16 <= config.flow_size <= config.size or config.flow_size % stride,
           f"the flow would see {config.flow_size} of {config.size} pixels a side: --size and --flow-size "
           f"must leave it 16 or more, divisible by {stride}")
    refuse(config.batch_size % ranks.COUNT,
           f"--batch-size {config.batch_size} must be a multiple of the {ranks.COUNT} processes")
    refuse(config.tau >= config.t_image, f"--tau {config.tau:g} must be below --t-image, {config.t_image:g}")
    refuse(config.coupling == "sinkhorn" and not config.sigma, "--coupling sinkhorn needs --sigma above 0")
    refuse(config.coupling == "independent" and config.ot_batch > 1, "--ot-batch is for other couplings")
    return config, device


if __name__ == "__main__":
    run(main)
