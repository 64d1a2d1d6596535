"""Curves, bands and regions against known answers."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minimedshift import bands
from minimedshift.bands import Curve


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(count=4, size=64, air=1.0, head=-.2, halo=False):
    """Soft-edged discs of different radius: a dark head in air, if asked with a bright halo as edge
    enhancement leaves it."""
    a = torch.arange(size) - size / 2
    r = torch.sqrt(a[:, None] ** 2 + a ** 2)
    radius = torch.linspace(.3, .42, count)[:, None, None] * size
    x = head + (air - head) * torch.sigmoid((r - radius) * 2)
    if halo:
        x = x + .4 * torch.exp(-(r - radius - 4) ** 2 / 8)
    return x[:, None], (r < radius)[:, None]


def wave(periods, amplitude, n=16, size=32, turned=False):
    """n cosines, (n, 1, size, size), of random phase along one axis."""
    phase = uniform(n, 1, 1, 1, seed=int(periods)) * np.pi
    cosine = torch.cos(2 * np.pi * periods * torch.arange(size) / size + phase)
    x = amplitude * cosine.expand(n, 1, size, size)
    return x.mT if turned else x


def test_a_curve_is_straight_between_knots_and_constant_outside():
    values = torch.tensor([-1.0, 0, 0, .5, .2])
    x = uniform(2, 1, 9, 9)
    expected = np.interp(x.numpy(), [-.5, -.2, .1, .4, .7], values.numpy())
    assert_close(Curve(-.5, .7, values)(x), torch.from_numpy(expected).float())


def test_histogram_matching_sends_quantiles_to_quantiles():
    source = uniform(6, 1, 64, 64)
    source[source > .4] = 1                                     # air: many equal pixels
    target = torch.tanh(noise(9, 1, 64, 64, seed=1)) * .5
    target[target > .25] = .9
    curve = bands.fit_histogram(source.half().float(), target)
    assert (curve.values.diff() >= 0).all()
    q = torch.linspace(.05, .6, 12)
    found, wanted = (torch.quantile(x.flatten(), q) for x in (curve(source), target))
    assert_close(found, wanted, atol=.01, rtol=0)
    assert_close(curve(torch.ones(1)), torch.tensor([.9]))
    same = bands.fit_histogram(source, source)
    assert ((same(source) - source).abs() < .01).float().mean() > .999  # but for the last ones before a gap


def test_histogram_matching_by_hand():
    curve = bands.fit_histogram(torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 10, 40, 50]))
    assert_close(curve(torch.tensor([0.0, 1, 2, 3])), torch.tensor([10.0, 10, 40, 50]), atol=.3, rtol=0)
    constant = bands.fit_histogram(torch.zeros(5), torch.tensor([1.0, 2, 3]))
    assert_close(constant(torch.zeros(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("shape, count", [((2, 1, 64, 64), 5), ((1, 3, 37, 50), 4), ((1, 1, 5, 9), 2)])
def test_bands_put_together_are_the_image(shape, count):
    x = uniform(*shape)
    parts = bands.laplacian(x)
    assert len(parts) == count
    assert_close(bands.join(parts), x, atol=1e-5, rtol=0)
    *details, rest = bands.laplacian(torch.full(shape, .4))
    assert all(detail.abs().max() < 1e-6 for detail in details) and (rest - .4).abs().max() < 1e-6


def test_each_band_gets_the_strength_it_has_in_the_target():
    """Two waves, the coarse one halved and the fine one doubled."""
    source, target = (wave(2, a) + wave(12, b, turned=True) for a, b in ((.3, .1), (.15, .2)))
    error = lambda x: (x - target)[..., 4:-4, 4:-4].square().mean()  # bands bend at the frame
    assert error(bands.fit_bands(source, target)(source)) < .1 * error(source)


def test_bands_blur_a_signal_not_its_log():
    """Discs, seen as logs of signals that are blurred by 1 pixel, or by 2: the wider blur makes them smaller.
    Bands of x itself leave more than twice the error."""
    see = lambda x, width: bands.low_pass(x.exp(), width).log()
    sharp, other, tested = (heads(n, head=-.9)[0] for n in (16, 15, 7))
    source, target, x, truth = see(sharp, 1), see(other, 2), see(tested, 1), see(tested, 2)
    error = lambda found: (found - truth).square().mean()
    by_signal, of_x = (error(bands.fit_bands(source, target, log)(x)) for log in (True, False))
    assert by_signal < .2 * error(x) and by_signal < .5 * of_x


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (1, 3, 70, 150)])
def test_there_are_as_many_bands_as_curves_whatever_the_size(shape):
    x = uniform(*shape)
    keep, drop = (Curve(-4.0, 4.0, torch.tensor(values)) for values in ((-4.0, 4.0), (0.0, 0.0)))
    assert_close(bands.BandCurves((keep,) * 5)(x), x, atol=1e-5, rtol=0)
    assert_close(bands.BandCurves((keep,) * 5, log=False)(x - 2.5), x - 2.5, atol=1e-5, rtol=0)  # below -3
    coarse = torch.nn.functional.interpolate(bands.laplacian(x.exp(), 1)[1], shape[2:], mode="bilinear")
    assert_close(bands.BandCurves((drop, keep))(x), coarse.log(), atol=1e-5, rtol=0)
    assert_close(bands.BandCurves((drop,) * 5)(x), torch.full(shape, -3.), atol=1e-5, rtol=0)


def test_the_pyramid_halves_with_weights_one_three_three_one():
    impulse = torch.zeros(1, 1, 16, 16)
    impulse[..., 7, 7] = 1
    small = bands.laplacian(impulse, levels=1)[-1][0, 0]
    line = torch.zeros(8)
    # small pixel 3 weighs pixels 5 to 8 by 1, 3, 3, 1; small pixel 4 weighs 7 to 10
    line[3], line[4] = 3 / 8, 1 / 8
    assert_close(small, line[:, None] * line[None])


def test_low_pass_is_the_gaussian_transfer_function():
    size, width = 64, 1.5
    for m in (0, 3, 10, 25, 40):
        w = math.pi * m / (size - 1)                            # even about both edges: reflection is exact
        x = torch.cos(w * torch.arange(size)).expand(1, 1, size, size)
        expected = math.exp(-w ** 2 * width ** 2 / 2)
        assert_close(bands.low_pass(x, width), x * expected, atol=1e-4, rtol=0)
        assert_close(bands.low_pass(x.mT, width), x.mT * expected, atol=1e-4, rtol=0)


LOOKS = [dict(), dict(air=.5, halo=True), dict(air=.3, head=-.8, halo=True)]


@pytest.mark.parametrize("look", LOOKS, ids=["white", "grey", "dark"])
def test_flat_region_lies_in_the_head_off_its_edges(look):
    truth, disc = heads(**look)
    rim = (truth - bands.low_pass(truth)).abs() > .01
    mask = bands.flat_region(truth)
    assert mask.shape == truth.shape and mask.dtype == torch.bool
    assert not (mask & (rim | ~disc)).any()
    air = bands.flat_region(truth, air=True) & ~disc  # up to two thirds of the air are rim
    assert (air & rim).sum() < .1 * air.sum() and air.sum() > 2000
    share = mask.flatten(1).sum(1) / disc.flatten(1).sum(1)
    assert (share > .15).all() and (share < .6).all()
