"""The bridge from noise to image, and what the network learns from it.

    xt = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) e        x0 noise at t = 0, x1 image at t = 1, e noise too
    ut = d xt / dt = x1 - x0 + sigma (1 - 2t) / (2 sqrt(t (1 - t))) e          arXiv:2302.00482, eq. 15

The network is asked for ut when shown xt. What it answers is the mean of ut over all lines through xt: the velocity of
a flow that carries all noise to all images. sigma = 0 is plain flow matching, sigma > 0 a Brownian bridge.
"""

import torch

COARSE = 3  # periods per frame
EDGE = 1e-3  # with sigma > 0 the slope of sqrt(t (1 - t)) is infinite at both ends: t stays this far away


def draw_noise(shape, generator=None, colour=0.0, device="cpu"):
    """Gaussian noise (B, C, H, W) of unit variance whose amplitude falls with spatial frequency k:

        noise = F^-1 [ max(|k|, COARSE)^-colour F[e] ],  e ~ N(0, I),  rescaled        |k| in periods per frame

    colour = 0 is white, N(0, I). colour = 1 falls like the spectrum of natural images, so that edges and shades are drowned at
    the same t: under white noise all but the finest outlive t = .2, and a translation can no longer change them. What is coarser
    than a COARSE-th of the frame, where the head is and how it is turned, outlives both.
    """
    e = torch.randn(shape, generator=generator, device=device)
    if not colour:
        return e
    H, W = shape[-2:]
    k = torch.hypot(torch.fft.fftfreq(H, 1 / H, device=device)[:, None], torch.fft.fftfreq(W, 1 / W, device=device)[None])
    gain = k.clamp_min(COARSE) ** -colour  # (H, W)
    gain = gain / gain.square().mean().sqrt()
    return torch.fft.irfft2(torch.fft.rfft2(e) * gain[:, :W // 2 + 1], s=(H, W))


def per_image(t, x):
    """t (B,) shaped to broadcast against x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def bridge(x0, x1, t, sigma=0.0, noise=None):
    """The point xt of the bridge and its velocity ut (equations above).

    x0, x1, noise (B, ...), t (B,) in [0, 1], sigma >= 0. noise is needed where sigma > 0. Returns xt, ut like x1.
    Raises ValueError for a negative sigma, or sigma > 0 without noise.
    """
    if sigma < 0 or (sigma > 0 and noise is None):
        raise ValueError(f"bridge needs sigma >= 0, and noise with sigma > 0; got sigma = {sigma}")
    t = per_image(t, x1)
    xt, ut = (1 - t) * x0 + t * x1, x1 - x0
    if sigma > 0:
        t = t.clamp(EDGE, 1 - EDGE)
        spread = (t * (1 - t)).sqrt()
        xt = xt + sigma * spread * noise
        ut = ut + sigma * (1 - 2 * t) / (2 * spread) * noise
    return xt, ut


def weight(t, sigma=0.0):
    """The loss weight of each time: 1, or 4t (1 - t) with sigma > 0, where the variance of ut grows like 1/t at the ends."""
    return 4 * t * (1 - t) if sigma > 0 else torch.ones_like(t)


def loss(model, x0, x1, y, t, sigma=0.0, noise=None):
    """Flow-matching loss of each image, E ||v(xt, t, y) - ut||^2 per pixel (arXiv:2210.02747, eq. 9), weighted. (B,)."""
    xt, ut = bridge(x0, x1, t, sigma, noise)
    vt = model(xt, t, y)
    return weight(t, sigma) * (vt.float() - ut).square().flatten(1).mean(1)
