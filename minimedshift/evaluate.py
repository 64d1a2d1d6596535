"""Every method on the same heads: `python -m minimedshift.evaluate`.

A Question is one ordered pair of domains on N heads: pictures to translate, and their truth. A Method answers it. What a method can be
set to (tau, rounds) is chosen on validation heads; what is reported is measured on test heads, from the population that all domains
share and from the source's own (there a user's synthetic heads are made real).

Leaves in OUT: table.md, results.json, pareto.png and heads.png. Everything about the phantom is simulated, its "real" domains too.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from minimedshift import balance, data, sampler, student
from minimedshift.measure import baselines, metrics, realism, rivals
from minimedshift.phantom import sets
from minimedshift.support.command import UserError, flag, parse, run
from minimedshift.support import images
from minimedshift.support.files import whole, write_json
from minimedshift.support.checkpoint import load_model
from minimedshift.support.log import progress
from minimedshift.support.machine import in_batches, keep_memory, load, machine, pick_device

MAIN = ("synthetic-high", "real-normal")
STUDENT = "MedShift's student"
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # the paper reports .3, .45 and .6
SDEDIT_TAUS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ROUNDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    data: str = flag(None, "folder of images, DIR/DOMAIN/*.png, instead of what the checkpoint was trained on", "what")
    rivals: str = flag("", "folder of learned rivals, as `python -m minimedshift.study rivals` leaves it", "what")
    source: str = flag(None, "domain that is translated in the main table (default: synthetic-high, or the first one)", "what")
    target: str = flag(None, "domain it is translated to (default: real-normal, or the last one)", "what")
    heads: int = flag(128, "test heads of the main pair", "how much", low=1)
    heads_each: int = flag(32, "test heads of every ordered pair", "how much", low=1)
    valid_heads: int = flag(64, "validation heads on which the settings are chosen", "how much", low=1)
    features: str = flag(None, "FILE.py with features(x) -> (B, D) for realism (default: a small network, trained here)", "how much")
    out: str = flag("", "folder of the results (default: evaluation, beside the checkpoint)", "run")
    device: str = flag("auto", "where to compute", "run", ("auto", "cuda", "mps", "cpu"))


# ---------------------------------------------------------------- helpers

def scorer(device):
    """Where scores are computed: they take float64, which mps lacks."""
    return "cpu" if torch.device(device).type == "mps" else device


# ---------------------------------------------------------------- questions

@dataclass(frozen=True)
class Question:
    """Translate x, pictures of N heads in domain number `source`, to domain number `target`. All else is for scoring: see data.Pairs."""
    source: int
    target: int
    x: torch.Tensor                         # (N, C, H, W), on the network's device
    images: torch.Tensor                    # (N, C, H, W) of the target domain, as taken; these on the scores' device
    truth: torch.Tensor                     # (N, C, H, W) of the target domain, noise-free
    second: torch.Tensor | None = None      # (N, C, H, W) of the target domain, taken again
    decoys: torch.Tensor | None = None      # (N, K, C, H, W) truths of other heads in the same view
    materials: torch.Tensor | None = None   # (N, 3, H, W) cm


def question(pairs, s, t, heads, device, x=None):
    """The Question s -> t on the first `heads` heads of `Pairs`. x: the sources, where they are loaded already."""
    pick = lambda array: None if array is None else load(array[:heads, t], scorer(device))
    decoys = materials = None
    if pairs.decoys is not None and pairs.decoys.shape[1]:
        decoys = load(pairs.decoys[:heads, :, t], scorer(device))
    if pairs.materials is not None:
        materials = load(pairs.materials[:heads], scorer(device))
    x = load(pairs.images[:heads, s], device) if x is None else x
    images = pick(pairs.images)
    truth = images if pairs.truth is None else pick(pairs.truth)  # of real pairs a noisy image is all there is
    return Question(s, t, x, images, truth, pick(pairs.second), decoys, materials)


# ---------------------------------------------------------------- methods

@dataclass(frozen=True)
class Method:
    """A way to translate. make(s, t) is called once a pair and gives answer(question, setting) -> (N, C, H, W), or None if it cannot.

    kind: "unpaired" (no network), "learned", "ours", "ceiling" (sees pairs) or "bound" (needs the truth). settings: what is tried on
    validation heads; knob: what they are.
    """
    name: str
    kind: str
    make: Callable
    settings: tuple = (None,)
    knob: str = ""


def without_network(dataset):
    """Methods that need no network: untouched, the unpaired and the paired baselines, the second exposure."""
    methods = [Method("untouched", "bound", lambda s, t: lambda q, _: q.x)]
    for name, fit in baselines.UNPAIRED.items():
        rounds = (1,) if name == "histogram" else ROUNDS
        methods.append(Method(name, "unpaired", cache(partial(fit_unpaired, dataset, fit, max(rounds))), rounds, "rounds"))
    if dataset.valid is not None:
        for name, fit in baselines.PAIRED.items():
            methods.append(Method(name, "ceiling", cache(partial(fit_paired, dataset, fit))))
        if dataset.valid.second is not None:
            methods.append(Method("second exposure", "bound", lambda s, t: lambda q, _: q.second))
        else:
            methods.append(Method("real against real", "bound", lambda s, t: lambda q, _: q.images))
    return methods


def fit_unpaired(dataset, fit, rounds, s, t):
    """A baseline of baselines.UNPAIRED, fitted to the training images of two domains, balanced if the network's were."""
    fitted = fit(dataset.drawn(s), dataset.drawn(t), rounds)
    return lambda q, rounds: fitted.first(rounds)(q.x)


