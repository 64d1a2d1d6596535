"""Does a set of images look like the target domain's? A distance between two sets, without pairs or truth.

It is between features of a small network that is trained here. Two sets of real images differ too, by chance:
compare a number with that of real against real. (The Frechet distance is biased where images are few.)"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def kernel_distance(fa, fb):
    """Kernel distance, the unbiased estimate of MMD^2 (arXiv:1801.01401, eq. 4).

        k(x, y) = (x.y / D + 1)^3"""
    k = lambda a, b: (a.double() @ b.double().T / a.shape[1] + 1) ** 3
    same = lambda a: (k(a, a).sum() - k(a, a).trace()) / (len(a) * (len(a) - 1))
    return float(same(fa) + same(fb) - 2 * k(fa, fb).mean())


KINDS = 6  # of corruption: none, blurred, noisy, darker tones bent, sharpened, warped


def corrupt(x, kind, generator):
    """x (B, C, H, W) spoilt as translations can be, in the way of number `kind`."""
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


def train_features(sets, seed=0, steps=300, batch=48):
    """features(x), (B, 64), of a small network that learns from which set an image is and how it was spoilt.
    sets: arrays (N_d, C, H, W) in [-1, 1], one a domain."""
    draw, layers = torch.Generator().manual_seed(seed), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for a, b in pairwise((sets[0].shape[1], 16, 32, 64, 64)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.SiLU()]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, C, H, W) -> (B, 64)
        tell_domain, tell_kind = nn.Linear(64, len(sets)), nn.Linear(64, KINDS)
    optimizer = torch.optim.AdamW(nn.ModuleList([net, tell_domain, tell_kind]).parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    kind = torch.arange(batch) * KINDS // batch
    for _ in range(steps):
        domain = torch.randint(len(sets), (batch,), generator=draw)
        u = torch.rand(batch, generator=draw)
        images = [sets[d][int(share * len(sets[d]))] for d, share in zip(domain.tolist(), u.tolist())]
        x = torch.from_numpy(np.stack(images).astype(np.float32))
        x = torch.cat([corrupt(x[kind == k], k, draw) for k in range(KINDS)])
        features = net(x)
        loss = F.cross_entropy(tell_domain(features), domain) + F.cross_entropy(tell_kind(features), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    return lambda x: torch.cat([net(part.cpu().float()) for part in x.split(256)])
