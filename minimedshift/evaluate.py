"""The evaluation, `python -m minimedshift.evaluate`: every method on the same heads.

What a method can be set to (tau, rounds) is chosen on validation heads. What is reported is measured on test
heads, of the population that all domains share and of the source's own (there a user's synthetic heads are
made real). Test images that are no pairs are scored by realism alone.

Leaves in OUT: table.md, results.json, pareto.png and heads.png. Everything about the phantom is simulated,
its "real" domains too.
"""

import sys
import time
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from minimedshift import balance, data, student
from minimedshift import metrics, realism, tables
from minimedshift.methods import STUDENT, Question, answer, every_method
from minimedshift.methods import main_domains, question, scorer
from minimedshift.phantom import sets
from minimedshift.support.checkpoint import load_model
from minimedshift.support.command import UserError, flag, parse, run
from minimedshift.support.files import clear_unfinished, explain_os_error, write_whole, write_json
from minimedshift.support.images import figure
from minimedshift.support.machine import keep_memory, to_float, machine_name, pick_device


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    data: str = flag(None, "folder of images, DIR/DOMAIN/*.png, instead of what it was trained on", "what")
    rivals: str = flag("", "folder that `python -m minimedshift.study rivals` leaves", "what")
    source: str = flag(None, "domain to translate (default: synthetic-high, or the first)", "what")
    target: str = flag(None, "domain to translate to (default: real-normal, or the last)", "what")
    heads: int = flag(128, "test heads of the main pair", "how much", low=2, high=10**6)
    heads_each: int = flag(32, "test heads of every ordered pair", "how much", low=1, high=10**6)
    valid_heads: int = flag(64, "validation heads on which the settings are chosen", "how much", low=2,
                            high=10**6)
    features: str = flag(None, "FILE.py with features(x) -> (B, D) for realism", "how much")
    out: str = flag("", "folder of the results (default: evaluation, beside the checkpoint)", "run")
    device: str = flag("auto", "where to compute", "run", ("auto", "cuda", "mps", "cpu"))


# ---------------------------------------------------------------- scores

def bounds(curve, q):
    """Errors (N,) of the best grey-value curve and of the second exposure: 0 and 1 of `gap closed`."""
    E_curve = metrics.structure_mse(answer(curve, q)[0], q.truth)
    E_second = torch.zeros_like(E_curve) if q.second is None else metrics.structure_mse(q.second, q.truth)
    return E_curve, E_second


def gap_closed(E, limits):
    """metrics.gap_closed of errors E (N,), with the `bounds` of their question."""
    return metrics.gap_closed(*(each.mean().item() for each in (E, *limits)))