def fit_paired(dataset, fit, s, t):
    """A baseline of baselines.PAIRED, fitted to validation pairs: sources and noise-free truths."""
    pairs = dataset.valid
    truth = pairs.images if pairs.truth is None else pairs.truth
    translate = fit(np.asarray(pairs.images[:, s]), np.asarray(truth[:, t]))
    return lambda q, _: translate(q.x)


class Flow:
    """The paper's translation by one network. The way back is kept: it is the same for every target."""

    def __init__(self, model, how):
        self.model, self.how, self.kept = model, {key: how[key] for key in ("steps", "solver", "end", "colour")}, (None, None, None)
        self.guidance = how["guidance"]

    def make(self, s, t):
        return partial(self.translate, s, t)

    def translate(self, s, t, q, tau):
        draw = torch.Generator(q.x.device).manual_seed(0)
        if not (self.kept[0] is q.x and self.kept[1] == tau):
            back = lambda part: sampler.encode(self.model, part, s, tau, **self.how, generator=draw)
            self.kept = q.x, tau, in_batches(back, q.x)
        forth = lambda part: sampler.decode(self.model, part, t, tau, self.guidance, **self.how, generator=draw)
        return in_batches(forth, self.kept[2])


def with_network(model, how, name="MedShift", taus=TAUS):
    """Methods of one trained network: MedShift at several tau and DDIB (tau 0), or the bridge from image to image."""
    if how["x0"] == "image":
        def make(s, t):
            return lambda q, _: in_batches(lambda part: sampler.translate(model, part, s, t, **how), q.x)
        return [Method("image to image", "learned" if name == "MedShift" else "ours", make)]
    taus = tuple(sorted({tau for tau in (*taus, how["tau"]) if tau < how["end"]}))
    return [Method(name, "ours", Flow(model, how).make, taus, "tau"), Method("DDIB", "learned", Flow(model, how).make, (0.0,), "tau")]


def with_student(translator):
    """The Method of a student that a flow has taught (student.py)."""
    return Method(STUDENT, "ours", lambda s, t: lambda q, _: in_batches(lambda x: translator(x, s, t), q.x))


