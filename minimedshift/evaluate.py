"""The evaluation: every method on the same heads. `evaluation` is the one path to its numbers.

    train.py                           `report` at its end: the methods as they are set by default
    python -m minimedshift.evaluate    settings (tau, rounds) of the main pair chosen on validation heads,
                                       realism, also test heads of the source's own population

The command leaves in OUT: table.md, results.json, pareto.png. Test images that are no pairs are scored by
realism alone. Everything about the phantom is simulated, its "real" domains too."""

import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import torch

from minimedshift import batches, metrics, phantom, realism, sampler, student, tables
from minimedshift.methods import TAUS, answer, every_method, main_domains, question
from minimedshift.model import load_model
from minimedshift.phantom import sets
from minimedshift.support.command import flag, parse, refuse, run
from minimedshift.support.files import explain_os_error, write_json, write_whole
from minimedshift.support.images import Reading, figure
from minimedshift.support.log import progress
from minimedshift.support.machine import keep_memory, machine_name, pick_device, scorer, to_float


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    data: str = flag(None, "folder of images, DIR/DOMAIN/*.png, instead of what it was trained on", "what")
    source: str = flag(None, "domain to translate (default: synthetic-high, or the first)", "what")
    target: str = flag(None, "domain to translate to (default: real-normal, or the last)", "what")
    heads: int = flag(128, "test heads of the main pair", "how much", low=2, high=10**6)
    heads_each: int = flag(32, "test heads of every ordered pair", "how much", low=1, high=10**6)
    valid_heads: int = flag(64, "validation heads, to choose settings by", "how much", low=2, high=10**6)
    out: str = flag("", "folder of the results (default: evaluation, beside the checkpoint)", "run")
    device: str = flag("auto", "where to compute: cuda, cuda:1, mps, cpu", "run")


OF_A_PAIR = ("structure", "E", "gap_closed", "same_head", "noise", "seconds")  # kept of each ordered pair
OF_A_SETTING = ("setting", "gap_closed", "structure", "kernel")  # kept of each setting that is tried


def bounds(q, curve):
    """Errors (N,) of the best grey-value curve and of the second exposure: 0 and 1 of `gap closed`."""
    if q.truth is None:
        return None, None
    ends = answer(curve, q)[0], q.truth if q.second is None else q.second
    return [metrics.structure_mse(x, q.truth).cpu() for x in ends]


def score(methods, q, limits, reference=None):
    """{method: row}, all numbers of each method's answer to a Question; who does not know it has no row.
    limits: its `bounds`. A row holds kind, knob, setting, seconds, metrics.SCORES, and with a `reference`,
    the kernel distance of translations to the target's images, how real they look."""
    rows = {}
    for method in methods:
        x, seconds = answer(method, q)
        if x is None:
            continue
        row = dict(kind=method.kind, knob=method.knob, setting=method.settings[0], seconds=seconds)
        row |= metrics.score(x, q.truth, q.images, *limits, q.decoys)
        rows[method.name] = row | ({"kernel": reference(x)} if reference else {})
    return rows


def sweep(methods, q, curve, reference=None):
    """Methods at each of their settings on one Question: {method: [{key of OF_A_SETTING: value}]}. Then those
    that know it, each at the setting that closes the most of the gap."""
    limits, found, chosen = bounds(q, curve), {}, []
    for method in methods:
        points = []
        for setting in sorted(method.settings):
            rows = score([replace(method, settings=(setting,))], q, limits, reference)
            points += [{key: row.get(key) for key in OF_A_SETTING} for row in rows.values()]
        if points:
            found[method.name] = points
            best = max(points, key=lambda point: point["gap_closed"] or 0)  # without truth the first
            chosen.append(replace(method, settings=(best["setting"],)))
    return found, chosen


def main_pair(methods, q, curve, reference=None):
    """The rows of a Question. less_ours: 95 % interval of the gap closed less the last of "ours"."""
    limits = bounds(q, curve)
    rows = score(methods, q, limits, reference)
    ours = [row for row in rows.values() if row["kind"] == "ours"]
    if ours and q.truth is not None:
        for row in rows.values():
            E, E_ours = torch.tensor([row["E_heads"], ours[-1]["E_heads"]])
            row["less_ours"] = metrics.difference_interval(E, E_ours, *limits)
    return rows


