"""The bridge from noise to image, and what the network learns from it.

    xt = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) e        x0 noise at t = 0, x1 image at t = 1, e ~ N(0, I)
    ut = d xt / dt = x1 - x0 + sigma (1 - 2t) / (2 sqrt(t (1 - t))) e          arXiv:2302.00482, eq. 15

The network is asked for ut when shown xt. What it answers is the mean of ut over all bridges through xt: the velocity v of
a flow that carries all noise to all images. sigma = 0 is plain flow matching, sigma > 0 a Brownian bridge: with the coupling of
entropic optimal transport (coupling.py), the Schrodinger bridge.

With sigma > 0 the slope of sqrt(t (1 - t)) is infinite at both ends. Either the loss weighs it down (`weight`), or the network
learns the two parts of ut apart (--score), d = E[x1 - x0 | xt] and n = E[e | xt], whose targets have the same variance at every t:

    v = d + sigma (1 - 2t) / (2 sqrt(t (1 - t))) n          grad log p_t = -n / (sigma sqrt(t (1 - t)))         arXiv:2307.03672

With s = sigma^2 / 2 grad log p_t this is v = d - (1 - 2t) s, and a diffusion of width sigma has the drift v + s forward in time and v - s
backward (sampler.py).
"""

import math

import torch

COARSE = 3  # periods per frame
EDGE = 1e-3  # with sigma > 0, t stays this far away from 0 and 1


def draw_noise(shape, generator=None, colour=0.0, device="cpu"):
    """Gaussian noise (B, C, H, W) of unit variance whose amplitude falls with spatial frequency k:

        noise = F^-1 [ max(|k|, COARSE)^-colour F[e] ],  e ~ N(0, I),  rescaled        |k| in periods per frame

    colour = 0 is white, N(0, I). colour = 1 falls like the spectrum of natural images, so that edges and shades are drowned at
    the same t: under white noise all but the finest outlive t = .2, and a translation can no longer change them. What is coarser
    than a COARSE-th of the frame, where the head is and how it is turned, outlives both.
    """
    return tint(torch.randn(shape, generator=generator, device=device), colour)


def tint(x, colour):
    """The filter of `draw_noise` on x (..., H, W). It is symmetric: <tint(e), x> = <e, tint(x)>."""
    if not colour:
        return x
    H, W = x.shape[-2:]
    k = torch.hypot(torch.fft.fftfreq(H, 1 / H, device=x.device)[:, None], torch.fft.fftfreq(W, 1 / W, device=x.device)[None])
    gain = k.clamp_min(COARSE) ** -colour  # (H, W)
    gain = gain / gain.square().mean().sqrt()
    return torch.fft.irfft2(torch.fft.rfft2(x) * gain[:, :W // 2 + 1], s=(H, W))


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
    """The loss weight of each time, over the variance that e gives to ut: 1 / (1 + sigma^2 (1 - 2t)^2 / (4t (1 - t))). 1 where sigma is 0."""
    t = t.clamp(EDGE, 1 - EDGE)
    return 1 / (1 + sigma**2 * (1 - 2 * t) ** 2 / (4 * t * (1 - t)))


def loss(model, x0, x1, y, t, sigma=0.0, noise=None):
    """Flow-matching loss of each image per pixel, E ||v(xt, t, y) - ut||^2 (arXiv:2210.02747, eq. 9), weighted: (B,).

    From a network with a score head, which returns d and n as (B, 2C, H, W), it is ||d - (x1 - x0)||^2 + ||n - e||^2.
    """
    xt, ut = bridge(x0, x1, t, sigma, noise)
    out = model(xt, t, y).float()
    mean = lambda error: error.square().flatten(1).mean(1)
    if out.shape[1] == x1.shape[1]:
        return weight(t, sigma) * mean(out - ut)
    d, n = out.chunk(2, 1)
    return mean(d - (x1 - x0)) + mean(n - noise)


def velocity_and_score(out, t, sigma):
    """The velocity v and s = sigma^2 / 2 grad log p_t from what a network with a score head returns, (B, 2C, H, W), at one time t: each (B, C, H, W)."""
    d, n = out.chunk(2, 1)
    t = min(max(t, EDGE), 1 - EDGE)
    s = -sigma / (2 * math.sqrt(t * (1 - t))) * n
    return d - (1 - 2 * t) * s, s


def direct_label(y_source, y_target, num_domains):
    """The label of a flow that starts from an image instead of noise (--x0 image): the ordered pair of domains as one number."""
    return y_source * num_domains + y_target