def learned_rivals(folder, domains, device, end):
    """Methods of the networks that `study rivals` has left in a folder; raises UserError if there is none. end: MedShift's, for SDEdit too."""
    methods, folder = [], Path(folder)
    if (folder / "sdedit" / "checkpoint.pt").exists():
        model, state = load_model(folder / "sdedit" / "checkpoint.pt", device)
        colour = state["translate"]["colour"]

        def noised(s, t):
            answer = partial(rivals.sdedit, model, y_target=t, steps=20, end=end, colour=colour)
            return lambda q, tau: in_batches(partial(answer, tau=tau), q.x)

        methods.append(Method("SDEdit", "learned", noised, SDEDIT_TAUS, "tau"))
    if (folder / "bridge" / "checkpoint.pt").exists():
        model, state = load_model(folder / "bridge" / "checkpoint.pt", device)
        methods += with_network(model, state["translate"])
    for name, kind in (("adversarial", "learned"), ("supervised", "ceiling")):
        translators = {}
        for file in folder.glob(f"{name}*.pt"):
            translate, pair = rivals.load(file, device)
            translators[tuple(domains.index(domain) for domain in pair)] = translate
        if translators:
            methods.append(Method(rivals.NAMES.get(name, name), kind, partial(one_way, translators)))
    if not methods:
        raise UserError(f"--rivals {folder}: found no rival there; `python -m minimedshift.study rivals` trains them")
    return methods


def one_way(translators, s, t):
    """The answer of translators that know some pairs alone, {(s, t): function}; None for the others."""
    if (s, t) not in translators:
        return None
    return lambda q, _: in_batches(translators[s, t], q.x)


# ---------------------------------------------------------------- asking

def answer(method, q, setting):
    """The translation of a Question by a Method, clipped like a stored image, and seconds; None where it does not know the pair."""
    translate = method.make(q.source, q.target)
    if translate is None:
        return None, 0.0
    start = time.time()
    x = translate(q, setting)
    if x.is_cuda:
        torch.cuda.synchronize()
    return x.to(q.truth.device).clamp(-1, 1), time.time() - start


def bounds(curve, q):
    """Errors (N,) of the best grey-value curve and of the second exposure: what `gap closed` is measured by."""
    E_curve = metrics.structure_mse(answer(curve, q, None)[0], q.truth)
    E_second = torch.zeros_like(E_curve) if q.second is None else metrics.structure_mse(q.second, q.truth)
    return E_curve, E_second


def choose(method, questions, references):
    """{setting: mean gap closed over validation questions}, for every setting of a method."""
    found = {}
    for setting in method.settings:
        gaps = []
        for q, (E_curve, E_second) in zip(questions, references):
            x, _ = answer(method, q, setting)
            if x is not None:
                E = metrics.structure_mse(x, q.truth)
                gaps.append(metrics.gap_closed(E.mean().item(), E_curve.mean().item(), E_second.mean().item()))
        gaps = [gap for gap in gaps if gap is not None]
        found[setting] = float(np.mean(gaps)) if gaps else -math.inf
    return found


def sweep(method, q, limits, reference):
    """A method along its own knob, on one validation question: [dict(setting, gap_closed, structure, kernel)], empty if it does not know the pair."""
    points = []
    E_curve, E_second = (E.mean().item() for E in limits)
    for setting in method.settings:
        x, _ = answer(method, q, setting)
        if x is not None:
            E = metrics.structure_mse(x, q.truth).mean().item()
            points.append(dict(setting=setting, gap_closed=metrics.gap_closed(E, E_curve, E_second), structure=metrics.structure(x, q.truth).mean().item(),
                               kernel=realism.score(x, reference)["kernel"]))
    return points


def best(found):
    """The setting with the highest validation score."""
    return max(found, key=found.get)


def score(q, x, E_curve, E_second, reference=None):
    """All numbers of one translation: metrics.score, and with a `realism.Reference` how near the set is to the target domain."""
    numbers = metrics.score(x, q.truth, q.images, E_curve, E_second, q.decoys, q.materials)
    if torch.equal(q.truth, q.images):  # real pairs: no noise-free truth, nothing to measure noise by
        numbers.update(noise=None, spectrum=None)
    if reference is not None:
        numbers.update(realism.score(x, reference))
    return numbers


