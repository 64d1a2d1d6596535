import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minimedshift.measure import baselines, metrics
from minimedshift.measure.baselines import PAIRED, UNPAIRED, Curve


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n, size=32, seed=0):
    """Smooth random pictures with a little grain."""
    x = torch.tanh(metrics.low_pass(noise(n, 1, size, size, seed=seed), 2.0) * 4)
    return x + .02 * noise(n, 1, size, size, seed=seed + 1000)


# ---------------------------------------------------------------- chains

def test_a_chain_goes_on_from_what_is_left():
    seen = []

    def fit_mean(source, target):
        """The smallest fit: half way towards the target's mean."""
        seen.append(source.mean().item())
        step = (target.mean() - source.mean()) / 2
        return lambda x: x + step

    fitted = baselines.alternate(fit_mean, fit_mean)(torch.zeros(3, 1, 4, 4), np.ones((5, 1, 4, 4), np.float16), rounds=2)
    assert seen == [0, .5, .75, .875]
    assert [x.item() for x in fitted.each(torch.zeros(()))] == [.75, .9375]
    assert fitted(torch.zeros(())) == .9375 and fitted.first(1)(torch.zeros(())) == .75
    with pytest.raises(ValueError, match="at least 1 round"):
        UNPAIRED["histogram"](torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4), rounds=0)


def test_a_fit_looks_at_images_from_all_over_a_large_stack():
    stack = np.arange(2000, dtype=np.float16).reshape(-1, 1, 1, 1) * np.ones((1, 1, 64, 64), np.float16)
    few = baselines.spread(stack)
    assert few.numel() <= baselines.PIXELS < 2 * few.numel() and few[0, 0, 0, 0] == 0 and few.max() > 1990
    values = baselines.pixels(few)
    assert baselines.SORTED / 2 < len(values) < 2 * baselines.SORTED and abs(values.mean() - 1000) < 5


@pytest.mark.parametrize("table, name", [("UNPAIRED", name) for name in UNPAIRED] + [("PAIRED", name) for name in PAIRED])
def test_every_baseline_leaves_alone_what_is_right_and_takes_other_sizes(table, name):
    x = blobs(24).half().numpy()
    fitted = getattr(baselines, table)[name](x, x, rounds=2)
    assert metrics.mse(fitted(torch.from_numpy(x).float()), torch.from_numpy(x).float()).max() < 1e-4
    other = blobs(2, 50, seed=7)[..., :41]
    assert fitted(other).shape == other.shape
    assert metrics.mse(fitted(other)[..., 8:-8, 8:-8], other[..., 8:-8, 8:-8]).max() < 5e-3
    colour = fitted(torch.cat([other, other], 1))
    assert_close(colour[:, 1:], fitted(other))
    assert_close(fitted(other)[:1], fitted(other[:1]), atol=1e-5, rtol=0)                       # one image is translated as in a batch


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_baselines_do_not_see_who_is_whose_partner(name):
    source, target = blobs(16), torch.tanh(2 * blobs(16, seed=3))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    fitted, other = (UNPAIRED[name](source, t, rounds=2) for t in (target, target[order]))
    assert_close(fitted(source), other(source), atol=2e-3, rtol=0)


# ---------------------------------------------------------------- curves

def test_a_curve_is_straight_between_knots_and_constant_outside():
    values = torch.tensor([-1.0, 0, 0, .5, .2])
    x = uniform(2, 1, 9, 9)
    expected = np.interp(x.numpy(), [-.5, -.2, .1, .4, .7], values.numpy())
    assert_close(Curve(-.5, .7, values)(x), torch.from_numpy(expected).float())


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_is_the_min_max_of_block_means(seed):
    n = 9
    y, w = noise(n, seed=seed).double(), uniform(n, seed=seed + 50).double() + 1.1
    mean = lambda a, b: (w[a:b] * y[a:b]).sum() / w[a:b].sum()
    expected = [max(min(mean(a, b) for b in range(i + 1, n + 1)) for a in range(i + 1)) for i in range(n)]
    assert_close(baselines.isotonic(y, w), torch.stack(expected))


def test_isotonic_is_the_best_of_many_monotone_sequences():
    y, w = noise(12, seed=7).double(), uniform(12, seed=8).double() + 1.1
    loss = lambda f: (w * (f - y) ** 2).sum(-1)
    fit = baselines.isotonic(y, w)
    assert (fit.diff() >= 0).all()
    steps = noise(20000, 12, seed=9).double().sort(1).values
    assert loss(fit) <= loss(steps).min()
    for share in (.01, .1, .5):                                 # a convex set: any way towards another member is uphill
        assert (loss(fit) <= loss((1 - share) * fit + share * steps)).all()


