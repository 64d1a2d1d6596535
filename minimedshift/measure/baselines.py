"""Translators that need no network. A method is worth something where it beats these.

    UNPAIRED   fitted on training images of two domains, each of other heads: they know what MedShift knows
    PAIRED     ceilings, fitted on the same heads in both domains, the target noise-free: unknown to MedShift

Both are tables, name -> fit function. source, target (N, C, H, W) in [-1, 1], float16 or float32.

    fitted = UNPAIRED["bands (Laplacian)"](source, target, rounds=5)
    x = fitted(x1)                  translations (B, C, H, W) of any images of the source domain, not clipped
    for x in fitted.each(x1): ...   after one round, after two, ...: to choose the number on validation heads
    x = fitted.first(2)(x1)         after the rounds that were chosen

A fitted translator is a chain of parts: functions from images to images. Each is fitted to what the parts
before it leave of the source. So a new rival is a function fit_something(source, target), which returns a
part, and one line in a table. Channels and images are pooled: all see the same curves and filters.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

PIXELS = 2**20  # of each domain are enough for a fit: 256 images at 64 x 64
SORTED = 2**16  # values are enough for a histogram
KNOTS = 4096  # of a curve


# ---------------------------------------------------------------- a chain of parts

@dataclass(frozen=True)
class Chain:
    """Functions from images to images, applied one after another."""
    parts: tuple

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x

    def each(self, x):
        """What x (B, C, H, W) has become after each part. A generator, as the solvers of the ODE are."""
        for part in self.parts:
            x = part(x)
            yield x

    def first(self, count):
        """The chain of the first `count` parts."""
        return Chain(self.parts[:count])


def alternate(*fits):
    """The fit function that goes through `fits` once a round: each is fitted to what is left and applied."""
    def fit(source, target, rounds=1):
        """A Chain of `rounds` parts, itself a chain each. Raises ValueError for fewer than one round."""
        if rounds < 1:
            raise ValueError(f"a fit needs at least 1 round, got {rounds}")
        x, target = spread(source), spread(target)
        chain = []
        for _ in range(rounds):
            parts = []
            for fit_part in fits:
                part = fit_part(x, target)
                parts.append(part)
                x = part(x)
            chain.append(Chain(tuple(parts)))
        return Chain(tuple(chain))
    return fit


def tensor(a):
    """An array or a tensor as a float32 tensor on the CPU."""
    return a.float().cpu() if torch.is_tensor(a) else torch.from_numpy(np.array(a, np.float32))


def spread(stack):
    """Every n-th image of a stack (N, C, H, W), for the smallest n that leaves at most PIXELS pixels."""
    n = math.ceil(math.prod(stack.shape) / PIXELS)
    return tensor(stack[::n])


# ---------------------------------------------------------------- grey-value curves

@dataclass(frozen=True)
class Curve:
    """A function of the grey value: straight lines between K equally spaced knots, constant outside.
    values (K,) are those at the knots, from low to high."""
    low: float
    high: float
    values: torch.Tensor

    def __call__(self, x):
        """x and the result: any shape."""
        values = self.values.to(x)
        last = len(values) - 1
        at = ((x - self.low) * (last / (self.high - self.low))).clamp(0, last)  # counted in knots
        left = at.long().clamp(max=last - 1)
        return torch.lerp(values[left], values[left + 1], at - left)


def fit_histogram(source, target):
    """Unpaired: the curve that sends each quantile of the source's pixels to that of the target's.

        curve = F_target^-1 o F_source        (Gonzalez and Woods, Digital Image Processing, 3.3.2)

    Of pixels that are equal (air) half count as darker.
    """
    s, t = pixels(source), pixels(target)
    low, high = ends(s)
    knots = torch.linspace(low, high, KNOTS)
    darker = (torch.searchsorted(s, knots) + torch.searchsorted(s, knots, right=True)) / (2 * len(s))
    at = (darker * len(t) - .5).clamp(0, len(t) - 1)
    left, right = at.floor().long(), at.ceil().long()
    return Curve(low, high, torch.lerp(t[left], t[right], at - left))


def pixels(stack):
    """About SORTED values of a stack, in order. An odd stride sees all columns of images 2^n pixels wide."""
    v = tensor(stack).flatten()
    stride = max(1, len(v) // SORTED) | 1  # odd
    return v[::stride].sort().values


def ends(values):
    """The smallest and the largest value, a little apart even if they are equal."""
    low, high = values.min().item(), values.max().item()
    return low, max(high, low + 1e-3)


def fit_curve(source, target, bins=512):
    """Paired: the best non-decreasing curve, in least squares of pixels: the limit of any lookup table.
    Pixels are binned by source value. The bins' target means, weighted by their counts, are made monotone."""
    s, t = tensor(source).double().flatten(), tensor(target).double().flatten()
    low, high = ends(s)
    bin = ((s - low) / (high - low) * bins).long().clamp(max=bins - 1)
    count = torch.bincount(bin, minlength=bins)
    s = torch.bincount(bin, s, minlength=bins)  # the sum of each bin
    t = torch.bincount(bin, t, minlength=bins)
    seen = count > 0
    count = count[seen]
    return through(s[seen] / count, isotonic(t[seen] / count, count))


