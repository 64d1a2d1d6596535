"""How good a translation is: structure, noise, anatomy, physics, and how sure each number is.

Images are (N, C, H, W) floats in [-1, 1]. For one target domain, of the same N heads in the same order: x
are the translations, `images` what the target domain really takes, `truth` the same without noise, and
`materials` (N, 3, H, W) how many cm of bone, soft tissue and brain each ray crosses.

Plain PSNR against the truth rewards blur. So read structure and noise together. `score` collects everything.
"""

import math

import torch
import torch.nn.functional as F

from minimedshift.bands import blur, erode, flat_region, inside, low_pass

NOISE_FLOOR = 1e-4  # a smaller share of the right power counts as this: -40 dB


# ---------------------------------------------------------------- structure

def mse(x, truth):
    """Mean squared error per image, (N,)."""
    return (x - truth).square().flatten(1).mean(1)


def decibels(error):
    """A mean squared error in dB, for a data range of 2: 10 log10(4 / error)."""
    return 10 * torch.log10(4 / error)


def psnr(x, truth):
    """Peak signal-to-noise ratio per image in dB, (N,)."""
    return decibels(mse(x, truth))


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


# ---------------------------------------------------------------- noise

def high_pass(x):
    """The detail that `low_pass` removes: noise and fine texture."""
    return x - low_pass(x)


def noise_residuals(x, images, truth, mask, fine=high_pass):
    """Noise of the translations and of the target's own images, 0 outside the mask: (N, C, H, W) float64.

        r = fine(x) - a fine(truth)        right = fine(images - truth)
    fine: a filter that keeps fine detail. a: by least squares, one number per image, so that texture which is
    weak or missing is not called noise, and texture of another pattern is.
    """
    detail, known = fine(x).double() * mask, fine(truth).double() * mask
    overlap, power = (detail * known).flatten(1).sum(1), known.square().flatten(1).sum(1)
    a = overlap / power.clamp(min=1e-30)  # 0 where the truth has no fine detail
    return detail - a[:, None, None, None] * known, fine(images - truth).double() * mask


def noise_ratio(x, images, truth):
    """Power of the noise in the translations over that in the target's own images, in flat regions; a float.
    1 is right; k^2: noise of k times the amplitude. Fine detail that the truth does not have is noise."""
    noise, right = noise_residuals(x, images, truth, flat_region(truth))
    return float(noise.square().sum() / right.square().sum())


