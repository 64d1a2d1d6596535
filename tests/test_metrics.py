import math

import pytest
import torch
from torch.testing import assert_close

from minimedshift import metrics


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(count=4, size=64, air=1.0, head=-.2, halo=False):
    """Soft-edged discs of different radius: a dark head in air, if asked with a bright halo around it as edge enhancement leaves it."""
    a = torch.arange(size) - size / 2
    r = torch.sqrt(a[:, None] ** 2 + a ** 2)
    radius = torch.linspace(.3, .42, count)[:, None, None] * size
    x = head + (air - head) * torch.sigmoid((r - radius) * 2)
    if halo:
        x = x + .4 * torch.exp(-(r - radius - 4) ** 2 / 8)
    return x[:, None], (r < radius)[:, None]


def test_low_pass_is_the_gaussian_transfer_function():
    size, width = 64, 1.5
    for m in (0, 3, 10, 25, 40):
        w = math.pi * m / (size - 1)                            # this wave is even about both edges: reflection changes nothing
        x = torch.cos(w * torch.arange(size)).expand(1, 1, size, size)
        expected = math.exp(-w ** 2 * width ** 2 / 2)
        assert_close(metrics.low_pass(x, width), x * expected, atol=1e-4, rtol=0)
        assert_close(metrics.low_pass(x.mT, width), x.mT * expected, atol=1e-4, rtol=0)


def test_low_pass_spreads_an_impulse_into_a_gaussian_and_keeps_its_sum():
    x = torch.zeros(2, 3, 41, 41)
    x[:, :, 20, 20] = 1
    y, a = metrics.low_pass(x, 2.0), torch.arange(-20, 21)
    expected = torch.exp(-(a[:, None] ** 2 + a ** 2) / (2 * 2.0 ** 2)) / (2 * math.pi * 2.0 ** 2)
    assert_close(y, expected.expand_as(y), atol=1e-5, rtol=0)
    assert_close(y.sum((2, 3)), torch.ones(2, 3))
    assert_close(metrics.low_pass(x, 2.0) + metrics.high_pass(x, 2.0), x)


def test_psnr_has_its_closed_form():
    x = noise(3, 2, 16, 16).clamp(-1, 1)
    offset = torch.tensor([.01, .1, 1.0])[:, None, None, None]
    assert_close(metrics.psnr(x + offset, x), torch.tensor([46.0206, 26.0206, 6.0206]), atol=1e-3, rtol=0)
    assert_close(metrics.psnr(x + offset, x, data_range=1), torch.tensor([40.0, 20.0, 0.0]), atol=1e-3, rtol=0)


