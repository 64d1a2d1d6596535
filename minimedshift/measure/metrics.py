"""How good a translation is: structure, noise, anatomy, physics, and how sure each number is.

Images are (N, C, H, W) floats in [-1, 1], so the data range is 2. For one target domain, of the same N heads
in the same order: x are the translations, `images` what the target domain really takes, `truth` the same
without noise, and `materials` (N, 3, H, W) how many cm of bone, soft tissue and brain each ray crosses. All
of it is simulated (phantom.py).

Plain PSNR against the truth rewards blur, therefore structure and noise are always read together. `score`
collects everything.
"""

import math

import torch
import torch.nn.functional as F

RANGE = 2.0                                                    # images live in [-1, 1]


def gaussian(width, radius, like):
    """A sampled Gaussian of the given width in pixels, (2 radius + 1,), sum 1; dtype and device of `like`."""
    k = torch.arange(-radius, radius + 1, dtype=torch.float64)
    k = torch.exp(-k ** 2 / (2 * width ** 2))
    return (k / k.sum()).to(like)


def blur(x, kernel):
    """Correlate the last two axes of x (B, C, H, W) with a kernel (K,), without padding.

    A sum of shifted copies: unlike a convolution it is never rounded to TF32, which would drown weak noise.
    """
    for axis in (-2, -1):
        n = x.shape[axis] - len(kernel) + 1
        x = sum(k * x.narrow(axis, i, n) for i, k in enumerate(kernel))
    return x


def low_pass(x, width=1.5):
    """What x looks like without detail finer than `width` pixels: Gaussian low-pass, reflected at the frame.

    x: (B, C, H, W); same shape out. A wave of w radians per pixel keeps exp(-w^2 width^2 / 2) of its
    amplitude. Raises ValueError for an image smaller than the filter.
    """
    radius = math.ceil(4 * width)
    if min(x.shape[-2:]) <= radius:
        size = tuple(x.shape)
        raise ValueError(f"a low-pass of width {width} needs sides over {radius} pixels, got {size}")
    return blur(F.pad(x, (radius,) * 4, mode="reflect"), gaussian(width, radius, x))


def high_pass(x, width=1.5):
    """The detail that `low_pass` removes: noise and fine texture. Same shapes."""
    return x - low_pass(x, width)


def mse(x, truth):
    """Mean squared error per image: (B, C, H, W) twice -> (B,)."""
    return (x - truth).square().flatten(1).mean(1)


def psnr(x, truth, data_range=RANGE):
    """Peak signal-to-noise ratio per image in dB, (B,): 10 log10(range^2 / mse)."""
    return 10 * torch.log10(data_range ** 2 / mse(x, truth))


def ssim(x, truth, data_range=RANGE):
    """Structural similarity per image, (B,): 11x11 Gaussian window of width 1.5, K = (.01, .03).

        ssim = (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(vx + vy + c2))      Wang et al. 2004, Eq. 13
    Mean over the windows that lie inside the frame. Raises ValueError for an image smaller than the window.
    """
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs sides of at least 11 pixels, got {tuple(x.shape)}")
    window = gaussian(1.5, 5, x)
    mx, my = blur(x, window), blur(truth, window)
    vx, vy = blur(x * x, window) - mx ** 2, blur(truth * truth, window) - my ** 2
    cov = blur(x * truth, window) - mx * my
    c1, c2 = (.01 * data_range) ** 2, (.03 * data_range) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))
    return value.flatten(1).mean(1)


def structure_mse(x, truth):
    """E, the mean squared error per image once both are low-passed, (B,): neither noise nor blur can win."""
    return mse(low_pass(x), low_pass(truth))


def structure(x, truth):
    """PSNR per image in dB once both images are low-passed, (B,): 10 log10(4 / E)."""
    return psnr(low_pass(x), low_pass(truth))