def main_pair(methods, chosen, q, curve, reference, say=print):
    """{method: numbers} of one Question, {method: translations}; each row has its setting, its seconds and its distance to ours."""
    E_curve, E_second = bounds(curve, q)
    rows, pictures = {}, {}
    for method in methods:
        x, seconds = answer(method, q, chosen.get(method.name))
        if x is None:
            continue
        rows[method.name] = dict(kind=method.kind, knob=method.knob, setting=chosen.get(method.name), seconds=seconds,
                                 **score(q, x, E_curve, E_second, reference))
        pictures[method.name] = x
        say(f"  {method.name}: {line(rows[method.name])}", flush=True)
    add_differences(rows, E_curve, E_second)
    return rows, pictures


def line(row):
    """A row of numbers as a short text."""
    gap = "no gap" if row["gap_closed"] is None else f"gap closed {row['gap_closed']:.0%}"
    noise = "" if row["noise"] is None else f", noise {row['noise']:.2f}"
    return f"structure {row['structure']:.2f} dB, {gap}{noise}, {row['seconds']:.1f} s"


def add_differences(rows, E_curve, E_second):
    """Into each row: the 95 % interval of its gap closed less ours (`ours`, paired over heads), and its ranks among unpaired methods."""
    errors = {name: torch.tensor(row["E_heads"]) for name, row in rows.items()}
    E_curve, E_second = E_curve.cpu(), E_second.cpu()
    for name, row in rows.items():
        if ours(rows) not in (None, name):
            row["less_ours"] = metrics.difference_interval(errors[name], errors[ours(rows)], E_curve, E_second)
    contenders = [name for name, row in rows.items() if row["kind"] in ("unpaired", "learned", "ours")]
    if len(contenders) < 2:
        return
    structure = metrics.ranks({name: errors[name] for name in contenders})
    for name in contenders:
        rows[name]["rank_structure"] = structure[name]
    if all("realism_heads" in rows[name] for name in contenders):
        look = metrics.ranks({name: torch.tensor(rows[name]["realism_heads"]) for name in contenders})
        for name in contenders:
            rows[name]["rank_realism"] = look[name]
            rows[name]["rank"] = (look[name] + structure[name]) / 2


def ours(rows):
    """The row that others are compared with: the student's, or where there is none MedShift's; None without either."""
    names = [name for name, row in rows.items() if row["kind"] == "ours"]
    return STUDENT if STUDENT in names else names[0] if names else None


def all_pairs(methods, chosen, pairs_of, domains, curve, heads, device, report=lambda done, total: None):
    """Every ordered pair: {method: {"source -> target": numbers}} and {method: summary}. pairs_of(s): the `Pairs` of source s."""
    rows = {method.name: {} for method in methods}
    errors = {method.name: [] for method in methods}
    limits, done, total = [], 0, len(domains) * (len(domains) - 1)
    for s, source in enumerate(domains):
        pairs = pairs_of(s)
        x = load(pairs.images[:heads, s], device)
        for t, target in enumerate(domains):
            if s == t:
                continue
            q = question(pairs, s, t, heads, device, x)
            E_curve, E_second = bounds(curve, q)
            E_untouched = metrics.structure_mse(q.x.to(q.truth.device), q.truth)
            gap = E_untouched.mean() > E_second.mean()  # a cleaner source has nothing to close: it is judged by its noise alone
            limits.append((E_curve, E_second, bool(gap)))
            for method in methods:
                out, seconds = answer(method, q, chosen.get(method.name))
                if out is None:
                    continue
                E = metrics.structure_mse(out, q.truth)
                row = dict(structure=metrics.structure(out, q.truth).mean().item(), E=E.mean().item(), seconds=seconds, gap_closed=None,
                           same_head=None if q.decoys is None else metrics.same_head(out, q.truth, q.decoys).float().mean().item(),
                           noise=None if torch.equal(q.truth, q.images) else metrics.noise_ratio(out, q.images, q.truth))
                if gap:
                    row["gap_closed"] = metrics.gap_closed(row["E"], E_curve.mean().item(), E_second.mean().item())
                rows[method.name][f"{source} -> {target}"] = row
                errors[method.name].append(E)
            done += 1
            report(done, total)
    return rows, {method.name: summary(method, chosen, rows[method.name], errors[method.name], limits) for method in methods
                  if len(rows[method.name]) == total}


