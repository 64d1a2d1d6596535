"""The studies behind RESULTS.md: one thing is changed, and measured.

    python -m minimedshift.study moons      couplings in the plane, where the error itself can be measured
    python -m minimedshift.study phantom    couplings and bridges on simulated heads
    python -m minimedshift.study rivals     what MedShift is compared with, trained and evaluated
    python -m minimedshift.study bands      how good is the best rival without a network, if all is tried?
    python -m minimedshift.study latent     do all domains share one latent, as the paper says?

Your own ablation is one more line of PHANTOM. Stop and start at will: what is done is not done again.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from minimedshift import balance, evaluate, phantom, sampler, student
from minimedshift.coupling import assign, couple
from minimedshift.flow import loss as flow_loss
from minimedshift import baselines, methods, rivals
from minimedshift.model import Shape, UNet
from minimedshift.phantom import sets
from minimedshift import classify
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError, flag, parse, run
from minimedshift.support.files import explain_os_error, write_whole
from minimedshift.support.machine import in_batches, to_float, pick_device, pick_formats
from minimedshift.presets import PRESETS


@dataclass(frozen=True)
class Config:
    study: str = flag(None, "moons, phantom, rivals, bands or latent", "positional")
    out: str = flag("out/study", "folder of the results", "study")
    seeds: int = flag(1, "seeds of each run of moons and phantom", "study", low=1)
    only: str = flag("", "one run of phantom (default: all)", "study")
    shift: float = flag(0.1, "population shift of rivals", "study", low=0, high=1)
    checkpoint: str = flag("out/checkpoint.pt", "trained network of bands and latent", "study")


def show(path, found):
    """Print and write a Markdown table: mean and standard error over seeds of {run: [{column: number}]}."""
    columns = list(next(iter(found.values()))[0])
    lines = [["run", *columns], ["---"] * (1 + len(columns))]
    for name, seeds in found.items():
        lines.append([name])
        for column in columns:
            values = [numbers[column] for numbers in seeds]
            error = np.std(values) / max(1, len(values) - 1)**.5
            lines[-1].append(f"{np.mean(values):.3f}" + f" ± {error:.3f}" * (len(values) > 1))
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    with explain_os_error(path.parent, "cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as work:
        work.write_text(text)
    print(text)


def make_out(c):
    """The folder --out, made before any long work."""
    with explain_os_error(f"--out {c.out}", "cannot be made"):
        Path(c.out).mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------- in the plane

def eight_gaussians(n, generator):
    """n points around eight centres on a circle of radius 5, each of variance .1: (n, 2)."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centre = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + math.sqrt(.1) * torch.randn(n, 2, generator=generator)