def ring_powers(noise):
    """Power of the noise (N, C, H, W) at each spatial frequency, (rings,): mean over images and a ring.
    Ring k holds waves of about k cycles per shorter side, from an eighth of a cycle per pixel to a half."""
    height, width = noise.shape[-2:]
    side = min(height, width)
    power = torch.fft.fft2(noise.double()).abs().square().mean((0, 1))  # (H, W)
    fy, fx = (torch.fft.fftfreq(n, device=noise.device) for n in (height, width))  # cycles per pixel
    ring = (torch.sqrt(fy[:, None]**2 + fx**2) * side).round().long().flatten()
    total = torch.bincount(ring, power.flatten())
    return (total / torch.bincount(ring).clamp(min=1))[math.ceil(side / 8):side // 2 + 1]


def spectrum_distance(x, images, truth):
    """How far the noise of x is from the right noise at each frequency, in dB; a float.

        root mean square over rings of 10 log10 P_x / P_image          P: `ring_powers` of `noise_residuals`
    0: the same spectrum. White noise of k times the power is 10 log10 k off, no noise 40.
    """
    noise, right = (ring_powers(r) for r in noise_residuals(x, images, truth, flat_region(truth)))
    off = 10 * torch.log10((noise / right).clamp(min=NOISE_FLOOR))
    return float(off.square().mean().sqrt())


# ---------------------------------------------------------------- anatomy

def same_head(x, truth, decoys):
    """Whether x is nearer to its own truth than to each decoy, all low-passed: (N,) bool.
    decoys: (N, K, C, H, W), truths of K heads with the same view and another anatomy."""
    E = structure_mse(x, truth)  # (N,)
    others = low_pass(decoys.flatten(0, 1)).view_as(decoys)
    E_others = (low_pass(x)[:, None] - others).square().flatten(2).mean(2)  # (N, K)
    return (E[:, None] < E_others).all(1)


def fine_structure(x, truth):
    """Structure of one to three pixels inside the head, kept and invented: floats (recall, false).

        band = low_pass(1) - low_pass(3)        Marr and Hildreth 1980; bright and dark are counted apart
    Structure is what exceeds the 80th percentile of |band(truth)| in the image.
    recall: the share of the truth's pixels of structure with structure of x within one pixel.
    false: the share of x's where the truth has, within a pixel, not even half of the threshold.
    """
    band = lambda images: low_pass(images, 1.0) - low_pass(images, 3.0)
    near = lambda mask: F.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0
    region = erode(inside(truth), 3).expand_as(truth)  # (N, C, H, W)
    there, got = band(truth), band(x)
    strength = there.abs().masked_fill(~region, math.inf).flatten(1).sort(1).values
    weaker = (.8 * region.flatten(1).sum(1, keepdim=True)).long()
    threshold = strength.gather(1, weaker)[:, :, None, None]  # (N, 1, 1, 1)
    real = found = shown = false = 0
    for sign in (1, -1):
        of_truth, of_x = sign * there > threshold, sign * got > threshold
        real += (of_truth & region).sum().item()
        found += (of_truth & region & near(of_x)).sum().item()
        shown += (of_x & region).sum().item()
        false += (of_x & region & ~near(sign * there > threshold / 2)).sum().item()
    return found / max(1, real), false / max(1, shown)


# ---------------------------------------------------------------- physics

def grey_per_cm(x, materials):
    """Grey levels per cm of bone and per cm of other tissue, [2 floats]: least squares over all heads.

        low_pass(x) = c0 + c1 low_pass(bone) + c2 low_pass(soft + brain)          where a ray meets any tissue
    """
    body = materials.sum(1) > 0  # (N, H, W)
    smooth = low_pass(materials)
    bone, tissue = smooth[:, 0], smooth[:, 1:].sum(1)
    paths = torch.stack([torch.ones_like(bone), bone, tissue], -1)[body].double()  # (pixels, 3)
    grey = low_pass(x).mean(1)[body].double()
    return (torch.linalg.pinv(paths.mT @ paths) @ (paths.mT @ grey))[1:].tolist()


def attenuation(x, truth, materials):
    """How strongly bone and soft tissue darken x over how strongly they darken the truth: (bone, soft).
    1, 1 is right. None for a material that the truth does not show."""
    pairs = zip(grey_per_cm(x, materials), grey_per_cm(truth, materials))
    bone, soft = (own / right if abs(right) > 1e-6 else None for own, right in pairs)
    return bone, soft


def signed_distance(region, reach=6):
    """Pixels to the outline of a region (N, 1, H, W) bool: negative inside, infinite beyond `reach`.
    The outline lies half a pixel before the nearest pixel of the other kind."""
    height, width = region.shape[-2:]
    padded = F.pad(region.float(), (reach,) * 4, mode="replicate") > 0
    distance = torch.full(region.shape, math.inf, device=region.device)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if math.hypot(dy, dx) <= reach:
                shifted = padded[:, :, reach + dy:reach + dy + height, reach + dx:reach + dx + width]
                nearer = torch.where(shifted != region, math.hypot(dy, dx), math.inf)
                distance = torch.minimum(distance, nearer)
    return torch.where(region, .5 - distance, distance - .5)


def edge_width(x, materials, level=.5):
    """Width in pixels of the skull's edge in x, a float: the range of grey across it over the slope on it.

    The edge is where bone crosses `level` cm. Range: of the mean grey in each pixel of distance. Slope: along
    the normal, mean over the edge. A step blurred by a Gaussian of s pixels has sqrt(2 pi) s. None without an
    edge, or where x is level across it.
    """
    skull, x = materials[:, :1] > level, x.mean(1, keepdim=True)  # (N, 1, H, W)
    distance = signed_distance(skull)
    seen, edge = distance.isfinite(), distance.abs() <= .5
    if not edge.any():
        return None
    step = distance[seen].floor().long()
    step = step - step.min()
    profile = torch.bincount(step, x[seen].double()) / torch.bincount(step).clamp(min=1)
    ny, nx = torch.gradient(low_pass(skull.to(x)), dim=(2, 3))  # normal to the edge
    gy, gx = torch.gradient(x, dim=(2, 3))
    along = (gy * ny + gx * nx) / torch.sqrt(ny**2 + nx**2).clamp(min=1e-6)  # grey per pixel
    slope = along[edge].double().mean().abs()
    return float((profile.max() - profile.min()) / slope) if slope > 1e-6 else None


def sharpness(x, truth, materials):
    """Width of the skull's edge in x over that in the truth: more than 1 is blurred. None without an edge."""
    own, right = edge_width(x, materials), edge_width(truth, materials)
    return None if own is None or right is None else own / right


def soft_tissue(x, images, truth, materials):
    """Contrast to noise of soft tissue against air in x over that in the target's own images; 1 is right.

        |mean grey of air - mean grey of soft tissue| / noise          over the set
    Soft tissue: over 1 cm of it, no bone. Noise: the root mean square there. None without such pixels or air.
    """
    bone, tissue = materials[:, :1], materials[:, 1:].sum(1, keepdim=True)
    soft = erode((bone == 0) & (tissue > 1), 1)  # (N, 1, H, W)
    air = (bone + tissue) == 0
    if not soft.any() or not air.any():
        return None

    def second_difference(images):  # hardly sees an edge such as the skin's (Immerkaer 1996)
        return F.pad(images, (1,) * 4, mode="reflect").diff(n=2, dim=-1).diff(n=2, dim=-2)

    def contrast(images):
        grey = images.mean(1, keepdim=True)
        return (grey[air].mean() - grey[soft].mean()).abs()

    noise, right = noise_residuals(x, images, truth, soft, second_difference)
    share = (noise.square().sum() / right.square().sum()).clamp(min=NOISE_FLOOR).sqrt()
    return float(contrast(x) / contrast(images) / share)


# ---------------------------------------------------------------- statistics over heads

def gap_closed(E, E_curve, E_second):
    """How far from the best grey-value curve (0) to taking the picture again (1); < 0: worse.

        (E_curve - E) / (E_curve - E_second)          three means over heads; None where there is no gap
    """
    return None if E_curve <= E_second else (E_curve - E) / (E_curve - E_second)


def worst_tenth(E):
    """Mean of the largest tenth of E (N,), of at least one head."""
    return E.sort().values[-max(1, len(E) // 10):].mean()


def bootstrap(statistic, *per_head, draws=2000, seed=0):
    """95 % interval of a statistic over heads, as (low, high): percentile bootstrap (Efron 1979).

    per_head: tensors (..., N). Each draw takes N heads with replacement, the same in all tensors: differences
    are paired. statistic: gets them as (..., draws, N), gives (..., draws). low, high: floats, or lists.
    """
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


# ---------------------------------------------------------------- all together

METRICS = {  # function(x, truth, images) -> a number: a column of the evaluation's first table
    "noise": lambda x, truth, images: noise_ratio(x, images, truth),
    "spectrum": lambda x, truth, images: spectrum_distance(x, images, truth),
    "psnr": lambda x, truth, images: psnr(x, truth).mean().item(),
    "ssim": lambda x, truth, images: ssim(x, truth).mean().item(),
}


OF_NOISE = ("noise", "spectrum")  # not known where the truth itself is noisy


@torch.no_grad()
def score(x, truth, images, E_curve, E_second, decoys=None, materials=None):
    """All numbers of one set of translations, as a flat dict that json can write.

    E_curve, E_second: (N,), errors of the curve and of the second exposure. decoys: see `same_head`. In dB:
    structure (mean over heads), median, worst_tenth (of its mean E), spectrum, psnr. None: what is not known
    without decoys, materials, or noise in the images.
    """
    x = x.to(truth)
    E, heads = structure_mse(x, truth), structure(x, truth)  # (N,)
    row = dict(structure=heads.mean().item(), median=heads.median().item(), E=E.mean().item(),
               worst_tenth=10 * torch.log10(4 / worst_tenth(E)).item(), E_heads=E.tolist())
    row["gap_closed"] = gap_closed(row["E"], E_curve.mean().item(), E_second.mean().item())
    row["gap_interval"] = difference_interval(E, E_curve, E_curve, E_second)  # the curve closes 0
    row["recall"], row["false"] = fine_structure(x, truth)
    row.update(dict.fromkeys(("same_head", "bone", "soft", "sharpness", "soft_tissue")))
    noisy = not torch.equal(images, truth)
    for name, metric in METRICS.items():
        row[name] = metric(x, truth, images) if noisy or name not in OF_NOISE else None
    if decoys is not None:
        row["same_head"] = same_head(x, truth, decoys).float().mean().item()
    if materials is not None:
        row["bone"], row["soft"] = attenuation(x, truth, materials)
        row["sharpness"] = sharpness(x, truth, materials)
        row["soft_tissue"] = soft_tissue(x, images, truth, materials) if noisy else None
    return row
