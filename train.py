"""Train MedShift: one flow-matching network for all domains. The loop is in `train`: a batch of paired noise
and images (batches.py), flow.loss, Muon and AdamW, the running mean of the weights.

    python train.py                simulates the five X-ray domains, trains, translates, scores
    python train.py --data DIR     your own images, DIR/DOMAIN/*.png
    python train.py --resume       goes on where the last run stopped, exactly
    torchrun --nproc_per_node=2 train.py    the same run over two devices

Ends with a student (student.py), which learns from the flow to translate in one evaluation.
Leaves in out/: checkpoint.pt, log.csv, loss.png, samples.png, translations.png, report.json.
Ctrl-C saves and stops.
"""

import math
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from minimedshift import balance, data, evaluate, phantom, sampler, student
from minimedshift.coupling import COUPLINGS
from minimedshift.flow import TIMES
from minimedshift.flow import loss as flow_loss
from minimedshift.model import UNet
from minimedshift.phantom import sets
from minimedshift.support import checkpoint, dry, ranks
from minimedshift.batches import affordable, batches, null_label
from minimedshift.support.command import UserError, flag, parse, refuse, run
from minimedshift.support.files import lock_folder, clear_unfinished, explain_os_error, write_json
from minimedshift.support.guard import Guard
from minimedshift.support.images import figure
from minimedshift.support.log import Log, progress
from minimedshift.support.machine import (
    can_compile, has_bfloat16, keep_memory, machine_name, pick_device, pick_formats, to_float, try_compile)
from minimedshift.optim import Muon, split
from minimedshift.presets import PRESETS
from minimedshift.support.trust import check_settings, check_weights