def summary(method, chosen, rows, errors, limits):
    """Means over all ordered pairs: gap closed with its interval over heads, the worst pair, noise within 1/2 to 2, same head."""
    gaps = [row["gap_closed"] for row in rows.values() if row["gap_closed"] is not None]
    result = dict(kind=method.kind, setting=chosen.get(method.name), pairs=len(rows), pairs_with_gap=len(gaps))
    if gaps:
        some = [i for i, (_, _, gap) in enumerate(limits) if gap]
        E, E_curve, E_second = (torch.stack([each[i] for i in some]).cpu() for each in (errors, *list(zip(*limits))[:2]))
        mean_gap = lambda E, curve, second: ((curve - E).mean(-1) / (curve - second).mean(-1)).mean(0)  # (pairs, draws, N) -> (draws,)
        result.update(gap_closed=float(np.mean(gaps)), worst_pair=min(gaps), gap_interval=list(metrics.bootstrap(mean_gap, E, E_curve, E_second)))
    noise = [row["noise"] for row in rows.values() if row["noise"] is not None]
    same = [row["same_head"] for row in rows.values() if row["same_head"] is not None]
    result.update(noise_right=sum(.5 <= ratio <= 2 for ratio in noise) if noise else None, same_head=float(np.mean(same)) if same else None)
    return result


def summary_line(mean):
    """A summary as a short text."""
    parts = ["no gap to close"]
    if mean.get("gap_closed") is not None:
        parts = [f"mean gap closed {mean['gap_closed']:.0%} over the {mean['pairs_with_gap']} that have one"]
    if mean["noise_right"] is not None:
        parts.append(f"noise within 1/2 to 2 in {mean['noise_right']}")
    if mean["same_head"] is not None:
        parts.append(f"same head {mean['same_head']:.1%}")
    return "; ".join(parts)


# ---------------------------------------------------------------- what train.py reports at its end

def report(model, dataset, how, device="cpu", translator=None, heads=128, heads_each=32, say=print):
    """report.json as a dict, and the main pair's translations for its picture: MedShift beside methods that need no network.

    how: tau, guidance, steps, solver, end, colour, x0. MedShift stands at every tau of TAUS, and at `tau` for all pairs;
    beside it its student, if there is one.
    """
    start = time.time()
    s, t = main_domains(dataset.domains)
    flow, plain, simulation = with_network(model, how)[0], without_network(dataset), dataset.test.truth is not None
    curve = next(method for method in plain if method.name == "curve")
    q = question(dataset.test, s, t, heads, device)
    asked = question(dataset.valid, s, t, len(dataset.valid.images), device)
    chosen = {method.name: best(choose(method, [asked], [bounds(curve, asked)])) for method in plain}
    what = "simulated test heads" if simulation else "test images, paired by file name"
    say(f"{dataset.domains[s]} -> {dataset.domains[t]}, {len(q.x)} {what}, EMA weights:", flush=True)
    rows, pictures = main_pair(plain, chosen, q, curve, None, say)
    E_curve, E_second = bounds(curve, q)
    taus = {}
    for tau in flow.settings:
        x, seconds = answer(flow, q, tau)
        taus[tau] = dict(score(q, x, E_curve, E_second), seconds=seconds)
        pictures[tau] = x
        name = flow.name if tau is None else f"{flow.name}, tau {tau:g}"
        say(f"  {name}: {line(taus[tau])}", flush=True)
    main = dict(source=dataset.domains[s], target=dataset.domains[t], heads=len(q.x), methods=rows, medshift=taus, student=None)
    methods = [flow]
    if translator:
        methods.append(with_student(translator))
        x, seconds = answer(methods[-1], q, None)
        main["student"] = dict(score(q, x, E_curve, E_second), seconds=seconds)
        pictures[STUDENT] = x
        say(f"  {STUDENT}: {line(main['student'])}", flush=True)
    tau = how["tau"] if how["x0"] == "noise" else None
    each, means = all_pairs(methods, {flow.name: tau}, lambda s: dataset.test, dataset.domains, curve, heads_each, device)
    for name, mean in means.items():
        at = "" if tau is None or name == STUDENT else f", tau {tau:g}"
        say(f"all {mean['pairs']} ordered pairs, {name}{at}: {summary_line(mean)}", flush=True)
    return dict(simulated=simulation, version=sets.phantom.VERSION if simulation else None, translation=how, main_pair=main,
                pairs=each[flow.name], all_pairs=means[flow.name], student_pairs=each.get(STUDENT), student_all_pairs=means.get(STUDENT),
                evaluation_seconds=time.time() - start), pictures


