"""What is compared: a Question, and every Method that answers it. Those without a network: baselines.py."""

import time
from dataclasses import dataclass
from functools import cache
from typing import Callable

import torch

from minimedshift import baselines, sampler
from minimedshift.data import Pairs
from minimedshift.support.command import refuse
from minimedshift.support.machine import in_batches, scorer, to_float

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


def question(pairs, s, t, heads, device):
    """The Question s -> t on the first `heads` heads of `Pairs`. Of real pairs a noisy image is the truth.
    Of unpaired images, (N_d, C, H, W) a domain, there is none."""
    if not isinstance(pairs, Pairs):
        return Question(s, t, to_float(pairs[s][:heads], device), to_float(pairs[t][:heads], scorer(device)))
    x = to_float(pairs.images[:heads, s], device)
    get = lambda stack: None if stack is None else to_float(stack[:heads, ..., t, :, :, :], scorer(device))
    images, truth = get(pairs.images), get(pairs.truth)
    return Question(s, t, x, images, images if truth is None else truth, get(pairs.second), get(pairs.decoys))


def main_domains(domains, source=None, target=None):
    """The numbers of the main pair's domains: MAIN, or where one is missing the first and the last domain."""
    domains = list(domains)
    source = source or next(name for name in (MAIN[0], *domains) if name in domains and name != target)
    target = target or next(name for name in (MAIN[1], *domains[::-1]) if name in domains and name != source)
    return domains.index(source), domains.index(target)


@dataclass(frozen=True)
class Method:
    """A way to translate: translate(question, setting) -> (N, C, H, W), or None if it does not know the pair.
    kind: "unpaired" (no network), "learned", "ours", "ceiling" (sees pairs) or "bound" (needs the truth).
    settings: what `knob` can be; the first is taken, and the others are tried on validation heads."""
    name: str
    kind: str
    translate: Callable
    settings: tuple = (None,)
    knob: str = ""


def answer(method, q):
    """The translation of a Question, clipped like a stored image, and the seconds it took; or None, 0."""
    start = time.time()
    x = method.translate(q, method.settings[0])
    if x is None:
        return None, 0.0
    refuse(x.isnan().any(), f"{method.name} translates to what is no number: its weights are spoilt")
    return x.to(q.images.device).clamp(-1, 1), time.time() - start  # a GPU has finished: `refuse` looked at x


def baseline(fit, sources, targets, rounds=1):
    """A baseline of baselines.py, fitted once a pair s -> t to the images sources(s) and targets(t)."""
    fitted = cache(lambda s, t: fit(sources(s), targets(t), rounds))
    return lambda q, rounds: fitted(q.source, q.target).first(rounds)(q.x)


def flow(model, how):
    """The paper's translation at tau."""
    translate = lambda x, q, tau: sampler.translate(model, x, q.source, q.target, **how | dict(tau=tau))
    return lambda q, tau: in_batches(lambda x: translate(x, q, tau), q.x)


def every_method(dataset, model=None, how=None, student=None):
    """The Methods that there is everything for, in the order of the tables.
    model, how: a trained flow, and `translate` of its checkpoint. student: its Student."""
    methods = [Method("untouched", "bound", lambda q, _: q.x)]
    for name, fit in baselines.UNPAIRED.items():  # training images, balanced if the network's were
        rounds = (1,) if name == "histogram" else ROUNDS
        fitted = baseline(fit, dataset.drawn, dataset.drawn, max(rounds))
        methods.append(Method(name, "unpaired", fitted, rounds, "rounds"))
    if model is not None:
        taus = [tau for tau in TAUS if tau < how["t_image"] and tau != how["tau"]]
        methods.append(Method("MedShift", "ours", flow(model, how), (how["tau"], *taus), "tau"))
    if student:
        at_once = lambda q, _: in_batches(lambda x: student(x, q.source, q.target), q.x)
        methods.append(Method(STUDENT, "ours", at_once))
    pairs = dataset.valid_pairs
    if pairs is not None:
        truth = pairs.images if pairs.truth is None else pairs.truth  # noise-free, where it is known
        for name, fit in baselines.PAIRED.items():
            fitted = baseline(fit, lambda s: pairs.images[:, s], lambda t: truth[:, t])
            methods.append(Method(name, "ceiling", fitted))
    if pairs is not None and pairs.second is not None:
        return [*methods, Method("second exposure", "bound", lambda q, _: q.second)]
    return [*methods, Method("real against real", "bound", lambda q, _: q.images)]
