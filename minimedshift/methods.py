"""What is compared: a Question, and every Method that answers it.

A Question is one ordered pair of domains on N heads: pictures to translate, and their truth. A Method is a
way to translate them. `every_method` lists all: those without a network come from baselines.UNPAIRED and
PAIRED, learned ones from `study rivals`.
"""

import time
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from minimedshift import sampler
from minimedshift import baselines, rivals
from minimedshift.support.checkpoint import load_model
from minimedshift.support.command import UserError, refuse
from minimedshift.support.machine import in_batches, to_float

MAIN = ("synthetic-high", "real-normal")
STUDENT = "MedShift's student"
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # the paper reports .3, .45 and .6
SDEDIT_TAUS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ROUNDS = (1, 2, 4, 8, 16)


# ---------------------------------------------------------------- questions

@dataclass(frozen=True)
class Question:
    """Translate x, pictures of N heads in domain number `source`, to domain number `target`."""
    source: int
    target: int
    x: torch.Tensor                         # (N, C, H, W), on the network's device
    images: torch.Tensor                    # (N, C, H, W) of the target domain, as taken
    truth: torch.Tensor                     # (N, C, H, W) of the target domain, noise-free
    second: torch.Tensor | None = None      # (N, C, H, W) of the target domain, taken again
    decoys: torch.Tensor | None = None      # (N, K, C, H, W) truths of other heads in the same view
    materials: torch.Tensor | None = None   # (N, 3, H, W) cm


def question(pairs, s, t, heads, device, x=None):
    """The Question s -> t on the first `heads` heads of `Pairs`. x: the sources, if they are loaded already.
    Of real pairs a noisy image is all the truth there is."""
    def get(array, *which):
        return None if array is None else to_float(array[:heads][which], scorer(device))

    every = slice(None)
    x = to_float(pairs.images[:heads, s], device) if x is None else x
    images = get(pairs.images, every, t)
    truth = images if pairs.truth is None else get(pairs.truth, every, t)
    second, decoys = get(pairs.second, every, t), get(pairs.decoys, every, every, t)
    return Question(s, t, x, images, truth, second, decoys, get(pairs.materials, every))


def scorer(device):
    """Where scores are computed: they take float64, which mps lacks."""
    return "cpu" if torch.device(device).type == "mps" else device


def main_domains(domains, source=None, target=None):
    """The numbers of the main pair's domains: MAIN, or where one is missing the first and the last domain."""
    domains = list(domains)
    if source is None:
        source = next(name for name in (MAIN[0], *domains) if name in domains and name != target)
    if target is None:
        target = next(name for name in (MAIN[1], *domains[::-1]) if name in domains and name != source)
    return domains.index(source), domains.index(target)


# ---------------------------------------------------------------- methods

@dataclass(frozen=True)
class Method:
    """A way to translate: translate(question, setting) -> (N, C, H, W), or None if it does not know the pair.

    kind: "unpaired" (no network), "learned", "ours", "ceiling" (sees pairs) or "bound" (needs the truth).
    settings: what is tried on validation heads; knob: what they are.
    """
    name: str
    kind: str
    translate: Callable
    settings: tuple = (None,)
    knob: str = ""


def answer(method, q, setting=None):
    """The translation of a Question, clipped like a stored image, and the seconds it took; or None, 0."""
    start = time.time()
    x = method.translate(q, setting)
    if x is None:
        return None, 0.0
    if x.is_cuda:
        torch.cuda.synchronize()
    refuse(x.isnan().any(), f"{method.name} translates to what is no number: its weights are spoilt")
    return x.to(q.truth.device).clamp(-1, 1), time.time() - start


def unpaired(dataset, fit, rounds):
    """A baseline of baselines.UNPAIRED, fitted to training images, balanced if the network's were."""
    fitted = cache(lambda s, t: fit(dataset.drawn(s), dataset.drawn(t), rounds))
    return lambda q, rounds: fitted(q.source, q.target).first(rounds)(q.x)


def paired(pairs, fit):
    """A baseline of baselines.PAIRED, fitted to validation pairs: sources and noise-free truths."""
    truth = pairs.images if pairs.truth is None else pairs.truth
    fitted = cache(lambda s, t: fit(np.asarray(pairs.images[:, s]), np.asarray(truth[:, t])))
    return lambda q, _: fitted(q.source, q.target)(q.x)