def inside(truth):
    """Where the head is: the darker of the two classes that Otsu's threshold finds, (B, 1, H, W) bool.

    Otsu finds the split whatever the grey of the background is, so it needs no level per domain; of a head
    that fills the frame it keeps the denser part. Per image the threshold maximises n1 n2 (m1 - m2)^2
    (Otsu 1979, Eq. 14).
    """
    grey = low_pass(truth).mean(1, keepdim=True)                                       # (B, 1, H, W)
    v = grey.flatten(1).double().sort(1).values                                        # (B, N)
    n = torch.arange(1, v.shape[1], device=v.device)                                   # darker pixels
    below, total = v.cumsum(1)[:, :-1], v.sum(1, keepdim=True)
    between = n * (v.shape[1] - n) * (below / n - (total - below) / (v.shape[1] - n)) ** 2
    threshold = v.gather(1, between.argmax(1, keepdim=True)).to(grey)                  # (B, 1)
    return grey <= threshold[:, :, None, None]


def erode(mask, pixels):
    """The part of a mask (N, 1, H, W) that has none but its own pixels within `pixels` rows and columns."""
    return ~(F.max_pool2d((~mask).float(), 2 * pixels + 1, stride=1, padding=pixels) > 0)


def flat_region(truth, share=.3):
    """Where only noise should be fine: the flattest `share` of the pixels inside the head, (B, 1, H, W) bool.

    truth: (B, C, H, W), noise-free. Flat means: nowhere in the 5x5 neighbourhood is the low-passed truth
    steep, so edges of the head and bone rims stay outside.
    """
    grey = low_pass(truth).mean(1, keepdim=True)
    dy, dx = torch.gradient(grey, dim=(2, 3))
    steep = F.max_pool2d(torch.sqrt(dx ** 2 + dy ** 2), 5, stride=1, padding=2)
    head = erode(inside(truth), 2)
    steep = steep.masked_fill(~head, math.inf).flatten(1)
    keep = (share * head.flatten(1).sum(1, keepdim=True)).ceil().long().clamp(min=1)
    limit = steep.sort(1).values.gather(1, keep - 1)                                   # (B, 1)
    return ((steep <= limit) & head.flatten(1)).view_as(grey)


# ---------------------------------------------------------------- noise

NOISE_FLOOR = 1e-4                                     # a smaller share of the right power counts as this


def unexplained(detail, known, mask):
    """What the truth's fine detail does not explain: r = detail - a known in the mask, 0 outside; float64.

    detail, known: (N, C, H, W), fine detail of a translation and of its truth; mask (N, 1, H, W) bool. a is
    one least-squares number per image: texture that is weak or missing is not called noise, texture of
    another pattern is. a = 0 where the truth has no fine detail.
    """
    detail, known = detail.double() * mask, known.double() * mask
    overlap, power = (detail * known).flatten(1).sum(1), known.square().flatten(1).sum(1)
    a = torch.where(power > 0, overlap / power.clamp(min=1e-30), 0)                    # (N,)
    return detail - a[:, None, None, None] * known


def noise_residuals(x, images, truth, mask, fine=high_pass):
    """Noise of the translations and of the target's own images in the mask, both (N, C, H, W) float64.

    fine: the filter that keeps fine detail. Raises ValueError where the images have no noise.
    """
    noise = unexplained(fine(x), fine(truth), mask)
    right = fine(images - truth).double() * mask
    if not right.any():
        raise ValueError("noise is measured against that of the target's images, but they equal the truth")
    return noise, right


def noise_ratio(x, images, truth):
    """Power of the noise in the translations over that in the target's own images, in flat regions; a float.

        sum |r|^2 / sum |high_pass(images - truth)|^2          r: `unexplained`; sums over the whole set
    0: the truth (blurred: nearly). 1: the target's own image, or its noise on a truth without fine texture.
    k^2: noise of k times the amplitude. Fine detail that the truth does not have is noise.
    """
    noise, right = noise_residuals(x, images, truth, flat_region(truth))
    return float(noise.square().sum() / right.square().sum())


