"""What couplings and bridges are worth: the measurements behind the README's tables.

    python -m minimedshift.study moons      eight Gaussians to two moons, in the plane, where the error can be measured
    python -m minimedshift.study phantom    the head phantom, every coupling and a few sigma at equal steps
    python -m minimedshift.study rivals     MedShift and everything it is compared with, at two population shifts: the README's first table
    python -m minimedshift.study student    what makes a student better than its teacher: its view, its loss, its lessons (after `python train.py`)

Each run leaves its result in OUT/STUDY, and the whole OUT/STUDY/table.md. A run that has its result is not run again: stop and start at will.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minimedshift import data, evaluate, sampler, student
from minimedshift.measure import rivals, tables
from minimedshift.phantom import sets
from minimedshift.support.command import UserError, flag, parse, run
from minimedshift.support.files import whole, write_json
from minimedshift.support.checkpoint import load, load_model
from minimedshift.coupling import assign, couple
from minimedshift.flow import draw_noise
from minimedshift.flow import loss as flow_loss
from minimedshift.support.machine import load as load_array, pick_formats
from minimedshift.model import PRESETS, UNet


@dataclass(frozen=True)
class Config:
    study: str = flag(None, "moons, phantom, rivals or student", "positional")
    checkpoint: str = flag("out/checkpoint.pt", "the teacher of the study of students", "study")
    out: str = flag("out/study", "folder of the results", "study")
    only: str = flag("", "runs to make, separated by semicolons (default: all)", "study")
    seeds: int = flag(1, "seeds of each run", "study", low=1)
    steps: int = flag(0, "optimizer steps of each run; 0 is 2000 for moons, 600 for phantom, the preset's for rivals", "study", low=0)
    heads: int = flag(64, "validation heads of the phantom's main pair", "study", low=1)
    shifts: str = flag("0.1,0.55", "population shifts of the study of rivals", "study")


# ---------------------------------------------------------------- in the plane

def eight_gaussians(n, generator):
    """n points around eight centres on a circle of radius 5, each with variance .1: (n, 2)."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    return 5 * torch.stack([angle.cos(), angle.sin()], 1) + math.sqrt(.1) * torch.randn(n, 2, generator=generator)


def moons(y, generator):
    """A point on moon y (n,) of two interleaved half circles, with noise of .2, times 3 less 1: (n, 2)."""
    angle = math.pi * torch.rand(len(y), generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(y[:, None] == 0, upper, torch.tensor([1.0, 0.5]) - upper)
    return 3 * (x + .2 * torch.randn(len(y), 2, generator=generator)) - 1


class Plane(nn.Module):
    """v(x, t, y) in the plane: a small perceptron of x, t and one-hot y."""

    def __init__(self, labels=2, width=128):
        super().__init__()
        self.shape = type("Shape", (), dict(num_domains=labels, score=0.0))
        sizes = (3 + labels, width, width, width)
        self.layers = nn.Sequential(*[part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.SiLU())], nn.Linear(width, 2))

    def forward(self, x, t, y):
        return self.layers(torch.cat([x, t[:, None], nn.functional.one_hot(y, self.shape.num_domains).to(x)], 1))


def distance(a, b):
    """W2^2 between two samples (n, 2) of one size: the mean squared length of the optimal pairing."""
    cost = torch.cdist(a.double(), b.double()) ** 2
    return cost[torch.arange(len(a)), assign(cost)].mean().item()


MOONS = {"independent": ("independent", True), "label-blind": ("exact", False), "per label": ("exact", True)}


