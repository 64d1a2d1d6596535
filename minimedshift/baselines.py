"""Translators that need no network. A method is worth something where it beats these.

    UNPAIRED   fitted on training images of two domains, each of other heads: they know what MedShift knows
    PAIRED     a ceiling, fitted on the same heads in both domains, the target noise-free: unknown to MedShift

    fitted = UNPAIRED["bands (Laplacian)"](source, target, rounds=5)        of (N, C, H, W), any float type
    x = fitted(x1)                  translations (B, C, H, W) of images of the source domain, not clipped
    x = fitted.first(2)(x1)         after two rounds

A new rival is a function fit_something(source, target), whose result translates, and a line in a table."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from minimedshift.bands import KNOTS, Curve, ends, fit_bands, fit_histogram, low_pass
from minimedshift.support.machine import in_batches

IMAGES = 256  # A fit looks at so many images of each domain.
FEW, CLEARLY = 128, 1.4  # images that tell the scale; so many times the mean error (RMS) is clearly more


@dataclass(frozen=True)
class Chain:
    """Functions from images to images, applied one after another."""
    parts: list

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x

    def first(self, count):
        """The chain of the first `count` parts."""
        return Chain(self.parts[:count])


def alternate(*fits):
    """The fit function that goes through `fits` once a round: each is fitted to what is left and applied."""
    def fit(source, target, rounds=1, images=IMAGES):
        """A Chain of `rounds` parts, itself a chain each, fitted to about `images` of each domain."""
        x, target = spread(source, images), spread(target, images)
        chain = []
        for _ in range(rounds):
            parts = []
            for fit_part in fits:
                parts.append(fit_part(x, target))
                x = in_batches(parts[-1], x)
            chain.append(Chain(parts))
        return Chain(chain)
    return fit


def spread(stack, most=IMAGES):
    """About `most` images, evenly spread, as files in order may be alike: a float32 tensor."""
    return torch.as_tensor(stack[::max(1, round(len(stack) / most))]).float()


def fit_curve(source, target, bins=512):
    """Paired: the best non-decreasing curve, in least squares of pixels: the limit of any lookup table.
    The mean of the target in each bin of source values, weighted by its count, is made monotone."""
    s, t = source.double().flatten(), target.double().flatten()
    low, high = ends(s)
    bin = ((s - low) / (high - low) * bins).long().clamp(max=bins - 1)
    count = torch.bincount(bin, minlength=bins)
    s = torch.bincount(bin, s, minlength=bins)  # the sum of each bin
    t = torch.bincount(bin, t, minlength=bins)
    count, s, t = (z[count > 0] for z in (count, s, t))
    low, high = ends(s / count)
    values = np.interp(np.linspace(low, high, KNOTS), s / count, isotonic(t / count, count))
    return Curve(low, high, torch.from_numpy(values).float())


def isotonic(y, weight):
    """The nearest non-decreasing sequence to y (K,): least sum_i weight_i (f_i - y_i)^2, (K,).

        f_i = max_{a <= i} min_{b >= i} m_ab      m_ab: weighted mean of y_a to y_b      (Barlow et al. 1972)
    """
    total, mass = (F.pad(z.cumsum(0), (1, 0)) for z in (weight * y, weight))  # before each, (K + 1,)
    m = (total[1:] - total[:-1, None]) / (mass[1:] - mass[:-1, None])  # (K, K), a down and b across
    empty = torch.ones_like(m).tril(-1).bool()  # b < a
    least = m.masked_fill(empty, torch.inf).flip(1).cummin(1).values.flip(1)  # of b >= i, (a, i)
    return least.masked_fill(empty, -torch.inf).amax(0)


def fit_tone(source, target, rounds=1, images=IMAGES, log=None):
    """Bands, then pixels. log: bands are of e^x (True) or of x (False); None asks `is_log`."""
    log = is_log([source, target]) if log is None else log
    return alternate(partial(fit_bands, log=log), fit_histogram)(source, target, rounds, images)


def is_log(domains):
    """Whether bands should be of e^x, as X-rays' should: true unless bands of x clearly lose less on the way
    from one of the domains (N, C, H, W) to the next and back. It takes 30 images to see it, but no pairs."""
    def lost(a, b, log):
        there, back = fit_tone(a, b, 2, FEW, log), fit_tone(b, a, 2, FEW, log)
        ways = (a, lambda x: back(there(x))), (b, lambda x: there(back(x)))
        return sum(low_pass(in_batches(way, x) - x).square().mean() for x, way in ways)
    few = [spread(images, FEW) for images in domains]
    of_x, of_exp = (sum(lost(a, b, log) for a, b in zip(few, few[1:])) for log in (False, True))
    return not of_exp > CLEARLY**2 * of_x


UNPAIRED = {"histogram": alternate(fit_histogram), "bands (Laplacian)": fit_tone}
PAIRED = {"curve": alternate(fit_curve)}