def picture(path, dataset, main, pictures, count=6):
    """translations.png: source | MedShift at each tau | its student | simulated truth of the first test heads, with the scores."""
    s, t = (dataset.domains.index(main[name]) for name in ("source", "target"))
    columns, captions = [load(dataset.test.images[:count, s], "cpu")], [f"{main['source']}\nsource"]
    rows = main["medshift"] | ({STUDENT: main["student"]} if main["student"] else {})
    for tau, row in rows.items():
        columns.append(pictures[tau][:count].cpu())
        name = "directly" if tau is None else "student" if tau == STUDENT else f"tau {tau:g}"
        captions.append(f"{name}: {row['structure']:.1f} dB" + ("" if row["noise"] is None else f"\nnoise {row['noise']:.2f}"))
    truth = dataset.test.images if dataset.test.truth is None else dataset.test.truth
    columns.append(load(truth[:count, t], "cpu"))
    captions.append(f"{main['target']}\n" + ("the other image" if dataset.test.truth is None else "simulated truth"))
    images.figure(path, [list(row) for row in zip(*columns)], captions, [""] * count)


def main_domains(domains, source=None, target=None):
    """The numbers of the main pair's domains: synthetic-high -> real-normal, or where they are missing the first -> the last."""
    domains = list(domains)
    if source is None:
        source = MAIN[0] if MAIN[0] in domains and MAIN[0] != target else [name for name in domains if name != target][0]
    if target is None:
        target = MAIN[1] if MAIN[1] in domains and MAIN[1] != source else [name for name in domains if name != source][-1]
    return domains.index(source), domains.index(target)


# ---------------------------------------------------------------- the whole evaluation

def open_data(c, state):
    """The data set that a checkpoint is scored on: the simulated one it was trained on, or a folder."""
    config = state["config"]
    if c.data or config.get("data"):
        dataset = data.folder_set(c.data or config["data"], state["image"]["size"], config["seed"])
    else:
        dataset = sets.phantom_set(state["image"]["size"], config["train_images"], c.valid_heads, c.heads, config["seed"], config["shift"])
    if not set(state["domains"]) <= set(dataset.domains):
        raise UserError(f"{c.checkpoint} knows the domains {', '.join(state['domains'])}, the data has {', '.join(dataset.domains)}")
    dataset = data.only(dataset, state["domains"])
    if dataset.channels != state["image"]["channels"]:
        raise UserError(f"{c.checkpoint} takes images of {state['image']['channels']} channels, the data has {dataset.channels}")
    return balance.balanced(dataset) if config.get("balance") else dataset


def feature_sets(dataset):
    """What the small network of features learns from: the real domains' training images; of a folder, all domains'."""
    real = [images for name, images in zip(dataset.domains, dataset.train) if name.startswith("real")]
    return real if len(real) >= 2 else list(dataset.train)


class Phase:
    """Says what is being done, and how long the whole has taken."""

    def __init__(self):
        self.start = time.time()

    def __call__(self, text):
        print(f"[{time.time() - self.start:.0f} s] {text}", flush=True)


