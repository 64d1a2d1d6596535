"""Which domain an image is from, and whether it is from any: `--source auto`. A little noise is laid over the
image. The label under which the network predicts that noise best is its domain."""

import math
import sys

import torch

from minimedshift.flow import draw_noise, tint
from minimedshift.sizes import shrunk
from minimedshift.support.machine import in_batches

NEAR = (0.9, 0.99)  # the t of the noisy image: there is so little noise that the image's own stays visible
CLOSE = 0.005  # two labels are close if what they leave unexplained differs by less than half a percent
FAR = 2.0      # an image is far from a domain that leaves more than this unexplained in some octave


def octaves(H, W):
    """Masks (O, H, W) of spatial frequencies: below 2 periods per frame, 2 to 4 and so on up to Nyquist."""
    k = torch.hypot(torch.fft.fftfreq(H, 1 / H)[:, None], torch.fft.fftfreq(W, 1 / W))
    nyquist = min(H, W) / 2
    octave = k.clamp(min=1).log2().floor().clamp(max=math.floor(math.log2(nyquist)) - 1)
    return torch.stack([(octave == o) & (k <= nyquist) for o in range(int(octave.max()) + 1)])


@torch.inference_mode()
def unexplained(model, x1, labels, seed=0, colour=0.0, draws=8):
    """Share of the noise that L labels leave unexplained in images x1 (B, C, H, W), by octave: (B, L, O).

        mean over an octave of  |F[v(xt, t, y) - (x1 - x0)]|^2 / E |F[x0]|^2        F: Fourier, in space

    It is a mean over `draws` pairs of t and x0 (a diffusion classifier, arXiv:2303.16203); colour is that of
    the training. In images of its own domain a perfect network leaves less than 1 / t^2."""
    B, C, H, W = x1.shape
    masks, generator = octaves(H, W).to(x1.device), torch.Generator().manual_seed(seed)
    impulse = torch.zeros(1, 1, H, W)
    impulse[..., 0, 0] = 1
    gain = torch.fft.fft2(tint(impulse, colour)).abs().to(x1.device)  # E |F[x0]|^2 = H W gain^2
    shares = torch.zeros(B, len(labels), len(masks), device=x1.device)
    for i in range(draws):
        t = NEAR[0] + (NEAR[1] - NEAR[0]) * (i + 0.5) / draws
        x0 = draw_noise((C, H, W), generator, colour).to(x1.device)
        xt, times = (1 - t) * x0 + t * x1, torch.full((B,), t, device=x1.device)
        for k, y in enumerate(labels):
            vt = model(xt, times, torch.full((B,), y, device=x1.device)).float()
            power = (torch.fft.fft2(vt - (x1 - x0)) / gain).abs().square().mean(1) / (H * W)  # (B, H, W)
            shares[:, k] += torch.stack([power[:, mask].mean(1) for mask in masks], 1) / draws
    return shares


def label_of(shares, H, W):
    """The label, the runner-up and whether the two are close, each (B,), from `unexplained` (B, L, O).
    The label has the smallest sum over octaves of n log(share), for n frequencies each: the likelihood of a
    Gaussian error of unknown variance."""
    n = octaves(H, W).sum((1, 2)).to(shares)
    best, labels = (n / n.sum() * shares.log()).sum(-1).topk(2, largest=False)  # (B, 2)
    return labels[:, 0], labels[:, 1], best[:, 1] - best[:, 0] < CLOSE


def far(shares):
    """Whether each label leaves more than FAR in some octave, from `unexplained` (B, L, O): (B,) bool."""
    return shares.amax(2).amin(1) > FAR


def source_labels(x1, names, model, state, source, seed):
    """Labels (B,) of images x1 (B, C, H, W): that of `source`, or if it is "auto" the inferred ones, printed.
    Warns of an image that is far from `source`, or with "auto" from every domain."""
    domains, x1 = state["domains"], shrunk(x1, state["translate"].get("size"), model.stride)
    wanted, draws = (range(len(domains)), 8) if source == "auto" else ([domains.index(source)], 4)
    look = lambda part: unexplained(model, part, wanted, seed, state["config"]["colour"], draws)
    shares = in_batches(look, x1, len(x1))
    whom = "any domain of this network" if source == "auto" else source
    for i in far(shares).nonzero()[:, 0].tolist():
        print(f"warning: {names[i]} does not look like {whom}: its translation means little", file=sys.stderr)
    if source != "auto":
        return torch.full((len(x1),), wanted[0], device=x1.device)
    labels, second, close = label_of(shares, *x1.shape[-2:])
    for name, y, other, in_doubt in zip(names, labels.tolist(), second.tolist(), close.tolist()):
        print(f"{name}: taken for {domains[y]}" + f" ({domains[other]} is close)" * in_doubt)
    return labels