def test_fit_curve_recovers_the_curve_that_made_the_data():
    curve = lambda v: torch.sign(v) * v.abs() ** .6 * .8 + .1
    source = uniform(8, 1, 64, 64)
    target = curve(source) + .05 * noise(8, 1, 64, 64, seed=1)
    fitted = baselines.fit_curve(source.half().numpy(), target.half().numpy())
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


def test_fit_curve_is_at_least_as_good_as_other_curves():
    source = uniform(4, 1, 32, 32)
    target = torch.tanh(2 * source) * .7 + .3 * noise(4, 1, 32, 32, seed=1)
    best = metrics.mse(baselines.fit_curve(source, target)(source), target).mean()
    for other in (source, torch.tanh(2 * source) * .7, source.clamp(-.7, .7), baselines.fit_histogram(source, target)(source)):
        assert best <= metrics.mse(other, target).mean()


def test_histogram_matching_sends_quantiles_to_quantiles():
    source = uniform(6, 1, 64, 64)
    source[source > .4] = 1                                     # air: many equal pixels
    target = torch.tanh(noise(9, 1, 64, 64, seed=1)) * .5
    target[target > .25] = .9
    curve = baselines.fit_histogram(source.half().numpy(), target)
    assert (curve.values.diff() >= 0).all()
    q = torch.linspace(.05, .6, 12)
    assert_close(torch.quantile(curve(source).flatten(), q), torch.quantile(target.flatten(), q), atol=.01, rtol=0)
    assert_close(curve(torch.ones(1)), torch.tensor([.9]))
    same = baselines.fit_histogram(source, source)
    assert ((same(source) - source).abs() < .01).float().mean() > .999                          # but for the last ones before a gap


def test_histogram_matching_by_hand():
    curve = baselines.fit_histogram(torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 10, 40, 50]))
    assert_close(curve(torch.tensor([0.0, 1, 2, 3])), torch.tensor([10.0, 10, 40, 50]), atol=.3, rtol=0)
    constant = baselines.fit_histogram(torch.zeros(5), torch.tensor([1.0, 2, 3]))
    assert_close(constant(torch.zeros(2)), torch.full((2,), 2.0))


# ---------------------------------------------------------------- the spectrum

def wave(periods, amplitude, n=16, size=32, turned=False):
    """n cosines, (n, 1, size, size), of random phase along one axis."""
    phase = uniform(n, 1, 1, 1, seed=int(periods)) * np.pi
    x = amplitude * torch.cos(2 * np.pi * periods * torch.arange(size) / size + phase).expand(n, 1, size, size)
    return x.mT if turned else x


def test_gains_of_waves_are_the_ratios_of_their_amplitudes():
    source = wave(3, .2) + wave(7, .1) + .3
    target = wave(3, .1, turned=True) + wave(7, .4, turned=True) + .6
    gains = baselines.fit_spectrum(source, target)
    assert_close(gains.gains[[0, 3, 7]], torch.tensor([2, .5, 4.0]), atol=1e-3, rtol=0)
    assert_close(gains(source), wave(3, .1) + wave(7, .4) + .6, atol=1e-4, rtol=0)
    other = wave(6, .2, size=64) + wave(14, .1, size=64) + .3   # the same waves, in a larger picture
    assert_close(gains(other), wave(6, .1, size=64) + wave(14, .4, size=64) + .6, atol=1e-4, rtol=0)


def test_after_the_gains_the_mean_power_of_every_ring_is_the_target_s():
    source, target = blobs(12), uniform(9, 1, 32, 32)
    after = baselines.fit_spectrum(source, target)(source)
    ring = [[round(np.hypot(min(i, 32 - i), min(j, 32 - j))) for j in range(32)] for i in range(32)]

    def power(x):
        total, count = np.zeros(30), np.zeros(30)
        mean = np.square(np.abs(np.fft.fft2(x.numpy()))).mean((0, 1))
        for i in range(32):
            for j in range(32):
                total[ring[i][j]] += mean[i, j]
                count[ring[i][j]] += 1
        return torch.from_numpy(total[count > 0] / count[count > 0])

    assert_close(power(after), power(target), rtol=1e-4, atol=0)


# ---------------------------------------------------------------- bands

@pytest.mark.parametrize("split", [baselines.laplacian, baselines.gaussians])
@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (1, 3, 37, 50)])
def test_bands_put_together_are_the_image(split, shape):
    x = uniform(*shape)
    bands = split(x)
    assert len(bands) == 5
    assert_close(baselines.join(bands), x, atol=1e-5, rtol=0)
    *details, rest = split(torch.full(shape, .4))
    assert all(detail.abs().max() < 1e-6 for detail in details) and (rest - .4).abs().max() < 1e-6


