"""Which domain an image is from, and whether from any: `--source auto`.

A little noise is laid over the image. The label under which the network predicts that noise best is its
domain.
"""

import math
import sys

import torch

from minimedshift.flow import draw_noise, tint
from minimedshift.support.machine import in_batches

NEAR = (0.9, 0.99)  # between which noise is laid over the image: so little that its own stays visible
CLOSE = 0.005  # labels are close where what they leave unexplained differs by less than half a percent
FAR = 2.0      # an image is far from a domain that leaves more than this unexplained in some octave


def octaves(H, W, device="cpu"):
    """Masks (O, H, W) of spatial frequencies: below 2 periods per frame, 2 to 4 and so on up to Nyquist."""
    k = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(H, 1 / H), torch.fft.fftfreq(W, 1 / W), indexing="ij"))
    nyquist = min(H, W) / 2
    octave = k.clamp(min=1).log2().floor().clamp(max=math.floor(math.log2(nyquist)) - 1)
    masks = [(octave == o) & (k <= nyquist) for o in range(int(octave.max()) + 1)]
    return torch.stack(masks).to(device)


@torch.inference_mode()
def unexplained(model, x1, labels, seed=0, colour=0.0, draws=8):
    """Share of the noise that L labels leave unexplained in images x1 (B, C, H, W), by octave: (B, L, O).

        mean over an octave of  |F[v(xt, t, y) - (x1 - x0)]|^2 / E |F[x0]|^2        F: Fourier, in space

    and over `draws` pairs of t and x0 (a diffusion classifier, arXiv:2303.16203). In images of its domain a
    right network leaves less than 1 / t^2. colour: of the training."""
    B, C, H, W = x1.shape
    masks, generator = octaves(H, W, x1.device), torch.Generator().manual_seed(seed)
    impulse = torch.zeros(1, 1, H, W)
    impulse[..., 0, 0] = 1
    gain = torch.fft.fft2(tint(impulse, colour)).abs().to(x1.device)  # E |F[x0]|^2 = H W gain^2
    shares = 0
    for i in range(draws):
        t = NEAR[0] + (NEAR[1] - NEAR[0]) * (i + 0.5) / draws
        x0 = draw_noise((C, H, W), generator, colour).to(x1.device)
        xt, times, share = (1 - t) * x0 + t * x1, torch.full((B,), t, device=x1.device), []
        for y in labels:
            vt = model(xt, times, torch.full((B,), y, device=x1.device))[:, :C].float()
            power = (torch.fft.fft2(vt - (x1 - x0)) / gain).abs().square().mean(1) / (H * W)  # (B, H, W)
            share.append(torch.stack([power[:, mask].mean(1) for mask in masks], 1))
        shares = shares + torch.stack(share, 1) / draws
    return shares


def judge(shares, H, W):
    """Label, runner-up and whether the two are close, each (B,), from `unexplained` shares (B, L, O).

    The label has the smallest sum over octaves of n log(share), n frequencies each: the likelihood of a
    Gaussian error of unknown variance. (The errors' own sum is that of coarse detail: it tells no doses.)"""
    n = octaves(H, W, shares.device).sum((1, 2))
    score = (n / n.sum() * shares.log()).sum(-1)  # (B, L)
    best, labels = score.topk(2, largest=False)
    return labels[:, 0], labels[:, 1], best[:, 1] - best[:, 0] < CLOSE


def far(shares):
    """Whether each label leaves more than FAR in some octave, from `unexplained` (B, L, O): (B,) bool."""
    return shares.amax(2).amin(1) > FAR


def sources(x1, names, model, state, source, target, seed):
    """Source labels (B,) of images x1 (B, C, H, W): `source`, or if that is "auto" inferred and told.

    Warns of what looks like no domain. A given label costs two evaluations an image, "auto" 8 a domain."""
    domains, colour = state["domains"], state["config"].get("colour", 0.0)
    every, suspects = range(len(domains)), torch.arange(len(x1), device=x1.device)

    def look(x, labels, draws):
        return in_batches(lambda part: unexplained(model, part, labels, seed, colour, draws), x, len(x))

    if source == "auto":
        shares = look(x1, every, 8)
        labels, second, close = judge(shares, *x1.shape[-2:])
        for name, y, other, in_doubt in zip(names, labels.tolist(), second.tolist(), close.tolist()):
            doubt = f" ({domains[other]} is close)" if in_doubt else ""
            same = ", the target itself: nothing to change" if domains[y] == target else ""
            print(f"{name}: taken for {domains[y]}{doubt}{same}")
    else:
        y = domains.index(source)
        labels = torch.full((len(x1),), y, device=x1.device)
        if state["translate"]["x0"] == "image":  # such a network has seen no noise
            return labels
        suspects = far(look(x1, [y], 2)).nonzero()[:, 0]  # at a glance; these under all labels again
        if not len(suspects):
            return labels
        shares = look(x1[suspects], every, 8)
    for i in suspects[far(shares)].tolist():
        says = "looks like no domain of this network: its translation means little"
        print(f"warning: {names[i]} {says}", file=sys.stderr)
    return labels