def through(knots, values):
    """The Curve that is straight between any knots (K,), sorted."""
    low, high = ends(knots)
    values = np.interp(np.linspace(low, high, KNOTS), knots, values)
    return Curve(low, high, torch.from_numpy(values).float())


def isotonic(y, weight):
    """The nearest non-decreasing sequence to y (K,), weighted least squares: (K,).

        min sum_i weight_i (f_i - y_i)^2   with   f_1 <= f_2 <= ...

    Pool adjacent violators (Ayer et al. 1955): merge two neighbouring blocks that are out of order into their
    mean, until there are none.
    """
    blocks = []  # (mean, weight, how many)
    for mean, w in zip(y.tolist(), weight.tolist()):
        n = 1
        while blocks and blocks[-1][0] >= mean:
            before, v, k = blocks.pop()
            mean = (mean * w + before * v) / (w + v)
            w, n = w + v, n + k
        blocks.append((mean, w, n))
    means, _, counts = zip(*blocks)
    return torch.repeat_interleave(torch.tensor(means, dtype=y.dtype), torch.tensor(counts))


# ---------------------------------------------------------------- the spectrum

@dataclass(frozen=True)
class RingGains:
    """A gain (R,) for each ring of spatial frequencies, in an image of any size.
    Ring r has about r periods per `side` pixels."""
    side: int
    gains: torch.Tensor

    def __call__(self, x):
        ring = rings(*x.shape[-2:], self.side).clamp(max=len(self.gains) - 1)
        gain = self.gains[ring].to(x)  # (H, W)
        return torch.fft.ifft2(torch.fft.fft2(x) * gain).real


def rings(H, W, side):
    """The ring of each Fourier coefficient: its periods per `side` pixels, rounded, (H, W) int64."""
    frequency = torch.hypot(torch.fft.fftfreq(H)[:, None], torch.fft.fftfreq(W)[None])  # periods per pixel
    return (frequency * side).round().long()


def radial_power(x):
    """The mean power |F x|^2 of images (N, C, H, W) in each ring, (R,)."""
    ring = rings(*x.shape[-2:], max(x.shape[-2:])).flatten()
    power = torch.fft.fft2(x).abs().square().mean((0, 1)).flatten()  # (H W,)
    return torch.bincount(ring, power) / torch.bincount(ring)


def fit_spectrum(source, target):
    """Unpaired: gains after which the set's mean radial power is the target's. Both of one image size."""
    gains = (radial_power(target) / radial_power(source).clamp(min=1e-12)).sqrt()
    return RingGains(max(source.shape[-2:]), gains)


# ---------------------------------------------------------------- bands

