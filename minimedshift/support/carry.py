"""From full resolution to the size a network works at, and its translation back: lines fitted in windows (a guided filter)."""

from functools import partial

import torch.nn.functional as F


def working_shape(h, w, size, stride):
    """The shape at which an (h, w) image is translated: shorter side = training size, the other near it, divisible by stride."""
    return tuple(max(size, round(n * size / min(h, w) / stride) * stride) for n in (h, w))


def resize(x, shape):
    """x (B, C, H, W) -> (B, C, *shape), antialiased."""
    return x if x.shape[-2:] == shape else F.interpolate(x, shape, mode="bicubic", antialias=True)


def carry(full, x1, out, radius=1, eps=1e-3):
    """The translation x1 -> out (B, C, h, w) carried to `full` (B, C, H, W), the image that x1 is a small copy of.

        change = a x1 + b in each window:  a = cov(x1, change) / (var(x1) + eps),  b = mean(change) - a mean(x1)
        result = full + A full + B,  A and B the window means of a and b, upsampled        arXiv:1505.00996, Algorithm 2
    """
    change = out - x1
    mean = partial(F.avg_pool2d, kernel_size=2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    a = (mean(x1 * change) - mean(x1) * mean(change)) / (mean(x1 * x1) - mean(x1)**2 + eps)
    b = mean(change) - a * mean(x1)
    a, b = mean(a), mean(b)
    up = partial(resize, shape=full.shape[-2:])
    return full + up(a) * full + up(b) + up(change - a * x1 - b)  # the last term: what no line explains, such as noise