@dataclass(frozen=True)
class Config:
    # ---- data
    data: str = flag(None, "folder of images, DIR/DOMAIN/*.png (default: simulated heads)", "data")
    size: int = flag(0, "side of the training images in pixels; 0 is the preset's", "data", low=0, high=4096)
    train_images: int = flag(10000, "simulated training images, all domains together", "data", low=5,
                             high=10**7)
    valid_heads: int = flag(64, "simulated validation heads, each in all domains", "data", low=1, high=10**6)
    test_heads: int = flag(128, "simulated test heads, each in all domains", "data", low=1, high=10**6)
    shift: float = flag(0.1, "share of a domain's simulated training heads that are from its own population",
                        "data", low=0, high=1)
    domains: str = flag("", "train on these domains alone, separated by commas (default: all)", "data")
    balance: bool = flag(True, "draw images less often whose like other domains hardly have", "data")
    check_data: bool = flag(False, "write a picture and a line per domain, then stop", "data")
    # ---- method
    preset: str = flag("auto", "network and training settings", "method", ("auto", *PRESETS))
    coupling: str = flag("semidiscrete", "which noise goes with which image", "method", tuple(COUPLINGS))
    coupling_labels: str = flag("keep", "plan inside each label, or ignore labels (for teaching: it breaks "
                                "conditional models)", "method", ("keep", "ignore"))
    ot_batch: int = flag(0, "batches that one plan is made over; 0: as the coupling needs", "method", low=0,
                         high=10**5)
    entropy: float = flag(0.0, "normalised entropy of Sinkhorn's plan, near 0 exact, near 1 independent; "
                          "0: eps = 2 sigma^2", "method", low=0, below=1)
    sigma: float = flag(0.0, "width of the bridge between noise and image", "method", low=0)
    score: bool = flag(False, "learn the score too, for --solver sde (needs --sigma)", "method")
    x0: str = flag("noise", "the flow starts from noise, or from an image of another domain (then no tau)",
                   "method", ("noise", "image"))
    colour: float = flag(1.0, "fall of the noise's amplitude with frequency: 0 white, 1 like natural images",
                         "method", low=0, high=2)
    times: str = flag("uniform", "how t is drawn in training", "method", tuple(TIMES))
    drop_label: float = flag(0.1, "share of labels that are hidden, for guidance", "method", low=0, below=1)
    # ---- training
    steps: int = flag(0, "optimizer steps; 0 is the preset's", "training", low=0)
    batch_size: int = flag(0, "images a step; 0 is the preset's", "training", low=0, high=10**5)
    lr: float = flag(0.02, "peak learning rate of the convolutions (Muon); the rest (AdamW) has a twentieth",
                     "training", above=0)
    ema: float = flag(16.97, "exponent of the EMA: 16.97 averages a twentieth of the run, 6.94 a tenth",
                      "training", low=0)
    seed: int = flag(0, "all randomness is a function of the seed and the step", "training", low=0)
    # ---- translation
    tau: float = flag(0.3, "how far back: 1 keeps structure, 0 favours realism", "translation", low=0)
    guidance: float = flag(1.0, "guidance scale of the forward leg; 1 is none", "translation")
    end: float = flag(0.97, "time t assigned to an image; 1 is the paper's", "translation", high=1)
    solver_steps: int = flag(3, "solver steps of each leg", "translation", low=1, high=1000)
    solver: str = flag("fireflow", "ODE solver, or sde: a diffusion", "translation", tuple(sampler.SOLVERS))
    # ---- student
    student: bool = flag(True, "at the end, teach a small network to translate in one evaluation", "student")
    student_images: int = flag(0, "images of a domain that the flow translates for it; 0 is the preset's",
                               "student", low=0, high=10**5)
    student_steps: int = flag(0, "its optimizer steps, 32 images each; 0 is the preset's", "student", low=0)
    student_tau: float = flag(0.1, "tau of its lessons", "student", low=0)
    student_end: float = flag(0.99, "end of its lessons, above student-tau", "student", high=1)
    # ---- run
    out: str = flag("out", "folder for everything the run leaves", "run")
    dry_run: bool = flag(False, "say what memory and time a run would take here, then stop", "run")
    resume: bool = flag(False, "go on from OUT/checkpoint.pt: give the flags of that run again", "run")
    overwrite: bool = flag(False, "start anew where OUT has a checkpoint", "run")
    device: str = flag("auto", "where to compute", "run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = flag("auto", "number format; auto measures", "run", ("auto", "float32", "bfloat16"))
    compile: str = flag("auto", "torch.compile; auto: on a GPU alone", "run", ("auto", "yes", "no"))
    evaluate: bool = flag(True, "score the result on simulated test heads at the end", "run")


SAVE_EVERY = 120  # seconds
LESSONS = ("student_images", "student_steps", "student_tau", "student_end")
# flags that may differ on --resume
FREE = {"out", "resume", "overwrite", "dry_run", "device", "dtype", "compile", "evaluate", "check_data",
        "student", *LESSONS}


def main(argv=None):
    # every flag is checked before any long work
    config, device = resolve(parse(Config, __doc__, argv))
    if config.dry_run:
        return try_out(config, device)
    device = ranks.join(device)
    with open_out(config, device) as (file, before):
        return train(config, device, file, before)


def train(config, device, file, before=None):
    """A whole run; its checkpoint is `file`, `before` is one to go on from. Returns the exit status."""
    # ---- data
    with ranks.first():
        dataset = load_data(config)
    if config.check_data:
        data.check(dataset, file.parent / "data.png")
        return 0
    if config.balance:
        dataset = balance.balanced(dataset)

    # ---- model
    keep_memory()
    dtype, memory = ranks.same(formats(config, device, before))
    domains = len(dataset.domains)
    model, optimizers, ema = build(config, domains, dataset.channels, device, dtype, memory)
    shape = model.shape
    net = ranks.parallel(model)  # as it is called in training; the weights are those of model
    first, taught = 0, None  # step to begin with; the student's state
    if before:
        first, taught = go_on(before, config, file, model, optimizers, ema)
    translation = translation_of(config)
    parameters = sum(p.numel() for p in model.parameters())
    images = sum(len(train) for train in dataset.train_images)
    print(f"{device.type}, {name_of(dtype)}, {name_of(memory)}, {config.preset} preset: "
          f"{parameters / 1e6:.2f}M parameters, {domains} domains ({', '.join(dataset.domains)}), "
          f"{images} images of {config.size}x{config.size}, steps {first} to {config.steps}, "
          f"{config.batch_size} images each", flush=True)

    rank, _ = ranks.number()

    def save(step):
        if rank:
            return
        checkpoint.save(file, dict(
            config=asdict(config), shape=asdict(shape), domains=list(dataset.domains), step=step,
            image=dict(size=config.size, channels=dataset.channels, range=[-1.0, 1.0]),
            translate=translation, machine=dict(dtype=name_of(dtype), memory_format=name_of(memory)),
            model=model.state_dict(), ema=ema.mean, student=taught,
            optimizer=[optimizer.state_dict() for optimizer in optimizers]))

    def draw():
        log.draw()
        with ema.weights_of(model):
            draw_samples(file.parent / "samples.png", model, dataset, translation, device)

    # ---- loop
    stopping = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopping.append(True))  # finish the step, save, stop
    log = Log(file.parent, first, config.steps, config.batch_size, rank > 0)
    guard = Guard(model, optimizers, ema, first)
    saved = time.time()
    with ranks.first():
        steps = batches(dataset, affordable(config, dataset, device), device, first, dtype, *ranks.number())
    for step, (x0, x1, y, t, e, plan, seconds) in enumerate(steps, first):
        warm_up, cosine = (step + 1) / 50, (1 + math.cos(math.pi * step / config.steps)) / 2
        lr = config.lr * min(warm_up, cosine)
        optimizers[0].param_groups[0]["lr"] = lr
        optimizers[1].param_groups[0]["lr"] = lr / 20
        loss, norm = take_step(net, optimizers, config, dtype, x0, x1, y, t, e)
        ema.update(step + 1)
        stop, late = ranks.any_of(stopping, time.time() > saved + SAVE_EVERY)
        saving = stop or late or step + 1 == config.steps
        read = log(step + 1, ranks.mean(loss), norm, lr, plan, seconds, now=saving)
        try:
            guard.watch(step + 1, read)
        except UserError:
            save(step + 1)
            raise
        if saving:
            save(step + 1)
            saved = time.time()
            if rank == 0:
                draw()
        if stop:
            ranks.leave()
            print(f"\nstopped and saved after step {step + 1}: the same command with --resume goes on")
            return 130
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks.leave()  # what remains is small, and rank 0's
    print(log.coupling(), flush=True)
    if first == config.steps:
        print("all steps were done: what comes after them is made again", flush=True)
        draw()  # the stopped run may not have come to its pictures

    # ---- the student, taught by the EMA weights
    if config.student and not taught:
        try:
            with ema.weights_of(model):
                taught = teach(model, dataset, config, dtype, device).state()
        except KeyboardInterrupt:
            print("\nstopped: the flow is saved, the same command with --resume teaches the student anew")
            return 130
        save(config.steps)

    # ---- report and pictures
    if config.evaluate and dataset.test_pairs is not None:
        translator = student.restore(taught, device) if taught else None
        with ema.weights_of(model):
            report, pictures = evaluate.report(model, dataset, translation, device, translator)
        seconds = (log.column("seconds") or [0.0])[-1]
        run_of = dict(command=" ".join(["python", *sys.argv]), seed=config.seed, machine=machine_name(device),
                      torch=torch.__version__, dtype=name_of(dtype), memory_format=name_of(memory),
                      weights="EMA", steps=config.steps, training_seconds=seconds, coupling=log.means())
        write_json(file.parent / "report.json", run_of | report)
        evaluate.picture(file.parent / "translations.png", dataset, report["main_pair"], pictures)
        print(f"{file.parent}/: checkpoint.pt, log.csv, loss.png, samples.png, translations.png, report.json")
    return 0


