"""What an X-ray picture is in each of the five domains: a table of constants and a chain of short functions.

    attenuate -> add_scatter -> blur -> add_quantum_noise -> log_image -> enhance -> lookup

`picture` is the chain, and `render` draws heads with it. Images are (B, 1, H, W). A signal is 1 in air.
The log image p = -ln(signal) is 0 in air and about 4 behind a head."""

import dataclasses
import math

import torch
import torch.nn.functional as F

from minimedshift.phantom.anatomy import Head, derive_seed
from minimedshift.phantom.rays import one_thread, project

# Shares of five energy bins, 30, 40, 49.6, 60.6 and 74.7 keV, for 90 kV, 4 mm Al and a 600 um CsI detector,
# and the attenuation per cm of bone, soft tissue and brain at each energy.
SPECTRUM = (.118, .227, .239, .285, .131)
MU = ((2.81, 1.32, .840, .605, .468), (.432, .290, .243, .217, .199), (.425, .286, .239, .214, .196))
MU_60 = ((.605,), (.217,), (.217,))  # a simple simulator has one energy, and brain is like soft tissue


@dataclasses.dataclass(frozen=True)
class Physics:
    full: bool          # the real chain: spectrum, fine bone, enhancement; else a simple simulator
    dose: float         # quanta per rendered pixel without a head
    electronic: float   # noise, in quanta
    scatter: float      # scattered per primary quantum and unit of log
    width: float        # of the focal spot and detector blur, in pixels
    coarse: float       # enhancement: gain of the coarsest band ...
    fine: float         # ... and of the finest
    rest: float         # ... and of what is coarser than all bands
    slope: float        # grey levels per unit of p
    air: float          # grey level of air


PHYSICS = {                 # full, dose, electronic, scatter, width, coarse, fine, rest, slope, air
    "synthetic-low":  Physics(False, 900, 0., 0., 0., 1., 1., 1., .20, 1.),
    "synthetic-high": Physics(False, 5000, 0., 0., 0., 1., 1., 1., .20, 1.),
    "real-low":       Physics(True, 2000, 3., .2, .9, 2.2, 2.3, .20, .44, .9),
    "real-normal":    Physics(True, 15000, 3., .2, .5, 2.2, 2.3, .20, .44, .9),
    "real-exposure":  Physics(True, 60000, 3., .16, .4, .6, 4.5, .36, .42, .72),
}
DOMAINS = tuple(PHYSICS)


def each(function, x):
    """function(x), image by image, since exp and log round differently at the end of an array."""
    return torch.stack([function(image) for image in x])


def randn(heads, size, *stream):
    """Standard normal fields (B, 1, size, size), from a generator per head and stream."""
    seeded = [torch.Generator().manual_seed(derive_seed(head.seed, head.prior, *stream)) for head in heads]
    return torch.stack([torch.randn(1, size, size, generator=generator) for generator in seeded])


def attenuate(materials, mu=MU, spectrum=SPECTRUM):
    """Transmission (B, 1, H, W): Beer-Lambert per energy, P = sum_b w_b exp(-sum_m mu_mb L_m), L in cm."""
    total = 0
    for b, weight in enumerate(spectrum):
        path = sum(materials[:, m:m + 1] * -mu[m][b] for m in range(3))
        total = total + each(torch.exp, path) * (weight / sum(spectrum))
    return total