def with_truth(c, methods, dataset, pairs_of, s, t, reference, device, phase):
    """Everything that needs paired test heads. pairs_of: {population: function from a source domain's number to `Pairs`}."""
    curve = next(method for method in methods if method.name == "curve")
    several = [method for method in methods if len(method.settings) > 1]
    phase(f"choosing settings on {min(c.valid_heads, len(dataset.valid.images))} validation heads")
    asked = question(dataset.valid, s, t, c.valid_heads, device)
    limits = bounds(curve, asked)
    curves = {method.name: points for method in methods if (points := sweep(method, asked, limits, reference))}
    settings = {method.name: {point["setting"]: point["gap_closed"] or 0.0 for point in curves[method.name]} for method in several if method.name in curves}
    chosen = {name: best(found) for name, found in settings.items()} | {method.name: method.settings[0] for method in methods if method not in several}
    for name, found in settings.items():
        print(f"  {name}: " + ", ".join(f"{setting:g}: {gap:.0%}" for setting, gap in found.items()) + f" -> {chosen[name]:g}", flush=True)

    few = [question(dataset.valid, a, b, 8, device) for a in range(len(dataset.domains)) for b in range(len(dataset.domains)) if a != b]
    bounded = [bounds(curve, q) for q in few]
    phase(f"choosing settings for all {len(few)} ordered pairs, 8 validation heads each")
    quick = [method for method in methods if method.name != "SDEdit"]  # far below the curve on the main pair, and the slowest
    settings_all = {method.name: choose(method, few, bounded) for method in quick if method in several}
    chosen_all = chosen | {name: best(found) for name, found in settings_all.items()}
    for name, found in settings_all.items():
        print(f"  {name}: " + ", ".join(f"{setting:g}: {gap:.0%}" for setting, gap in found.items()) + f" -> {chosen_all[name]:g}", flush=True)

    main, everything, kept = {}, {}, {}
    for population, pairs in pairs_of.items():
        phase(f"{dataset.domains[s]} -> {dataset.domains[t]}, {c.heads} test heads, population {population}")
        q = question(pairs(s), s, t, c.heads, device)
        main[population], kept[population] = main_pair(methods, chosen, q, curve, reference)
    for population, pairs in pairs_of.items():
        phase(f"all {len(few)} ordered pairs, {c.heads_each} test heads each, population {population}")
        start = time.time()
        show = lambda done, total: progress(done, total, start, "scoring pairs", "pairs")
        rows, means = all_pairs(quick, chosen_all, pairs, dataset.domains, curve, c.heads_each, device, show)
        everything[population] = dict(pairs=rows, means=means)
    return dict(settings=settings, settings_all_pairs=settings_all, main_pair=main, all_pairs=everything, pareto=curves), kept


def without_truth(methods, dataset, s, t, reference, device):
    """Realism alone, for unpaired test images: every method at every setting, and real against real."""
    x, real = load(dataset.held_out[s], device), load(dataset.held_out[t], scorer(device))
    if not len(x) or not len(real):
        raise UserError("the data has no held-out images to evaluate on")
    rows = {"real against real": dict(kind="bound", **realism.score(real, reference))}
    for method in methods:
        for setting in method.settings:
            start = time.time()
            out = method.make(s, t)(Question(s, t, x, real, real), setting).clamp(-1, 1).to(real.device)
            name = method.name if setting is None or len(method.settings) == 1 else f"{method.name}, {method.knob} {setting:g}"
            rows[name] = dict(kind=method.kind, seconds=time.time() - start, **realism.score(out, reference))
    return dict(unpaired=rows)