# ---------------------------------------------------------------- parts of it

def take_step(net, optimizers, config, dtype, x0, x1, y, t, e):
    """One step of the optimizers: the loss of the batch before it, and the norm of its gradient."""
    with torch.autocast(x1.device.type, dtype, enabled=dtype != torch.float32):
        loss = flow_loss(net, x0, x1, y, t, config.sigma, e).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach(), norm


def try_out(config, device):
    """--dry-run: two steps and one translation at full size, and what the whole would take."""
    dataset, rendered = dry.blank(config)
    config = affordable(config, dataset, device)
    keep_memory()
    dtype, memory = formats(config, device, None)
    model, optimizers, _ = build(config, len(dataset.domains), dataset.channels, device, dtype, memory)
    print(f"{device.type}, {name_of(dtype)}, {name_of(memory)}, {config.preset} preset at {config.size}x"
          f"{config.size}, {len(dataset.domains)} domains, {sum(map(len, dataset.train_images))} images", flush=True)
    step = partial(take_step, model, optimizers, config, dtype)
    dry.dry_run(config, device, dtype, dataset, rendered, model, translation_of(config), step)
    return 0


def translation_of(config):
    """How the flow translates, as the checkpoint says it."""
    return dict(tau=config.tau, guidance=config.guidance, steps=config.solver_steps, solver=config.solver,
                end=config.end, colour=config.colour, x0=config.x0)


