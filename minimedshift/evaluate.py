"""Score translations against the simulated truth: the main pair at several tau, then every ordered pair of domains.

What the numbers mean is in metrics.py, what MedShift is compared with in baselines.py. Everything here is simulated.
"""

import json
import time
from itertools import combinations

import numpy as np
import torch

from . import data, metrics, sampler, whole
from .baselines import reference_scores, sdedit

MAIN = ("synthetic-high", "real-normal")
TAUS = (0.1, 0.3, 0.45, 0.6)  # the paper reports the last three


def in_batches(function, x, batch=64):
    """function applied to slices of x (N, ...), joined again: the memory of one batch. A batch that a GPU has no memory for is halved.
    Raises torch.OutOfMemoryError where a single image does not fit."""
    while True:
        try:
            return torch.cat([function(part) for part in x.split(batch)])
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2


def load(array, device):
    """A stored float16 array (or a slice of one) as float32 on the device."""
    return torch.from_numpy(np.array(array, np.float32)).to(device)


def scorer(device):
    """Where scores are computed: they take float64, which mps lacks."""
    return "cpu" if torch.device(device).type == "mps" else device


def main_pair(model, dataset, taus, settings, device="cpu", heads=128, source=MAIN[0], target=MAIN[1]):
    """One pair at several tau, beside SDEdit at the same tau and the references. Returns (dict, {tau: (N, C, H, W)}). A network that
    goes from image to image directly has no tau (0 is written) and no SDEdit."""
    s, t = dataset.domains.index(source), dataset.domains.index(target)
    x, images, truth = (load(a[:heads, d], on) for a, d, on in
                        ((dataset.test.images, s, device), (dataset.test.images, t, scorer(device)), (dataset.test.truth, t, scorer(device))))
    references = reference_scores(dataset, s, t, heads, scorer(device))
    bounds = references["curve"]["E"], references["second_exposure"]["E"]
    result = dict(source=source, target=target, heads=len(x), **references, medshift={}, sdedit={})
    translations = {}
    direct = settings["x0"] == "image"
    noising = {name: settings[name] for name in ("guidance", "steps", "solver", "colour")}  # no end: its noise must be taken off to the last
    draw = torch.Generator(device).manual_seed(0)
    for tau in [0.0] if direct else taus:
        start = time.time()
        translations[tau] = in_batches(lambda part: sampler.translate(model, part, s, t, tau, **settings, generator=draw), x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds = time.time() - start
        result["medshift"][tau] = dict(metrics.score(translations[tau], truth, images, *bounds), seconds=seconds)
        if not direct:
            again = in_batches(lambda part: sdedit(model, part, t, tau, **noising), x)
            result["sdedit"][tau] = metrics.score(again, truth, images, *bounds)
    return result, translations


def all_pairs(model, dataset, tau, settings, device="cpu", heads=32):
    """Every ordered pair of domains at one tau: {"source -> target": scores}, and the share of heads whose anatomy is kept.

    Each source is encoded once. Anatomy is kept where a head's translations into one domain from two sources are nearer to
    each other than to any other head's; the share is over all targets and pairs of sources.
    """
    rows, into = {}, {target: [] for target in dataset.domains}
    direct, draw = settings["x0"] == "image", torch.Generator(device).manual_seed(0)
    leg = {name: settings[name] for name in ("steps", "solver", "end", "colour")} | dict(generator=draw)
    for s, source in enumerate(dataset.domains):
        z = load(dataset.test.images[:heads, s], device)
        z = z if direct else in_batches(lambda part: sampler.encode(model, part, s, tau, **leg), z)
        for t, target in enumerate(dataset.domains):
            if s == t:
                continue
            if direct:
                x = in_batches(lambda part: sampler.translate(model, part, s, t, **settings, generator=draw), z)
            else:
                x = in_batches(lambda part: sampler.decode(model, part, t, tau, settings["guidance"], **leg), z)
            into[target].append(x)
            references = reference_scores(dataset, s, t, heads, scorer(device))
            curve, second, untouched = (references[name] for name in ("curve", "second_exposure", "untouched"))
            row = metrics.score(x, load(dataset.test.truth[:heads, t], scorer(device)), load(dataset.test.images[:heads, t], scorer(device)), curve["E"], second["E"])
            if untouched["E"] <= second["E"]:  # a cleaner source: nothing to close, judged by its noise alone
                row["gap_closed"] = None
            rows[f"{source} -> {target}"] = dict(row, **{name: references[name]["structure"] for name in references})
    kept = [metrics.same_head(a, b) for some in into.values() for a, b in combinations(some, 2)]
    return rows, torch.cat(kept).float().mean().item()


def report(model, dataset, tau, settings, device="cpu", taus=TAUS, heads=128, heads_each=32, say=print):
    """The numbers of report.json (a dict) and the main pair's translations {tau: (N, C, H, W)} for the figure.

    settings: guidance, steps, solver, end, colour, x0. The mean of the gap closed is over the pairs whose source is not cleaner than a second
    exposure; `noise_right` counts the pairs whose noise is between 1/2 and 2.
    """
    start = time.time()
    say("scoring translations of test heads", flush=True)
    pair, translations = main_pair(model, dataset, sorted(each for each in {*taus, tau} if each < settings["end"]), settings, device, heads)
    say(f"{pair['source']} -> {pair['target']}, {pair['heads']} simulated test heads, EMA weights:", flush=True)
    percent = lambda share: "none to close" if share is None else f"{share:.0%}"
    for t, row in pair["medshift"].items():
        noised = f"SDEdit {pair['sdedit'][t]['structure']:.2f}, " if t in pair["sdedit"] else ""
        say(f"tau {t:<5} structure {row['structure']:.2f} dB ({noised}curve "
            f"{pair['curve']['structure']:.2f}, second exposure {pair['second_exposure']['structure']:.2f})  "
            f"noise {row['noise']:.2f}  gap closed {percent(row['gap_closed'])}", flush=True)
    pairs, kept = all_pairs(model, dataset, tau, settings, device, heads_each)
    closed = [row["gap_closed"] for row in pairs.values() if row["gap_closed"] is not None]
    mean, right = float(np.mean(closed)) if closed else None, sum(0.5 <= row["noise"] <= 2 for row in pairs.values())
    say(f"all {len(pairs)} ordered pairs at tau {tau}: mean gap closed {percent(mean)} over the {len(closed)} that have one; noise within 1/2 to 2 in {right} of {len(pairs)}; "
        f"same head {kept:.1%}", flush=True)
    return dict(simulated=True, translation=dict(tau=tau, **settings), main_pair=pair, pairs=pairs, mean_gap_closed=mean, pairs_with_gap=len(closed),
                noise_right=right, same_head=kept, evaluation_seconds=time.time() - start), translations


def write_json(path, values):
    """Write a dict as JSON, whole or not at all."""
    with whole(path) as work:
        work.write_text(json.dumps(values, indent=1))


def picture(path, dataset, pair, translations, count=6):
    """translations.png: source | translation at each tau | simulated truth of the first test heads, captioned with the scores."""
    s, t = dataset.domains.index(pair["source"]), dataset.domains.index(pair["target"])
    columns = [load(dataset.test.images[:count, s], "cpu"), *[x[:count].cpu() for x in translations.values()],
               load(dataset.test.truth[:count, t], "cpu")]
    captions = [f"{pair['source']}\nsource", *[f"tau {tau:g}: {pair['medshift'][tau]['structure']:.1f} dB\nnoise {pair['medshift'][tau]['noise']:.2f}"
                                               for tau in translations], f"{pair['target']}\nsimulated truth"]
    data.figure(path, [list(row) for row in zip(*columns)], captions, [""] * count)