def flow(model, how):
    """The paper's translation at tau. The way back is kept: it is the same for every target."""
    legs = {key: how[key] for key in ("steps", "solver", "end", "colour")}
    seeded = lambda seed, x: torch.Generator(x.device).manual_seed(seed)

    @lru_cache(maxsize=1)
    def encoded(x1, s, tau):
        noise = seeded(0, x1)
        return in_batches(lambda x: sampler.encode(model, x, s, tau, generator=noise, **legs), x1)

    def translate(q, tau):
        z, noise = encoded(q.x, q.source, tau), seeded(1, q.x)
        forth = partial(sampler.decode, guidance=how["guidance"], generator=noise, **legs)
        return in_batches(lambda part: forth(model, part, q.target, tau), z)
    return translate


def directly(translate):
    """translate(x, s, t) with nothing to set: a student, or a bridge from image to image."""
    return lambda q, _: in_batches(lambda x: translate(x, q.source, q.target), q.x)


def sdedit(file, domains, device, end):
    """rivals.sdedit with a network of its own, and with MedShift's `end`."""
    model, state = load_rival(file, domains, device)
    move = partial(rivals.sdedit, model, steps=20, end=end, colour=state["translate"]["colour"])
    return lambda q, tau: in_batches(lambda x: move(x, q.target, tau), q.x)


def load_rival(file, domains, device):
    """load_model of a network that knows just these domains. Raises UserError for others."""
    model, state = load_model(file, device)
    refuse(state["domains"] != domains, f"{file} knows other domains than {', '.join(domains)}")
    return model, state


def one_pair_each(files, domains, device):
    """Translators that know one pair each, as rivals.save has written them."""
    known = {}
    for file in files:
        translate, pair = rivals.load(file, device)
        refuse(not set(pair) <= set(domains), f"{file} knows other domains than {', '.join(domains)}")
        known[tuple(map(domains.index, pair))] = translate

    def translate(q, _):
        pair = q.source, q.target
        return in_batches(known[pair], q.x) if pair in known else None
    return translate


# ---------------------------------------------------------------- the table

def every_method(dataset, model=None, how=None, translator=None, folder=""):
    """The Methods that there is everything for, in the order of the tables.

    model, how: a trained network, and `translate` of its checkpoint. translator: its student. folder: learned
    rivals, as `python -m minimedshift.study rivals` leaves them. Raises UserError if it holds none.
    """
    methods = [Method("untouched", "bound", lambda q, _: q.x)]
    for name, fit in baselines.UNPAIRED.items():
        rounds = (1,) if name == "histogram" else ROUNDS
        methods.append(Method(name, "unpaired", unpaired(dataset, fit, max(rounds)), rounds, "rounds"))
    if dataset.valid_pairs is not None:
        for name, fit in baselines.PAIRED.items():
            methods.append(Method(name, "ceiling", paired(dataset.valid_pairs, fit)))
        if dataset.valid_pairs.second is not None:
            methods.append(Method("second exposure", "bound", lambda q, _: q.second))
        else:
            methods.append(Method("real against real", "bound", lambda q, _: q.images))
    if folder:
        device = next(model.parameters()).device
        methods += learned_rivals(Path(folder), list(dataset.domains), device, how["end"])
    if model is not None and how["x0"] == "image":
        bridge = partial(sampler.translate, model, **how)
        methods.append(Method("image to image", "learned", directly(bridge)))
    elif model is not None:
        taus = tuple(sorted({tau for tau in (*TAUS, how["tau"]) if tau < how["end"]}))
        methods.append(Method("MedShift", "ours", flow(model, how), taus, "tau"))
        methods.append(Method("DDIB", "learned", flow(model, how), (0.0,), "tau"))
    if translator:
        methods.append(Method(STUDENT, "ours", directly(translator)))
    return methods


def learned_rivals(folder, domains, device, end):
    """The Methods of a folder of networks; raises UserError if there is none."""
    methods = []
    for file in folder.glob("sdedit/checkpoint.pt"):
        methods.append(Method("SDEdit", "learned", sdedit(file, domains, device, end), SDEDIT_TAUS, "tau"))
    for file in folder.glob("bridge/checkpoint.pt"):
        model, state = load_rival(file, domains, device)
        bridge = partial(sampler.translate, model, **state["translate"])
        methods.append(Method("image to image", "learned", directly(bridge)))
    if files := list(folder.glob("adversarial*.pt")):
        methods.append(Method("CycleGAN", "learned", one_pair_each(files, domains, device)))
    if files := list(folder.glob("supervised*.pt")):
        methods.append(Method("supervised", "ceiling", one_pair_each(files, domains, device)))
    if not methods:
        raise UserError(f"--rivals {folder}: no rival is there, `minimedshift.study rivals` trains them")
    return methods