def all_pairs(methods, pairs_of, domains, curve, heads, device):
    """Every ordered pair: pairs, {method: {"source -> target": row}}, and means, {method: summary} of those
    that know all. pairs_of(s): the `Pairs` of source s."""
    rows = {method.name: {} for method in methods}
    errors = {method.name: [] for method in methods}  # (3, N) of each pair with a gap: own, and the bounds
    pairs, start = list(permutations(range(len(domains)), 2)), time.time()
    for done, (s, t) in enumerate(pairs, 1):
        q = question(pairs_of(s), s, t, heads, device)
        limits = bounds(q, curve)
        E_untouched = metrics.structure_mse(q.x.to(q.truth.device), q.truth)
        gap = E_untouched.mean() > limits[1].mean()  # a cleaner source has nothing to close
        for name, row in score(methods, q, limits).items():
            if gap:
                errors[name].append(torch.stack([torch.tensor(row["E_heads"]), *limits]))
            else:
                row["gap_closed"] = None
            rows[name][f"{domains[s]} -> {domains[t]}"] = {key: row[key] for key in OF_A_PAIR}
        progress(done, len(pairs), start, "scoring all pairs", "pairs")
    means = {method.name: summary(method, rows[method.name].values(), errors[method.name])
             for method in methods if len(rows[method.name]) == len(pairs)}
    return dict(pairs=rows, means=means)


def summary(method, rows, errors):
    """Means over ordered pairs, the worst pair, and how many have noise within 1/2 to 2.
    errors: (3, N) of each pair with a gap."""
    known = lambda key: [row[key] for row in rows if row[key] is not None]
    mean = lambda values: sum(values) / len(values) if values else None
    closed = lambda E, curve, second: ((curve - E).mean(-1) / (curve - second).mean(-1)).mean(0)  # (draws,)
    gaps, noise = known("gap_closed"), known("noise")
    return dict(
        kind=method.kind, knob=method.knob, setting=method.settings[0], pairs=len(rows),
        pairs_with_gap=len(gaps), same_head=mean(known("same_head")),
        noise_right=sum(.5 <= ratio <= 2 for ratio in noise) if noise else None,
        gap_closed=mean(gaps), worst_pair=min(gaps, default=None),
        gap_interval=metrics.bootstrap(closed, *torch.stack(errors).unbind(1)) if gaps else None)


def evaluation(dataset, methods, s, t, device, heads=128, heads_each=32, valid_heads=0, own=None,
               reference=None):
    """Methods on the pair s -> t, and on every pair: a dict for json.

        heads, heads_each    how many were measured
        main_pair            {population: {method: row}}, see `score` and `main_pair`
        all_pairs            {population: {"pairs", "means"}}, see `all_pairs`: with default settings
        pareto               `sweep` of the main pair, where its settings are chosen
    valid_heads: settings are chosen on so many; 0: the defaults, and only ours on every pair. own(s): test
    `Pairs` of the own population of a simulated source. Unpaired test images are scored by realism alone."""
    start, domains, pairs = time.time(), dataset.domains, dataset.test_pairs
    simulated = pairs is not None and pairs.truth is not None
    found = dict(source=domains[s], target=domains[t], simulated=simulated, main_pair={}, all_pairs={},
                 version=phantom.VERSION if simulated else None)
    curve = next((method for method in methods if method.name == "curve"), None)
    chosen, for_all = methods, [method for method in methods if valid_heads or method.kind == "ours"]
    if valid_heads and pairs is not None:
        print("choosing settings on validation heads")
        q = question(dataset.valid_pairs, s, t, valid_heads, device)
        found["pareto"], chosen = sweep(methods, q, curve, reference)
    populations = {"shared": lambda _: dataset.test_images if pairs is None else pairs}
    if own and simulated:
        populations["own"] = own
    for population, test_of in populations.items():
        q = question(test_of(s), s, t, heads, device)
        print(f"{domains[s]} -> {domains[t]}, {len(q.x)} test heads, EMA weights:")
        found |= dict(heads=len(q.x), heads_each=min(heads_each, len(q.x)))
        rows = found["main_pair"][population] = main_pair(chosen, q, curve, reference)
        print(tables.markdown(rows, tables.SHORT))
        if pairs is not None:
            found["all_pairs"][population] = all_pairs(for_all, test_of, domains, curve, heads_each, device)
    return found | dict(evaluation_seconds=time.time() - start)


