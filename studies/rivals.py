"""A finished run of train.py beside rivals: bands, their student, SDEdit, a CycleGAN, and supervision.

    python studies/rivals.py --checkpoint out/checkpoint.pt

Bands (baselines.py) get 2,000 images of a domain and 32 rounds, balanced and as they are. Their student has
the run's network and finish, but bands write its lessons (700 images, 12 rounds), which are more, in fewer
steps: chosen on validation heads. What is the flow worth? SDEdit (arXiv:2108.01073) adds noise to a picture
and denoises it under the target's label, with a flow made for that: white noise, independent pairs. The
CycleGAN (arXiv:1703.10593) and supervision, the ceiling, have networks like the student's, of four and six
blocks. They draw the run's images. Leaves what `python -m minimedshift.evaluate` does. 40 minutes."""

import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a study finds the package

from minimedshift import baselines, batches, evaluate, finish, phantom, sampler
from minimedshift.flow import draw_noise
from minimedshift.methods import MAIN, Method, baseline
from minimedshift.model import load_model
from minimedshift.optim import EMA
from minimedshift.phantom import sets
from minimedshift.student import LocalNet, LocalShape, Student, learn, lessons, spread_out
from minimedshift.support.command import flag, parse, refuse, run
from minimedshift.support.machine import autocast, in_batches, pick_device, pick_formats
from studies import couplings

TAUS = (0.9, 0.3, 0.5, 0.6, 0.7, 0.8, 0.95)  # of SDEdit; the first for all ordered pairs
ROUNDS, IMAGES = (32, 16, 8), 2000  # of bands at their best
SAME = "size", "train_images", "valid_heads", "test_heads", "shift", "steps", "batch_size", "seed"


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("out/checkpoint.pt", "a run on simulated heads, with its student", "study")
    pairs: int = flag(2000, "pairs that supervision sees", "study", low=1, high=500_000)
    seconds: float = flag(120, "how long a CycleGAN and supervision are trained", "study", above=0)
    out: str = flag("out/studies/rivals", "folder of SDEdit's flow and of the evaluation", "study")


def sdedit(model, x1, y_target, tau, guidance=1.0, steps=20, solver="heun", t_image=1.0, colour=0.0, seed=0):
    """SDEdit (arXiv:2108.01073, Alg. 1): fresh noise down to time tau, then generate in the target domain.

        xt = a x1 + b x0,   a = tau / t_image,   b^2 = (1 - tau)^2 - a^2 (1 - t_image)^2
        t_image = 1:   xt = tau x1 + (1 - tau) x0

    x1 (B, C, H, W): source images. They count as xt at t = t_image, so they hold a part of the noise already.
    y_target: int or (B,). x0 is drawn on the host from `seed`, the same on every machine.
    """
    x0 = draw_noise(x1.shape, torch.Generator().manual_seed(seed), colour).to(x1)
    a = tau / t_image
    b = math.sqrt((1 - tau) ** 2 - (a * (1 - t_image)) ** 2)
    return sampler.decode(model, a * x1 + b * x0, y_target, tau, guidance, steps, solver, t_image)


class Local(LocalNet):
    """The student's network, for one pair of domains: x (B, C, H, W) -> its translation."""

    def __init__(self, channels, width, blocks):
        super().__init__(LocalShape(1, channels, width, blocks=blocks))

    def forward(self, x):
        only = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return super().forward(x, only, only)


def judge(channels, width=32):
    """A PatchGAN (arXiv:1611.07004): a mark for each 34 x 34 pixels, (B, C, H, W) -> (B, 1, ~H/4, ~W/4)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 4, 1, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(4 * width, 1, 4, 1, 1))


def off(mark, wanted):
    """How far a judge's marks are from 1 (real) or 0 (translated), squared (arXiv:1611.04076)."""
    return (mark.float() - wanted).square().mean()


