"""What MedShift is compared with: a grey-value curve (unpaired and paired), SDEdit, the supervised reference, a second exposure.

Images are (B, C, H, W) floats in [-1, 1]. A curve is a pair (knots, values), each (K,) and sorted: straight between knots,
constant outside. Only SDEdit and the supervised reference need a network.
"""

import math
import time

import numpy as np
import torch

from . import metrics, sampler
from .flow import draw_noise


# ---------------------------------------------------------------- grey-value curves

def apply_curve(curve, x):
    """Send every pixel of x (any shape) through a curve, straight lines between its knots. Same shape and dtype out."""
    knots, values = (a.to(x) for a in curve)
    if len(knots) == 1:
        return values.expand(x.shape).clone()
    i = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    share = ((x - knots[i - 1]) / (knots[i] - knots[i - 1])).clamp(0, 1)
    return values[i - 1] + share * (values[i] - values[i - 1])


def fit_histogram(source, target, levels=1024, most=2 ** 20):
    """Histogram matching, unpaired: the curve that sends each quantile of all source pixels to the same quantile of the target's.

    source, target: image stacks of any length, arrays or tensors; at most `most` pixels of each are looked at.
        curve = F_target^-1 o F_source        (Gonzalez and Woods, Digital Image Processing, 3.3.2)
    Equal knots (air is one value) become one, with their mean.
    """
    def quantiles(a):
        v = torch.as_tensor(thin(a, most)).float().sort().values
        at = torch.linspace(0, 1, levels, dtype=torch.float64) * (len(v) - 1)
        low, part = at.long(), (at % 1).float()
        return v[low] + part * (v[(low + 1).clamp(max=len(v) - 1)] - v[low])

    knots, which = quantiles(source).unique(return_inverse=True)
    values = torch.zeros_like(knots).index_add_(0, which, quantiles(target)) / which.bincount()
    return knots, values


def thin(a, most):
    """About `most` pixels of an image stack, (N,), spread evenly over it: an odd stride, which no image width divides."""
    a = np.asarray(a).reshape(-1)
    return a[::max(1, len(a) // most) | 1].astype(np.float32)


def histogram(x, curve):
    """Untouched geometry, target grey values: x (B, C, H, W) through the curve of `fit_histogram`."""
    return apply_curve(curve, x).clamp(-1, 1)


def isotonic(y, weight):
    """The nearest non-decreasing sequence to y (K,), weighted least squares: (K,).

    min sum_i weight_i (f_i - y_i)^2 with f_1 <= f_2 <= ...; pool adjacent violators (Ayer et al. 1955): while two neighbouring
    blocks are out of order, merge them into their mean.
    """
    blocks = []                                                # [mean, weight, how many]
    for mean, w in zip(y.tolist(), weight.tolist()):
        n = 1
        while blocks and blocks[-1][0] >= mean:
            m, v, k = blocks.pop()
            mean, w, n = (mean * w + m * v) / (w + v), w + v, n + k
        blocks.append([mean, w, n])
    return torch.repeat_interleave(torch.tensor([b[0] for b in blocks], dtype=y.dtype), torch.tensor([b[2] for b in blocks]))


def fit_curve(source, target, bins=512):
    """The best non-decreasing grey-value curve from paired images, in least squares of pixels: what a lookup table can do.

    source, target: (N, C, H, W) of the same heads. Pixels are binned by source value; the isotonic fit is of the bins' target
    means, weighted by their counts, so binning costs less than one part in `bins` of the range.
    """
    s, t = (torch.tensor(np.asarray(a)).double().flatten() for a in (source, target))
    low, high = s.min(), s.max()
    bin = ((s - low) / (high - low).clamp(min=1e-12) * bins).long().clamp(max=bins - 1)
    count, knots, means = (torch.bincount(bin, weights, minlength=bins) for weights in (None, s, t))
    seen = count > 0
    count, knots, means = count[seen], knots[seen] / count[seen], means[seen] / count[seen]
    return knots.float(), isotonic(means, count).float()


# ---------------------------------------------------------------- with a network

def sdedit(model, x1, y_target, tau, guidance=1.0, steps=5, solver="heun", colour=0.0, seed=0):
    """SDEdit (arXiv:2108.01073, Alg. 1): drown the image in fresh noise down to time tau, then generate in the target domain.

    x1: (B, C, H, W) source images, y_target: int or (B,). xt = tau x1 + (1-tau) x0 with x0 the noise of training, drawn from
    `seed` on the host, the same on every machine. The second leg is MedShift's own, all the way to t = 1.
    """
    x0 = draw_noise(x1.shape, torch.Generator().manual_seed(seed), colour).to(x1)
    xt = tau * x1 + (1 - tau) * x0
    return sampler.decode(model, xt, y_target, tau, guidance, steps, solver, 1.0, colour, torch.Generator(x1.device).manual_seed(seed))


def regress(model, x, y):
    """The supervised translation x + model(x, t=1, y), with y an int or (B,): a network that starts at zero starts at the identity."""
    y = torch.as_tensor(y, device=x.device).expand(len(x))
    return x + model(x, torch.ones(len(x), device=x.device), y).float()


def supervised(model, source, target, y_target, steps, batch_size=64, lr=1e-3, seed=0, dtype=torch.float32, progress=print):
    """Train `model` in place on pairs, for one direction: the reference that is allowed to see what MedShift never sees.

    source, target: (N, C, H, W) of the same heads, arrays or tensors; y_target: int. Returns the model, whose translation is
    `regress`. Loss ||x + v(x, 1, y) - target||^2, AdamW, cosine decay to zero; `dtype` is the autocast type.
    """
    device = next(model.parameters()).device
    draw, start = torch.Generator().manual_seed(seed), time.time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / steps)) / 2)
    model.train()
    for step in range(1, steps + 1):
        pick = torch.randint(len(source), (batch_size,), generator=draw).numpy()
        x, x1 = (torch.as_tensor(a[pick]).to(device, torch.float32) for a in (source, target))       # (B, C, H, W)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = (regress(model, x, y_target) - x1).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            left = (time.time() - start) * (steps - step) / step
            progress(f"supervised {step}/{steps}  loss {loss.item():.5f}  {left:.0f} s left")
    return model.eval()


# ---------------------------------------------------------------- the references of one ordered pair

@torch.no_grad()
def reference_scores(data, s, t, heads=None, device="cpu"):
    """What needs no network, for one ordered pair of domains s -> t: untouched, histogram, curve, second_exposure.

    data: a `data.Dataset` with `valid` and `test`. Returns {name: metrics.score(...)} on the first `heads` test heads. Histogram
    matching sees the unpaired training images; the curve sees validation pairs and is fitted to the noise-free truth.
    """
    images, truth, second = (torch.as_tensor(np.asarray(a[:heads], np.float32), device=device)
                             for a in (data.test.images, data.test.truth, data.test.second))         # (N, D, C, H, W)
    curve = fit_curve(np.asarray(data.valid.images[:, s]), np.asarray(data.valid.truth[:, t]))
    x = images[:, s]
    results = {"untouched": x, "histogram": histogram(x, fit_histogram(data.train[s], data.train[t])),
               "curve": apply_curve(curve, x), "second_exposure": second[:, t]}
    E_curve, E_second = (metrics.structure_mse(results[name], truth[:, t]).mean().item() for name in ("curve", "second_exposure"))
    return {name: metrics.score(result, truth[:, t], images[:, t], E_curve, E_second) for name, result in results.items()}