def main(argv=None):
    from minimedshift.measure import tables
    c = parse(Config, __doc__, argv)
    device, phase = pick_device(c.device), Phase()
    keep_memory()
    model, state = load_model(c.checkpoint, device)
    for name in ("source", "target"):
        if getattr(c, name) not in (None, *state["domains"]):
            raise UserError(f"--{name} {getattr(c, name)} is not a domain of {c.checkpoint}: choose from {', '.join(state['domains'])}")
    features = realism.load_features(c.features) if c.features else None
    dataset = open_data(c, state)
    s, t = main_domains(dataset.domains, c.source, c.target)
    if s == t:
        raise UserError(f"--source and --target are both {dataset.domains[s]}: translate between two domains")
    methods = without_network(dataset)
    if c.rivals:
        methods += learned_rivals(c.rivals, list(dataset.domains), device, state["translate"]["end"])
    methods += with_network(model, state["translate"])
    if state.get("student"):
        methods.append(with_student(student.restore(state["student"], device, c.checkpoint)))
    out = Path(c.out) if c.out else Path(c.checkpoint).parent / "evaluation"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror})") from None

    if features is None:
        phase("training a small network of features, for realism")
        features = realism.train_features(feature_sets(dataset))
    reference = realism.Reference(load(dataset.train[t], scorer(device)), features)
    config = state["config"]
    results = dict(command=" ".join(["python -m minimedshift.evaluate", *(argv or tables.sys.argv[1:])]), checkpoint=c.checkpoint, steps=state["step"],
                   weights="EMA", machine=machine(device), torch=torch.__version__, seed=config["seed"], source=dataset.domains[s],
                   target=dataset.domains[t], features=c.features or "small network", references=len(reference.images))
    if dataset.test is None:
        results.update(simulated=False, heads=len(dataset.held_out[s]), **without_truth(methods, dataset, s, t, reference, device))
    else:
        pairs_of = {"shared": lambda source: dataset.test}
        if dataset.test.truth is not None:
            own = lambda source: sets.own_heads(dataset, dataset.domains[source], c.heads, config["seed"])
            pairs_of["own"] = cache(own)
            results.update(simulated=True, version=sets.phantom.VERSION, shift=config["shift"], balance=config.get("balance", False))
        found, kept = with_truth(c, methods, dataset, pairs_of, s, t, reference, device, phase)
        results.update(heads=min(c.heads, len(dataset.test.images)), heads_each=min(c.heads_each, len(dataset.test.images)), **found)
        tables.pareto(out / "pareto.png", results)
        if results.get("simulated"):
            heads_picture(out / "heads.png", methods, results, dataset, s, t, config["seed"], model.stride, device)
        else:
            columns = {name: x for name, x in kept["shared"].items()}
            images.figure(out / "heads.png", [list(row) for row in zip(*(x[:4].cpu() for x in columns.values()))], list(columns), [""] * 4)
    results["seconds"] = time.time() - phase.start
    write_json(out / "results.json", results)
    text = tables.table(results)
    with whole(out / "table.md") as work:
        work.write_text(text)
    print(text)
    phase(f"{out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))
    return 0


def heads_picture(path, methods, results, dataset, s, t, seed, stride, device, size=256):
    """heads.png: the same test heads under all methods, a row each, at full resolution as a user gets them (carry.py).

    The columns are our median head, the one at the edge of its worst tenth, and its worst.
    """
    from minimedshift.measure import tables
    from minimedshift.support.carry import carry, resize, working_shape
    rows = results["main_pair"]["shared"]
    best_of_ours = ours(rows)
    order = np.argsort(rows[best_of_ours]["E_heads"])
    places = {"median head": .5, "90th percentile": .9, "worst head": 1.0}
    shown = {name: int(order[min(len(order) - 1, int(share * len(order)))]) for name, share in places.items()}
    people = [sets.phantom.Head(sets.first_seed(seed, "test") + i) for i in shown.values()]
    draw = lambda domain, **how: sets.phantom.render(people, dataset.domains[domain], max(size, dataset.size), **how).to(device)
    full, truth = draw(s), draw(t, noise=False)
    small = resize(full, working_shape(*full.shape[-2:], dataset.size, stride))
    q = Question(s, t, small, small, small, small)
    figure = {"source": full}
    for method in methods:
        if method.name in ("untouched", "second exposure") or method.name not in rows:
            continue
        x = method.make(s, t)(q, rows[method.name]["setting"]).to(device)
        figure[method.name] = (x if x.shape == full.shape else carry(full, small, x)).clamp(-1, 1)
    figure = {name: figure[name] for name in ("source", *(name for name, _ in tables.ordered(rows) if name in figure))}  # what sees pairs comes last
    figure |= {"second exposure": draw(t, exposure=1), "truth, noise-free": truth}
    labels = []
    for name in figure:
        seen = "\n(sees pairs)" if name in rows and rows[name]["kind"] == "ceiling" else ""
        labels.append(f"{name}\n{rows[name]['structure']:.1f} dB, mean{seen}" if name in rows else name)
    images.figure(path, [list(x.cpu()) for x in figure.values()], [f"{name} of {best_of_ours}: {i}" for name, i in shown.items()], labels, cell=size)


if __name__ == "__main__":
    run(main)
