"""Score translations against the simulated truth: the main pair at several tau, then every ordered pair of domains.

What the numbers mean is in metrics.py, what MedShift is compared with in baselines.py. Everything here is simulated.
"""

import json
import os
import time

import numpy as np
import torch

from . import data, metrics, sampler
from .baselines import reference_scores, sdedit

MAIN = ("synthetic-high", "real-normal")
TAUS = (0.3, 0.45, 0.6)


def in_batches(function, x, batch=64):
    """function applied to slices of x (N, ...), joined again: the memory of one batch."""
    return torch.cat([function(part) for part in x.split(batch)])


def load(array, device):
    """A stored float16 array (or a slice of one) as float32 on the device."""
    return torch.from_numpy(np.array(array, np.float32)).to(device)


def main_pair(model, dataset, taus, settings, device="cpu", heads=128, source=MAIN[0], target=MAIN[1]):
    """One pair at several tau, beside SDEdit at the same tau and the references. Returns (dict, {tau: (N, C, H, W)})."""
    s, t = dataset.domains.index(source), dataset.domains.index(target)
    x, images, truth = (load(a[:heads, d], device) for a, d in
                        ((dataset.test.images, s), (dataset.test.images, t), (dataset.test.truth, t)))
    references = reference_scores(dataset, s, t, heads, device)
    bounds = references["curve"]["E"], references["second_exposure"]["E"]
    result = dict(source=source, target=target, heads=len(x), **references, medshift={}, sdedit={})
    translations = {}
    for tau in taus:
        start = time.time()
        translations[tau] = in_batches(lambda part: sampler.translate(model, part, s, t, tau, **settings), x)
        seconds = time.time() - start
        again = in_batches(lambda part: sdedit(model, part, t, tau, **settings), x)
        result["medshift"][tau] = dict(metrics.score(translations[tau], truth, images, *bounds), seconds=seconds)
        result["sdedit"][tau] = metrics.score(again, truth, images, *bounds)
    return result, translations


def all_pairs(model, dataset, tau, settings, device="cpu", heads=32):
    """Every ordered pair of domains at one tau: {"source -> target": scores}. Each source is encoded once."""
    results, (guidance, rest) = {}, (settings["guidance"], {k: v for k, v in settings.items() if k != "guidance"})
    for s, source in enumerate(dataset.domains):
        x = load(dataset.test.images[:heads, s], device)
        z = in_batches(lambda part: sampler.encode(model, part, s, tau, **rest), x)
        for t, target in enumerate(dataset.domains):
            if s == t:
                continue
            references = reference_scores(dataset, s, t, heads, device)
            curve, second, untouched = (references[k] for k in ("curve", "second_exposure", "untouched"))
            images, truth = load(dataset.test.images[:heads, t], device), load(dataset.test.truth[:heads, t], device)
            y = in_batches(lambda part: sampler.decode(model, part, t, tau, guidance, **rest), z)
            row = metrics.score(y, truth, images, curve["E"], second["E"])
            if untouched["E"] <= second["E"]:  # a cleaner source: nothing to close, judged by its noise alone
                row["gap_closed"] = None
            results[f"{source} -> {target}"] = dict(row, curve=curve["structure"], second_exposure=second["structure"],
                                                    untouched=untouched["structure"])
    return results


def report(model, dataset, tau, settings, device="cpu", taus=TAUS, heads=128, heads_each=32, say=print):
    """The numbers of report.json (a dict) and the main pair's translations {tau: (N, C, H, W)} for the figure.

    settings: guidance, steps, solver. Every number is simulated, from EMA weights if `model` holds them.
    """
    start = time.time()
    pair, translations = main_pair(model, dataset, sorted({*taus, tau}), settings, device, heads)
    for t, row in pair["medshift"].items():
        say(f"tau {t:<5} structure {row['structure']:.2f} dB (SDEdit {pair['sdedit'][t]['structure']:.2f}, curve "
            f"{pair['curve']['structure']:.2f}, second exposure {pair['second_exposure']['structure']:.2f})  "
            f"noise {row['noise']:.2f}  gap closed {row['gap_closed']:.0%}")
    pairs = all_pairs(model, dataset, tau, settings, device, heads_each)
    closed = [row["gap_closed"] for row in pairs.values() if row["gap_closed"] is not None]
    say(f"all {len(pairs)} ordered pairs at tau {tau}: mean gap closed {np.mean(closed):.0%} over the {len(closed)} that have a gap")
    return dict(simulated=True, tau=tau, **settings, main_pair=pair, pairs=pairs, mean_gap_closed=float(np.mean(closed)),
                pairs_with_gap=len(closed), seconds=time.time() - start), translations


def write_json(path, values):
    """Write a dict as JSON, whole or not at all."""
    work = path.with_name(f".{path.name}.tmp")
    work.write_text(json.dumps(values, indent=1))
    os.replace(work, path)


def picture(path, dataset, pair, translations, count=6):
    """translations.png: source | translation at each tau | simulated truth of the first test heads, captioned with the scores."""
    s, t = dataset.domains.index(pair["source"]), dataset.domains.index(pair["target"])
    columns = [load(dataset.test.images[:count, s], "cpu"), *[x[:count].cpu() for x in translations.values()],
               load(dataset.test.truth[:count, t], "cpu")]
    captions = [f"{pair['source']}\nsource", *[f"tau {tau:g}: {pair['medshift'][tau]['structure']:.1f} dB\nnoise {pair['medshift'][tau]['noise']:.2f}"
                                               for tau in translations], f"{pair['target']}\nsimulated truth"]
    data.figure(path, [list(row) for row in zip(*columns)], captions, [""] * count)
