"""What a student cannot learn from its teacher: tone and noise, from training images of the target, unpaired.

    tone    the histogram of each pyramid band, then of the pixels, is brought to the target's
    grain   fine bands get the strength of noise that the target has, by grey level

A median does not outvote a teacher that is wrong in the same way on every head, but histograms show it. And a
median is smooth, while strong noise of the source passes through a local network.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from minimedshift.bands import (BandCurves, Curve, erode, fit_bands, fit_histogram, flat_region, gaussians,
    inside, join, laplacian, smooth)

IMAGES = 1000  # of each domain are looked at; of a histogram, too few images pull the tone off
NOISY = 250   # of them, about, are enough for the noise
WIDTHS = (1, 2)  # pixels: bands finer than the first, and between the two, are grain
LEVELS = 16   # of grey
ENOUGH = 100  # pixels of a grey level
NORMAL = 0.6745  # median of |N(0, 1)|


# ---------------------------------------------------------------- grain

def grain(images, robust):
    """The noise of images (N, C, H, W): for each fine band a Curve, grey level -> standard deviation.

    Measured in flat places inside heads and in the air around. robust: from the median of |band|, which a bit
    of fine texture does not move; else from its mean square.
    """
    *bands, coarse = gaussians(images, WIDTHS)
    flat = (flat_region(images) | erode(~inside(images), 3)).expand_as(images)
    ends = torch.linspace(-1, 1, LEVELS + 1)[1:-1].to(images)
    level = torch.bucketize(coarse[flat].clamp(-1, 1), ends)
    curves = []
    for band in bands:
        size = band[flat].abs()
        deviations = torch.full((LEVELS,), torch.nan)
        for i in range(LEVELS):
            mine = size[level == i]
            if len(mine) >= ENOUGH:
                deviations[i] = mine.median() / NORMAL if robust else mine.square().mean().sqrt()
        curves.append(through_levels(deviations))
    return curves


def through_levels(values):
    """A Curve through the middles of grey levels. A level without a value (nan) takes the nearest, or 0."""
    half = 1 / len(values)
    seen = values.isfinite().nonzero()[:, 0]
    if len(seen):
        nearest = (torch.arange(len(values))[:, None] - seen).abs().argmin(1)
        values = values[seen[nearest]]
    return Curve(-1 + half, 1 - half, values.nan_to_num())


def regrain(x, own, wanted, noise):
    """x (B, C, H, W) with the grain `wanted` instead of `own`, Curves of each band; noise: white, like x.

        band <- gain band + sqrt(max(0, w^2 - o^2)) e        o, w: own and wanted deviation at the grey level
        gain^2 = 1 - max(0, o^2 - w^2) / P                   P: the band's power around; gain at least w / o

    e is noise in this band, of variance 1. The gain is a Wiener filter's: 1 near edges, far above the noise.
    """
    *bands, coarse = gaussians(x, WIDTHS)
    *fresh, _ = gaussians(noise, WIDTHS)
    *unit, _ = gaussian_deviations(x.shape[-2:])
    parts = []
    for band, e, deviation, o, w in zip(bands, fresh, unit, own, wanted):
        o, w = o(coarse), w(coarse)
        power = smooth(band.square(), 1.5).clamp(min=1e-9)
        gain = (1 - (o**2 - w**2).clamp(min=0) / power).clamp(min=0).sqrt()
        gain = torch.maximum(gain, (w / o.clamp(min=1e-6)).clamp(max=1))
        parts.append(gain * band + (w**2 - o**2).clamp(min=0).sqrt() * e / deviation)
    return join(parts + [coarse])


def gaussian_deviations(sides):
    """The deviation of each band of white noise of variance 1: from the bands of one bright pixel."""
    point = torch.zeros(1, 1, *sides)
    point[..., sides[0] // 2, sides[1] // 2] = 1
    return [band.square().sum().sqrt().item() for band in gaussians(point, WIDTHS)]


# ---------------------------------------------------------------- both

@dataclass(frozen=True)
class Finish:
    """Gives a student's answers x (B, C, H, W) for one ordered pair the target's tone and grain."""
    bands: BandCurves
    pixels: Curve
    own: list  # Curves of the answers' grain, once their tone is right
    wanted: list  # Curves of the target's

    def __call__(self, x, noise):
        """noise: white, like x."""
        return regrain(self.pixels(self.bands(x)), self.own, self.wanted, noise)

    def state(self):
        """As plain types and tensors."""
        plain = lambda curve: (curve.low, curve.high, curve.values)
        groups = dict(bands=self.bands.curves, pixels=[self.pixels], own=self.own, wanted=self.wanted)
        return {name: [plain(curve) for curve in curves] for name, curves in groups.items()}


def restore(state):
    """The Finish of Finish.state(). Raises ValueError, or what else a damaged one makes Python raise."""
    curves = {name: [Curve(*plain) for plain in group] for name, group in state.items()}
    for curve in sum(curves.values(), []):
        finite = -math.inf < curve.low < curve.high < math.inf and curve.values.isfinite().all()
        if not finite or curve.values.ndim != 1 or len(curve.values) < 2:
            raise ValueError("no curve")
    if not 0 < len(curves["bands"]) < 16:
        raise ValueError("no pyramid")
    split = partial(laplacian, levels=len(curves["bands"]) - 1)
    bands = BandCurves(split, tuple(curves["bands"]))
    return Finish(bands, curves["pixels"][0], curves["own"], curves["wanted"])


@torch.inference_mode()
def fit(student, images, dtype=torch.float32, say=lambda done, total: None, batch=64):
    """{(s, t): Finish} of a Student, from training images (D, N, C, H, W). dtype: of its arithmetic."""
    D = len(images)
    device = next(student.parameters()).device
    some = slice(None, None, max(1, images.shape[1] // NOISY))  # files in order may be alike
    wanted = [grain(target[some].float(), robust=True) for target in images]
    finishes = {}
    for s in range(D):
        for t in range(D):
            if s == t:
                continue
            answers, target = [], images[t].float()
            for x in images[s].float().split(batch):
                labels = (torch.full((len(x),), y, device=device) for y in (s, t))
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    answers.append(student(x.to(device), *labels).float().cpu())
            x = torch.cat(answers)
            bands = fit_bands(laplacian, x, target)
            x = bands(x)
            pixels = fit_histogram(x, target)
            own = grain(pixels(x[some]), robust=False)
            finishes[s, t] = Finish(bands, pixels, own, wanted[t])
            say(len(finishes), D * (D - 1))
    return finishes
