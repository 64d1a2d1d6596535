"""How good a translation is: structure (is it the same head?), noise (does it look like the target domain?), PSNR and SSIM.

Images are (B, C, H, W) floats in [-1, 1], so the data range is 2. The truth of a translation is the noise-free image of the same
head in the target domain. Plain PSNR against it rewards blur, therefore structure and noise are always read together.
"""

import math

import torch
import torch.nn.functional as F

RANGE = 2.0                                                    # images live in [-1, 1]


def gaussian(width, radius, like):
    """A sampled Gaussian of the given width in pixels, (2 radius + 1,), with sum 1 and the dtype and device of `like`."""
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

    x: (B, C, H, W); same shape out. A wave of w radians per pixel keeps exp(-w^2 width^2 / 2) of its amplitude.
    Raises ValueError for an image smaller than the filter.
    """
    radius = math.ceil(4 * width)
    if min(x.shape[-2:]) <= radius:
        raise ValueError(f"a low-pass of width {width} needs sides over {radius} pixels, got {tuple(x.shape)}")
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
    """Structural similarity per image, (B,): 11x11 Gaussian window of width 1.5, K = (.01, .03), windows inside the frame only.

    ssim = (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(vx + vy + c2)), averaged over windows (Wang et al. 2004, Eq. 13).
    Raises ValueError for an image smaller than the window.
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
    """E, the mean squared error per image once both are low-passed, (B,): what noise cannot hide and blur cannot win."""
    return mse(low_pass(x), low_pass(truth))


def structure(x, truth):
    """PSNR per image in dB once both images are low-passed, (B,): 10 log10(4 / E)."""
    return psnr(low_pass(x), low_pass(truth))


def inside(truth):
    """Where the head is: the darker of the two classes that Otsu's threshold finds in each image, (B, 1, H, W) bool.

    Otsu finds the split whatever the grey of the background is, so it needs no level per domain; of a head that
    fills the frame it keeps the denser part. The threshold maximises n1 n2 (m1 - m2)^2 (Otsu 1979, Eq. 14).
    """
    grey = low_pass(truth).mean(1, keepdim=True)                                       # (B, 1, H, W)
    v = grey.flatten(1).double().sort(1).values                                        # (B, N)
    n = torch.arange(1, v.shape[1], device=v.device)                                   # pixels in the darker class
    below, total = v.cumsum(1)[:, :-1], v.sum(1, keepdim=True)
    between = n * (v.shape[1] - n) * (below / n - (total - below) / (v.shape[1] - n)) ** 2
    threshold = v.gather(1, between.argmax(1, keepdim=True)).to(grey)                  # (B, 1)
    return grey <= threshold[:, :, None, None]


def flat_region(truth, share=.3):
    """Where only noise should be fine: the flattest `share` of the pixels inside the head, (B, 1, H, W) bool.

    truth: (B, C, H, W), noise-free. Flat means: nowhere in the 5x5 neighbourhood is the low-passed truth steep, so edges of
    the head and bone rims stay outside.
    """
    grey = low_pass(truth).mean(1, keepdim=True)
    dy, dx = torch.gradient(grey, dim=(2, 3))
    steep = F.max_pool2d(torch.sqrt(dx ** 2 + dy ** 2), 5, stride=1, padding=2)
    head = inside(truth)
    head = -F.max_pool2d(-head.to(grey), 5, stride=1, padding=2) > .5                  # two pixels off its edge
    steep = steep.masked_fill(~head, math.inf).flatten(1)
    keep = (share * head.flatten(1).sum(1, keepdim=True)).ceil().long().clamp(min=1)
    limit = steep.sort(1).values.gather(1, keep - 1)                                   # (B, 1)
    return ((steep <= limit) & head.flatten(1)).view_as(grey)


def noise_ratio(x, images, truth):
    """High-frequency power of the translations x over that of the target domain's own images, in flat regions; a float.

    x, images, truth: (B, C, H, W) of the same heads: translated, really taken, noise-free. 1: the right amount of noise;
    near 0: smoothed; 2: twice the variance. Means are taken over the whole set before the ratio.
    """
    mask = flat_region(truth).to(x)                                                    # (B, 1, H, W)
    power = (high_pass(x).square() * mask).sum(dtype=torch.float64)
    return float(power / (high_pass(images).square() * mask).sum(dtype=torch.float64))


def gap_closed(E, E_curve, E_second):
    """How far from the best grey-value curve (0) to taking the picture again (1), negative if worse than the curve.

    (E_curve - E) / (E_curve - E_second). None where there is no gap: a curve is already as near the truth as a second exposure.
    """
    return None if E_curve <= E_second else (E_curve - E) / (E_curve - E_second)


def same_head(a, b):
    """Per head i, whether a[i] and b[i] are nearer to each other than to any other head's image, once low-passed: (N,) bool.

    a, b (N, C, H, W): translations of the same N heads into one domain from two different sources. What keeps anatomy passes.
    """
    a, b = (low_pass(x).flatten(1) for x in (a, b))
    distance, own = torch.cdist(a, b), torch.arange(len(a), device=a.device)
    return (distance.argmin(0) == own) & (distance.argmin(1) == own)


@torch.no_grad()
def score(x, truth, images, E_curve=None, E_second=None):
    """All numbers of one set of translations x (B, C, H, W), as a dict of floats (means over images; noise: over the set).

    truth: noise-free targets; images: the target domain's own images of the same heads. `gap_closed` is None without its
    two references or without a gap.
    """
    x, truth, images = (torch.as_tensor(a).float() for a in (x, truth, images))
    x, images = x.to(truth.device), images.to(truth.device)
    E = structure_mse(x, truth).mean().item()
    known = E_curve is not None and E_second is not None
    return dict(structure=structure(x, truth).mean().item(), E=E, noise=noise_ratio(x, images, truth),
                psnr=psnr(x, truth).mean().item(), ssim=ssim(x, truth).mean().item(),
                gap_closed=gap_closed(E, E_curve, E_second) if known else None)