def moons(y, generator):
    """A point on moon y (n,) of two interleaved half circles, with noise of .2, times 3 less 1: (n, 2)."""
    angle = math.pi * torch.rand(len(y), generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(y[:, None] == 0, upper, torch.tensor([1.0, 0.5]) - upper)
    return 3 * (x + .2 * torch.randn(len(y), 2, generator=generator)) - 1


class Plane(nn.Module):
    """v(x, t, y) in the plane: a small perceptron of x (B, 2), t and one-hot y."""

    def __init__(self, width=128):
        super().__init__()
        self.shape = Shape(num_domains=2)
        layers = []
        for inputs in (5, width, width):
            layers += [nn.Linear(inputs, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t, y):
        return self.layers(torch.cat([x, t[:, None], nn.functional.one_hot(y, 2).to(x)], 1))


def distance(a, b):
    """W2^2 between two samples (n, 2) of one size: the mean squared length of the optimal pairing."""
    cost = torch.cdist(a.double(), b.double()) ** 2
    return cost[torch.arange(len(a)), assign(cost)].mean().item()


MOONS = {"independent": ("independent", True), "label-blind": ("exact", False), "per label": ("exact", True)}


def moons_run(name, seed, steps=2000, batch=256, n=4096):
    """Train with one coupling, generate n points a label: mean W2^2 over the labels, after one Euler step and
    by the adaptive solver, and of a second sample of the truth instead."""
    coupling, keep_labels = MOONS[name]
    torch.manual_seed(seed)
    model, g = Plane(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        y = torch.arange(batch) % 2  # balanced
        x0, x1, t = eight_gaussians(batch, g), moons(y, g), torch.rand(batch, generator=g)
        x0 = x0[couple(coupling, x0, x1, y * keep_labels).index]
        loss = flow_loss(model, x0, x1, y, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found, fresh = {}, torch.Generator().manual_seed(10**6 + seed)
    with torch.no_grad():
        for label in range(2):
            y, v = torch.full((n,), label), sampler.Velocity(model, label)
            truth, again, x0 = moons(y, fresh), moons(y, fresh), eight_gaussians(n, fresh)
            made = dict(euler_1=sampler.last(sampler.euler(v, x0, [0.0, 1.0])),
                        adaptive=sampler.last(sampler.adaptive(v, x0, [0.0, 1.0])), floor=again)
            for key, x in made.items():
                found[key] = found.get(key, 0) + distance(x, truth) / 2
    return found


def study_moons(c):
    """W2^2 of each coupling, and its floor."""
    found = {}
    for name in MOONS:
        found[name] = [moons_run(name, seed) for seed in range(c.seeds)]
    show(Path(c.out) / "moons.md", found)


# ---------------------------------------------------------------- simulated heads: train.py with other flags

PHANTOM = {
    "independent": "--coupling independent",
    "exact": "--coupling exact",
    "semidiscrete": "--coupling semidiscrete",
    "sinkhorn, entropy .1": "--coupling sinkhorn --entropy 0.1",
    "sinkhorn, entropy .4": "--coupling sinkhorn --entropy 0.4",
    "independent, sigma .1": "--coupling independent --sigma 0.1",
    "semidiscrete, sigma .1": "--coupling semidiscrete --sigma 0.1",
    "sinkhorn, sigma .1": "--coupling sinkhorn --sigma 0.1",
    "sinkhorn, sigma .3": "--coupling sinkhorn --sigma 0.3",
    "sinkhorn, sigma .3, score": "--coupling sinkhorn --sigma 0.3 --score",
    "exact, labels ignored": "--coupling exact --coupling-labels ignore",
    "exact, image to image": "--coupling exact --x0 image",
}
RIVALS = {
    "medshift": "",
    "sdedit": "--coupling independent --colour 0",
    "bridge": "--coupling exact --x0 image",
}


def train(flags, folder):
    """The report of `train.py` with these flags. It goes on where it was stopped; what is done stays."""
    command = [sys.executable, Path(__file__).parents[1] / "train.py", "--preset", "cpu", "--no-student"]
    command += [*flags.split(), "--out", folder, *["--resume"] * (folder / "checkpoint.pt").exists()]
    if not (folder / "report.json").exists():
        status = subprocess.run(command).returncode
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise UserError(f"train.py {flags} has stopped: see above")
    return json.loads((folder / "report.json").read_text())


def study_phantom(c):
    """Everything at tau .4. Seeds start at 1: the test heads of seed 0 are there to report on, not to choose
    by."""
    if c.only not in ("", *PHANTOM):
        raise UserError(f"--only {c.only} is no run of phantom: choose from {'; '.join(PHANTOM)}")
    found = {}
    for name in [c.only] if c.only else PHANTOM:
        found[name] = []
        for seed in range(1, c.seeds + 1):
            flags = f"--steps 600 --tau 0.4 --seed {seed} {PHANTOM[name]}"
            report = train(flags, Path(c.out) / "phantom" / name / f"seed-{seed}")
            plan, pairs, taus = report["coupling"], report["all_pairs"], report["main_pair"]["medshift"]
            row = taus.get("0.4") or taus["null"]  # image to image has no tau
            found[name].append({
                "plan's entropy": plan["entropy"], "cost": plan["cost"], "gap closed": row["gap_closed"],
                "noise": row["noise"], "all pairs": pairs["gap_closed"], "same head": pairs["same_head"]})
    show(Path(c.out) / "phantom" / "table.md", found)


def study_rivals(c, heads=2000):
    """Train what `evaluate --rivals` reads, then evaluate it: the flows of RIVALS, and as long as MedShift an
    adversarial network and a supervised one, which sees `heads` pairs. Populations are taken as they are."""
    folder = Path(c.out) / f"rivals-{c.shift:g}"
    for name, flags in RIVALS.items():
        train(f"--no-balance --shift {c.shift:g} {flags}", folder / name)
    medshift, out = folder / "medshift" / "checkpoint.pt", folder / "evaluation"
    if not (folder / "supervised.pt").exists():
        seconds = json.loads((folder / "medshift" / "report.json").read_text())["training_seconds"]
        train_rivals(folder, checkpoint.load(medshift)["config"], seconds, heads)
    evaluate.main(["--checkpoint", str(medshift), "--rivals", str(folder), "--out", str(out)])


def train_rivals(folder, config, seconds, heads):
    """The networks of the main pair, one after the other for about `seconds` each, into files of `folder`."""
    device, size, seed = pick_device("auto"), config["size"], config["seed"]
    dtype, pair = pick_formats("auto", device)[0], methods.MAIN
    s, t = [phantom.DOMAINS.index(name) for name in pair]

    images = sets.training_images(size, config["train_images"] // len(phantom.DOMAINS), seed, config["shift"])
    learn = partial(rivals.adversarial, images[s], images[t], seed=seed, dtype=dtype, device=device)
    forth, back = learn(rivals.steps_within(seconds, learn))
    rivals.save(folder / "adversarial.pt", forth, pair)
    rivals.save(folder / "adversarial-back.pt", back, pair[::-1])

    first = sets.first_seed(seed, "supervised")
    people = [phantom.Head(first + i) for i in range(heads)]
    source = phantom.render(people, pair[0], size).numpy()
    target = phantom.render(people, pair[1], size, noise=False).numpy()

    def learn(steps):
        torch.manual_seed(seed)
        model = UNet(PRESETS["cpu"].shape).to(device)
        return rivals.supervised(model, source, target, t, steps, batch_size=16, seed=seed, dtype=dtype)

    rivals.save(folder / "supervised.pt", learn(rivals.steps_within(seconds, learn)), pair, t)


# ---------------------------------------------------------------- bands, with more images and rounds

MANY = (250, 1000, 10**6)  # images of each domain to fit on, as far as there are
ROUNDS = (*methods.ROUNDS, 32)


def study_bands(c):
    """Laplacian bands beside a student, on populations as they are and balanced. Images and rounds are chosen
    on validation heads of the main pair; for all pairs the rounds once more, on 8 heads of each."""
    model, state = checkpoint.load_model(c.checkpoint)
    config, size, domains = state["config"], state["image"]["size"], state["domains"]
    if config.get("data") or not state.get("student") or domains != list(phantom.DOMAINS):
        raise UserError(f"{c.checkpoint}: needs a student of all simulated domains")
    make_out(c)
    counts = config["train_images"], config["valid_heads"], config["test_heads"]
    dataset = sets.phantom_set(size, *counts, config["seed"], config["shift"])
    pupil = student.restore(state["student"], "cpu", c.checkpoint)
    ours = methods.Method(methods.STUDENT, "ours", methods.directly(pupil))
    curve = methods.Method("curve", "ceiling", methods.paired(dataset.valid_pairs, baselines.PAIRED["curve"]))
    s, t = methods.main_domains(domains)
    ask = partial(methods.question, device="cpu")
    valid = ask(dataset.valid_pairs, s, t, len(dataset.valid_pairs.images))
    each = [ask(dataset.valid_pairs, *pair, 8) for pair in permutations(range(len(domains)), 2)]
    test, fit, found = ask(dataset.test_pairs, s, t, 128), baselines.UNPAIRED["bands (Laplacian)"], {}
    for name, some in (("as they are", dataset), ("balanced", balance.balanced(dataset))):
        tried = []
        for images in MANY:
            answer = methods.unpaired(some, partial(fit, images=images), max(ROUNDS))
            count = len(baselines.spread(some.train_images[s], images))
            tried.append(methods.Method(f"{name}, {count} images", "unpaired", answer, ROUNDS, "rounds"))
        points = evaluate.sweep(tried, [valid], curve)
        chosen = {key: evaluate.best(rows) for key, rows in points.items()}
        rows, _ = evaluate.main_pair([*tried, ours], chosen, test, curve)
        gaps = {key: max(point["gap_closed"] for point in rows) for key, rows in points.items()}
        best = max(tried, key=lambda method: gaps[method.name])
        rounds = evaluate.best(evaluate.sweep([best], each, curve)[best.name])
        pairs = {best.name: rounds}, lambda s: dataset.test_pairs, domains, curve, 32, "cpu"
        _, means = evaluate.all_pairs([best], *pairs)
        row = rows[best.name]
        low, high = row["less_ours"] or (math.nan, math.nan)
        found[best.name] = [{
            "rounds": chosen[best.name], "validation": gaps[best.name], "test": row["gap_closed"],
            "less the student, from": low, "to": high, "noise": row["noise"], "rounds, all pairs": rounds,
            "all pairs": means[best.name]["gap_closed"], "noise right": means[best.name]["noise_right"]}]
    show(Path(c.out) / "bands.md", found)


# ---------------------------------------------------------------- the latent z, tau = 0 to 1

def features(z):
    """What the probe sees of z (N, D, C, H, W): pixels and, for doses, log powers by octave, (N, D, F)."""
    power = torch.fft.fft2(z).abs().square()
    octaves = [power[..., mask].mean((2, 3)).log() for mask in classify.octaves(*z.shape[-2:])]
    parts = [part - part.mean((0, 1)) for part in (z.flatten(2), torch.stack(octaves, 2))]
    return torch.cat([part / part.square().sum(2).mean().sqrt() for part in parts], 2).double()


def probe(x, ridge=1.0):
    """Share of x (N, D, F), N heads in D domains, whose domain a linear probe of other heads tells.

    Ridge regression on one-hot labels Y: scores = x X^T (X X^T + ridge tr(X X^T) / n I)^-1 Y, all centred.
    """
    right, Y = [], torch.eye(x.shape[1], dtype=x.dtype) - 1 / x.shape[1]  # (D, D)
    for train, test in ((x[::2], x[1::2]), (x[1::2], x[::2])):
        X, n = (train - train.mean((0, 1))).flatten(0, 1), train[..., 0].numel()
        gram = X @ X.T + ridge * X.square().sum() / n * torch.eye(n, dtype=x.dtype)
        scores = (test - train.mean((0, 1))) @ X.T @ torch.linalg.solve(gram, Y.repeat(len(train), 1))
        right.append(scores.argmax(2) == torch.arange(x.shape[1]))
    return torch.cat(right).double().mean().item()


def same_head(z):
    """Share of z (N, D, ...) whose nearest neighbour in another domain is the same head, over all pairs."""
    (N, D), flat = z.shape[:2], z.flatten(0, 1).flatten(1).double()
    nearest = torch.cdist(flat, flat).view(N, D, N, D).argmin(2)  # (N, D, D): of each z, in each domain
    right = (nearest == torch.arange(N).view(N, 1, 1))[:, ~torch.eye(D, dtype=torch.bool)]
    return right.double().mean().item()


def study_latent(c):
    """latent.png. Were z shared, a probe would tell its domain by chance alone, and the nearest z of another
    domain would be that of the same head. A z that has forgotten everything passes the first test only."""
    device = pick_device("auto")
    model, state = checkpoint.load_model(c.checkpoint, device)
    how, config = state["translate"], state["config"]
    if config.get("data") or how["x0"] == "image" or config["valid_heads"] < 2:
        raise UserError(f"{c.checkpoint}: needs a flow from noise, and two simulated validation heads")
    make_out(c)
    N, D = config["valid_heads"], len(state["domains"])
    pairs = sets.paired_heads(state["image"]["size"], N, "valid", config["seed"], decoys=sets.DECOYS)
    columns = [phantom.DOMAINS.index(name) for name in state["domains"]]
    found = {i / 10: None for i in range(11)}  # tau: (domain told, same head)
    for tau in found:
        z = [to_float(pairs.images[:, column], device) for column in columns]
        if tau < how["end"]:  # from `end` on, z is the image
            leg = tau, how["steps"], how["solver"], how["end"], how["colour"]
            z = [in_batches(lambda x1: sampler.encode(model, x1, y, *leg), z[y]) for y in range(D)]
        z = torch.stack(z, 1).cpu()  # (N, D, C, H, W)
        found[tau] = probe(features(z)), same_head(z)
        print("tau {:.1f}: domain told {:.1%}, same head {:.1%}".format(tau, *found[tau]), flush=True)
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for name, values, chance in zip(("domain told", "same head"), zip(*found.values()), (1 / D, 1 / N)):
        line, = axes.plot(list(found), values, "o-", label=f"{name} (dotted: chance, {chance:.1%})")
        axes.axhline(chance, color=line.get_color(), linestyle=":")
    axes.set(xlabel="tau (1: the image)", ylim=(0, 1.05), title=f"z of {N} simulated validation heads")
    axes.legend(title=f"EMA weights of step {state['step']}")
    with write_whole(Path(c.out) / "latent.png") as work:
        axes.figure.savefig(work, dpi=110)


STUDIES = dict(moons=study_moons, phantom=study_phantom, rivals=study_rivals, bands=study_bands,
               latent=study_latent)


def main(argv=None):
    c = parse(Config, __doc__, argv)
    if c.study not in STUDIES:
        raise UserError(f"name a study: {', '.join(STUDIES)} (found {c.study or 'none'})")
    STUDIES[c.study](c)


if __name__ == "__main__":
    run(main)