def moons_run(name, seed, steps=2000, batch=256, n=4096):
    """Train on one coupling and generate n points a label: mean W2^2 over the labels, after one Euler step and by the adaptive solver."""
    coupling, keep = MOONS[name]
    torch.manual_seed(seed)
    model, g, start = Plane(), torch.Generator().manual_seed(seed), time.time()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        y = torch.arange(batch) % 2  # balanced
        x0, x1, t = eight_gaussians(batch, g), moons(y, g), torch.rand(batch, generator=g)
        x0 = x0[couple(coupling, x0, x1, y * keep).index]
        loss = flow_loss(model, x0, x1, y, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    result, fresh = dict(name=name, seed=seed, steps=steps, n=n, seconds=time.time() - start), torch.Generator().manual_seed(10**6 + seed)
    with torch.no_grad():
        for label in range(2):
            y, v = torch.full((n,), label), sampler.Velocity(model, label)
            truth, again, x0 = moons(y, fresh), moons(y, fresh), eight_gaussians(n, fresh)
            made = dict(euler_1=sampler.last(sampler.euler(v, x0, [0.0, 1.0])), adaptive=sampler.last(sampler.adaptive(v, x0, [0.0, 1.0])))
            for key, x in (made if name != "independent" else dict(made, floor=again)).items():  # the floor is the same for all
                result[key] = result.get(key, 0) + distance(x, truth) / 2
    return result


def moons_table(results):
    """Markdown: W2^2 of each coupling, mean and standard error over its seeds."""
    lines = ["| coupling | seeds | 1 Euler step | adaptive solver |", "|---|---|---|---|"]
    for name in MOONS:
        rows = [r for r in results if r["name"] == name]
        if rows:
            cell = lambda key: f"{np.mean([r[key] for r in rows]):.3f} ± {np.std([r[key] for r in rows]) / max(1, len(rows) - 1)**.5:.3f}"
            lines.append(f"| {name} | {len(rows)} | {cell('euler_1')} | {cell('adaptive')} |")
            if "floor" in rows[0]:
                lines.append(f"| floor: two samples of the truth | {len(rows)} | {cell('floor')} | {cell('floor')} |")
    return lines


# ---------------------------------------------------------------- the head phantom

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


def train(flags, folder):
    """`train.py` with these flags into a folder; goes on where it was stopped."""
    command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), *flags, "--no-evaluate", "--no-student", "--out", str(folder)]
    status = subprocess.run(command + ["--resume"] * (folder / "checkpoint.pt").exists()).returncode
    if status:
        raise KeyboardInterrupt if status == 130 else UserError(f"train.py {' '.join(flags)} ended with status {status}")


def phantom_run(name, seed, steps, heads, folder):
    """`train.py` with the flags of PHANTOM[name], then everything measured on validation heads."""
    flags = [*PHANTOM[name].split(), "--steps", str(steps), "--seed", str(seed)]
    train(flags, folder)
    model, state = load_model(folder / "checkpoint.pt")
    c = state["config"]
    dataset = sets.phantom_set(state["image"]["size"], c["train_images"], c["valid_heads"], c["test_heads"], c["seed"], c["shift"])
    how = {key: value for key, value in state["translate"].items() if key != "tau"}
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()[1:]]
    mean = lambda column: float(np.mean([float(row[column]) for row in rows]))
    result = dict(name=name, seed=seed, steps=steps, flags=" ".join(flags), loss=float(np.mean([float(row[1]) for row in rows[-100:]])),
                  entropy=mean(3), cost=mean(4), coupling_share=mean(6) * len(rows) / float(rows[-1][7]))
    result["pair"] = main_pair(model, dataset, how, heads)
    _, means = evaluate.all_pairs([method := network(model, how)], {method.name: .4}, lambda s: dataset.valid, dataset.domains,
                                  curve_of(dataset), 16, "cpu")
    mean = means[method.name]
    result.update(same_head=mean["same_head"], mean_gap_closed=mean["gap_closed"], noise_right=mean["noise_right"])
    if model.shape.score:  # at t < 1 a bridge is not yet rid of its noise: to the end
        result["sde"] = main_pair(model, dataset, dict(how, solver="sde", steps=20, end=1.0), heads)
    result["evaluations"] = evaluations_needed(model, dataset, how)
    result["straightness"] = straightness(model, how, dataset)
    return result


def network(model, how):
    """The evaluation's Method of a trained network."""
    return evaluate.with_network(model, dict(how, tau=.4))[0]


def curve_of(dataset):
    """The evaluation's Method that is the best grey-value curve."""
    return next(method for method in evaluate.without_network(dataset) if method.name == "curve")


def main_pair(model, dataset, how, heads, taus=(.1, .4)):
    """{tau: structure, noise, gap closed} of the main pair on validation heads: nothing here may see a test head."""
    s, t = evaluate.main_domains(dataset.domains)
    q = evaluate.question(dataset.valid, s, t, heads, "cpu")
    limits, method, found = evaluate.bounds(curve_of(dataset), q), network(model, how), {}
    for tau in taus if how["x0"] == "noise" else (0.0,):
        row = evaluate.score(q, evaluate.answer(method, q, tau)[0], *limits)
        found[tau] = {key: row[key] for key in ("structure", "noise", "gap_closed")}
    return found