def laplacian(x, levels=4):
    """The Laplacian pyramid of x (B, C, H, W): [detail at H, at H / 2, ..., the rest], levels + 1 bands.
    (Burt and Adelson 1983.) Halving weighs four pixels 1, 3, 3, 1 each way; doubling, its adjoint, is linear
    interpolation."""
    bands = []
    for _ in range(levels):
        half = [-(-side // 2) for side in x.shape[-2:]]
        small = F.interpolate(x, half, mode="bilinear", antialias=True)
        bands.append(x - F.interpolate(small, x.shape[-2:], mode="bilinear"))
        x = small
    return bands + [x]


def gaussians(x, widths=(1, 2, 4, 8)):
    """Differences of Gaussians: what each wider blur of x (B, C, H, W) takes away, and the rest."""
    bands = []
    fine = x
    for width in widths:
        coarse = smooth(x, width)
        bands.append(fine - coarse)
        fine = coarse
    return bands + [fine]


def smooth(x, width):
    """Gaussian blur of (B, C, H, W), standard deviation `width` pixels: a matrix from each side.
    Its rows have sum 1, at the frame too."""
    def matrix(n):
        i = torch.arange(n, device=x.device, dtype=x.dtype)
        return torch.softmax(-((i[:, None] - i[None]) ** 2) / (2 * width**2), 1)
    return matrix(x.shape[-2]) @ x @ matrix(x.shape[-1]).T


def join(bands):
    """Put bands together again: the inverse of `laplacian` and of `gaussians`."""
    x = bands[-1]
    for detail in reversed(bands[:-1]):
        x = detail + F.interpolate(x, detail.shape[-2:], mode="bilinear")
    return x


@dataclass(frozen=True)
class BandCurves:
    """A curve for each band of `split`."""
    split: Callable
    curves: tuple

    def __call__(self, x):
        return join([curve(band) for curve, band in zip(self.curves, self.split(x))])


def fit_bands(split, source, target):
    """Unpaired: match the histogram of each band."""
    curves = [fit_histogram(s, t) for s, t in zip(split(source), split(target))]
    return BandCurves(split, tuple(curves))


# ---------------------------------------------------------------- least squares, from pairs

def least_squares(equations, ridge=1e-6):
    """w (K,) with A w nearest to b in least squares, in float64: (A^T A + ridge I) w = A^T b.
    equations: an iterable of (A (n, K), b (n,)), so that not all are held at once. ridge: a share of the mean
    of the diagonal of A^T A."""
    gram = right = 0
    for A, b in equations:
        A, b = A.double(), b.double()
        gram = gram + A.T @ A
        right = right + A.T @ b
    ridge = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, right).float()


def singly(x):
    """The channels of x (N, C, H, W) as images of one channel, four at a time: a list of (4, 1, H, W)."""
    return tensor(x).flatten(0, 1)[:, None].split(4)


@dataclass(frozen=True)
class Filter:
    """Correlation with a kernel (K, K), edges repeated, plus a constant."""
    kernel: torch.Tensor
    constant: float

    def __call__(self, x):
        images = x.flatten(0, 1)[:, None]
        padded = F.pad(images, (len(self.kernel) // 2,) * 4, mode="replicate")
        return F.conv2d(padded, self.kernel.to(x)[None, None]).view_as(x) + self.constant


def fit_filter(source, target, width=13):
    """Paired: the kernel (width, width), width odd, and constant nearest to the target, in least squares."""
    def equations():
        for x, truth in zip(singly(source), singly(target)):
            padded = F.pad(x, (width // 2,) * 4, mode="replicate")
            around = F.unfold(padded, width).transpose(1, 2).flatten(0, 1)  # (pixels, width^2)
            yield F.pad(around, (0, 1), value=1.0), truth.flatten()

    w = least_squares(equations())
    return Filter(w[:-1].view(width, width), w[-1].item())


def fit_band_curves(split, source, target, knots=24):
    """Paired: the curves, one a band, whose sum comes nearest to the target, in least squares of pixels.
    All are fitted at once. A curve is a sum of hats: each is 1 at one of the `knots`, which lie at quantiles
    of the band, and 0 at the others."""
    places = [quantiles(band, knots) for band in split(tensor(source))]

    def equations():
        for x, truth in zip(singly(source), singly(target)):
            bands = split(x)
            columns = []
            for i, at in enumerate(places):
                finer = [torch.zeros_like(band) for band in bands[:i]]
                columns.append(join(finer + [hats(bands[i], at)]))  # (4, K, H, W)
            yield torch.cat(columns, 1).movedim(1, -1).flatten(0, -2), truth.flatten()

    values = least_squares(equations(), 1e-5).split([len(at) for at in places])
    curves = [through(at, v) for at, v in zip(places, values)]
    return BandCurves(split, tuple(curves))


def quantiles(x, count):
    """About `count` different quantiles of x, (K,), on the grid of a Curve."""
    v = pixels(x)
    low, high = ends(v)
    step = (high - low) / (KNOTS - 1)
    chosen = v[torch.linspace(0, len(v) - 1, count).long()]
    steps = ((chosen - low) / step).round()
    steps[-1] = KNOTS - 1
    return low + steps.unique() * step


def hats(x, knots):
    """The share of each knot's value in a curve at each pixel: (B, K, H, W), with sum 1 over K.
    x (B, 1, H, W), knots (K,), sorted."""
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    place = left + ((x - knots[left]) / (knots[right] - knots[left])).clamp(0, 1)  # counted in knots
    distance = (place - torch.arange(len(knots)).view(1, -1, 1, 1)).abs()  # (B, K, H, W)
    return (1 - distance).clamp(min=0)


# ---------------------------------------------------------------- the tables

UNPAIRED = {
    "histogram": alternate(fit_histogram),
    "histogram and spectrum": alternate(fit_histogram, fit_spectrum, fit_histogram),
    "bands (Laplacian)": alternate(partial(fit_bands, laplacian), fit_histogram),
    "bands (DoG)": alternate(partial(fit_bands, gaussians), fit_histogram),
}
PAIRED = {
    "curve": alternate(fit_curve),
    "curve and filter": alternate(fit_curve, fit_filter),
    "band curves (Laplacian)": alternate(fit_curve, partial(fit_band_curves, laplacian)),
    "band curves (DoG)": alternate(fit_curve, partial(fit_band_curves, gaussians)),
}