def add_scatter(p, amount):
    """Primary plus scatter, P + G * (k P (-ln P)), on a coarse grid. G is 3 cm wide, an eighth of a frame."""
    source = p * log_image(p.clamp(min=1e-6)) * amount
    coarse = smaller(source, max(1, p.shape[-1] // 16))
    return p + larger(blur(coarse, 1.8), p)


def blur(x, width):
    """Gaussian blur of (B, 1, H, W) of standard deviation `width`, in pixels, as a sum of shifted images."""
    if width == 0:
        return x
    reach = max(1, math.ceil(2.5 * width))
    taps = [math.exp(-.5 * (i / width) ** 2) for i in range(reach + 1)]
    taps = [tap / (2 * sum(taps) - taps[0]) for tap in taps]
    for axis, pad in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        n, padded = x.shape[axis], F.pad(x, pad, mode="replicate")
        x = x * taps[0]
        for i in range(1, reach + 1):
            x += (padded.narrow(axis, reach - i, n) + padded.narrow(axis, reach + i, n)) * taps[i]
    return x


def add_quantum_noise(rate, dose, white, electronic=0., hiss=0.):
    """Detected signal per incident quantum, (N + sqrt(N) z + e z') / dose with N = dose rate.
    That is the Gaussian limit of Poisson counts. Counts stay above 2, for the log. white z and hiss z' are
    standard normal fields like rate (B, 1, H, W); the electronic noise e is in quanta."""
    counts = rate * dose
    return (counts + counts.sqrt() * white + electronic * hiss).clamp(min=2.) / dose


def log_image(signal):
    """p = -ln(signal), which is like a path again, and 0 in air."""
    return -each(torch.log, signal)


def smaller(x, factor=2):
    """Means over factor x factor blocks (cut at the lower and right edges)."""
    return F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def larger(x, like):
    """Bilinear interpolation of x to the height and width of `like`."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def enhance(p, coarse, fine, rest):
    """Multi-scale enhancement of the log image.
    Each band x of a Laplacian pyramid becomes gain x (x^2 + e^2)^((q-1)/2), q = .7. That is the compression
    sign(x) |x|^q made smooth at 0. Gains rise from `coarse` (an eighth of the frame) to `fine` (one pixel).
    What is left is multiplied by `rest`, which flattens the brain and leaves the halo round the skin."""
    levels = max(1, round(math.log2(max(2, p.shape[-1]))) - 2)
    bands, x = [], p
    for _ in range(levels):
        low = smaller(blur(x, .8))
        bands.append(x - larger(low, x))
        x = low
    x = x * rest
    for i, band in enumerate(reversed(bands)):
        gain = coarse * (fine / coarse) ** min(1., i / 3)
        x = larger(x, band) + band * each(lambda b: b ** -.15, band.square() + .25 ** 2) * (.66 * gain)
    return x


def lookup(p, slope, air):
    """Grey level in [-1, 1]: air - slope p, with soft shoulders so that nothing saturates."""
    grey = air - slope * p
    room = 1 - air
    if room > 0:  # halo: above air, below white
        halo = air + room * each(torch.tanh, (grey - air) / room)
        grey = torch.where(grey > air, halo, grey)
    shadow = -.6 - .4 * each(torch.tanh, (-.6 - grey) / .4)
    return torch.where(grey < -.6, shadow, grey).clamp(-1, 1)


def fine_bone(bone, heads, exposure=0):
    """Bone path (B, 1, H, W) with trabeculae at two scales and thin curved channels, set per rendered pixel.
    A local mean is taken off. Their power is at high frequencies, so a low-pass hardly sees another seed."""
    size = bone.shape[-1]
    grain = randn(heads, size, "grain", exposure)
    fine = grain - blur(grain, .8)
    mid = blur(grain, .7) - blur(grain, 1.2)
    smooth = blur(randn(heads, size, "lines", exposure), 1.1)
    lines = each(torch.exp, -(smooth / .05).square())  # zero crossings of a smooth field are thin curves
    field = .08 * fine + .2 * mid - .2 * (lines - blur(lines, 1.5))
    return bone + field * (bone * 1.5 / (bone + 1.5))


@one_thread()
def picture(materials, heads, domain, noise=True, exposure=0):
    """Grey levels (B, 1, H, W) of the heads with these line integrals (B, 3, H, W), in one domain."""
    physics, size = PHYSICS[domain], materials.shape[-1]
    white = noise * randn(heads, size, "quanta", domain, exposure)
    hiss = noise * randn(heads, size, "hiss", domain, exposure)
    if physics.full:
        bone = fine_bone(materials[:, :1], heads, exposure)
        primary = attenuate(torch.cat([bone, materials[:, 1:]], 1), MU, SPECTRUM)
    else:
        primary = attenuate(materials, MU_60, (1.,))
    rate = blur(add_scatter(primary, physics.scatter), physics.width)
    white = blur(white, physics.width)  # the scintillator spreads quanta too
    p = log_image(add_quantum_noise(rate, physics.dose, white, physics.electronic, hiss))
    if physics.full:
        p = enhance(p, physics.coarse, physics.fine, physics.rest)
    return lookup(p, physics.slope, physics.air)


def render(heads, domain, size, noise=True, exposure=0):
    """The picture of each head in a domain, float32 in [-1, 1], air white.
    (1, size, size) for one Head, (B, 1, size, size) for a list. noise=False is the truth. exposure > 0 is
    another exposure, with fresh noise and fresh fine texture."""
    if isinstance(heads, Head):
        return render([heads], domain, size, noise, exposure)[0]
    together = max(1, 2 ** 16 // size ** 2)  # what a processor's cache likes
    images = torch.empty(len(heads), 1, size, size)
    for start in range(0, len(heads), together):
        some = heads[start:start + together]
        materials = project(some, size, PHYSICS[domain].full)
        images[start:start + together] = picture(materials, some, domain, noise, exposure)
    return images
