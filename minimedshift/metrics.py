"""How good a translation is: structure, noise, anatomy, and how sure each number is.

Images are (N, C, H, W) floats in [-1, 1]. For one target domain, of the same N heads in the same order: x
are the translations, `images` what the target domain really takes, and `truth` the same without noise.

Plain PSNR against the truth rewards blur. So read structure and noise together. `score` collects everything.
A metric of your own is a function and a line in METRICS."""

import torch

from minimedshift.bands import blur, flat_region, low_pass


def mse(x, truth):
    """Mean squared error per image, (N,)."""
    return (x - truth).square().flatten(1).mean(1)


def decibels(error):
    """A mean squared error as PSNR, in dB for a data range of 2: 10 log10(4 / error)."""
    return 10 * torch.log10(4 / error)


def structure_mse(x, truth):
    """E, the mean squared error per image once both are low-passed, (N,): neither noise nor blur can win."""
    return mse(low_pass(x), low_pass(truth))


def structure(x, truth):
    """E in dB, (N,)."""
    return decibels(structure_mse(x, truth))


def ssim(x, truth):
    """Structural similarity per image, (N,): Gaussian windows 11x11 of width 1.5, all inside the frame.

        ssim = (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(vx + vy + c2))      Wang et al. 2004, Eq. 13
    """
    mean = lambda images: blur(images, 1.5, 5)
    mx, my = mean(x), mean(truth)
    vx, vy = mean(x * x) - mx**2, mean(truth * truth) - my**2
    cov = mean(x * truth) - mx * my
    c1, c2 = (.01 * 2) ** 2, (.03 * 2) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return value.flatten(1).mean(1)


def noise_ratio(x, images, truth):
    """Power of the noise in the translations over that in the target's own images, in flat regions; a float.

        noise = fine(x) - a fine(truth)        right = fine(images - truth)        fine(z) = z - low_pass(z)
    a: by least squares, one number per image, so that texture which is weak or missing is not called noise,
    and texture of another pattern is. 1 is right; k^2: noise of k times the amplitude.
    None where the images have no noise: they are all the truth there is."""
    if torch.equal(images, truth):
        return None
    flat = flat_region(truth)
    detail, known, right = ((z - low_pass(z)).double() * flat for z in (x, truth, images - truth))
    overlap, power = (detail * known).flatten(1).sum(1), known.square().flatten(1).sum(1)
    a = overlap / power.clamp(min=1e-30)  # 0 where the truth has no fine detail
    noise = detail - a[:, None, None, None] * known
    return float(noise.square().sum() / right.square().sum())


def same_head(x, truth, decoys):
    """Whether x is nearer to its own truth than to each decoy, all low-passed: (N,) bool.
    decoys: (N, K, C, H, W), truths of K heads with the same view and another anatomy."""
    E = structure_mse(x, truth)  # (N,)
    others = low_pass(decoys.flatten(0, 1)).view_as(decoys)
    E_others = (low_pass(x)[:, None] - others).square().flatten(2).mean(2)  # (N, K)
    return (E[:, None] < E_others).all(1)


def gap_closed(E, E_curve, E_second):
    """How far from the best grey-value curve (0) to taking the picture again (1); < 0: worse.

        (E_curve - E) / (E_curve - E_second)          three means over heads; None where there is no gap"""
    return None if E_curve <= E_second else (E_curve - E) / (E_curve - E_second)


def worst_tenth(E):
    """Mean of the largest tenth of E (N,), of at least one head."""
    return E.sort().values[-max(1, len(E) // 10):].mean()


def bootstrap(statistic, *per_head, draws=2000, seed=0):
    """95 % interval of a statistic over heads, as (low, high): percentile bootstrap (Efron 1979).
    per_head: tensors (..., N). Each draw takes N heads with replacement, the same in all tensors: differences
    are paired. statistic: gets them as (..., draws, N), gives (..., draws). low, high: floats, or lists."""
    n = per_head[0].shape[-1]
    pick = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed)).to(per_head[0].device)
    values = statistic(*(a.double()[..., pick] for a in per_head))
    low, high = values.quantile(values.new_tensor([.025, .975]), dim=-1)
    return low.tolist(), high.tolist()


def difference_interval(E_a, E_b, E_curve, E_second):
    """95 % interval of (gap closed by a) - (gap closed by b), paired, from errors (N,): (low, high).
    None where the gap itself is not clear of 0."""
    gap, _ = bootstrap(lambda curve, second: (curve - second).mean(-1), E_curve, E_second)
    if gap <= 0:
        return None
    share = lambda a, b, curve, second: (b - a).mean(-1) / (curve - second).mean(-1)
    return bootstrap(share, E_a, E_b, E_curve, E_second)


METRICS = {  # function(x, truth, images) -> a number or None: a column of the evaluation's first table
    "noise": lambda x, truth, images: noise_ratio(x, images, truth),
    "ssim": lambda x, truth, images: ssim(x, truth).mean().item(),
}
SCORES = ("structure", "median", "worst_tenth", "E", "E_heads", "gap_closed", "gap_interval", "same_head",
          *METRICS)


@torch.no_grad()
def score(x, truth, images, E_curve, E_second, decoys=None):
    """All numbers of one set of translations, SCORES: a flat dict that json can write.
    E_curve, E_second: (N,) on the CPU, errors of the curve and of the second exposure. decoys: see
    `same_head`. In dB: structure (mean over heads), median, worst_tenth (of its mean E). None: what is not
    known without truth, decoys, or noise in the images."""
    if truth is None:
        return dict.fromkeys(SCORES)
    x = x.to(truth)
    E = structure_mse(x, truth).cpu()  # (N,), where E_curve is
    dB, means = decibels(E), [each.mean().item() for each in (E, E_curve, E_second)]
    known = None if decoys is None else same_head(x, truth, decoys).float().mean().item()
    return dict(
        structure=dB.mean().item(), median=dB.median().item(), worst_tenth=decibels(worst_tenth(E)).item(),
        E=means[0], E_heads=E.tolist(), gap_closed=gap_closed(*means),
        gap_interval=difference_interval(E, E_curve, E_curve, E_second),  # the curve closes 0
        same_head=known, **{name: metric(x, truth, images) for name, metric in METRICS.items()})