def test_a_difference_of_gaussians_passes_what_its_two_gaussians_tell_apart():
    x = wave(8, 1.0, n=2, size=64)
    w = 2 * np.pi * 8 / 64                                      # radians per pixel: a Gaussian keeps exp(-w^2 width^2 / 2)
    for fine, coarse, band in zip((0, 1, 2, 4), (1, 2, 4, 8), baselines.gaussians(x)):
        share = np.exp(-(w * fine) ** 2 / 2) - np.exp(-(w * coarse) ** 2 / 2)
        assert_close(band[..., 24:40], share * x[..., 24:40], atol=.03, rtol=0)


def test_the_pyramid_halves_with_weights_one_three_three_one():
    impulse = torch.zeros(1, 1, 16, 16)
    impulse[..., 7, 7] = 1
    small = baselines.laplacian(impulse, levels=1)[-1][0, 0]
    line = torch.zeros(8)
    line[3], line[4] = 3 / 8, 1 / 8                             # small pixel 3 weighs pixels 5 to 8 by 1, 3, 3, 1; small pixel 4 weighs 7 to 10
    assert_close(small, line[:, None] * line[None])


@pytest.mark.parametrize("name", ["bands (Laplacian)", "bands (DoG)"])
def test_bands_find_contrast_and_curve_that_a_histogram_cannot(name):
    split = baselines.laplacian if "Laplacian" in name else baselines.gaussians

    def look(x):
        """Another domain: fine bands stronger, coarse ones weaker, and a curve."""
        bands = [band * gain for band, gain in zip(split(x), (2.0, 1.5, 1.0, .7, .5))]
        return torch.tanh(baselines.join(bands))

    source, target, test = blobs(60), look(blobs(60, seed=1)), blobs(10, seed=2)
    error = lambda x: metrics.structure_mse(x, look(test)).mean().item()
    fitted = UNPAIRED[name](source, target, rounds=4)
    errors = [error(x) for x in fitted.each(test)]
    assert errors[3] < errors[0] and errors[3] < .2 * error(UNPAIRED["histogram"](source, target)(test))
    assert errors[3] < .5 * error(UNPAIRED["histogram and spectrum"](source, target, rounds=4)(test))


# ---------------------------------------------------------------- least squares

def test_least_squares_solves_what_can_be_solved():
    A, w = noise(50, 4), torch.tensor([1.0, -2, .5, 3])
    pieces = [(part, part @ w) for part in A.split(7)]
    assert_close(baselines.least_squares(pieces, 1e-9), w)


def test_the_filter_that_made_the_data_is_found():
    kernel = torch.zeros(13, 13)
    kernel[4:9, 4:9] = noise(5, 5, seed=4) / 10
    made_by = baselines.Filter(kernel, .2)
    source = uniform(6, 1, 32, 32)
    fitted = baselines.fit_filter(source, made_by(source))
    assert_close(fitted.kernel, kernel, atol=1e-4, rtol=0)
    assert fitted.constant == pytest.approx(.2, abs=1e-4)
    impulse = torch.zeros(1, 1, 40, 40)
    impulse[..., 20, 20] = 1
    assert_close(fitted(impulse)[0, 0, 14:27, 14:27], kernel.flip(0, 1) + .2, atol=1e-4, rtol=0)


def test_hats_are_the_shares_of_straight_lines():
    knots = torch.tensor([-.7, -.1, .2, .9])
    x = uniform(2, 1, 5, 5)
    shares = baselines.hats(x, knots)
    for k in range(4):
        at_one_knot = np.interp(x[:, 0].numpy(), knots.numpy(), np.eye(4)[k])
        assert_close(shares[:, k], torch.from_numpy(at_one_knot).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("split", [baselines.laplacian, baselines.gaussians])
def test_the_curves_of_bands_that_made_the_data_are_found(split):
    source = blobs(24)
    bent = lambda x: baselines.join([torch.tanh(3 * band) * gain for band, gain in zip(split(x), (.9, .6, .5, .3, .2))])
    fitted = baselines.fit_band_curves(split, source, bent(source))
    other = blobs(4, seed=1)
    assert metrics.mse(fitted(other), bent(other)).mean() < 2e-3 * bent(other).var()
    flat = torch.full((4, 1, 32, 32), .5)                       # no detail at all
    assert_close(baselines.fit_band_curves(split, flat, flat)(flat), flat, atol=1e-4, rtol=0)


def test_ceilings_stand_in_their_order():
    source = blobs(40)
    target = torch.tanh(baselines.join([band * gain for band, gain in zip(baselines.gaussians(source), (2, 1.5, 1, .7, .5))]))
    error = {name: metrics.structure_mse(fit(source, target)(source), target).mean() for name, fit in PAIRED.items()}
    assert error["curve and filter"] < .5 * error["curve"] and error["band curves (DoG)"] < .5 * error["curve"]
    assert error["curve"] < metrics.structure_mse(source, target).mean()