def descend(loss, optimizer, schedule, clip=math.inf):
    """One step of an optimizer. A gradient longer than `clip` is shortened to it."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    schedule.step()


def some(generator, count, device, *stacks):
    """`count` images at places drawn at random, the same of each stack: (B, C, H, W) float32 each."""
    which = torch.randint(len(stacks[0]), (count,), generator=generator).numpy()
    return [torch.as_tensor(stack[which]).to(device, torch.float32) for stack in stacks]


def cyclegan(source, target, steps, device, batch_size=4, lr=1e-3, cycle=3.0, width=48, blocks=4, seed=0):
    """Two Local networks, source -> target and target -> source, from unpaired images (N, C, H, W).

    In each step, both ways (arXiv:1703.10593, eq. 3 with least squares):
        generators   min  (judge(fake) - 1)^2 + cycle |there and back - x|
        judges       min  (judge(real) - 1)^2 + judge(fake)^2
    Adam, the rate constant for half of the steps, then linear to 0; the weights are running means.
    """
    dtype, memory = pick_formats("auto", device)
    torch.manual_seed(seed)
    generators = nn.ModuleList([Local(source.shape[1], width, blocks) for _ in range(2)])
    judges = nn.ModuleList([judge(source.shape[1]) for _ in range(2)])
    rate = lambda step: min(1, 2 * (1 - step / steps))
    descents = []
    for part in (generators, judges):
        part.to(device=device, memory_format=memory)
        optimizer = torch.optim.Adam(part.parameters(), lr, betas=(0.5, 0.99))
        descents.append((optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)))
    (forth, back), (judge_source, judge_target) = generators, judges
    ema, draw = EMA(generators, 6.94), torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        x, = some(draw, batch_size, device, source)
        y, = some(draw, batch_size, device, target)
        judges.requires_grad_(False)
        with autocast(device, dtype):
            fake_y, fake_x = forth(x), back(y)
            fooled = off(judge_target(fake_y), 1) + off(judge_source(fake_x), 1)
            returned = F.l1_loss(back(fake_y), x) + F.l1_loss(forth(fake_x), y)
        descend(fooled + cycle * returned, *descents[0], clip=1.0)
        ema.update(step)
        judges.requires_grad_(True)
        with autocast(device, dtype):
            wrong = off(judge_target(y), 1) + off(judge_target(fake_y.detach()), 0)
            wrong = wrong + off(judge_source(x), 1) + off(judge_source(fake_x.detach()), 0)
        descend(wrong / 2, *descents[1], clip=1.0)
    return ema.model


def supervised(source, target, steps, device, batch_size=16, lr=1e-3, width=64, blocks=6, seed=0):
    """A Local network from pairs (N, C, H, W): a ceiling that sees what MedShift never sees.

        loss ||network(x) - x1||^2        x, x1: source and target of one head

    AdamW, cosine decay to zero.
    """
    dtype, memory = pick_formats("auto", device)
    torch.manual_seed(seed)
    network = Local(source.shape[1], width, blocks).to(device=device, memory_format=memory)
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, x1 = some(draw, batch_size, device, source, target)
        with autocast(device, dtype):
            loss = (network(x) - x1).square().mean()
        descend(loss, optimizer, schedule)
    return network.eval()


def train_for(seconds, train, trial=5):
    """What train(steps) returns after about `seconds`: a rival gets as long as MedShift had.
    It is tried twice before, so that what is done only once does not count."""
    train(trial)
    start = time.time()
    train(trial)
    return train(max(1, round(seconds * trial / (time.time() - start))))


def train_networks(dataset, seed, seconds, pairs, device):
    """A CycleGAN and a supervised network, {(source, target): network} each, trained for `seconds` each.
    pairs: how many supervision sees."""
    s, t = [phantom.DOMAINS.index(name) for name in MAIN]
    first = sets.first_seed(seed, "supervised")
    people = [phantom.Head(first + i) for i in range(pairs)]
    source = phantom.render(people, MAIN[0], dataset.size).numpy()
    target = phantom.render(people, MAIN[1], dataset.size, noise=False).numpy()
    how = dict(device=device, seed=seed)
    forth, back = train_for(seconds, lambda steps: cyclegan(dataset.drawn(s), dataset.drawn(t), steps, **how))
    paired = train_for(seconds, lambda steps: supervised(source, target, steps, **how))
    return {(s, t): forth, (t, s): back}, {(s, t): paired}


@torch.inference_mode()
def one_pair_each(networks, q, _=None):
    """A Method's translation of a Question by {(source, target): network}; None for other pairs."""
    network = networks.get((q.source, q.target))
    return network and in_batches(network, q.x)


