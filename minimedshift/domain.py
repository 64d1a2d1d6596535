"""Which domain an image is from, and whether from any: how much of the noise laid over it each label explains."""

import math

import torch

from .flow import draw_noise, tint

TIMES = (0.9, 0.99)  # between which noise is laid over the image: so little that its own noise is still visible
CLOSE = 0.005        # labels are close where what they leave unexplained differs by less than half a percent
FAR = 2.0            # an image is far from a domain that leaves more than this unexplained in some octave


def octaves(H, W, device="cpu"):
    """Masks (O, H, W) of spatial frequencies: below 2 periods per frame, 2 to 4, 4 to 8 and so on up to Nyquist."""
    k = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(H, 1 / H), torch.fft.fftfreq(W, 1 / W), indexing="ij"))
    nyquist = min(H, W) / 2
    octave = k.clamp(min=1).log2().floor().clamp(max=math.floor(math.log2(nyquist)) - 1)
    masks = [(octave == o) & (k <= nyquist) for o in range(int(octave.max()) + 1)]
    return torch.stack(masks).to(device)


@torch.inference_mode()
def unexplained(model, x1, labels, seed=0, colour=0.0, draws=8):
    """Share of the noise that the network does not find in images x1 (B, C, H, W) under each of L labels: (B, L, O).

        mean over an octave of  |F[v(xt, t, y) - (x1 - x0)]|^2 / E |F[x0]|^2        F: Fourier transform in space

    and over `draws` fixed pairs of t and x0, the same for all (diffusion classifier, arXiv:2303.16203, an octave each).
    It is |F[x0 - E[x0 | xt]]|^2 / t^2: a right network leaves less than 1 / t^2 in images of its domain.
    colour is that of the training.
    """
    H, W = x1.shape[-2:]
    generator, delta, powers = torch.Generator().manual_seed(seed), torch.zeros(1, 1, H, W), 0
    delta[..., 0, 0] = 1
    gain = torch.fft.fft2(tint(delta, colour)).abs().to(x1.device)  # of the noise: E |F[x0]|^2 = H W gain^2
    masks = octaves(H, W, x1.device)
    for i in range(draws):
        t = TIMES[0] + (TIMES[1] - TIMES[0]) * (i + 0.5) / draws
        x0 = draw_noise(x1.shape[1:], generator, colour).to(x1.device)
        xt, ts, power = (1 - t) * x0 + t * x1, torch.full((len(x1),), t, device=x1.device), []
        for y in labels:
            vt = model(xt, ts, torch.full((len(x1),), y, device=x1.device))[:, :x1.shape[1]].float()
            spectrum = (torch.fft.fft2(vt - (x1 - x0)) / gain).abs().square().mean(1) / (H * W)  # (B, H, W)
            power.append(torch.stack([spectrum[:, mask].mean(1) for mask in masks], 1))
        powers = powers + torch.stack(power, 1) / draws
    return powers


def judge(shares, H, W):
    """Label, runner-up and whether the two are close, each (B,), from what L labels leave `unexplained` (B, L, O).

    The label has the smallest sum over octaves of n log(share), n frequencies each: the likelihood of a Gaussian error
    of unknown variance. (The errors' own sum is that of coarse detail, in which doses do not differ.)
    """
    n = octaves(H, W, shares.device).sum((1, 2))
    score = (n / n.sum() * shares.log()).sum(-1)  # (B, L)
    best, labels = score.topk(2, largest=False)
    return labels[:, 0], labels[:, 1], best[:, 1] - best[:, 0] < CLOSE


def far(shares):
    """Whether every label leaves more than FAR `unexplained` (B, L, O) in some octave: (B,) bool."""
    return shares.amax(2).amin(1) > FAR