@torch.no_grad()
def evaluations_needed(model, dataset, how, tau=.4, heads=8, share=.05):
    """The fewest evaluations with which a translation of the main pair is within `share` of its solution with 60 Heun steps a leg: root mean
    square difference over that between this solution and the source. None if 24 steps a leg do not do."""
    s, t = (dataset.domains.index(name) for name in evaluate.MAIN)
    x1 = load_array(dataset.valid.images[:heads, s], "cpu")
    solve = lambda steps: sampler.translate(model, x1, s, t, tau, **{**how, "solver": "heun", "steps": steps})
    solution = solve(60)
    rms = lambda x: x.square().mean().sqrt().item()
    for steps in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24):
        if rms(solve(steps) - solution) <= share * rms(solution - x1):
            return steps * 2 * (1 if how["x0"] == "image" else 2)
    return None


@torch.no_grad()
def straightness(model, how, dataset, count=16, steps=20):
    """How far paths from noise to generated images of the main target are from straight lines (arXiv:2209.03003, eq. 4, over the squared length
    of the lines): int E ||(X1 - X0) - v(Xt, t)||^2 dt / E ||X1 - X0||^2. 0 is straight."""
    if how["x0"] == "image":
        return None
    x0 = draw_noise((count, dataset.channels, dataset.size, dataset.size), torch.Generator().manual_seed(0), how["colour"])
    v = sampler.Velocity(model, dataset.domains.index(evaluate.MAIN[1]))
    path = [x for _, x in sampler.heun(v, x0, [i / steps * how["end"] for i in range(steps + 1)])]
    line = (path[-1] - path[0]) / how["end"]
    bend = sum((line - (b - a) * steps / how["end"]).square().mean().item() for a, b in zip(path, path[1:])) / steps
    return bend / line.square().mean().item()


