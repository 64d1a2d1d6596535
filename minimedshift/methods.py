"""What is compared: a Question, and every Method that answers it.

A Question is one ordered pair of domains on N heads: pictures to translate, and their truth where there is
one. A Method is a way to translate them. `every_method` lists all: those without a network come from
baselines.UNPAIRED and PAIRED.
"""

import time
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Callable

import numpy as np
import torch

from minimedshift import baselines, sampler
from minimedshift.data import Pairs
from minimedshift.support.command import refuse
from minimedshift.support.machine import in_batches, to_float

MAIN = ("synthetic-high", "real-normal")
STUDENT = "MedShift's student"
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # the paper reports .3, .45 and .6
ROUNDS = (16, 1, 2, 4, 8)


@dataclass(frozen=True)
class Question:
    """Translate x, pictures of N heads in domain number `source`, to domain number `target`."""
    source: int
    target: int
    x: torch.Tensor                         # (N, C, H, W), on the network's device
    images: torch.Tensor                    # (M, C, H, W) of the target domain, as taken
    truth: torch.Tensor | None = None       # (N, C, H, W) of the target domain, noise-free; M = N
    second: torch.Tensor | None = None      # (N, C, H, W) of the target domain, taken again
    decoys: torch.Tensor | None = None      # (N, K, C, H, W) truths of other heads in the same view
    materials: torch.Tensor | None = None   # (N, 3, H, W) cm


def question(pairs, s, t, heads, device, x=None):
    """The Question s -> t on the first `heads` heads of `Pairs`. x: the sources, if they are loaded already.

    Of real pairs a noisy image is all the truth there is. pairs can also be unpaired images, an array
    (N_d, C, H, W) for each domain: then there is no truth.
    """
    def get(array, *which):
        return None if array is None else to_float(array[:heads][which], scorer(device))

    if not isinstance(pairs, Pairs):
        return Question(s, t, to_float(pairs[s][:heads], device), get(pairs[t]))
    every = slice(None)
    x = to_float(pairs.images[:heads, s], device) if x is None else x
    images = get(pairs.images, every, t)
    truth = images if pairs.truth is None else get(pairs.truth, every, t)
    second, decoys = get(pairs.second, every, t), get(pairs.decoys, every, every, t)
    return Question(s, t, x, images, truth, second, decoys, get(pairs.materials))


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


@dataclass(frozen=True)
class Method:
    """A way to translate: translate(question, setting) -> (N, C, H, W), or None if it does not know the pair.

    kind: "unpaired" (no network), "learned", "ours", "ceiling" (sees pairs) or "bound" (needs the truth).
    settings: what is tried on validation heads, the default first; knob: what they are.
    """
    name: str
    kind: str
    translate: Callable
    settings: tuple = (None,)
    knob: str = ""


def answer(method, q, setting=None):
    """The translation of a Question, clipped like a stored image, and the seconds it took; or None, 0.
    Raises UserError for a translation that is no number."""
    start = time.time()
    x = method.translate(q, setting)
    if x is None:
        return None, 0.0
    if x.is_cuda:
        torch.cuda.synchronize()
    refuse(x.isnan().any(), f"{method.name} translates to what is no number: its weights are spoilt")
    return x.to(q.images.device).clamp(-1, 1), time.time() - start


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
    legs = {key: how[key] for key in ("steps", "solver", "t_image")}

    @lru_cache(maxsize=1)
    def encoded(x1, s, tau):
        return in_batches(lambda x: sampler.encode(model, x, s, tau, **legs), x1)

    def translate(q, tau):
        forth = partial(sampler.decode, guidance=how["guidance"], **legs)
        return in_batches(lambda z: forth(model, z, q.target, tau), encoded(q.x, q.source, tau))
    return translate


def directly(translate):
    """translate(x, s, t) with nothing to set: a student."""
    return lambda q, _: in_batches(lambda x: translate(x, q.source, q.target), q.x)


def every_method(dataset, model=None, how=None, student=None):
    """The Methods that there is everything for, in the order of the tables.
    model, how: a trained flow, and `translate` of its checkpoint. student: its Student."""
    methods = [Method("untouched", "bound", lambda q, _: q.x)]
    for name, fit in baselines.UNPAIRED.items():
        rounds = (1,) if name == "histogram" else ROUNDS
        methods.append(Method(name, "unpaired", unpaired(dataset, fit, max(rounds)), rounds, "rounds"))
    pairs = dataset.valid_pairs
    if pairs is not None:
        for name, fit in baselines.PAIRED.items():
            methods.append(Method(name, "ceiling", paired(pairs, fit)))
    if pairs is not None and pairs.second is not None:
        methods.append(Method("second exposure", "bound", lambda q, _: q.second))
    else:
        methods.append(Method("real against real", "bound", lambda q, _: q.images))
    if model is not None:
        taus = [tau for tau in TAUS if tau < how["t_image"] and tau != how["tau"]]
        methods.append(Method("MedShift", "ours", flow(model, how), (how["tau"], *taus), "tau"))
    if student:
        methods.append(Method(STUDENT, "ours", directly(student)))
    return methods
