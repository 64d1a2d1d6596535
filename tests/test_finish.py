"""Tone and grain against known answers."""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from minimedshift import finish, student
from minimedshift.bands import Curve, fit_histogram
from test_bands import noise, wave


def blobs(count, side=64, seed=0):
    """Dark discs on white: a head in air, (count, 1, side, side)."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.arange(side) - side / 2
    distance = torch.hypot(at[:, None], at[None])
    radius = side * (.28 + .1 * torch.rand(count, 1, 1, 1, generator=draw))
    return 1 - torch.sigmoid((radius - distance) / .5) * (1 + .3 * torch.rand(count, 1, 1, 1, generator=draw))


def noisy(images, deviation, seed=1):
    return images + deviation * noise(*images.shape, seed=seed)


def distances(domains, certain=1.0, log=True):
    return finish.Distances(log, None, torch.full((domains, domains), certain))


def flat(value, count=1):
    return [Curve(-1.0, 1.0, torch.full((4,), float(value)))] * count


def test_fine_bands_sum_to_the_image_and_pass_what_two_gaussians_tell_apart():
    x = wave(8, 1.0, n=2, size=64)
    *bands, coarse = finish.fine_bands(x)
    torch.testing.assert_close(sum(bands) + coarse, x, atol=1e-6, rtol=0)
    w = 2 * math.pi * 8 / 64  # radians per pixel: a Gaussian keeps exp(-w^2 width^2 / 2)
    for narrow, wide, band in zip((0, 1), (1, 2), bands):
        share = math.exp(-(w * narrow)**2 / 2) - math.exp(-(w * wide)**2 / 2)
        torch.testing.assert_close(band[..., 24:40], share * x[..., 24:40], atol=.003, rtol=0)
    *bands, coarse = finish.fine_bands(torch.full((1, 3, 17, 20), .4))  # the frame leaves no trace
    assert all(band.abs().max() < 1e-6 for band in bands) and (coarse - .4).abs().max() < 1e-6


def test_white_noise_of_variance_1_has_its_share_in_each_band():
    bands = finish.fine_bands(noise(40, 1, 64, 64))
    for band, share in zip(bands, finish.UNIT):
        assert band[..., 8:-8, 8:-8].std() == pytest.approx(share, rel=.02)


@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("air", [.02, .05, .1])
def test_the_grain_of_white_noise_is_its_share_of_each_band(robust, air):
    x = blobs(20, 128)
    curves = finish.grain(noisy(x, torch.where(x > .5, air, .05)), robust)
    for curve, share in zip(curves, finish.UNIT, strict=True):
        for level, size in ((-.15, .05), (1.0, air)):  # in the disc and around it
            assert curve(torch.tensor(level)) == pytest.approx(size * share, rel=.25)  # flat: a little less


@pytest.mark.parametrize("has, wants", [(0.0, .06), (.03, .06), (.06, .06), (.08, .03)])
def test_regrain_brings_noise_to_the_strength_wanted(has, wants):
    own, wanted = ([flat(size * share)[0] for share in finish.UNIT] for size in (has, wants))
    x = noisy(torch.zeros(20, 1, 64, 64), has)
    y = finish.regrain(x, own, wanted, noise(20, 1, 64, 64, seed=2))
    if has == wants:
        torch.testing.assert_close(y, x, atol=1e-5, rtol=0)
    for band, share in zip(finish.fine_bands(y), finish.UNIT):
        found = band[..., 8:-8, 8:-8].std() / share
        assert found == pytest.approx(wants, rel=.15 if has <= wants else .25)  # the rest keeps its own


def test_noise_belongs_to_the_image_whatever_stands_beside_it():
    x = torch.randn(3, 1, 8, 8)
    noise = finish.fresh_noise(x, 1)
    assert torch.equal(finish.fresh_noise(x[1:2], 1), noise[1:2])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(finish.fresh_noise(x, 2), noise)
    assert finish.fresh_noise(torch.zeros(1, 1, 99, 99)).std() == pytest.approx(1, abs=.03)


@pytest.mark.parametrize("own, left", [(.03, 1), (.045, 1 / 3)])
def test_what_is_stronger_than_noise_stays(own, left):
    """Stripes of one pixel have nearly all power, .01, in the finest band. A mean of ratios, not powers."""
    assert (.005 / own**2 > finish.STRUCTURE) == (left == 1) and .01 / (own**2 + .01**2) > finish.STRUCTURE
    x = .1 * (-1.0) ** torch.arange(64).expand(1, 1, 64, 64)
    curves = [flat(size)[0] for size in (own, .01)]
    y = finish.regrain(x, curves, flat(own / 3, 2), torch.zeros_like(x))
    assert y[..., 8:-8].abs().mean() / .1 == pytest.approx(left, rel=.04)


def test_taking_noise_away_leaves_edges():
    x = torch.ones(1, 1, 64, 64)
    x[..., 32:] = -1
    y = finish.regrain(x, flat(.05, 2), flat(.01, 2), torch.zeros_like(x))
    assert (y - x).abs().max() < .02


def test_a_level_without_pixels_takes_the_nearest_value():
    """Only the discs, around level -.15, and the air, at the top, have pixels; where there are too few, 0."""
    values = finish.grain(noisy(blobs(20, 128), .05), True)[0].values
    assert (values > 0).all() and (values[:3] == values[0]).all()
    assert not any(curve.values.any() for curve in finish.grain(torch.zeros(1, 1, 8, 8), True))


@pytest.fixture(scope="module", params=[True, False], ids=["bands of e^x", "bands of x"])
def fitted(request):
    """A student that changes nothing, between two domains of other grey levels and noise."""
    net = student.LocalNet(student.LocalShape(2, width=8, blocks=1)).requires_grad_(False)
    a, b = noisy(blobs(60), .02), noisy(.95 * blobs(60, seed=5) - .03, .05, seed=3)
    return finish.fit(net, torch.stack([a, b]), distances(2, .9, request.param)), a, b


def test_tone_and_noise_become_the_targets(fitted):
    finishes, a, b = fitted
    x = noisy(blobs(40, seed=9), .02, seed=8)
    y = finishes[0, 1](x, noise(*x.shape, seed=7))
    for share in (.1, .3, .5, .8):
        assert y.quantile(share) == pytest.approx(b.quantile(share).item(), abs=.05)
    for band, want in zip(finish.fine_bands(y)[:2], finish.fine_bands(b)):
        assert band[..., 28:36, 28:36].std() == pytest.approx(want[..., 28:36, 28:36].std().item(), rel=.25)


def test_grain_is_measured_once_the_tone_is_right(fitted):
    """The student changes nothing, so its answers are the images of the source."""
    finishes, a, b = fitted
    part = finishes[0, 1]
    (one, first), (two, second) = (each.parts for each in part.chain.parts)
    toned = torch.lerp(a, second(two(first(one(a)))), part.strength)
    assert part.strength == pytest.approx(finish.MOST * .9)
    grains = finish.grain(toned, robust=False), finish.grain(b, robust=True)
    for own, want in zip((part.own, part.wanted), grains):
        for curve, expected in zip(own, want, strict=True):
            torch.testing.assert_close(curve.values, expected.values)
    raw = finish.grain(a, robust=False)[0]
    assert (part.own[0].values - raw.values).abs().max() > .03 * raw.values.max()


@pytest.mark.parametrize("certain, alike", [(1.0, .6), (0.0, .6), (1.0, 0.0)])
def test_tone_is_taken_from_the_targets_images_that_are_most_alike(certain, alike, monkeypatch):
    """They are the source's, .3 darker; as many have smaller heads. Between like domains, and where none is
    alike, all images count."""
    monkeypatch.setattr(finish, "ALIKE", alike)
    net = student.LocalNet(student.LocalShape(2, width=8, blocks=1)).requires_grad_(False)
    a = noisy(blobs(100), .02)
    b = torch.cat([a[:50] - .3, F.pad(a[50:, ..., 16:-16, 16:-16], (16,) * 4, value=1.0)])
    y = finish.fit(net, torch.stack([a, b]), distances(2, certain))[0, 1].chain(a)
    error, of_all = ((z - a + .3).abs().mean() for z in (y, fit_histogram(a, b)(a)))
    assert of_all > .1 and (error < .3 * of_all if certain * alike else error > .4 * of_all)


def test_a_finish_goes_through_plain_types(fitted):
    finishes, a, _ = fitted
    e = noise(3, 1, 64, 64)
    assert torch.equal(finish.restore(asdict(finishes[0, 1]))(a[:3], e), finishes[0, 1](a[:3], e))
