"""Image tools without a network: grey-value curves, bands of a pyramid, blur, and where a head is.
Images are (B, C, H, W). Channels and images share the curves."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

COARSEST = 4  # The shorter side of a pyramid's last band has about so many pixels.
DARKEST = math.exp(-3)  # the least e^x of an answer
SORTED, KNOTS = 2**16, 4096  # A histogram is made from about 2^16 pixels, a curve has 4096 knots.
scaled = partial(F.interpolate, mode="bilinear", antialias=True)  # enlarging is the same without, and slower


@dataclass(frozen=True)
class Curve:
    """A function of the grey value: values (K,) at equally spaced knots, linear between, constant outside."""
    low: float
    high: float
    values: torch.Tensor

    def __call__(self, x):
        values = self.values.to(x)
        last = len(values) - 1
        at = ((x - self.low) * (last / (self.high - self.low))).clamp(0, last)  # counted in knots
        left = at.long().clamp(0, last - 1)  # NaN too has a place, and stays NaN
        return torch.lerp(values[left], values[left + 1], at - left)


def fit_histogram(source, target):
    """The Curve that sends each quantile of the source's pixels to that of the target's.

        curve = F_target^-1 o F_source        (Gonzalez and Woods, Digital Image Processing, 3.3.2)

    Half of the pixels that are equal (air) count as darker."""
    s, t = pixels(source), pixels(target)
    low, high = ends(s)
    knots = torch.linspace(low, high, KNOTS, device=s.device)
    darker = (torch.searchsorted(s, knots) + torch.searchsorted(s, knots, right=True)) / (2 * len(s))
    quantile = Curve(0, len(t) - 1, t)  # of the target, by how many pixels are darker
    return Curve(low, high, quantile(darker * len(t) - .5))


def pixels(images):
    """About SORTED values of images, in order."""
    stride = max(1, images.numel() // SORTED) | 1  # odd: sees all columns of images 2^n pixels wide
    return in_order(images.flatten()[::stride])


def in_order(x):
    """The values of x (..., N), sorted along N. On a CPU numpy is up to thirty times as fast as torch."""
    return x.sort().values if x.device.type != "cpu" else torch.from_numpy(np.sort(x.numpy()))


def ends(values):
    """The smallest and the largest value, a little apart even if they are equal."""
    low, high = values.min().item(), values.max().item()
    return low, max(high, low + 1e-3)


def laplacian(x, levels=None):
    """The Laplacian pyramid, levels + 1 bands: [detail at H, at H / 2, ..., the rest].
    Halving weighs four pixels 1, 3, 3, 1 each way (Burt and Adelson 1983). None leaves COARSEST pixels."""
    if levels is None:
        levels = max(1, round(math.log2(min(x.shape[-2:]) / COARSEST)))
    bands = []
    for _ in range(levels):
        half = [-(-side // 2) for side in x.shape[-2:]]
        small = scaled(x, half)
        bands.append(x - scaled(small, x.shape[-2:]))
        x = small
    return bands + [x]


def join(bands):
    """The image (B, C, H, W) that has these bands: the inverse of `laplacian`."""
    x = bands[-1]
    for detail in reversed(bands[:-1]):
        x = detail + scaled(x, detail.shape[-2:])
    return x


@dataclass(frozen=True)
class BandCurves:
    """Curves for the bands of e^x, or of x itself if not log, from fine to coarse. Blur and scatter add
    signals, and an X-ray's x (B, C, H, W) is about a log of a signal. With log, answers are at least -3."""
    curves: list
    log: bool = True

    def __call__(self, x):
        bands = laplacian(x.exp() if self.log else x, len(self.curves) - 1)
        x = join([curve(band) for curve, band in zip(self.curves, bands)])
        return x.clamp(min=DARKEST).log() if self.log else x


def fit_bands(source, target, log=True):
    """The BandCurves that bring the histogram of each band of e^source to that of e^target (log), or of x."""
    source, target = (laplacian(x.exp() if log else x) for x in (source, target))
    return BandCurves(list(map(fit_histogram, source, target)), log)


def blur(x, width, radius):
    """Gaussian blur of `width` pixels, cut off at `radius`, without padding: `radius` is lost on each side.
    A sum of shifted copies is never rounded to TF32, which would drown weak noise."""
    k = torch.arange(-radius, radius + 1, dtype=torch.float64)
    k = torch.exp(-k**2 / (2 * width**2))
    kernel = (k / k.sum()).tolist()
    for axis in (-2, -1):
        n = x.shape[axis] - 2 * radius
        parts = [x.narrow(axis, i, n) for i in range(len(kernel))]
        x = kernel[0] * parts[0]
        for weight, part in zip(kernel[1:], parts[1:]):
            x.add_(part, alpha=weight)
    return x


def low_pass(x, width=1.5):
    """Gaussian blur of `width` pixels, reflected at the frame. Sides are over 4 width.
    A wave of w radians per pixel keeps exp(-w^2 width^2 / 2) of its amplitude."""
    radius = math.ceil(4 * width)
    return blur(F.pad(x, (radius,) * 4, mode="reflect"), width, radius)


def inside(images):
    """Where the head is, (B, 1, H, W) bool: the darker of two classes of grey, whatever that of the air.
    The threshold between them makes n1 n2 (m1 - m2)^2 largest (Otsu 1979, Eq. 14)."""
    grey = low_pass(images).mean(1, keepdim=True)
    v = in_order(grey.flatten(1).double())  # (B, N)
    n = torch.arange(1, v.shape[1], device=v.device)  # darker pixels
    below, total = v.cumsum(1)[:, :-1], v.sum(1, keepdim=True)
    between = n * (v.shape[1] - n) * (below / n - (total - below) / (v.shape[1] - n)) ** 2
    threshold = v.gather(1, between.argmax(1, keepdim=True)).to(grey)  # (B, 1)
    return grey <= threshold[:, :, None, None]


def largest_around(x, side):
    """The largest of side x side neighbours, of images x (B, 1, H, W): as channels, which is faster."""
    z = x.transpose(0, 1).contiguous(memory_format=torch.channels_last)
    return F.max_pool2d(z, side, stride=1, padding=side // 2).transpose(0, 1)


def flat_region(images, share=.3, air=False):
    """Where only noise should be fine: the flattest `share` of the pixels inside the head, (B, 1, H, W) bool.
    A pixel is as flat as the low-passed image is where it is steepest among 5x5 neighbours.
    air: also the flattest share of those outside, 3 pixels from the head."""
    grey = low_pass(images).mean(1, keepdim=True)
    dy, dx = torch.gradient(grey, dim=(2, 3))
    steep = largest_around(torch.sqrt(dx**2 + dy**2), 5)
    head, flat = inside(images), torch.zeros_like(steep, dtype=torch.bool)
    without = lambda others, pixels: ~(largest_around(others.float(), 2 * pixels + 1) > 0)
    for place in (without(~head, 2), without(head, 3))[:1 + air]:
        in_place = in_order(steep.masked_fill(~place, math.inf).flatten(1))
        keep = (share * place.flatten(1).sum(1, keepdim=True)).ceil().long().clamp(min=1)
        flat |= place & (steep <= in_place.gather(1, keep - 1)[:, :, None, None])
    return flat