def bands(dataset, way):
    """The Method without a network that gets more images and rounds than `evaluate` gives it."""
    fitted = baseline(partial(baselines.fit_tone, images=IMAGES), dataset.drawn, dataset.drawn, max(ROUNDS))
    return Method(f"bands {way}, {IMAGES} images", "unpaired", fitted, ROUNDS, "rounds")


def taught_by_bands(dataset, way, device, seed=0, count=2000, steps=400, rounds=12):
    """The Method of a Student as `student.teach` makes one, but with the answers of bands in its lessons."""
    images, many = spread_out(dataset, count), spread_out(dataset, finish.IMAGES)
    distances = finish.measure(many, dataset.counts())
    chains = {(s, t): baselines.fit_tone(images[s], images[t], rounds, 700, distances.log)
              for s, t in permutations(range(len(images)), 2)}
    targets, answers = lessons(nn.Linear(1, 1), images, chains, seed)  # no flow is asked
    shape, dtype = LocalShape(len(images), dataset.channels), pick_formats("auto", device)[0]
    net = learn(shape, images, targets, answers, steps, seed=seed, dtype=dtype, device=device)
    pupil = Student(net, finish.fit(net, many, distances, dtype))
    at_once = lambda q, _: in_batches(lambda x: pupil(x, q.source, q.target), q.x)
    return Method(f"student of bands {way}", "unpaired", at_once)


def main(argv=None):
    c = parse(Config, __doc__, argv)
    out, device = Path(c.out), pick_device("auto")
    _, state = load_model(c.checkpoint)
    config = state["config"]
    shrunk = config.get("flow_size", config["size"]) < config["size"]  # rivals see no small copies
    refuse(config["data"] or shrunk, f"{c.checkpoint} was not trained on simulated heads of its flow's size")
    dataset = batches.load_dataset(SimpleNamespace(**config))
    flags = [f"--{name.replace('_', '-')} {config[name]}" for name in SAME]
    flags += ["--no-balance"] * (not config["balance"])
    couplings.train(f"{' '.join(flags)} --coupling independent --colour 0", out / "sdedit")
    model, _ = load_model(out / "sdedit" / "checkpoint.pt", device)
    edit = partial(sdedit, model, t_image=state["translate"]["t_image"])
    edited = lambda q, tau: in_batches(lambda x: edit(x, q.target, tau), q.x)
    print(f"training a CycleGAN and a supervised network, {c.seconds:.0f} s each", flush=True)
    both_ways, with_pairs = train_networks(dataset, config["seed"], c.seconds, c.pairs, device)
    ways = {"balanced": dataset, "as they are": replace(dataset, weights=None)}
    methods = [bands(data, way) for way, data in ways.items()]
    methods += [taught_by_bands(data, way, device, config["seed"]) for way, data in ways.items()]
    methods += [Method("SDEdit", "learned", edited, TAUS, "tau"),
                Method("CycleGAN", "learned", partial(one_pair_each, both_ways)),
                Method("supervised", "ceiling", partial(one_pair_each, with_pairs))]
    return evaluate.main(["--checkpoint", c.checkpoint, "--out", str(out / "evaluation")], methods)


if __name__ == "__main__":
    run(main)
