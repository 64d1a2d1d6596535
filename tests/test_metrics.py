import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_bands import LOOKS, heads, noise
from torch.testing import assert_close

from minimedshift import metrics


def test_psnr_has_its_closed_form():
    x = noise(3, 2, 16, 16).clamp(-1, 1)
    offset = torch.tensor([.01, .1, 1.0])[:, None, None, None]
    psnr = metrics.decibels(metrics.mse(x + offset, x))
    assert_close(psnr, torch.tensor([46.0206, 26.0206, 6.0206]), atol=1e-3, rtol=0)


def test_ssim_is_the_double_loop():
    x, truth = noise(1, 1, 14, 13, seed=1).clamp(-1, 1), noise(1, 1, 14, 13, seed=2).clamp(-1, 1)
    truth, values = .5 * truth + .5 * x, []
    a = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(a[:, None] ** 2 + a ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    for i in range(14 - 10):
        for j in range(13 - 10):
            p, q = (z[0, 0, i:i + 11, j:j + 11].double() for z in (x, truth))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            below = (mp ** 2 + mq ** 2 + .02 ** 2) * (vp + vq + .06 ** 2)
            values.append((2 * mp * mq + .02 ** 2) * (2 * cov + .06 ** 2) / below)
    assert_close(metrics.ssim(x, truth), torch.stack(values).mean().float()[None], atol=1e-5, rtol=0)
    assert_close(metrics.ssim(x, x), torch.ones(1))
    assert_close(metrics.ssim(truth, x), metrics.ssim(x, truth))


def test_structure_sees_shape_and_not_fine_noise():
    truth, _ = heads()
    fine, coarse = .1 * noise(*truth.shape), metrics.low_pass(noise(*truth.shape, seed=1), 5.0)
    coarse = .1 * coarse / coarse.square().mean().sqrt()
    # white noise of variance s^2 keeps s^2 / (4 pi width^2) after the low-pass; coarse noise keeps nearly all
    expected = torch.tensor(.01 / (4 * math.pi * 1.5 ** 2))
    assert_close(metrics.structure_mse(truth + fine, truth).mean(), expected, rtol=.1, atol=0)
    assert metrics.structure_mse(truth + coarse, truth).mean() > .008
    E = metrics.structure_mse(truth + fine, truth)
    assert_close(metrics.structure(truth + fine, truth), 10 * torch.log10(4 / E))


def textured(count=32, look=None):
    """Heads with fine texture, images of them with noise: (truth, smooth truth, images)."""
    smooth, disc = heads(count=count, **(look or {}))
    truth = smooth + .04 * noise(*smooth.shape, seed=7) * disc
    return truth, smooth, truth + .03 * noise(*smooth.shape, seed=1)


@pytest.mark.parametrize("look", LOOKS[:2], ids=["white", "grey"])
@pytest.mark.parametrize("factor", [0.0, .5, 1.0, 2.0])
def test_noise_ratio_recovers_a_ratio_of_variances(look, factor):
    truth, smooth, images = textured(look=look)
    fresh = factor * .03 * noise(*truth.shape, seed=2)
    assert metrics.noise_ratio(truth + fresh, images, truth) == pytest.approx(factor ** 2, rel=.05, abs=1e-6)
    # weaker texture, or none at all, is no noise either
    for x in (.5 * (truth + smooth), smooth):
        assert metrics.noise_ratio(x + fresh, images, truth) == pytest.approx(factor ** 2, rel=.08, abs=.02)


def test_noise_ratio_of_the_target_itself_is_one_and_invented_texture_is_noise():
    truth, smooth, images = textured()
    assert metrics.noise_ratio(images, images, truth) == pytest.approx(1, abs=.02)
    invented = smooth + .04 * noise(*truth.shape, seed=8)
    assert metrics.noise_ratio(invented, images, truth) == pytest.approx((.04 / .03) ** 2, rel=.05)
    both = invented + (images - truth)
    assert metrics.noise_ratio(both, images, truth) == pytest.approx(1 + (.04 / .03) ** 2, rel=.05)


def test_noise_of_a_truth_without_fine_detail():
    truth = torch.full((2, 1, 32, 32), .3)
    x, images = truth + noise(2, 1, 32, 32), truth + noise(2, 1, 32, 32, seed=1)
    flat = metrics.flat_region(truth)
    fine = [((z - metrics.low_pass(z)) * flat).square().sum() for z in (x - truth, images - truth)]
    assert metrics.noise_ratio(x, images, truth) == pytest.approx(float(fine[0] / fine[1]), rel=1e-4)


def test_noise_ratio_ignores_what_happens_outside_the_head_and_smooth_errors():
    truth, disc = heads(count=32)
    images = truth + .03 * noise(*truth.shape, seed=1)
    outside = F.max_pool2d(disc.float(), 9, stride=1, padding=4) < .5
    x = images + .2 * noise(*truth.shape, seed=2) * outside
    assert metrics.noise_ratio(x, images, truth) == pytest.approx(1, abs=.01)
    assert metrics.noise_ratio(.1 + images, images, truth) == pytest.approx(1, abs=.01)
    assert metrics.noise_ratio(metrics.low_pass(images), images, truth) < .2


def test_same_head_is_nearest_to_its_own_truth():
    truth = metrics.low_pass(noise(6, 1, 24, 24)) * 3
    decoys = metrics.low_pass(noise(6 * 4, 1, 24, 24, seed=1)).view(6, 4, 1, 24, 24) * 3
    x = truth + .1 * noise(6, 1, 24, 24, seed=2)
    assert metrics.same_head(x, truth, decoys).tolist() == [True] * 6
    x[2] = decoys[2, 3]                                          # head 2 became its last decoy
    x[4] = .4 * truth[4] + .6 * decoys[4, 0]                     # head 4 more than half of its first
    x[5] = .6 * truth[5] + .4 * decoys[5, 0]
    assert metrics.same_head(x, truth, decoys).tolist() == [True, True, False, True, False, True]


def test_gap_closed_is_a_ruler_from_curve_to_second_exposure():
    for E, closed in ((.02, 0), (.001, 1), (.0105, .5), (.039, -1)):
        assert metrics.gap_closed(E, E_curve=.02, E_second=.001) == pytest.approx(closed)
    assert metrics.gap_closed(.01, E_curve=.001, E_second=.002) is None


def test_worst_tenth_is_the_mean_of_the_largest():
    assert metrics.worst_tenth(torch.tensor([3.0, 9.0, 1.0])) == 9
    E = torch.arange(20.0)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    assert metrics.worst_tenth(E) == 18.5


def test_bootstrap_interval_of_a_mean_is_the_normal_one_and_covers():
    n, hits = 60, 0
    for trial in range(100):
        sample = 5 + 2 * noise(n, seed=trial)
        low, high = metrics.bootstrap(lambda v: v.mean(-1), sample, draws=400)
        hits += low < 5 < high
    assert 88 <= hits <= 99
    low, high = metrics.bootstrap(lambda v: v.mean(-1), sample)
    standard_error = sample.std(unbiased=False).item() / n ** .5
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=.1)
    assert (low, high) == metrics.bootstrap(lambda v: v.mean(-1), sample)