def mean(values):
    """The mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def sweep(methods, questions, curve, reference=None):
    """Methods at each of their settings, means over validation questions: {name: [{setting, gap_closed}]}.
    With a realism.Reference structure and kernel too. Methods that know none of the pairs are left out."""
    limits = [bounds(curve, q) for q in questions]
    found = {}
    for method in methods:
        for setting in method.settings:
            rows = []
            for q, limit in zip(questions, limits):
                x, _ = answer(method, q, setting)
                if x is None:
                    continue
                row = dict(gap_closed=gap_closed(metrics.structure_mse(x, q.truth), limit))
                if reference is not None:
                    row["structure"] = metrics.structure(x, q.truth).mean().item()
                    row["kernel"] = realism.score(x, reference)["kernel"]
                rows.append(row)
            if rows:
                point = {key: mean(row[key] for row in rows) for key in rows[0]}
                found.setdefault(method.name, []).append(dict(setting=setting, **point))
    return found


def best(points):
    """The setting of a sweep that closes the most of the gap."""
    gaps = {point["setting"]: point["gap_closed"] for point in points}
    return max(gaps, key=lambda setting: -np.inf if gaps[setting] is None else gaps[setting])


def score(q, x, E_curve, E_second, reference=None):
    """All numbers of one translation: metrics.score, and with a realism.Reference how real the set looks."""
    numbers = metrics.score(x, q.truth, q.images, E_curve, E_second, q.decoys, q.materials)
    return numbers if reference is None else numbers | realism.score(x, reference)


def main_pair(methods, chosen, q, curve, reference=None):
    """{method: numbers} of one Question, and {method: translations}.
    less_ours: 95 % interval of the gap closed less that of `ours`, paired over heads."""
    E_curve, E_second = bounds(curve, q)
    rows, pictures = {}, {}
    for method in methods:
        setting = chosen.get(method.name)
        x, seconds = answer(method, q, setting)
        if x is None:
            continue
        row = dict(kind=method.kind, knob=method.knob, setting=setting, seconds=seconds)
        rows[method.name] = row | score(q, x, E_curve, E_second, reference)
        pictures[method.name] = x
        print(f"  {method.name}: {line(rows[method.name])}", flush=True)
    limits = E_curve.cpu(), E_second.cpu()
    for name, row in rows.items():
        if ours(rows) not in (None, name):
            errors = [torch.tensor(rows[each]["E_heads"]) for each in (name, ours(rows))]
            row["less_ours"] = metrics.difference_interval(*errors, *limits)
    return rows, pictures


def line(row):
    """A row of numbers as a short text."""
    noise = "" if row["noise"] is None else f", noise {row['noise']:.2f}"
    gap = tables.percent(row["gap_closed"])
    return f"structure {row['structure']:.2f} dB, gap closed {gap}{noise}, {row['seconds']:.1f} s"


def ours(rows):
    """The row that others are compared with: the student's, or MedShift's; None without either."""
    names = [name for name, row in rows.items() if row["kind"] == "ours"]
    return names[-1] if names else None


def all_pairs(methods, chosen, pairs_of, domains, curve, heads, device):
    """Every ordered pair: {method: {"source -> target": numbers}}, and {method: summary} where all are known.
    pairs_of(s): the `Pairs` of source s."""
    rows = {method.name: {} for method in methods}
    errors = {method.name: [] for method in methods}  # (N,) of each pair with a gap
    limits = []
    for s, source in enumerate(domains):
        pairs = pairs_of(s)
        x = to_float(pairs.images[:heads, s], device)  # one tensor: a flow's way back is kept
        for t, target in enumerate(domains):
            if s == t:
                continue
            q = question(pairs, s, t, heads, device, x)
            limit = bounds(curve, q)
            E_untouched = metrics.structure_mse(x.to(q.truth.device), q.truth)
            gap = E_untouched.mean() > limit[1].mean()  # a cleaner source has nothing to close
            if gap:
                limits.append(limit)
            for method in methods:
                out, seconds = answer(method, q, chosen.get(method.name))
                if out is None:
                    continue
                E = metrics.structure_mse(out, q.truth)
                row = dict(structure=metrics.structure(out, q.truth).mean().item(), E=E.mean().item())
                row.update(seconds=seconds, gap_closed=None, same_head=None, noise=None)
                if gap:
                    errors[method.name].append(E)
                    row["gap_closed"] = gap_closed(E, limit)
                if q.decoys is not None:
                    row["same_head"] = metrics.same_head(out, q.truth, q.decoys).float().mean().item()
                if not torch.equal(q.truth, q.images):
                    row["noise"] = metrics.noise_ratio(out, q.images, q.truth)
                rows[method.name][f"{source} -> {target}"] = row
    means = {}
    for method in methods:
        if len(rows[method.name]) == len(domains) * (len(domains) - 1):
            means[method.name] = dict(kind=method.kind, setting=chosen.get(method.name))
            means[method.name].update(summary(rows[method.name].values(), errors[method.name], limits))
    return rows, means


def summary(rows, errors, limits):
    """Means over ordered pairs, the worst pair, and how many have noise within 1/2 to 2.
    errors: (N,) of each pair with a gap; limits: its `bounds`."""
    gaps = [row["gap_closed"] for row in rows if row["gap_closed"] is not None]
    noise = [row["noise"] for row in rows if row["noise"] is not None]
    result = dict(pairs=len(rows), pairs_with_gap=len(gaps), same_head=mean(row["same_head"] for row in rows))
    result["noise_right"] = sum(.5 <= ratio <= 2 for ratio in noise) if noise else None
    if gaps:
        def mean_gap(E, curve, second):  # (pairs, draws, N) -> (draws,)
            return ((curve - E).mean(-1) / (curve - second).mean(-1)).mean(0)

        per_head = [torch.stack(each).cpu() for each in (errors, *zip(*limits))]
        interval = list(metrics.bootstrap(mean_gap, *per_head))
        result.update(gap_closed=mean(gaps), worst_pair=min(gaps), gap_interval=interval)
    return result


# ---------------------------------------------------------------- what train.py reports at its end

def report(model, dataset, how, device="cpu", translator=None, heads=128, heads_each=32):
    """report.json as a dict, and the main pair's translations for its picture.

    MedShift at every tau (at `tau` of all pairs) and its student, beside methods that need no network.
    how: tau, guidance, steps, solver, end, colour, x0.
    """
    start = time.time()
    s, t = main_domains(dataset.domains)
    source, target = dataset.domains[s], dataset.domains[t]
    methods = every_method(dataset, model, how, translator)
    plain = [method for method in methods if method.kind in ("bound", "unpaired", "ceiling")]
    trained = [method for method in methods if method.kind == "ours" or method.name == "image to image"]
    curve = next(method for method in plain if method.name == "curve")
    asked = question(dataset.valid_pairs, s, t, len(dataset.valid_pairs.images), device)
    chosen = {name: best(points) for name, points in sweep(plain, [asked], curve).items()}
    q = question(dataset.test_pairs, s, t, heads, device)
    print(f"{source} -> {target}, {len(q.x)} test heads, EMA weights:", flush=True)
    rows, pictures = main_pair(plain, chosen, q, curve)
    limits, medshift = bounds(curve, q), {}
    for method in trained:
        for setting in method.settings:
            key = STUDENT if method.name == STUDENT else setting
            pictures[key], seconds = answer(method, q, setting)
            medshift[key] = dict(score(q, pictures[key], *limits), seconds=seconds)
            name = tables.label(method.name, dict(setting=setting, knob=method.knob))
            print(f"  {name}: {line(medshift[key])}", flush=True)
    taught = medshift.pop(STUDENT, None)
    main = dict(source=source, target=target, heads=len(q.x), methods=rows, medshift=medshift, student=taught)
    flow = trained[0].name
    at = {flow: how["tau"] if how["x0"] == "noise" else None}
    each, means = all_pairs(trained, at, lambda s: dataset.test_pairs, dataset.domains, curve, heads_each, device)
    for name, row in means.items():
        gap, same = tables.percent(row.get("gap_closed")), tables.percent(row["same_head"])
        print(f"all {row['pairs']} ordered pairs, {name}: gap closed {gap}, same head {same}", flush=True)
    simulated = dataset.test_pairs.truth is not None
    version = sets.phantom.VERSION if simulated else None
    return dict(simulated=simulated, version=version, translation=how, main_pair=main, pairs=each[flow],
                all_pairs=means[flow], student_pairs=each.get(STUDENT), student_all_pairs=means.get(STUDENT),
                evaluation_seconds=time.time() - start), pictures


def picture(path, dataset, main, pictures, count=6):
    """translations.png: source | MedShift at each tau | its student | truth, of the first test heads."""
    s, t = (dataset.domains.index(main[name]) for name in ("source", "target"))
    test = dataset.test_pairs
    columns = {f"{main['source']}\nsource": to_float(test.images[:count, s], "cpu")}
    rows = main["medshift"] | ({STUDENT: main["student"]} if main["student"] else {})
    for tau, row in rows.items():
        name = {None: "directly", STUDENT: "student"}.get(tau) or f"tau {tau:g}"
        noise = "" if row["noise"] is None else f"\nnoise {row['noise']:.2f}"
        columns[f"{name}: {row['structure']:.1f} dB{noise}"] = pictures[tau][:count].cpu()
    truth, what = (test.images, "the other image") if test.truth is None else (test.truth, "simulated truth")
    columns[f"{main['target']}\n{what}"] = to_float(truth[:count, t], "cpu")
    figure(path, list(zip(*columns.values())), list(columns), [""] * count)


# ---------------------------------------------------------------- the command

def open_data(c, state):
    """The data set that a checkpoint is scored on: the simulated one it was trained on, or a folder."""
    config, image, domains = state["config"], state["image"], state["domains"]
    if folder := c.data or config.get("data"):
        dataset = data.folder_set(folder, image["size"], config["seed"])
    else:
        count = config["train_images"], c.valid_heads, c.heads
        dataset = sets.phantom_set(image["size"], *count, config["seed"], config["shift"])
    if not set(domains) <= set(dataset.domains) or dataset.channels != image["channels"]:
        raise UserError(f"{c.checkpoint} knows {', '.join(domains)} and {image['channels']} channels; "
                        f"the data has {', '.join(dataset.domains)} and {dataset.channels}")
    dataset = data.select_domains(dataset, domains)
    return balance.balanced(dataset) if config.get("balance") else dataset


def with_truth(c, methods, dataset, pairs_of, s, t, reference, device, say):
    """What needs pairs: a part of results.json, and the main pair's pictures {name: (N, C, H, W)}.
    pairs_of: {population: function from a source domain's number to its `Pairs`}."""
    domains = dataset.domains
    curve = next(method for method in methods if method.name == "curve")
    quick = [method for method in methods if method.name != "SDEdit"]  # far below the curve, and the slowest
    several = [method for method in quick if len(method.settings) > 1]
    say(f"choosing settings on {min(c.valid_heads, len(dataset.valid_pairs.images))} validation heads")
    asked = question(dataset.valid_pairs, s, t, c.valid_heads, device)
    points = sweep(methods, [asked], curve, reference)
    say("choosing settings for all ordered pairs, 8 validation heads each")
    few = [question(dataset.valid_pairs, *pair, 8, device) for pair in permutations(range(len(domains)), 2)]
    points_all = sweep(several, few, curve)
    chosen = {name: best(found) for name, found in points.items()}
    chosen_all = chosen | {name: best(found) for name, found in points_all.items()}
    main, everything, pictures = {}, {}, {}
    for population, pairs in pairs_of.items():
        say(f"{domains[s]} -> {domains[t]}, {c.heads} test heads, population {population}")
        q = question(pairs(s), s, t, c.heads, device)
        main[population], x = main_pair(methods, chosen, q, curve, reference)
        pictures = pictures or dict(x, truth=q.truth)
        say(f"all ordered pairs, {c.heads_each} test heads each, population {population}")
        rows, means = all_pairs(quick, chosen_all, pairs, domains, curve, c.heads_each, device)
        everything[population] = dict(pairs=rows, means=means)
    found = dict(main_pair=main, all_pairs=everything, pareto=points, settings_all_pairs=points_all)
    return found, pictures


def without_truth(methods, dataset, s, t, reference, device):
    """Realism alone, for test images that are no pairs: every method at every setting."""
    x, real = to_float(dataset.test_images[s], device), to_float(dataset.test_images[t], scorer(device))
    if min(len(x), len(real)) < 2:  # one image has no spread
        raise UserError("the data has no two held-out images of each domain to evaluate on")
    rows = {"real against real": dict(kind="bound", **realism.score(real, reference))}
    for method in methods:
        for setting in method.settings:
            out, seconds = answer(method, Question(s, t, x, real, real), setting)
            if out is None:
                continue
            row = dict(kind=method.kind, seconds=seconds, knob=method.knob)
            row["setting"] = setting if len(method.settings) > 1 else None
            rows[tables.label(method.name, row)] = row | realism.score(out, reference)
    return dict(unpaired=rows)


def heads_picture(path, rows, pictures):
    """heads.png, a row a method: our median head, the one at the edge of our worst tenth, and our worst."""
    ranked = np.argsort(rows[ours(rows) or "untouched"]["E_heads"])
    places = {"median head": .5, "90th percentile": .9, "worst head": 1.0}
    shown = [ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in places.values()]
    images = {}
    for name, row in tables.ordered(rows):
        images[f"{name}\n{row['structure']:.1f} dB, mean"] = pictures[name]
    images["truth"] = pictures["truth"]
    figure(path, [list(x[shown].cpu()) for x in images.values()], list(places), list(images), cell=256)


def main(argv=None):
    c, start = parse(Config, __doc__, argv), time.time()
    say = lambda text: print(f"[{time.time() - start:.0f} s] {text}", flush=True)
    device = pick_device(c.device)
    keep_memory()
    model, state = load_model(c.checkpoint, device)
    domains, config = state["domains"], state["config"]
    for name in ("source", "target"):
        if getattr(c, name) not in (None, *domains):
            raise UserError(f"--{name} {getattr(c, name)} is not a domain of {c.checkpoint}: "
                            f"choose from {', '.join(domains)}")
    s, t = main_domains(domains, c.source, c.target)
    if s == t:
        raise UserError(f"--source and --target are both {domains[s]}: translate between two domains")
    features = realism.load_features(c.features) if c.features else None
    dataset = open_data(c, state)
    if len(dataset.train_images[t]) < 2:
        raise UserError(f"{domains[t]} has no two training images to compare with")
    translator = student.restore(state["student"], device, c.checkpoint) if state.get("student") else None
    methods = every_method(dataset, model, state["translate"], translator, c.rivals)
    out = Path(c.out) if c.out else Path(c.checkpoint).parent / "evaluation"
    with explain_os_error(f"--out {out}", "cannot be made"):
        out.mkdir(parents=True, exist_ok=True)
    clear_unfinished(out)

    if features is None:
        say("training a small network of features, for realism")
        real = [images for name, images in zip(domains, dataset.train_images) if name.startswith("real")]
        features = realism.train_features(real if len(real) >= 2 else list(dataset.train_images))
    reference = realism.Reference(to_float(dataset.train_images[t], scorer(device)), features)
    simulated = dataset.test_pairs is not None and dataset.test_pairs.truth is not None
    command = " ".join(["python -m minimedshift.evaluate", *(argv or sys.argv[1:])])
    results = dict(
        command=command, checkpoint=c.checkpoint, steps=state["step"], weights="EMA", seed=config["seed"],
        machine=machine_name(device), torch=torch.__version__, source=domains[s], target=domains[t],
        features=c.features or "small network", references=len(reference.images), simulated=simulated)
    if dataset.test_pairs is None:
        results.update(heads=len(dataset.test_images[s]))
        results.update(without_truth(methods, dataset, s, t, reference, device))
    else:
        count = len(dataset.test_pairs.images)
        results.update(heads=min(c.heads, count), heads_each=min(c.heads_each, count))
        pairs_of = {"shared": lambda source: dataset.test_pairs}
        if simulated:
            own = lambda source: sets.own_heads(dataset, domains[source], c.heads, config["seed"])
            pairs_of["own"] = cache(own)
            balanced = config.get("balance", False)
            results.update(version=sets.phantom.VERSION, shift=config["shift"], balance=balanced)
        found, pictures = with_truth(c, methods, dataset, pairs_of, s, t, reference, device, say)
        results.update(found)
        tables.pareto(out / "pareto.png", results)
        heads_picture(out / "heads.png", results["main_pair"]["shared"], pictures)
    results["seconds"] = time.time() - start
    write_json(out / "results.json", results)
    text = tables.table(results)
    with write_whole(out / "table.md") as work:
        work.write_text(text)
    print(text)
    say(f"{out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))
    return 0


if __name__ == "__main__":
    run(main)