def name_of(torch_constant):
    """torch.float32 -> "float32"."""
    return str(torch_constant).removeprefix("torch.")


@contextmanager
def open_out(config, device):
    """OUT/checkpoint.pt, and with --resume what it holds. OUT is this run's alone. Raises UserError."""
    file = Path(config.out) / "checkpoint.pt"
    made = not file.parent.exists()
    with explain_os_error(f"--out {config.out}", "cannot be made"):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock_folder(file.parent) if ranks.number()[0] == 0 else nullcontext():  # all ranks are one run
            clear_unfinished(file.parent)
            yield file, checkpoint_of(config, file, device)
    finally:
        if made:
            with suppress(OSError):  # something is in it
                file.parent.rmdir()


def checkpoint_of(config, file, device):
    """With --resume the checkpoint to go on from, else None. Raises UserError if one would be lost."""
    then = checkpoint.load(file, device) if config.resume else None
    if then:
        check_settings(then, file)
    if file.exists() and not (then or config.overwrite or config.check_data):
        raise UserError(f"{file} would be replaced: --resume goes on from it, --overwrite starts anew, "
                        "--out names another folder")
    others = []
    for name, value in asdict(config).items() if then else ():
        was = then["config"].get(name, value)
        if name not in FREE and was != value:
            others.append(f"--{name.replace('_', '-')} was {was}, is {value}")
    refuse(others, f"--resume needs the flags of the stopped run: {'; '.join(others)}")
    return then


def load_data(config):
    """The Dataset: a folder's, or the simulated one."""
    if config.data:
        dataset = data.folder_set(config.data, config.size, config.seed)
    else:
        dataset = sets.phantom_set(config.size, config.train_images, config.valid_heads, config.test_heads,
                                   config.seed, config.shift)
    if config.domains:
        dataset = data.select_domains(dataset, [name.strip() for name in config.domains.split(",")])
    for name in data.strays(dataset.domains):
        print(f"warning: {name} is taken for a domain, as every sub-folder is: "
              "--domains A,B takes A and B alone")
    return dataset


