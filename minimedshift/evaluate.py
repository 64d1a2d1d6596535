"""The evaluation: every method on the same heads. `evaluation` is the one path to its numbers.

    train.py                           `report` at its end: the methods as they are set by default
    python -m minimedshift.evaluate    settings (tau, rounds) of the main pair chosen on validation heads,
                                       realism, also test heads of the source's own population

The command leaves in OUT: table.md, results.json, pareto.png. Test images that are no pairs are scored by
realism alone. Everything about the phantom is simulated, its "real" domains too.
"""

import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from minimedshift import balance, batches, data, metrics, phantom, realism, sampler, student, tables
from minimedshift.methods import TAUS, answer, every_method, main_domains, question, scorer
from minimedshift.model import load_model
from minimedshift.phantom import sets
from minimedshift.support.command import flag, parse, refuse, run
from minimedshift.support.files import explain_os_error, write_json, write_whole
from minimedshift.support.images import figure
from minimedshift.support.machine import keep_memory, machine_name, pick_device, to_float


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    data: str = flag(None, "folder of images, DIR/DOMAIN/*.png, instead of what it was trained on", "what")
    source: str = flag(None, "domain to translate (default: synthetic-high, or the first)", "what")
    target: str = flag(None, "domain to translate to (default: real-normal, or the last)", "what")
    heads: int = flag(128, "test heads of the main pair", "how much", low=2, high=10**6)
    heads_each: int = flag(32, "test heads of every ordered pair", "how much", low=1, high=10**6)
    valid_heads: int = flag(64, "validation heads on which the settings are chosen", "how much", low=2,
                            high=10**6)
    out: str = flag("", "folder of the results (default: evaluation, beside the checkpoint)", "run")
    device: str = flag("auto", "where to compute", "run", ("auto", "cuda", "mps", "cpu"))


OF_A_PAIR = ("structure", "E", "gap_closed", "same_head", "noise", "seconds")  # kept of each ordered pair
OF_A_SETTING = ("setting", "gap_closed", "structure", "kernel")  # kept of each setting that is tried


def bounds(q, curve):
    """Errors (N,) of the best grey-value curve and of the second exposure: 0 and 1 of `gap closed`."""
    if q.truth is None:
        return None, None
    E_curve = metrics.structure_mse(answer(curve, q)[0], q.truth)
    E_second = torch.zeros_like(E_curve) if q.second is None else metrics.structure_mse(q.second, q.truth)
    return E_curve, E_second


def score(methods, q, limits, chosen={}, reference=None):
    """{method: row}, all numbers of each method's answer to a Question; who does not know it has no row.

    limits: its `bounds`. chosen: {method: setting}, else the default is taken. A row holds metrics.SCORES,
    with a realism.Reference how real the translations look, and kind, knob, setting, seconds.
    """
    rows = {}
    for method in methods:
        setting = chosen.get(method.name, method.settings[0])
        x, seconds = answer(method, q, setting)
        if x is None:
            continue
        row = dict(kind=method.kind, knob=method.knob, setting=setting, seconds=seconds)
        row.update(metrics.score(x, q.truth, q.images, *limits, q.decoys, q.materials))
        if reference is not None:
            row.update(realism.score(x, reference))
        rows[method.name] = row
    return rows


def sweep(methods, q, curve, reference=None):
    """Methods at each of their settings on one Question: {method: [{setting, *OF_A_SETTING}]}."""
    q, found = replace(q, decoys=None, materials=None), {}
    limits = bounds(q, curve)
    for method in methods:
        for setting in sorted(method.settings):
            for row in score([method], q, limits, {method.name: setting}, reference).values():
                found.setdefault(method.name, []).append({key: row.get(key) for key in OF_A_SETTING})
    return found


def best(points):
    """The setting of a sweep that closes the most of the gap."""
    gaps = {point["setting"]: point["gap_closed"] for point in points}
    return max(gaps, key=lambda setting: -np.inf if gaps[setting] is None else gaps[setting])


