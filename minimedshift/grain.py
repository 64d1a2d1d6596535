"""Grain: the fine noise of a domain, measured on its images without pairs, and given to others.

A translation that is a median has too little noise; one that carries its source's along has too little or too much. Grain is measured in
fine bands (differences of Gaussians) as a function of grey level, for noise follows the number of quanta. Coarse bands, and so tone, are
not touched.

    band <- min(1, w / o) band + sqrt(max(0, w^2 - o^2)) e
"""

import torch

from . import metrics
from .baselines import Curve, gaussians, join, smooth

WIDTHS = (1, 2)  # pixels: bands finer than the first, and between the two, are grain
BINS = 16  # of grey levels
MEDIAN = 0.6745  # median of |N(0, 1)|
ENOUGH = 100  # pixels of a grey level


def spread(images):
    """The grain of images (N, C, H, W): for each fine band a Curve, grey level -> standard deviation, in flat regions of heads and in air."""
    *bands, coarse = gaussians(images, WIDTHS)
    flat = metrics.flat_region(images) | metrics.erode(~metrics.inside(images), 3)
    flat = flat.expand_as(images)
    ends = torch.linspace(-1, 1, BINS + 1)
    which = torch.bucketize(coarse[flat].clamp(-1, 1), ends[1:-1].to(coarse))
    curves = []
    for band in bands:
        size = band[flat].abs()
        values = torch.full((BINS,), torch.nan)
        for i in range(BINS):
            mine = size[which == i]
            if len(mine) >= ENOUGH:
                values[i] = mine.median() / MEDIAN
        curves.append(filled(values))
    return curves


def filled(values):
    """A Curve through bin centres; bins without pixels take the value of the nearest that has them."""
    seen = values.isfinite().nonzero()[:, 0]
    if not len(seen):
        return Curve(-1.0, 1.0, torch.zeros(2))
    at = torch.arange(len(values))
    nearest = seen[(at[:, None] - seen[None]).abs().argmin(1)]
    half = 1 / len(values)
    return Curve(-1 + half, 1 - half, values[nearest])


def give(x, own, wanted, generator=None):
    """x (B, C, H, W) with the grain `wanted` instead of `own`, lists of Curves as `spread` returns: too strong bands are weakened, too weak ones get fresh noise.

        band <- min(1, w / o) band + sqrt(max(0, w^2 - o^2)) e        o, w: standard deviations at the pixel's grey level, e: noise of this band, unit variance
    """
    *bands, coarse = gaussians(x, WIDTHS)
    noise = torch.randn(x.shape, generator=generator, device=generator.device if generator else x.device).to(x)
    *fresh, _ = gaussians(noise, WIDTHS)
    out = []
    for band, e, o, w in zip(bands, fresh, own, wanted):
        o, w = o(coarse), w(coarse)
        power = smooth(band.square(), 1.5).clamp(min=1e-9)
        gain = ((power - (o**2 - w**2).clamp(min=0)) / power).clamp(min=0).sqrt()  # near edges, which are far above the noise, 1
        gain = torch.maximum(gain, (w / o.clamp(min=1e-6)).clamp(max=1))
        out.append(gain * band + (w**2 - o**2).clamp(min=0).sqrt() * e / e.std())
    return join(out + [coarse])