def ring_powers(noise):
    """Power of the noise (N, C, H, W) at each spatial frequency, (rings,): mean over images and a ring.

    Ring k holds the waves of about k cycles per shorter side. The first is at an eighth of a cycle per pixel,
    where the high-pass keeps half of the amplitude, the last at Nyquist.
    """
    height, width = noise.shape[-2:]
    side = min(height, width)
    power = torch.fft.fft2(noise.double()).abs().square().mean((0, 1))                 # (H, W)
    fy, fx = (torch.fft.fftfreq(n, device=noise.device) for n in (height, width))      # cycles per pixel
    ring = (torch.sqrt(fy[:, None] ** 2 + fx ** 2) * side).round().long().flatten()
    total = torch.bincount(ring, power.flatten())
    return (total / torch.bincount(ring).clamp(min=1))[math.ceil(side / 8):side // 2 + 1]


def spectrum_distance(x, images, truth):
    """How far the noise of x is from the right noise at each frequency, in dB; a float.

        root mean square over rings of 10 log10 P_x / P_image          P: `ring_powers` of `noise_residuals`
    The flat region is the window. 0: the same spectrum; white noise of k times the power is 10 log10 k off.
    P_x is taken as -40 dB of P_image at least, so that noise-free translations are 40 dB off.
    """
    noise, right = (ring_powers(r) for r in noise_residuals(x, images, truth, flat_region(truth)))
    off = 10 * torch.log10((noise / right).clamp(min=NOISE_FLOOR))
    return float(off.square().mean().sqrt())


# ---------------------------------------------------------------- anatomy

def same_head(x, truth, decoys):
    """Per head, whether x is nearer to its own truth than to each decoy, all low-passed: (N,) bool.

    x, truth: (N, C, H, W). decoys: (N, K, C, H, W), truths of K heads with the same view and another anatomy.
    """
    E = structure_mse(x, truth)                                                        # (N,)
    others = low_pass(decoys.flatten(0, 1)).view_as(decoys)
    E_others = (low_pass(x)[:, None] - others).square().flatten(2).mean(2)             # (N, K)
    return (E[:, None] < E_others).all(1)


def band(x):
    """Structure of one to three pixels: a difference of Gaussians (Marr and Hildreth 1980). Same shapes."""
    return low_pass(x, 1.0) - low_pass(x, 3.0)


def near(mask):
    """Where a mask (N, C, H, W) is true within one pixel, diagonals too."""
    return F.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0


def fine_structure(x, truth):
    """Structure of one to three pixels inside the head, kept and invented: floats (recall, false).

    The threshold is the 80th percentile of |band(truth)| in each image, three pixels off the edge of the
    head; what lies above it is structure, bright and dark apart. Both are shares over the whole set.
    recall: the truth's structure pixels with structure of x of the same sign within one pixel.
    false: x's structure pixels where the truth has, within a pixel, not even half the threshold of that sign.
    Raises ValueError for sides of 12 pixels or less.
    """
    region = erode(inside(truth), 3).expand_as(truth)                                  # (N, C, H, W)
    there, got = band(truth), band(x)
    strength = there.abs().masked_fill(~region, math.inf).flatten(1).sort(1).values
    weaker = (.8 * region.flatten(1).sum(1, keepdim=True)).long()
    threshold = strength.gather(1, weaker)[:, :, None, None]                           # (N, 1, 1, 1)
    counts = dict(real=0, found=0, shown=0, false=0)
    for sign in (1, -1):
        real, shown = (sign * there > threshold) & region, (sign * got > threshold) & region
        counts["real"] += real.sum().item()
        counts["found"] += (real & near(sign * got > threshold)).sum().item()
        counts["shown"] += shown.sum().item()
        counts["false"] += (shown & ~near(sign * there > threshold / 2)).sum().item()
    return counts["found"] / max(1, counts["real"]), counts["false"] / max(1, counts["shown"])


# ---------------------------------------------------------------- physics

def grey_per_cm(x, materials):
    """Grey levels per cm of bone and per cm of soft tissue or brain, (2,): least squares over all heads.

        low_pass(x) = c0 + c1 low_pass(bone) + c2 low_pass(soft + brain)          where a ray meets any tissue
    """
    body = materials.sum(1) > 0                                                        # (N, H, W)
    smooth = low_pass(materials)
    bone, tissue = smooth[:, 0], smooth[:, 1:].sum(1)
    paths = torch.stack([torch.ones_like(bone), bone, tissue], -1)[body].double()      # (pixels, 3)
    grey = low_pass(x).mean(1)[body].double()
    return (torch.linalg.pinv(paths.mT @ paths) @ (paths.mT @ grey))[1:]


def attenuation(x, truth, materials):
    """How strongly bone and soft tissue darken x over how strongly they darken the truth: (bone, soft).

    1, 1 is calibrated. One fit, `grey_per_cm`, for all heads together, so that x must tell a thick head from
    a thin one. None for a material that the truth does not show.
    """
    own, right = grey_per_cm(x, materials).tolist(), grey_per_cm(truth, materials).tolist()
    bone, soft = (a / b if abs(b) > 1e-6 else None for a, b in zip(own, right))
    return bone, soft


def signed_distance(region, reach=6):
    """Pixels to the outline of a region (N, 1, H, W) bool, like it: negative inside, positive outside.

    The nearest pixel of the other kind is looked for at every offset up to `reach`; the outline lies half a
    pixel before it. Infinite where there is none.
    """
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

    The edge is where bone crosses `level` cm. Range: of the mean grey at each distance, in steps of a pixel
    up to 6. Slope: along the normal, by central differences, mean over the edge. A step blurred by a Gaussian
    of s pixels has sqrt(2 pi) s, whatever its height. None without an edge, or where x is level across it.
    """
    skull, x = materials[:, :1] > level, x.mean(1, keepdim=True)                       # (N, 1, H, W)
    distance = signed_distance(skull)
    seen, edge = distance.isfinite(), distance.abs() <= .5
    if not edge.any():
        return None
    step = distance[seen].floor().long()
    step = step - step.min()
    profile = torch.bincount(step, x[seen].double()) / torch.bincount(step).clamp(min=1)
    ny, nx = torch.gradient(low_pass(skull.to(x)), dim=(2, 3))                         # normal to the edge
    gy, gx = torch.gradient(x, dim=(2, 3))
    along = (gy * ny + gx * nx) / torch.sqrt(ny ** 2 + nx ** 2).clamp(min=1e-6)        # grey per pixel
    slope = along[edge].double().mean().abs()
    return float((profile.max() - profile.min()) / slope) if slope > 1e-6 else None


def sharpness(x, truth, materials):
    """Width of the skull's edge in x over that in the truth: more than 1 is blurred. None without an edge."""
    own, right = edge_width(x, materials), edge_width(truth, materials)
    return None if own is None or right is None else own / right


def second_difference(x):
    """Noise, and next to nothing of any edge: second differences along both axes (Immerkaer 1996)."""
    x = F.pad(x, (1, 1, 1, 1), mode="reflect").diff(n=2, dim=-1)
    return x.diff(n=2, dim=-2)


def soft_tissue(x, images, truth, materials):
    """Contrast to noise of soft tissue against air in x over that in the target's own images; a float.

        |mean grey of air - mean grey of soft tissue| / noise          over the set
    1 is right. Soft tissue: over 1 cm of it and no bone, a pixel off its edge. Noise: root mean square there
    of `noise_residuals`, of second differences, since a high-pass would see the skin; at least 1 % of the
    right noise (-40 dB). None without such pixels or air.
    """
    bone, tissue = materials[:, :1], materials[:, 1:].sum(1, keepdim=True)
    soft = erode((bone == 0) & (tissue > 1), 1)                                        # (N, 1, H, W)
    air = (bone + tissue) == 0
    if not soft.any() or not air.any():
        return None
    noise, right = noise_residuals(x, images, truth, soft, second_difference)
    share = (noise.square().sum() / right.square().sum()).clamp(min=NOISE_FLOOR).sqrt()

    def contrast(images):
        grey = images.mean(1, keepdim=True)
        return (grey[air].mean() - grey[soft].mean()).abs()

    return float(contrast(x) / contrast(images) / share)


# ---------------------------------------------------------------- statistics over heads

def gap_closed(E, E_curve, E_second):
    """How far from the best grey-value curve (0) to taking the picture again (1); < 0: worse.

        (E_curve - E) / (E_curve - E_second)          three means over heads
    None where there is no gap: a curve is already as near the truth as a second exposure.
    """
    return None if E_curve <= E_second else (E_curve - E) / (E_curve - E_second)


def worst_tenth(E):
    """Mean of the largest tenth of E (..., N) over heads, of at least one head: (...,)."""
    return E.sort(-1).values[..., -max(1, E.shape[-1] // 10):].mean(-1)


def bootstrap(statistic, *per_head, draws=2000, seed=0):
    """95 % interval of a statistic over heads, as (low, high): percentile bootstrap (Efron 1979).

    per_head: tensors (..., N). Each draw takes N heads with replacement, the same in all tensors: differences
    are paired. statistic: gets them as (..., draws, N) and gives (..., draws). low, high: floats, or nested
    lists of shape (...).
    """
    n = per_head[0].shape[-1]
    pick = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed)).to(per_head[0].device)
    values = statistic(*(a.double()[..., pick] for a in per_head))
    low, high = values.quantile(values.new_tensor([.025, .975]), dim=-1)
    return low.tolist(), high.tolist()


def clear_gap(E_curve, E_second):
    """Whether E_curve is clearly above E_second, each (N,): without that a share of the gap means nothing."""
    low, _ = bootstrap(lambda curve, second: (curve - second).mean(-1), E_curve, E_second)
    return low > 0


def gap_interval(E, E_curve, E_second):
    """95 % interval of `gap_closed` from errors (N,), (low, high); None where the gap is not clear of 0."""
    if not clear_gap(E_curve, E_second):
        return None
    share = lambda E, curve, second: (curve - E).mean(-1) / (curve - second).mean(-1)
    return bootstrap(share, E, E_curve, E_second)


def difference_interval(E_a, E_b, E_curve, E_second):
    """95 % interval of (gap closed by a) - (gap closed by b), paired, like `gap_interval`."""
    if not clear_gap(E_curve, E_second):
        return None
    share = lambda a, b, curve, second: (b - a).mean(-1) / (curve - second).mean(-1)
    return bootstrap(share, E_a, E_b, E_curve, E_second)


def ranks(errors):
    """Rank of each method, {name: int}, from {name: E (N,)}: 1 + how many methods are clearly better.

    Clearly better: the 95 % interval of the paired difference of mean E lies below 0. Ties share a rank.
    """
    def differences(E):
        mean = E.mean(-1)                                                              # (methods, draws)
        return mean[:, None] - mean                                                    # first minus second

    _, high = bootstrap(differences, torch.stack(list(errors.values())))
    better = torch.tensor(high) < 0                                                    # of the first method
    return dict(zip(errors, (1 + better.sum(0)).tolist()))


# ---------------------------------------------------------------- all together

@torch.no_grad()
def score(x, truth, images, E_curve=None, E_second=None, decoys=None, materials=None):
    """All numbers of one set of translations x (N, C, H, W), as a flat dict that json can write.

    E_curve, E_second: (N,), errors of the curve and of the second exposure. decoys (N, K, C, H, W): see
    `same_head`. In dB: structure (mean over heads), median, worst_tenth (of its mean E), spectrum, psnr.
    None: what the arguments do not tell; noise, spectrum and soft_tissue where the images are noise-free.
    """
    def load(a):
        return None if a is None else torch.as_tensor(a).to(truth.device).float()

    truth = torch.as_tensor(truth).float()
    x, images, decoys, materials = (load(a) for a in (x, images, decoys, materials))
    E = structure_mse(x, truth)                                                        # (N,)
    decibels = structure(x, truth)
    recall, false = fine_structure(x, truth)
    noisy = not torch.equal(images, truth)
    numbers = dict(structure=decibels.mean().item(), median=decibels.median().item(),
                   worst_tenth=10 * torch.log10(RANGE ** 2 / worst_tenth(E)).item(),
                   E=E.mean().item(), E_heads=E.tolist(),
                   noise=noise_ratio(x, images, truth) if noisy else None,
                   spectrum=spectrum_distance(x, images, truth) if noisy else None,
                   psnr=psnr(x, truth).mean().item(), ssim=ssim(x, truth).mean().item(),
                   recall=recall, false=false,
                   gap_closed=None, gap_interval=None, same_head=None,
                   bone=None, soft=None, sharpness=None, soft_tissue=None)
    if E_curve is not None and E_second is not None:
        E_curve, E_second = load(E_curve), load(E_second)
        numbers["gap_closed"] = gap_closed(numbers["E"], E_curve.mean().item(), E_second.mean().item())
        interval = gap_interval(E, E_curve, E_second)
        numbers["gap_interval"] = None if interval is None else list(interval)
    if decoys is not None:
        numbers["same_head"] = same_head(x, truth, decoys).float().mean().item()
    if materials is not None:
        numbers["bone"], numbers["soft"] = attenuation(x, truth, materials)
        numbers["sharpness"] = sharpness(x, truth, materials)
        numbers["soft_tissue"] = soft_tissue(x, images, truth, materials) if noisy else None
    return numbers