def main_pair(methods, q, curve, chosen={}, reference=None):
    """The rows of one Question. less_ours: 95 % interval of the gap closed less that of the student (without
    one, of MedShift), paired over heads."""
    limits = bounds(q, curve)
    rows = score(methods, q, limits, chosen, reference)
    ours = [name for name, row in rows.items() if row["kind"] == "ours"][-1:]
    for name, row in rows.items():
        if ours not in ([], [name]) and q.truth is not None:
            errors = [torch.tensor(rows[each]["E_heads"]) for each in (name, *ours)]
            row["less_ours"] = metrics.difference_interval(*errors, *(limit.cpu() for limit in limits))
    return rows


def all_pairs(methods, pairs_of, domains, curve, heads, device, chosen={}):
    """Every ordered pair: {method: {"source -> target": row}}, and {method: summary} of those that know all.
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
            q = replace(question(pairs, s, t, heads, device, x), materials=None)
            limit = bounds(q, curve)
            E_untouched = metrics.structure_mse(x.to(q.truth.device), q.truth)
            gap = E_untouched.mean() > limit[1].mean()  # a cleaner source has nothing to close
            if gap:
                limits.append(limit)
            for name, row in score(methods, q, limit, chosen).items():
                if gap:
                    errors[name].append(torch.tensor(row["E_heads"]))
                else:
                    row["gap_closed"] = None
                rows[name][f"{source} -> {target}"] = {key: row[key] for key in OF_A_PAIR}
    means = {}
    for method in methods:
        found = rows[method.name].values()
        if len(found) == len(domains) * (len(domains) - 1):
            setting = chosen.get(method.name, method.settings[0])
            means[method.name] = dict(kind=method.kind, knob=method.knob, setting=setting)
            means[method.name].update(summary(found, errors[method.name], limits))
    return rows, means


def summary(rows, errors, limits):
    """Means over ordered pairs, the worst pair, and how many have noise within 1/2 to 2.
    errors: (N,) of each pair with a gap; limits: its `bounds`."""
    known = lambda key: [row[key] for row in rows if row[key] is not None]
    gaps, noise, same = known("gap_closed"), known("noise"), known("same_head")
    result = dict(pairs=len(rows), pairs_with_gap=len(gaps))
    result["same_head"] = sum(same) / len(same) if same else None
    result["noise_right"] = sum(.5 <= ratio <= 2 for ratio in noise) if noise else None
    if gaps:
        def mean_gap(E, curve, second):  # (pairs, draws, N) -> (draws,)
            return ((curve - E).mean(-1) / (curve - second).mean(-1)).mean(0)

        per_head = [torch.stack(each).cpu() for each in (errors, *zip(*limits))]
        interval = list(metrics.bootstrap(mean_gap, *per_head))
        result.update(gap_closed=sum(gaps) / len(gaps), worst_pair=min(gaps), gap_interval=interval)
    return result


def evaluation(dataset, methods, s, t, device, heads=128, heads_each=32, valid_heads=0, everywhere=None,
               populations=None, reference=None):
    """Methods on the pair s -> t, and those named in `everywhere` (None: all) on every pair: a dict for json.

        heads, heads_each    how many were measured
        main_pair            {population: {method: row}}, see `score` and `main_pair`
        all_pairs            {population: {"pairs", "means"}}, see `all_pairs`: with default settings
        pareto               `sweep` of the main pair, where its settings are chosen
    valid_heads: settings are chosen on so many; 0: the defaults. populations: {name: function from a source's
    number to its test `Pairs`}. Unpaired test images have no truth: only realism is measured, no all_pairs.
    """
    domains, pairs = dataset.domains, dataset.test_pairs
    curve = next((method for method in methods if method.name == "curve"), None)
    if pairs is None:
        q = question(dataset.test_images, s, t, heads, device)
        rows = main_pair(methods, q, curve, reference=reference)
        return dict(heads=len(q.x), main_pair={"shared": rows}, all_pairs={})
    count = len(pairs.images)
    found = dict(heads=min(heads, count), heads_each=min(heads_each, count), main_pair={}, all_pairs={})
    chosen = {}
    if valid_heads:
        print("choosing settings on validation heads", flush=True)
        q = question(dataset.valid_pairs, s, t, valid_heads, device)
        found["pareto"] = sweep(methods, q, curve, reference)
        chosen = {name: best(points) for name, points in found["pareto"].items()}
    for population, pairs_of in (populations or {"shared": lambda _: pairs}).items():
        print(f"{domains[s]} -> {domains[t]}, {found['heads']} test heads, EMA weights:", flush=True)
        q = question(pairs_of(s), s, t, heads, device)
        found["main_pair"][population] = main_pair(methods, q, curve, chosen, reference)
        tables.say(found["main_pair"][population])
        some = [method for method in methods if everywhere is None or method.name in everywhere]
        rows, means = all_pairs(some, pairs_of, domains, curve, heads_each, device)
        found["all_pairs"][population] = dict(pairs=rows, means=means)
    return found


def report(model, student, dataset, how, device="cpu"):
    """What train.py writes to report.json, and prints: `evaluation` of the main methods, of MedShift and its
    student on all pairs too. how: checkpoint["translate"]. Beside it: simulated, version (of the simulator),
    translation (how), source, target, evaluation_seconds."""
    start = time.time()
    s, t = main_domains(dataset.domains)
    methods = every_method(dataset, model, how, student)
    ours = [method.name for method in methods if method.kind == "ours"]
    found = evaluation(dataset, methods, s, t, device, everywhere=ours)
    for name, row in found["all_pairs"]["shared"]["means"].items():
        gap, same = tables.percent(row.get("gap_closed")), tables.percent(row["same_head"])
        print(f"all {row['pairs']} ordered pairs, {name}: gap closed {gap}, same head {same}", flush=True)
    simulated = dataset.test_pairs.truth is not None
    about = dict(simulated=simulated, version=phantom.VERSION if simulated else None, translation=how,
                 source=dataset.domains[s], target=dataset.domains[t])
    return about | found | dict(evaluation_seconds=time.time() - start)


@torch.inference_mode()
def picture(path, model, student, how, pairs, domains, s, t, device, taus=None, heads=6):
    """Draw source | the flow at several tau | student | truth, of the first heads; captions: mean structure.

    taus: None for the paper's and that of `how`. pairs: test `Pairs`, or unpaired images (methods.question),
    which have no truth: an image of the target domain is drawn instead. student: a Student, or None.
    """
    q = question(pairs, s, t, heads, device)
    if taus is None:
        taus = sorted({tau for tau in (*TAUS, how["tau"]) if tau < how["t_image"]})
    columns = {domains[s]: q.x}
    for tau in taus:
        columns[f"tau {tau:g}"] = sampler.translate(model, q.x, s, t, **(how | dict(tau=tau)))
    if student:
        columns["student"] = student(q.x, s, t)
    captions, pictures = [], []
    for caption, x in columns.items():
        x = x.to(q.images.device).nan_to_num().clamp(-1, 1)
        if q.truth is not None:
            caption += f"\n{metrics.structure(x, q.truth).mean():.1f} dB"
        captions.append(caption)
        pictures.append(x.cpu())
    simulated = q.truth is not None and q.truth is not q.images
    captions.append(f"{domains[t]}\n" + ("simulated truth" if simulated else "an image"))
    pictures.append((q.truth if simulated else q.images).cpu())
    rows = list(zip(*pictures))
    figure(path, rows, captions, [""] * len(rows))


def open_data(c, state):
    """The Dataset that a checkpoint is scored on: the simulated one it was trained on, or a folder."""
    domains, image = state["domains"], state["image"]
    config = state["config"] | dict(size=image["size"], valid_heads=c.valid_heads, test_heads=c.heads)
    config.update(data=c.data or config["data"], domains="", balance=False)
    dataset = batches.load_dataset(SimpleNamespace(**config))
    refuse(not set(domains) <= set(dataset.domains) or dataset.channels != image["channels"],
           f"{c.checkpoint} knows {', '.join(domains)} and {image['channels']} channels; "
           f"the data has {', '.join(dataset.domains)} and {dataset.channels}")
    dataset = data.select_domains(dataset, domains)
    return balance.balanced(dataset) if state["config"]["balance"] else dataset


def own_population(dataset, heads, seed):
    """The function from a source's number to the test `Pairs` of its own population."""
    keep = [phantom.DOMAINS.index(name) for name in dataset.domains]
    prior = lambda s: dataset.domains[s] if dataset.domains[s] in phantom.PRIORS else None
    return cache(lambda s: sets.paired_heads(dataset.size, heads, "test", seed, prior(s)).only(keep))


