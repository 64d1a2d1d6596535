import numpy as np
import pytest
import torch
from test_bands import noise, uniform
from torch.testing import assert_close

from minimedshift import bands, baselines, metrics
from minimedshift.baselines import PAIRED, UNPAIRED


def blobs(n, size=32, seed=0):
    """Smooth random pictures with a little grain."""
    x = torch.tanh(bands.low_pass(noise(n, 1, size, size, seed=seed), 2.0) * 4)
    return x + .02 * noise(n, 1, size, size, seed=seed + 1000)


def test_a_chain_goes_on_from_what_is_left():
    seen = []

    def fit_mean(source, target):
        """The smallest fit: half way towards the target's mean."""
        seen.append(source.mean().item())
        step = (target.mean() - source.mean()) / 2
        return lambda x: x + step

    zeros, ones = torch.zeros(3, 1, 4, 4), np.ones((5, 1, 4, 4), np.float16)
    fitted = baselines.alternate(fit_mean, fit_mean)(zeros, ones, rounds=2)
    assert seen == [0, .5, .75, .875]
    assert fitted(torch.zeros(())) == .9375 and fitted.first(1)(torch.zeros(())) == .75


def test_a_fit_looks_at_images_from_all_over_a_large_stack():
    stack = np.arange(2000, dtype=np.float16).reshape(-1, 1, 1, 1) * np.ones((1, 1, 64, 64), np.float16)
    few = baselines.spread(stack, 300)
    assert len(few) == 286 and few[0, 0, 0, 0] == 0 and few.max() > 1990
    values = bands.pixels(few)
    assert bands.SORTED / 2 < len(values) < 2 * bands.SORTED and abs(values.mean() - 1000) < 5


@pytest.mark.parametrize("name", [*UNPAIRED, *PAIRED])
def test_every_baseline_leaves_alone_what_is_right_and_takes_other_sizes(name):
    x = blobs(24).half()
    fitted = {**UNPAIRED, **PAIRED}[name](x.numpy(), x.numpy(), rounds=2)
    assert metrics.mse(fitted(x.float()), x.float()).max() < 1e-4
    other = blobs(2, 50, seed=7)[..., :41]
    found = fitted(other)
    assert metrics.mse(found[..., 8:-8, 8:-8], other[..., 8:-8, 8:-8]).max() < 5e-3
    assert_close(fitted(torch.cat([other, other], 1)), torch.cat([found, found], 1))
    assert_close(found[:1], fitted(other[:1]), atol=1e-5, rtol=0)  # one image is as in a batch


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_baselines_do_not_see_who_is_whose_partner(name):
    source, target = blobs(16), torch.tanh(2 * blobs(16, seed=3))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    fitted, other = (UNPAIRED[name](source, t, rounds=2) for t in (target, target[order]))
    assert_close(fitted(source), other(source), atol=2e-3, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_meets_the_conditions_of_the_nearest_rising_sequence(seed):
    """What is left is square to f, and no tail of it points up (Kuhn and Tucker)."""
    y, w = noise(9, seed=seed).double(), uniform(9, seed=seed + 50).double() + 1.1
    f = baselines.isotonic(y, w)
    left = w * (y - f)
    assert (f.diff() >= -1e-12).all() and abs((left * f).sum()) < 1e-12
    assert (left.flip(0).cumsum(0) < 1e-12).all() and abs(left.sum()) < 1e-12


def test_fit_curve_recovers_the_curve_that_made_the_data():
    curve = lambda v: torch.sign(v) * v.abs() ** .6 * .8 + .1
    source = uniform(8, 1, 64, 64)
    target = curve(source) + .05 * noise(8, 1, 64, 64, seed=1)
    fitted = baselines.fit_curve(source.half().float(), target.half().float())
    assert (fitted.values.diff() >= 0).all()
    new = uniform(2, 1, 64, 64, seed=2)
    assert metrics.mse(fitted(new), curve(new)).max() < 2e-4
    falling = baselines.fit_curve(source, -source)              # the best rising curve is then a constant
    assert_close(falling.values, torch.zeros_like(falling.values), atol=.01, rtol=0)


def test_fit_curve_gives_air_its_own_value():
    source = uniform(4, 1, 32, 32) * .9
    source[:, :, :10] = 1.0                                     # air, and nothing near it
    target = torch.where(source == 1, .7, source * .5)
    fitted = baselines.fit_curve(source, target)
    assert_close(fitted(source), target, atol=4e-3, rtol=0)
    source[:, :, :10] = .45                                     # air in the middle of the other values
    target = torch.where(source == .45, .6, torch.where(source < .45, source, .8))
    assert abs(baselines.fit_curve(source, target)(torch.tensor([.45])).item() - .6) < .02


def test_bands_find_contrast_and_curve_that_a_histogram_cannot():
    def look(x):
        """Another domain: fine bands stronger, coarse ones weaker, and a curve."""
        gains = 2.0, 1.5, 1.0, .7, .5
        return torch.tanh(bands.join([band * gain for band, gain in zip(bands.laplacian(x), gains)]))

    source, target, test = blobs(60), look(blobs(60, seed=1)), blobs(10, seed=2)
    error = lambda x: metrics.structure_mse(x, look(test)).mean().item()
    fitted = UNPAIRED["bands (Laplacian)"](source, target, rounds=4)
    errors = [error(fitted.first(rounds)(test)) for rounds in (1, 2, 3, 4)]
    assert errors[3] < errors[0] and errors[3] < .2 * error(UNPAIRED["histogram"](source, target)(test))