def report(model, student, dataset, how, device="cpu"):
    """train.py's report.json: `evaluation` at default settings. how: checkpoint["translate"]."""
    keep_memory(dataset.train_images, dataset.size)
    s, t = main_domains(dataset.domains)
    found = evaluation(dataset, every_method(dataset, model, how, student), s, t, device)
    print("all ordered pairs:\n" + tables.markdown(found["all_pairs"]["shared"]["means"], tables.ALL))
    return dict(translation=how) | found


@torch.inference_mode()
def picture(path, model, student, how, pairs, domains, s, t, device, taus=None, heads=6):
    """Draw source | the flow at several tau | student | truth, of the first heads; captions: mean structure.
    pairs: test `Pairs`, or unpaired images: then any image of the target domain stands for the truth."""
    q = question(pairs, s, t, heads, device)
    taus = taus or sorted({tau for tau in (*TAUS, how["tau"]) if tau < how["t_image"]})
    columns = {domains[s]: q.x}
    columns |= {f"tau {tau:g}": sampler.translate(model, q.x, s, t, **how | dict(tau=tau)) for tau in taus}
    if student:
        columns["student"] = student(q.x, s, t)
    captions, pictures = list(columns), [x.to(q.images).nan_to_num().clamp(-1, 1) for x in columns.values()]
    if q.truth is not None:
        captions = [f"{caption}\n{metrics.structure(x, q.truth).mean():.1f} dB"
                    for caption, x in zip(captions, pictures)]
    simulated = q.truth is not None and q.truth is not q.images
    captions.append(f"{domains[t]}\n" + ("simulated truth" if simulated else "an image"))
    pictures.append(q.truth if simulated else q.images)  # a domain can have fewer images than the source
    rows = list(zip(*(column.cpu() for column in pictures)))
    figure(path, rows, captions, [""] * len(rows))


def open_data(c, state):
    """The Dataset that a checkpoint is scored on: the simulated one it was trained on, or a folder."""
    image = state["image"]
    config = dict(bits=0, invert="", crop=False) | state["config"]
    readings = {domain: Reading(**how) for domain, how in image.get("readings", {}).items()}
    config |= dict(size=image["size"], valid_heads=c.valid_heads, test_heads=c.heads)
    dataset = batches.load_dataset(SimpleNamespace(**config | dict(data=c.data or config["data"])), readings)
    known, found = (state["domains"], image["channels"]), (list(dataset.domains), dataset.channels)
    refuse(found != known, f"{c.checkpoint} knows {', '.join(known[0])} and {known[1]} channels; "
           f"the data has {', '.join(found[0])} and {found[1]}")
    return dataset


def main(argv=None, extra_methods=()):
    """The command. extra_methods: more `Method`s to compare, such as the learned rivals of studies/."""
    c = parse(Config, __doc__, argv)
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

    print("training a small network of features, for realism")
    real = [images for name, images in zip(domains, dataset.train_images) if name.startswith("real")]
    features = realism.train_features(real if len(real) >= 2 else list(dataset.train_images))
    known = features(to_float(dataset.train_images[t], scorer(device)))
    reference = lambda x: realism.kernel_distance(features(x), known)
    methods = [*every_method(dataset, model, state["translate"], pupil), *extra_methods]
    prior = lambda s: domains[s] if domains[s] in phantom.PRIORS else None
    own = cache(lambda s: sets.paired_heads(dataset.size, c.heads, "test", config["seed"], prior(s)))
    found = evaluation(dataset, methods, s, t, device, c.heads, c.heads_each, c.valid_heads, own, reference)
    results = dict(
        command=" ".join(["python -m minimedshift.evaluate", *(argv or sys.argv[1:])]), seed=config["seed"],
        checkpoint=c.checkpoint, steps=state["step"], weights="EMA", machine=machine_name(device),
        torch=torch.__version__, shift=config["shift"], references=len(known)) | found
    if "pareto" in results:
        tables.pareto(out / "pareto.png", results)
    write_json(out / "results.json", results)
    text = tables.page(results)
    with write_whole(out / "table.md") as work:
        work.write_text(text)
    print(text)
    print(f"{out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))
    return 0


if __name__ == "__main__":
    run(main)