def test_intervals_of_the_gap():
    """Where a ratio is the same on all heads the interval is a point: all draws are of the same heads."""
    curve, second = .02 + .004 * noise(128).abs(), .001 + 0 * noise(128)
    half = metrics.difference_interval(.5 * (curve + second), curve, curve, second)
    assert half == pytest.approx((.5, .5), abs=1e-4)
    E = .5 * (curve + second) + .003 * noise(128, seed=1)
    low, high = metrics.difference_interval(E, curve, curve, second)
    closed = metrics.gap_closed(E.mean().item(), curve.mean().item(), second.mean().item())
    assert low < closed < high and .01 < high - low < .2
    tenth = metrics.difference_interval(E, E + .1 * (curve - second), curve, second)
    assert tenth == pytest.approx((.1, .1), abs=1e-4)
    assert metrics.difference_interval(E, second, second, second) is None
    in_the_noise = second + .001 * noise(128, seed=2)
    assert metrics.difference_interval(E, E, in_the_noise, second) is None


def test_score_puts_the_numbers_together():
    """Twice the noise of the target is a ratio of 4: nothing is symmetric in x, images and truth."""
    truth, _ = heads()
    images, x = truth + .02 * noise(*truth.shape, seed=1), truth + .04 * noise(*truth.shape, seed=2)
    E_curve, E_second = torch.full((4,), .02), torch.zeros(4)
    bare = metrics.score(x, truth, images, E_curve, E_second)
    assert [name for name, value in bare.items() if value is None] == ["same_head"]
    numbers = metrics.score(x.half(), truth, images, E_curve, E_second, truth.roll(1, 0)[:, None])
    assert list(numbers) == list(bare) == list(metrics.SCORES)
    lists = {"E_heads": 4, "gap_interval": 2}
    for name, value in numbers.items():
        values = value if name in lists else [value]
        assert len(values) == lists.get(name, 1) and all(isinstance(v, float) for v in values)
    json.dumps(numbers)
    assert numbers["gap_closed"] == pytest.approx((.02 - numbers["E"]) / .02)
    assert numbers["gap_interval"][0] <= numbers["gap_closed"] <= numbers["gap_interval"][1]
    assert numbers["worst_tenth"] == pytest.approx(metrics.structure(x, truth).min().item(), abs=.05)
    assert numbers["same_head"] == 1 and bare["noise"] == pytest.approx(4, rel=.15)
    assert bare["noise"] == metrics.noise_ratio(x, images, truth)
    assert bare["ssim"] == metrics.ssim(x, truth).mean().item()


def test_score_without_noise_to_measure_against_and_without_truth():
    truth, _ = heads()
    x, curve, second = truth + .03 * noise(*truth.shape), torch.full((4,), .02), torch.zeros(4)
    numbers = metrics.score(x, truth, truth, curve, second)
    assert numbers["noise"] is None and numbers["structure"] > 30
    assert metrics.score(x, None, truth, None, None) == dict.fromkeys(metrics.SCORES)
