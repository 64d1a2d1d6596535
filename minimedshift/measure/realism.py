"""Does a set of images look like the target domain's? Distances between two sets, without pairs or truth.

All of them have a floor that is not 0: two sets of real images differ too. Compare a number with that of real
against real, for the same number of images. Feature distances are biased when images are few; the kernel
distance is not.
"""

import importlib.util
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minimedshift.support.log import progress
from minimedshift.support.command import UserError


# ---------------------------------------------------------------- patches of a Laplacian pyramid

def pyramid(x, smallest=16):
    """The Laplacian pyramid of x (N, C, H, W): details at H, H / 2, ..., and the rest.
    No side has less than `smallest` pixels."""
    levels = []
    while min(x.shape[-2:]) >= 2 * smallest:
        small = F.avg_pool2d(x, 2)
        levels.append(x - F.interpolate(small, x.shape[-2:], mode="bilinear"))
        x = small
    return levels + [x]


def patches(x, count, side, generator):
    """`count` random patches of x (N, C, H, W): (count, C, side, side).
    Each channel has mean 0 and variance 1 over all patches."""
    N, C, H, W = x.shape
    n = torch.randint(N, (count,), generator=generator)
    i = torch.randint(H - side + 1, (count,), generator=generator)
    j = torch.randint(W - side + 1, (count,), generator=generator)
    rows = (i[:, None] + torch.arange(side))[:, None, :, None]      # (count, 1, side, 1)
    columns = (j[:, None] + torch.arange(side))[:, None, None, :]   # (count, 1, 1, side)
    some = x[n[:, None, None, None], torch.arange(C)[None, :, None, None], rows, columns]
    mean = some.mean((0, 2, 3), keepdim=True)
    spread = some.std((0, 2, 3), keepdim=True)
    return (some - mean) / spread.clamp_min(1e-6)


def sliced_wasserstein(a, b, count=4096, side=7, directions=128, seed=0):
    """Sliced Wasserstein distance of 7x7 patches, mean over the levels of a Laplacian pyramid.
    arXiv:1710.10196, section 5. a, b: (N, C, H, W) in [-1, 1], of any two counts. Patches of both sets are
    projected on random unit directions. Sorted projections are compared: mean |difference|. Patches are
    normalised per level and set, so it sees the shape of detail, not its strength."""
    draw, total = torch.Generator().manual_seed(seed), 0.0
    levels = list(zip(pyramid(a.cpu()), pyramid(b.cpu())))
    for fine_a, fine_b in levels:
        p = patches(fine_a, count, side, draw).flatten(1)  # (count, C side side)
        q = patches(fine_b, count, side, draw).flatten(1)
        ways = torch.randn(p.shape[1], directions, generator=draw)
        ways = ways / ways.norm(dim=0)
        difference = (p @ ways).sort(0).values - (q @ ways).sort(0).values
        total += difference.abs().mean().item()
    return total / len(levels)


# ---------------------------------------------------------------- distances of features (N, D)

def frechet(fa, fb):
    """Frechet distance of the Gaussians through two sets of features (arXiv:1706.08500, eq. 6).

        |m - n|^2 + tr(A + B - 2 (A B)^1/2)

    tr (A B)^1/2 is the sum of the square roots of the eigenvalues of A^1/2 B A^1/2.
    """
    fa, fb = fa.double(), fb.double()
    A, B = torch.cov(fa.T), torch.cov(fb.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    means = (fa.mean(0) - fb.mean(0)).square().sum()
    return float(means + A.trace() + B.trace() - 2 * both)


def kernel(fa, fb):
    """k(x, y) = (x.y / D + 1)^3 of all pairs: (N, M)."""
    return (fa.double() @ fb.double().T / fa.shape[1] + 1) ** 3


def kernel_distance(fa, fb):
    """Kernel distance, the unbiased estimate of MMD^2 (arXiv:1801.01401, eq. 4).
    Its mean over equal distributions is 0."""
    n, m = len(fa), len(fb)
    kaa, kbb = kernel(fa, fa), kernel(fb, fb)
    same_a = (kaa.sum() - kaa.trace()) / (n * (n - 1))
    same_b = (kbb.sum() - kbb.trace()) / (m * (m - 1))
    return float(same_a + same_b - 2 * kernel(fa, fb).mean())


def kernel_terms(fa, fb):
    """What each image of fa adds to the kernel distance, (N,).

        distance + influence_i - mean influence
        influence_i = 2 (mean of k to the rest of its set - mean of k to the other set)

    Their mean is the distance, their spread says how it scatters. So differences of two methods on the same
    heads can be told from chance.
    """
    kaa = kernel(fa, fa)
    own = (kaa.sum(1) - kaa.diagonal()) / (len(fa) - 1)
    influence = 2 * (own - kernel(fa, fb).mean(1))
    return kernel_distance(fa, fb) + influence - influence.mean()


def density_coverage(real, fake, k=5):
    """Density and coverage (arXiv:2002.09797, eq. 4 and 5).
    Around each real feature a ball reaches to its k-th real neighbour. density: the mean number of balls that
    hold a fake feature, over k. coverage: the share of balls that hold any; of two sets of one distribution
    about 1 - 2^-k."""
    real, fake = real.double(), fake.double()
    k = min(k, len(real) - 1)
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the image itself
    held = torch.cdist(real, fake) < radius[:, None]                # (real, fake)
    return float(held.sum() / (k * len(fake))), float(held.any(1).double().mean())


# ---------------------------------------------------------------- features

class Features(nn.Module):
    """Four strided convolutions and a mean over the picture: (B, C, H, W) -> (B, 64)."""

    def __init__(self, channels, classes):
        super().__init__()
        widths = (channels, 16, 32, 64, 64)
        layers = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.tell = nn.ModuleList(nn.Linear(64, n) for n in classes)

    def forward(self, x):
        return self.layers(x).mean((2, 3))


CORRUPTIONS = ("none", "blurred", "noisy", "darker tones bent", "sharpened", "warped")


def corrupt(x, kind, generator):
    """x (B, C, H, W) spoilt as translations can be: in the way of CORRUPTIONS with number `kind`."""
    soft = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)
    if kind == 1:
        return soft
    if kind == 2:
        return x + .08 * torch.randn(x.shape, generator=generator)
    if kind == 3:
        power = 1.4 if torch.rand((), generator=generator) < .5 else 1 / 1.4
        return 2 * ((x.clamp(-1, 1) + 1) / 2) ** power - 1
    if kind == 4:
        return x + .8 * (x - soft)
    if kind == 5:
        grid = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), x.shape, align_corners=False)
        push = torch.randn(len(x), 2, 5, 5, generator=generator) * .04
        push = F.interpolate(push, x.shape[-2:], mode="bicubic").permute(0, 2, 3, 1)
        return F.grid_sample(x, grid + push, padding_mode="border", align_corners=False)
    return x


