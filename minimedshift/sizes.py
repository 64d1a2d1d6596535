"""To the size a network works at, and back: the change it made is carried to full resolution.

In every window of the small image the translation is a line in the source, a x + b, by least squares. The
lines are enlarged and applied to the full image, whose own fine detail so stays (arXiv:1505.00996)."""

from functools import partial

import torch
import torch.nn.functional as F


def working_shape(h, w, size, stride):
    """Where an (h, w) image is translated: its shorter side is `size`, the other is divisible by stride."""
    short = min(h, w)
    return tuple(size if n == short else max(size, round(n * size / short / stride) * stride) for n in (h, w))


def crop_to_square(x, size):
    """x (C, H, W) -> (C, size, size): the shorter side resized, antialiased, to `size`; the centre kept."""
    shorter = min(x.shape[1:])
    h, w = (max(size, round(n * size / shorter)) for n in x.shape[1:])
    if (h, w) != x.shape[1:]:
        x = F.interpolate(x[None], (h, w), mode="bilinear", antialias=True)[0]
    top, left = (h - size) // 2, (w - size) // 2
    return x[:, top:top + size, left:left + size]


def resize(x, shape):
    """x (B, C, H, W) -> (B, C, *shape), antialiased."""
    return x if x.shape[-2:] == torch.Size(shape) else F.interpolate(x, shape, mode="bicubic", antialias=True)


def shrunk(x, size, stride):
    """x (B, C, H, W) in the `working_shape` of a network for images of `size`; as it is if that is None."""
    return resize(x, working_shape(*x.shape[-2:], size, stride)) if size else x


def carry_to_full_size(full, x1, out, eps=1e-3):
    """The translation x1 -> out (B, C, h, w) carried to `full` (B, C, H, W), of which x1 is a small copy.

        change = a x1 + b in each window:  a = cov(x1, change) / (var(x1) + eps), b = mean(change - a x1)
        result = full + A full + B,  A, B window means of a, b, upsampled      arXiv:1505.00996, Algorithm 2

    The code's last term is what no line explains, such as noise. Of the same size, out is the result."""
    if full.shape == out.shape:
        return out
    change, up = out - x1, partial(resize, shape=full.shape[-2:])
    mean = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    a = (mean(x1 * change) - mean(x1) * mean(change)) / (mean(x1 * x1) - mean(x1) ** 2 + eps)
    a, b = mean(a), mean(mean(change) - a * mean(x1))
    return full + up(a) * full + up(b) + up(change - a * x1 - b)