def build(config, domains, channels, device, dtype, memory):
    """The network, compiled where that works, its two optimizers, and the running mean of its weights."""
    torch.manual_seed(config.seed)
    shape = replace(PRESETS[config.preset].shape, num_domains=null_label(config, domains), channels=channels,
                    score=config.sigma if config.score else 0.0)
    model = UNet(shape).to(device, memory_format=memory)
    if config.compile == "yes" or config.compile == "auto" and can_compile(device):
        own = config.batch_size // ranks.number()[1]
        try_compile(model, torch.zeros(own, channels, config.size, config.size), dtype)
    convolutions, rest = split(model)
    adamw = torch.optim.AdamW(rest, config.lr / 20, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return model, [Muon(convolutions, config.lr), adamw], checkpoint.EMA(model, config.ema)


def formats(config, device, before):
    """Number format of arithmetic, memory format of weights: those of the stopped run, or measured."""
    if before is None:
        return pick_formats(config.dtype, device)
    dtype = before["machine"]["dtype"] if config.dtype == "auto" else config.dtype
    return getattr(torch, dtype), getattr(torch, before["machine"]["memory_format"])


def go_on(before, config, file, model, optimizers, ema):
    """Fill model, optimizers and EMA from a checkpoint. Its step, and its student if it had these lessons."""
    checkpoint.load_weights(model, before.get("model"), file)
    check_weights(model, before.get("ema"), file)
    ema.load(before["ema"])
    try:
        for optimizer, state in zip(optimizers, before["optimizer"], strict=True):
            optimizer.load_state_dict(state)
    except Exception as error:
        raise UserError(f"{file} holds an optimizer that cannot be read ({type(error).__name__})") from None
    same_lessons = all(before["config"].get(name) == getattr(config, name) for name in LESSONS)
    return before["step"], before.get("student") if same_lessons else None


def teach(model, dataset, config, dtype, device):
    """The student of a trained flow, with progress."""
    def say(what):
        start, unit = time.time(), {"the student learns": "steps", "its finish": "pairs"}.get(what, "images")
        return lambda done, total: progress(done, total, start, what, unit)

    how = dict(steps=5, solver="fireflow", end=config.student_end, colour=config.colour, x0=config.x0)
    return student.teach(model, dataset, config.student_images, config.student_steps, config.student_tau, how,
                         dtype, device, config.seed, say)


@torch.no_grad()
def draw_samples(path, model, dataset, translation, device, count=4):
    """samples.png: held-out images of the first domain and their translations to every other one."""
    images = dataset.test_images[0] if len(dataset.test_images[0]) else dataset.train_images[0]
    x1 = to_float(images[:count], device)
    others = range(1, len(dataset.domains))
    columns = [x1] + [sampler.translate(model, x1, 0, y, **translation) for y in others]
    way = f"tau {translation['tau']:g}" if translation["x0"] == "noise" else "directly"
    titles = [f"source\n{dataset.domains[0]}"] + [f"{way}\n{domain}" for domain in dataset.domains[1:]]
    rows = torch.stack(columns, 1).cpu()  # (count, domains, C, H, W)
    figure(path, list(rows), titles, [""] * len(x1))


def resolve(config):
    """The config with everything automatic filled in, and the device. Raises UserError for wrong flags."""
    device = pick_device(config.device)
    name = config.preset
    if name == "auto":  # in float32 the large preset takes many hours
        name = "gpu" if device.type == "cuda" and has_bfloat16() else "cpu"
    preset = PRESETS[name]
    ot_batch = {"independent": 1, "semidiscrete": 16}.get(config.coupling, 40 if config.x0 == "image" else 8)
    automatic = dict(size=preset.size, steps=preset.steps, batch_size=preset.batch_size, ot_batch=ot_batch,
                     student_images=preset.lessons, student_steps=preset.student_steps)
    filled = {name: getattr(config, name) or value for name, value in automatic.items()}
    config = replace(config, preset=name, **filled)
    stride = preset.shape.stem * 2 ** (len(preset.shape.widths) - 1)
    if config.size < 16 or config.size % stride:
        raise UserError(f"--size {config.size} must be at least 16 and divisible by {stride}")
    check_together(config)
    return config, device


def check_together(config):
    """Raises UserError for flags that do not go together."""
    independent, image = config.coupling == "independent", config.x0 == "image"
    _, processes = ranks.number()
    refuse(config.batch_size % processes,
           f"--batch-size {config.batch_size} must be a multiple of the {processes} processes")
    has_score = config.score or independent and config.sigma == 0
    if config.domains and not config.data:
        names = [name.strip() for name in config.domains.split(",")]
        known = set(names) <= set(phantom.DOMAINS) and len(set(names)) == len(names) > 1
        refuse(not known, f"--domains needs two or more different names of {', '.join(phantom.DOMAINS)}")
    refuse(config.tau >= config.end, f"--tau {config.tau:g} must be below --end, {config.end:g}")
    refuse(config.student_tau >= config.student_end,
           f"--student-tau {config.student_tau:g} must be below --student-end, {config.student_end:g}")
    refuse(config.coupling == "sinkhorn" and not config.sigma and not config.entropy,
           "--coupling sinkhorn needs --sigma or --entropy above 0")
    refuse(config.entropy and config.coupling != "sinkhorn", "--entropy is for --coupling sinkhorn")
    refuse(independent and config.ot_batch > 1, "--ot-batch has no meaning for --coupling independent")
    refuse(independent and config.coupling_labels == "ignore",
           "--coupling-labels ignore has no meaning for --coupling independent")
    refuse(config.score and not config.sigma, "--score needs --sigma above 0")
    refuse(image and config.coupling == "semidiscrete",
           "--coupling semidiscrete needs noise: with --x0 image choose another, such as --coupling exact")
    refuse(config.solver == "sde" and (image or not has_score),
           "--solver sde needs a score: --score, or --coupling independent with --sigma 0, and --x0 noise")


if __name__ == "__main__":
    run(main)