def train_features(sets, seed=0, steps=300, batch=48, progress=progress):
    """A small network learns to tell from which set an image is and how it was spoilt.
    sets: arrays (N_d, C, H, W) in [-1, 1], one a domain. Returns features(x), (B, 64), without gradients.
    Deterministic in the seed."""
    draw, start = torch.Generator().manual_seed(seed), time.time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Features(sets[0].shape[1], (len(sets), len(CORRUPTIONS)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        domain = torch.randint(len(sets), (batch,), generator=draw)
        u = torch.rand(batch, generator=draw)
        images = []
        for d, share in zip(domain.tolist(), u.tolist()):
            images.append(np.asarray(sets[d][int(share * len(sets[d]))], np.float32))
        x = torch.from_numpy(np.stack(images))
        kind = torch.arange(batch) * len(CORRUPTIONS) // batch
        x = torch.cat([corrupt(x[kind == k], k, draw) for k in range(len(CORRUPTIONS))])
        features = net(x)
        tell_domain, tell_kind = net.tell
        loss = F.cross_entropy(tell_domain(features), domain) + F.cross_entropy(tell_kind(features), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress and (step + 1) % 20 == 0:
            progress(step + 1, steps, start, "learning features", "steps")
    net.eval().requires_grad_(False)
    return lambda x: torch.cat([net(part.cpu().float()) for part in x.split(256)])


def load_features(path):
    """The function `features` of a user's Python file: features(x) -> (B, D), x (B, C, H, W) in [-1, 1].
    Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"--features {path}: there is no such file")
    spec = importlib.util.spec_from_file_location("user_features", path)
    if spec is None:
        raise UserError(f"--features {path}: a Python file is needed, with a function features(x)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # anything can go wrong in a user's file
        raise UserError(f"--features {path}: {type(error).__name__} while reading it: {error}") from None
    if not callable(getattr(module, "features", None)):
        raise UserError(f"--features {path}: it has no function features(x) that returns (B, D)")

    def features(x):
        try:
            found = module.features(x)
        except Exception as error:  # anything can go wrong in a user's function
            what = f"{type(error).__name__} in features(x) of {tuple(x.shape)}: {error}"
            raise UserError(f"--features {path}: {what}") from None
        if not torch.is_tensor(found) or found.ndim != 2 or len(found) != len(x):
            shape = tuple(found.shape) if torch.is_tensor(found) else type(found).__name__
            raise UserError(f"--features {path}: features(x) of {len(x)} images must be a tensor "
                            f"({len(x)}, D), found {shape}")
        return found.detach().float().cpu()

    return features


# ---------------------------------------------------------------- all together

@dataclass(frozen=True)
class Reference:
    """The target domain's images, and what `features` makes of them."""
    images: torch.Tensor     # (M, C, H, W)
    features: Callable
    found: torch.Tensor      # (M, D)


def reference(images, features):
    """A Reference from images (M, C, H, W)."""
    return Reference(images, features, features(images))


@torch.no_grad()
def score(x, reference):
    """Distances of a set x (N, C, H, W) to a Reference as plain floats.
    `realism_heads` are the N terms of the kernel distance."""
    found, real = reference.features(x), reference.found
    density, coverage = density_coverage(real, found)
    return dict(swd=sliced_wasserstein(x, reference.images), frechet=frechet(found, real),
                kernel=kernel_distance(found, real), density=density, coverage=coverage,
                realism_heads=kernel_terms(found, real).tolist())