def main(argv=None, extra_methods=()):
    """The command. extra_methods: more `Method`s to compare, such as the learned rivals of studies/."""
    c, start = parse(Config, __doc__, argv), time.time()
    device = pick_device(c.device)
    keep_memory()
    model, state = load_model(c.checkpoint, device)
    domains, config = state["domains"], state["config"]
    for name in ("source", "target"):
        refuse(getattr(c, name) not in (None, *domains), f"--{name} {getattr(c, name)} is not a domain of "
               f"{c.checkpoint}: choose from {', '.join(domains)}")
    s, t = main_domains(domains, c.source, c.target)
    refuse(s == t, f"--source and --target are both {domains[s]}: translate between two domains")
    pupil = student.restore(state["student"], device, c.checkpoint) if state.get("student") else None
    dataset = open_data(c, state)
    needed = dataset.train_images[t], dataset.test_images[s], dataset.test_images[t]
    refuse(min(map(len, needed)) < 2, "the data has no two images to train and two to test of both domains")
    out = Path(c.out) if c.out else Path(c.checkpoint).parent / "evaluation"
    with explain_os_error(f"--out {out}", "cannot be made"):
        out.mkdir(parents=True, exist_ok=True)

    print("training a small network of features, for realism", flush=True)
    real = [images for name, images in zip(domains, dataset.train_images) if name.startswith("real")]
    features = realism.train_features(real if len(real) >= 2 else list(dataset.train_images))
    reference = realism.Reference(to_float(dataset.train_images[t], scorer(device)), features)
    paired = dataset.test_pairs is not None
    simulated = paired and dataset.test_pairs.truth is not None
    command = " ".join(["python -m minimedshift.evaluate", *(argv or sys.argv[1:])])
    results = dict(
        command=command, checkpoint=c.checkpoint, steps=state["step"], weights="EMA", seed=config["seed"],
        machine=machine_name(device), torch=torch.__version__, source=domains[s], target=domains[t],
        references=reference.count, simulated=simulated)
    populations = None
    if simulated:
        results.update(version=phantom.VERSION, shift=config["shift"], balance=config["balance"])
        own = own_population(dataset, c.heads, config["seed"])
        populations = {"shared": lambda _: dataset.test_pairs, "own": own}
    methods = [*every_method(dataset, model, state["translate"], pupil), *extra_methods]
    results.update(evaluation(dataset, methods, s, t, device, c.heads, c.heads_each, c.valid_heads,
                              populations=populations, reference=reference))
    if paired:
        tables.pareto(out / "pareto.png", results)
    results["seconds"] = time.time() - start
    write_json(out / "results.json", results)
    text = tables.table(results)
    with write_whole(out / "table.md") as work:
        work.write_text(text)
    print(text)
    print(f"{out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))
    return 0


if __name__ == "__main__":
    run(main)
