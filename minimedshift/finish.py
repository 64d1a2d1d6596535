"""What a student cannot learn from the flow: tone and noise, from training images of the target, unpaired.

    tone    the histogram of each pyramid band, then of the pixels, is brought to the target's, twice
    grain   fine bands get the strength of noise that the target has, by grey level, but keep structure

A median does not mend what the flow does wrong on every head, but histograms show it: those of the answers,
beside those of the images of the target that look most like them, as populations may differ, and of all, if
none look alike. Where domains differ little, a histogram's own error counts: less of the tone is changed, and
all images are looked at. And a median is smooth, while strong noise of the source passes a local network."""

import itertools
import math
import time
import zlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from minimedshift.balance import contrast_thumbnails
from minimedshift.bands import BandCurves, Curve, blur, fit_bands, flat_region, low_pass
from minimedshift.baselines import Chain, fit_tone, is_log, spread
from minimedshift.support.log import progress
from minimedshift.support.machine import autocast, in_batches

IMAGES, SOME = 1000, 250  # images of a domain: to look for the nearest in, and to translate or to measure
ROUNDS = 2   # of tone: the second mends what the pixels' histogram did to the bands
MOST = 0.85  # of the tone is changed
ALIKE = 0.6  # The nearest images look alike if they are so many times nearer than a mean one.
ERROR = 0.007  # by which the tone that SOME images show is off by chance, about
LEVELS, ENOUGH = 16, 100  # Noise is measured at 16 levels of grey, where a level has 100 pixels.
NORMAL = 0.6745  # This is the median of |N(0, 1)|.
STRUCTURE = 4  # So many times the power of noise is structure.
UNIT = (0.87252, 0.18928)  # White noise of variance 1 has these deviations in its bands of grain.


def smooth(x, width):
    """Gaussian blur of `width` pixels over what lies inside the frame: a mirror would count noise twice."""
    radius = math.ceil(4 * width)
    total = lambda z: blur(F.pad(z, (radius,) * 4), width, radius)
    return total(x) / total(torch.ones_like(x[:1]))


def fine_bands(x):
    """Three images whose sum is x (B, C, H, W): two bands of grain and the rest.
    The first band is what a blur of 1 pixel takes away, the second what a blur of 2 takes beyond that."""
    narrow, wide = smooth(x, 1), smooth(x, 2)
    return x - narrow, narrow - wide, wide


def grain(images, robust):
    """The noise of images (N, C, H, W) in flat places, air too: a Curve a band, grey level -> deviation.
    robust: from the median of |band|, which fine texture does not move; else from its mean square."""
    *bands, coarse = fine_bands(images)
    flat = flat_region(images, air=True).expand_as(images)
    ends = torch.linspace(-1, 1, LEVELS + 1)[1:-1].to(images)
    level = torch.bucketize(coarse[flat].clamp(-1, 1), ends)
    curves = []
    for band in bands:
        size = band[flat].abs()
        deviations = torch.full((LEVELS,), torch.nan)
        for i in range(LEVELS):
            here = size[level == i]
            if len(here) >= ENOUGH:
                deviations[i] = here.median() / NORMAL if robust else here.square().mean().sqrt()
        seen = deviations.isfinite().nonzero()[:, 0]
        if len(seen):  # a level without a value takes that of the nearest
            deviations = deviations[seen[(torch.arange(LEVELS)[:, None] - seen).abs().argmin(1)]]
        curves.append(Curve(-1 + 1 / LEVELS, 1 - 1 / LEVELS, deviations.nan_to_num()))
    return curves


def regrain(x, own, wanted, noise):
    """x (B, C, H, W) with the grain `wanted` instead of `own`, a Curve for each band; noise: white, like x.

        band <- gain band + sqrt(max(0, w^2 - o^2)) e        o, w: own and wanted deviation at the grey level
        gain = 1 where the mean of P / o^2 over bands is above STRUCTURE, else min(1, w / o)

    P is a band's power, blurred by 2 pixels, e noise in this band, of variance 1. Structure keeps its noise.
    Raises ValueError where a band has no Curve."""
    *bands, coarse = fine_bands(x)
    *fresh, _ = fine_bands(noise)
    own, wanted = ([curve(coarse).clamp(min=1e-6) for curve in curves] for curves in (own, wanted))
    power = sum(smooth(band.square(), 2) / o**2 for band, o in zip(bands, own)) / len(bands)
    for band, e, unit, o, w in zip(bands, fresh, UNIT, own, wanted, strict=True):
        gain = torch.where(power > STRUCTURE, 1, (w / o).clamp(max=1))
        coarse = coarse + gain * band + (w**2 - o**2).clamp(min=0).sqrt() * e / unit
    return coarse


