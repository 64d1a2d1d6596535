"""The bridge from noise to image, and what the network learns from it.

    xt = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) e          x0 noise (t = 0), x1 image (t = 1), e ~ N(0, I)
    ut = d xt / dt = x1 - x0 + sigma (1 - 2t) / (2 sqrt(t (1 - t))) e              arXiv:2302.00482, eq. 15

The network sees xt and is asked for ut. Its best answer is the mean of ut over all bridges through xt: the
velocity v of a flow that carries all noise to all images. sigma = 0 is plain flow matching. sigma > 0 is a
Brownian bridge; with the coupling of entropic optimal transport it is the Schrodinger bridge."""

import torch

COARSE = 3  # periods per frame
EDGE = 1e-3  # with sigma > 0, t stays this far away from 0 and 1


def draw_noise(shape, generator=None, colour=0.0, device="cpu"):
    """Gaussian noise (B, C, H, W) of unit variance whose amplitude falls with spatial frequency k:

        noise = F^-1 [ max(|k|, COARSE)^-colour F[e] ],  e ~ N(0, I),  rescaled      |k| in periods a frame

    colour = 0 is white noise: all but the finest detail is still visible at t = .2, and a translation can no
    longer change it. colour = 1 falls like natural images: edges and shades drown at the same t."""
    return tint(torch.randn(shape, generator=generator, device=device), colour)


def tint(x, colour):
    """The filter of `draw_noise` on x (..., H, W). It is symmetric: <tint(e), x> = <e, tint(x)>."""
    if not colour:
        return x
    H, W = x.shape[-2:]
    rows = torch.fft.fftfreq(H, 1 / H, device=x.device)
    columns = torch.fft.fftfreq(W, 1 / W, device=x.device)
    k = torch.hypot(rows[:, None], columns[None])  # (H, W)
    gain = k.clamp_min(COARSE) ** -colour
    gain = gain / gain.square().mean().sqrt()
    half = gain[:, :W // 2 + 1]  # rfft2 keeps this half of the columns
    return torch.fft.irfft2(torch.fft.rfft2(x) * half, s=(H, W))


def bridge(x0, x1, t, sigma=0.0, e=None):
    """The point xt of the bridge and its velocity ut (equations above), each like x1.
    x0, x1, e (B, ...), t (B,) in [0, 1], sigma >= 0. e, white noise, is needed where sigma > 0.
    Raises ValueError for a negative sigma, or sigma > 0 without e."""
    if sigma < 0 or (sigma > 0 and e is None):
        raise ValueError(f"bridge needs sigma >= 0, and e with sigma > 0; got sigma = {sigma}")
    t = t.reshape(-1, *[1] * (x1.ndim - 1))  # (B, 1, ...)
    xt = (1 - t) * x0 + t * x1
    ut = x1 - x0
    if sigma > 0:
        t = t.clamp(EDGE, 1 - EDGE)
        spread = (t * (1 - t)).sqrt()
        xt = xt + sigma * spread * e
        ut = ut + sigma * (1 - 2 * t) / (2 * spread) * e
    return xt, ut


def weight(t, sigma=0.0):
    """The loss weight of each time, 1 / (1 + variance that e gives to ut): 1 for sigma = 0.
    The slope of sqrt(t (1 - t)) is infinite at both ends, where ut would drown all other errors."""
    t = t.clamp(EDGE, 1 - EDGE)
    return 1 / (1 + sigma**2 * (1 - 2 * t) ** 2 / (4 * t * (1 - t)))


def loss(model, x0, x1, y, t, sigma=0.0, e=None):
    """Flow-matching loss of each image per pixel, weighted: (B,).

        weight(t) mean |v(xt, t, y) - ut|^2                     arXiv:2210.02747, eq. 9"""
    xt, ut = bridge(x0, x1, t, sigma, e)
    error = model(xt, t, y).float() - ut
    return weight(t, sigma) * error.square().flatten(1).mean(1)