def test_ssim_is_the_double_loop():
    x, truth = noise(1, 1, 14, 13, seed=1).clamp(-1, 1), noise(1, 1, 14, 13, seed=2).clamp(-1, 1)
    truth = .5 * truth + .5 * x
    a = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(a[:, None] ** 2 + a ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    total, count = 0.0, 0
    for i in range(14 - 10):
        for j in range(13 - 10):
            p, q = (z[0, 0, i:i + 11, j:j + 11].double() for z in (x, truth))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq, cov = ((window * u * v).sum() for u, v in ((p - mp, p - mp), (q - mq, q - mq), (p - mp, q - mq)))
            total += (2 * mp * mq + .02 ** 2) * (2 * cov + .06 ** 2) / ((mp ** 2 + mq ** 2 + .02 ** 2) * (vp + vq + .06 ** 2))
            count += 1
    assert_close(metrics.ssim(x, truth), (total / count).float()[None], atol=1e-5, rtol=0)
    assert_close(metrics.ssim(x, x), torch.ones(1))
    assert_close(metrics.ssim(truth, x), metrics.ssim(x, truth))


def test_structure_sees_shape_and_not_fine_noise():
    truth, _ = heads()
    fine, coarse = .1 * noise(*truth.shape), metrics.low_pass(noise(*truth.shape, seed=1), 5.0)
    coarse = .1 * coarse / coarse.square().mean().sqrt()
    # white noise of variance s^2 keeps s^2 / (4 pi width^2) after the low-pass; coarse noise keeps nearly all
    assert_close(metrics.structure_mse(truth + fine, truth).mean(), torch.tensor(.01 / (4 * math.pi * 1.5 ** 2)), rtol=.1, atol=0)
    assert metrics.structure_mse(truth + coarse, truth).mean() > .008
    E = metrics.structure_mse(truth + fine, truth)
    assert_close(metrics.structure(truth + fine, truth), 10 * torch.log10(4 / E))


@pytest.mark.parametrize("look", [dict(), dict(air=.5, halo=True), dict(air=.3, head=-.8, halo=True)], ids=["white", "grey", "dark"])
def test_flat_region_lies_in_the_head_off_its_edges(look):
    truth, disc = heads(**look)
    rim = metrics.high_pass(truth).abs() > .01
    mask = metrics.flat_region(truth)
    assert mask.shape == truth.shape and mask.dtype == torch.bool
    assert not (mask & ~disc).any()
    assert not (mask & rim).any()
    share = mask.flatten(1).sum(1) / disc.flatten(1).sum(1)
    assert (share > .15).all() and (share < .6).all()


@pytest.mark.parametrize("look", [dict(), dict(air=.5, halo=True)], ids=["white", "grey"])
@pytest.mark.parametrize("factor", [0.0, .5, 1.0, 2.0])
def test_noise_ratio_recovers_a_ratio_of_variances(look, factor):
    truth, _ = heads(count=32, **look)
    images, x = truth + .03 * noise(*truth.shape, seed=1), truth + factor * .03 * noise(*truth.shape, seed=2)
    assert metrics.noise_ratio(x, images, truth) == pytest.approx(factor ** 2, rel=.08, abs=.02)


def test_noise_ratio_ignores_what_happens_outside_the_head_and_smooth_errors():
    truth, disc = heads(count=32)
    images = truth + .03 * noise(*truth.shape, seed=1)
    outside = metrics.F.max_pool2d(disc.float(), 9, stride=1, padding=4) < .5
    x = images + .2 * noise(*truth.shape, seed=2) * outside
    assert metrics.noise_ratio(x, images, truth) == pytest.approx(1, abs=.01)
    assert metrics.noise_ratio(.1 + images, images, truth) == pytest.approx(1, abs=1e-3)
    assert metrics.noise_ratio(metrics.low_pass(images), images, truth) < .2


def test_gap_closed_is_a_ruler_from_curve_to_second_exposure():
    assert metrics.gap_closed(.02, E_curve=.02, E_second=.001) == 0
    assert metrics.gap_closed(.001, E_curve=.02, E_second=.001) == 1
    assert metrics.gap_closed(.0105, E_curve=.02, E_second=.001) == pytest.approx(.5)
    assert metrics.gap_closed(.04, E_curve=.02, E_second=.001) < 0
    assert metrics.gap_closed(.01, E_curve=.001, E_second=.002) is None


def test_score_puts_the_numbers_together():
    truth, _ = heads()
    images, x = truth + .03 * noise(*truth.shape, seed=1), truth + .03 * noise(*truth.shape, seed=2)
    numbers = metrics.score(x.half().numpy(), truth, images, E_curve=.02, E_second=0.0)
    assert set(numbers) == {"structure", "E", "noise", "psnr", "ssim", "gap_closed"}
    assert all(isinstance(v, float) for v in numbers.values())
    assert numbers["psnr"] == pytest.approx(10 * math.log10(4 / .03 ** 2), abs=.2)
    assert numbers["gap_closed"] == pytest.approx((.02 - numbers["E"]) / .02)
    assert metrics.score(x, truth, images)["gap_closed"] is None


def test_too_small_an_image_is_told_in_a_sentence():
    x = torch.zeros(1, 1, 6, 6)
    with pytest.raises(ValueError, match="sides over 6 pixels"):
        metrics.low_pass(x)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        metrics.ssim(x, x)


def test_same_head_tells_translations_of_one_head_from_another():
    heads = metrics.low_pass(torch.randn(10, 1, 24, 24, generator=torch.Generator().manual_seed(0))) * 3
    a, b = (heads + 0.1 * torch.randn(heads.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    assert metrics.same_head(a, b).all()
    assert metrics.same_head(a, b[[1, 0, *range(2, 10)]]).tolist() == [False, False] + [True] * 8