def fresh_noise(x, seed=0):
    """White noise like images x (B, C, H, W), a function of the seed and of each image alone."""
    noise = []
    for image in x.float().cpu().contiguous():
        generator = torch.Generator().manual_seed(zlib.crc32(image.numpy().tobytes(), seed) + seed)
        noise.append(torch.randn(image.shape, generator=generator))
    return torch.stack(noise).to(x.device)


@dataclass(frozen=True)
class Finish:
    """Gives a student's answers x (B, C, H, W) for one ordered pair the target's tone and grain."""
    chain: Chain     # the whole tone, in rounds
    strength: float  # of the tone: 0 leaves it
    own: list = ()   # Curves of the answers' grain, once their tone is right
    wanted: list = ()  # Curves of the target's

    def tone(self, x):
        """Answers x with the target's tone."""
        return torch.lerp(x, self.chain(x), self.strength)

    def __call__(self, x, noise):  # noise: white, like x
        return regrain(self.tone(x), self.own, self.wanted, noise)


def restore(state):
    """The Finish of which `state` is the asdict."""
    curves = lambda some: [Curve(**one) for one in some]
    rounds = []
    for part in state["chain"]["parts"]:
        bands, pixels = part["parts"]
        rounds.append(Chain((BandCurves(curves(bands["curves"]), bands["log"]), Curve(**pixels))))
    return Finish(Chain(rounds), state["strength"], curves(state["own"]), curves(state["wanted"]))


@dataclass(frozen=True)
class Distances:
    """How far domains are from each other, as bands see it."""
    log: bool  # These are bands of e^x.
    changes: torch.Tensor  # (D, D): root mean square of what they change, low-passed, in units of x
    certain: torch.Tensor  # (D, D): the share of a change that is no error by chance, in [0, 1)


def measure(images, counts):
    """The Distances of domains with images (D, N, C, H, W), of which `counts` (D,) are different ones."""
    log, changes = is_log(images), torch.zeros(len(images), len(images))
    for s, t in itertools.permutations(range(len(images)), 2):
        x, target = spread(images[s], SOME), spread(images[t], SOME)
        changes[s, t] = low_pass(fit_bands(x, target, log)(x) - x).square().mean().sqrt()
    if not log:
        print("bands are of x, not of e^x: they lose less on the way to another domain and back")
    fewer = SOME / torch.tensor(counts).clamp(max=SOME)  # A mean of n images has a variance of 1 / n.
    error = ERROR**2 * (fewer[:, None] + fewer) / 2
    return Distances(log, changes, changes**2 / (changes**2 + error))


@torch.inference_mode()
def fit(net, images, distances, dtype=torch.float32):
    """{(s, t): Finish} of a LocalNet, from images (D, N, C, H, W) and their Distances. dtype: of the net."""
    start, device = time.time(), next(net.parameters()).device
    pairs = list(itertools.permutations(range(len(images)), 2))
    wanted = [grain(spread(target, SOME), robust=True) for target in images]
    points, finishes = [contrast_thumbnails(target) for target in images], {}
    for s, t in pairs:
        labels = torch.tensor([[s], [t]], device=device)
        answer = lambda x: net(x.to(device), *labels.expand(2, len(x))).float().to(x.device)
        with autocast(device, dtype):
            x = in_batches(answer, spread(images[s], SOME))
        apart = torch.cdist(contrast_thumbnails(x), points[t])
        known, near = float(distances.certain[s, t]), apart.amin(1).mean() < ALIKE * apart.mean()
        others = spread(images[t], max(1, IMAGES * (1 - known)) if near else IMAGES)
        target = torch.cat([images[t][apart.argmin(1)].float(), others])
        toned = Finish(fit_tone(x, target, ROUNDS, IMAGES, distances.log), MOST * known)
        finishes[s, t] = replace(toned, own=grain(toned.tone(x), robust=False), wanted=wanted[t])
        progress(len(finishes), len(pairs), start, "its finish", "pairs")
    return finishes