def phantom_table(results):
    """Markdown: a row for each kind of run, the mean over its seeds, and their range where there are more than one."""
    def cell(values, form):
        values = [v for v in values if v is not None]
        low, high = (form(f(values)) for f in (min, max)) if values else ("", "")
        return "" if not values else low if low == high else f"{form(np.mean(values))} ({low} to {high})"

    percent, plain = (lambda v: f"{100 * v:.0f}%"), (lambda v: f"{v:.2f}")
    lines = ["| run | seeds | plan's entropy | cost | gap closed, tau .1 | tau .4 | noise, tau .4 | all pairs, tau .4 | same head | evaluations | bend |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name in PHANTOM:
        rows = [r for r in results if r["name"] == name]
        if rows:
            at = lambda tau, key: [r["pair"].get(tau, r["pair"].get("0.0", {})).get(key) for r in rows]
            of = lambda key: [r[key] for r in rows]
            lines.append(f"| {name} | {len(rows)} | {cell(of('entropy'), plain)} | {cell(of('cost'), lambda v: f'{v:.3f}')} | {cell(at('0.1', 'gap_closed'), percent)} | "
                         f"{cell(at('0.4', 'gap_closed'), percent)} | {cell(at('0.4', 'noise'), plain)} | {cell(of('mean_gap_closed'), percent)} | "
                         f"{cell(of('same_head'), lambda v: f'{100 * v:.1f}%')} | {cell(of('evaluations'), lambda v: f'{v:.0f}')} | {cell(of('straightness'), plain)} |")
    return lines


# ---------------------------------------------------------------- the rivals

NETWORKS = {
    "medshift": "",
    "sdedit": "--coupling independent --colour 0",
    "bridge": "--coupling exact --x0 image",
}
ONE_PAIR = {"pair": 10, "pair-long": 1}  # one network for the main pair: its share of the steps, were there one for each of ten pairs, and all
PAIRED_HEADS = 2000  # of the supervised ceiling: as many as MedShift has training images in a domain


def rivals_run(shift, seed, steps, folder):
    """Train MedShift and every learned rival at one population shift, then evaluate them all: results.json in folder/evaluation. Populations
    are taken as they are: what balancing them is worth is `python train.py --shift S`, then `python -m minimedshift.evaluate`."""
    common = ["--shift", f"{shift:g}", "--seed", str(seed), "--no-balance"] + ["--steps", str(steps)] * bool(steps)
    for name, flags in NETWORKS.items():
        train_once([*flags.split(), *common], folder / name)
    checkpoint = folder / "medshift" / "checkpoint.pt"
    state = load(checkpoint)
    seconds = float((folder / "medshift" / "log.csv").read_text().splitlines()[-1].split(",")[-1])
    total = state["step"]
    for name, share in ONE_PAIR.items():
        train_once(["--domains", ",".join(evaluate.MAIN), "--shift", f"{shift:g}", "--seed", str(seed), "--no-balance", "--steps", str(total // share)], folder / name)
    config = state["config"]
    dataset = sets.phantom_set(state["image"]["size"], config["train_images"], config["valid_heads"], config["test_heads"], seed, shift)
    train_rivals(dataset, folder, seconds, seed)
    evaluate.main(["--checkpoint", str(checkpoint), "--rivals", str(folder), "--out", str(folder / "evaluation")])
    write_json(folder / "one_pair.json", one_network_or_many(folder, dataset))


def train_once(flags, folder):
    """`train`, unless that run is done."""
    if not (folder / "done").exists():
        train(flags, folder)
        (folder / "done").write_text("")


def train_rivals(dataset, folder, seconds, seed):
    """The adversarial rival and the supervised ceiling of the main pair, about as long as MedShift was trained: each into its file."""
    s, t = evaluate.main_domains(dataset.domains)
    pair = dataset.domains[s], dataset.domains[t]
    dtype = pick_formats("auto", torch.device("cpu"))[0]
    if not (folder / "adversarial-back.pt").exists():
        two = partial(rivals.adversarial, dataset.train[s], dataset.train[t], seed=seed, dtype=dtype)
        steps = rivals.steps_within(seconds, partial(two, progress=lambda line: None))
        print(f"adversarial rival, both ways: {steps} steps", flush=True)
        forth, back = two(steps)
        rivals.save(folder / "adversarial.pt", forth, pair)
        rivals.save(folder / "adversarial-back.pt", back, pair[::-1])
    if not (folder / "supervised.pt").exists():
        first = sets.first_seed(seed, "supervised")
        heads = [sets.phantom.Head(first + i) for i in range(PAIRED_HEADS)]
        source = sets.phantom.render(heads, pair[0], dataset.size).numpy()
        target = sets.phantom.render(heads, pair[1], dataset.size, noise=False).numpy()
        shape = replace(PRESETS["cpu"][1], num_domains=len(dataset.domains), channels=dataset.channels)

        def learn(steps, progress=print):
            torch.manual_seed(seed)
            return rivals.supervised(UNet(shape), source, target, t, steps, batch_size=16, seed=seed, dtype=dtype, progress=progress)

        steps = rivals.steps_within(seconds, partial(learn, progress=lambda line: None))
        print(f"supervised ceiling: {steps} steps", flush=True)
        rivals.save(folder / "supervised.pt", learn(steps), pair, t)


def one_network_or_many(folder, dataset, heads=128):
    """{network: {direction: numbers}}: one network for all domains beside one for the main pair, tau chosen on validation heads."""
    found = {}
    for name in ("medshift", *ONE_PAIR):
        model, state = load_model(folder / name / "checkpoint.pt")
        some = data.only(dataset, state["domains"])
        for pair in (evaluate.MAIN, evaluate.MAIN[::-1]):
            s, t = evaluate.main_domains(some.domains, *pair)
            method, curve = evaluate.with_network(model, state["translate"])[0], curve_of(some)
            asked, q = (evaluate.question(pairs, s, t, heads, "cpu") for pairs in (some.valid, some.test))
            tau = evaluate.best(evaluate.choose(method, [asked], [evaluate.bounds(curve, asked)]))
            row = evaluate.score(q, evaluate.answer(method, q, tau)[0], *evaluate.bounds(curve, q))
            numbers = {key: row[key] for key in ("structure", "noise", "gap_closed", "gap_interval")}
            found.setdefault(name, {})[" -> ".join(pair)] = dict(steps=state["step"], tau=tau, **numbers)
    return found


def rivals_table(found):
    """Markdown: the evaluations of all shifts side by side, then one network for all domains against one for the pair."""
    lines = tables.joint([evaluation for evaluation, _ in found]).splitlines()
    lines += ["", "| S | network | steps | direction | tau | gap closed (95%) | noise |", "|---|---|---|---|---|---|---|"]
    names = {"medshift": "one for all domains", "pair": "one for this pair, a tenth of the steps", "pair-long": "one for this pair, all the steps"}
    for evaluation, pairs in found:
        for network, directions in pairs.items():
            for direction, row in directions.items():
                lines.append(f"| {evaluation['shift']:g} | {names[network]} | {row['steps']} | {direction} | {row['tau']:g} | {tables.gap(row)} | {row['noise']:.2f} |")
    return lines


# ---------------------------------------------------------------- students

STUDENTS = {  # what differs from the student of `python train.py`
    "as it is": {},
    "view 16 pixels": dict(dilations=(1,) * 3),
    "view 64 pixels": dict(dilations=(1, 2, 4, 8, 6, 3)),
    "loss |.|^(1/2)": dict(power=.5),
    "loss |.|^2": dict(power=2.0),
    "lessons at tau .2": dict(tau=.2),
    "lessons at tau .4": dict(tau=.4),
    "lessons to end .97": dict(end=.97),
    "lessons to end 1": dict(end=1.0),
    "main pair alone": dict(alone=True),
    "half the steps": dict(steps=.5),
}


def students(checkpoint, names, report):
    """report(name, row) for the teacher and for each student of STUDENTS, on validation heads. Row: see `student_row`."""
    model, state = load_model(checkpoint)
    config = state["config"]
    if config["x0"] == "image" or config["data"]:
        raise UserError(f"--checkpoint {checkpoint}: the study of students needs a flow that starts from noise, and simulated heads")
    dataset = evaluate.open_data(evaluate.Config(checkpoint=checkpoint, valid_heads=config["valid_heads"], heads=config["test_heads"]), state)
    count, steps, tau, end = (config[name] for name in ("student_images", "student_steps", "student_tau", "student_end"))
    how = dict(steps=5, solver="fireflow", end=end, colour=config["colour"])
    dtype = pick_formats("auto", torch.device("cpu"))[0]
    images = student.spread_out(dataset, count)
    taught = cache(lambda tau, end: student.lessons(model, images, tau, **dict(how, end=end)))
    whole_flow = evaluate.Flow(model, dict(how, guidance=1.0)).make
    report("the teacher", student_row(dataset, lambda s, t: lambda q, _: whole_flow(s, t)(q, tau), {}))
    for name in names:
        change = STUDENTS[name]
        shape = replace(student.shape_for(dataset.size, len(dataset.domains), dataset.channels),
                        **{key: change[key] for key in ("dilations",) if key in change})
        pairs = [evaluate.main_domains(dataset.domains)] if change.get("alone") else None
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            answers = taught(change.get("tau", tau), change.get("end", end))
        net = student.learn(shape, images, answers, int(steps * change.get("steps", 1)), pairs, seed=config["seed"], dtype=dtype,
                            power=change.get("power", 1.0))
        translator = student.Translator(net, student.finish.fit(net, student.spread_out(dataset, min(student.finish.IMAGES, len(dataset.train[0]))), dtype))
        for finished in (False, True):
            row = student_row(dataset, lambda s, t: lambda q, _: translator(q.x, s, t, finished=finished), dict(view=student.view(shape)), bool(pairs))
            report(name + ", finished" * finished, row)


def student_row(dataset, make, more, alone=False, heads=64, heads_each=16):
    """A translator on validation heads: the main pair, and all pairs unless `alone`."""
    method, curve = evaluate.Method("it", "ours", make), curve_of(dataset)
    s, t = evaluate.main_domains(dataset.domains)
    q = evaluate.question(dataset.valid, s, t, heads, "cpu")
    row = evaluate.score(q, evaluate.answer(method, q, None)[0], *evaluate.bounds(curve, q))
    E = np.sort(row["E_heads"])
    tenth = E[-max(1, round(len(E) / 10)):].sum() / E.sum()
    found = dict(more, gap_closed=row["gap_closed"], noise=row["noise"], tenth=float(tenth), E_heads=E.tolist())
    if not alone:
        mean = evaluate.all_pairs([method], {}, lambda s: dataset.valid, dataset.domains, curve, heads_each, "cpu")[1]["it"]
        found.update({key: mean[key] for key in ("worst_pair", "noise_right", "same_head")}, all_pairs=mean["gap_closed"])
    return found


def students_table(rows):
    """Markdown. rows: {name: row}."""
    header = ["translator", "main pair", "its noise", "error in the worst tenth of heads", "all pairs", "worst pair", "noise right, of 20", "same head"]
    lines = [[name, tables.percent(row["gap_closed"]), tables.number(row["noise"]), tables.percent(row["tenth"]), tables.percent(row.get("all_pairs")),
              tables.percent(row.get("worst_pair")), str(row.get("noise_right", "-")), tables.percent(row.get("same_head"))] for name, row in rows.items()]
    return tables.markdown(header, lines)


SHOWN = {"the teacher": "k", "view 64 pixels": "tab:orange", "as it is": "tab:blue", "as it is, finished": "tab:green"}


def students_figure(path, rows):
    """The error of each validation head, sorted: where the teacher's are rare and large, the student's are not."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, colour in SHOWN.items():
        if name in rows:
            E = rows[name]["E_heads"]
            axes.plot(np.arange(1, len(E) + 1) / len(E), E, color=colour, label=name if name == "the teacher" else f"student, {name}")
    axes.set(xlabel="share of heads", ylabel="mean squared error after a low-pass", title=" -> ".join(evaluate.MAIN) + ", simulated validation heads")
    axes.legend()
    with whole(path) as work:
        figure.savefig(work, dpi=110)
    plt.close(figure)


def main_students(c):
    """The study of students: rows are kept, so that it can be stopped and started."""
    names = [name.strip() for name in c.only.split(";")] if c.only else list(STUDENTS)
    for name in names:
        if name not in STUDENTS:
            raise UserError(f"--only {name} is no run of student: choose from {'; '.join(STUDENTS)}")
    out = Path(c.out) / "student"
    out.mkdir(parents=True, exist_ok=True)
    file, start = out / "rows.json", time.time()
    rows = json.loads(file.read_text()) if file.exists() else {}

    def report(name, row):
        rows[name] = row
        write_json(file, rows)
        print(f"[{time.time() - start:.0f} s] {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, (int, float))), flush=True)

    students(c.checkpoint, [name for name in names if f"{name}, finished" not in rows], report)
    lines = students_table(rows)
    with whole(out / "table.md") as work:
        work.write_text("\n".join(lines) + "\n")
    students_figure(out / "heads.png", rows)
    print("\n".join(lines))
    return 0


# ---------------------------------------------------------------- the command

STUDIES = {"moons": (MOONS, moons_table, 2000), "phantom": (PHANTOM, phantom_table, 600)}


def main_rivals(c):
    """The study of rivals: its flags are checked before anything is trained."""
    try:
        shifts = [float(shift) for shift in c.shifts.split(",")]
    except ValueError:
        shifts = [-1.0]
    if not all(0 <= shift <= 1 for shift in shifts) or c.seeds != 1 or c.only:
        raise UserError("the study of rivals takes --shifts, numbers in [0, 1] separated by commas; not --seeds and --only")
    out = Path(c.out) / "rivals"
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for shift in shifts:
        folder = out / f"shift-{shift:g}"
        if not (folder / "one_pair.json").exists():
            rivals_run(shift, 0, c.steps, folder)
        found.append([json.loads((folder / name).read_text()) for name in ("evaluation/results.json", "one_pair.json")])
    lines = rivals_table(found)
    with whole(out / "table.md") as work:
        work.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def main(argv=None):
    c = parse(Config, __doc__, argv)
    others = {"rivals": main_rivals, "student": main_students}
    if c.study not in (*STUDIES, *others):
        raise UserError(f"name a study: {', '.join([*STUDIES, *others])} (found {c.study or 'none'})")
    if c.study in others:
        return others[c.study](c)
    runs, table, steps = STUDIES[c.study]
    names = [name.strip() for name in c.only.split(";")] if c.only else list(runs)
    for name in names:
        if name not in runs:
            raise UserError(f"--only {name} is no run of {c.study}: choose from {'; '.join(runs)}")
    out, steps = Path(c.out) / c.study, c.steps or steps
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(c.seeds):
        for name in names:
            key = f"{name.replace(' ', '-').replace(',', '').replace('.', '')}-{steps}-{seed}"
            file, start = out / f"{key}.json", time.time()
            if file.exists():
                continue
            result = moons_run(name, seed, steps) if c.study == "moons" else phantom_run(name, seed, steps, c.heads, out / key)
            write_json(file, dict(result, seconds=time.time() - start))
            print(f"{name}, seed {seed}: {time.time() - start:.0f} s", flush=True)
    lines = table([json.loads(file.read_text()) for file in sorted(out.glob(f"*-{steps}-*.json"))])
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run(main)
