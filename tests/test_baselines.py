from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from minimedshift import baselines, metrics


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- curves

def test_a_curve_is_straight_between_knots_and_constant_outside():
    knots, values = torch.tensor([-.5, 0, .2, .8]), torch.tensor([-1.0, 0, 0, .5])
    x = uniform(2, 1, 9, 9)
    expected = torch.from_numpy(np.interp(x.numpy(), knots.numpy(), values.numpy())).float()
    assert_close(baselines.apply_curve((knots, values), x), expected)
    assert_close(baselines.apply_curve((knots[:1], values[:1]), x), torch.full_like(x, -1))


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
    assert len(fitted[0]) <= 512 and (fitted[0].diff() > 0).all() and (fitted[1].diff() >= 0).all()
    new = uniform(2, 1, 64, 64, seed=2)
    assert metrics.mse(baselines.apply_curve(fitted, new), curve(new)).max() < 2e-4
    falling = baselines.fit_curve(source, -source)              # the best rising curve is then a constant
    assert_close(falling[1], torch.zeros_like(falling[1]), atol=.01, rtol=0)


def test_fit_curve_is_at_least_as_good_as_other_curves():
    source = uniform(4, 1, 32, 32)
    target = torch.tanh(2 * source) * .7 + .3 * noise(4, 1, 32, 32, seed=1)
    best = metrics.mse(baselines.apply_curve(baselines.fit_curve(source, target), source), target).mean()
    for other in (source, torch.tanh(2 * source) * .7, source.clamp(-.7, .7), baselines.histogram(source, baselines.fit_histogram(source, target))):
        assert best <= metrics.mse(other, target).mean()


def test_histogram_matching_sends_quantiles_to_quantiles():
    source = uniform(6, 1, 64, 64)
    source[source > .4] = 1                                     # air: many equal pixels
    target = torch.tanh(noise(9, 1, 64, 64, seed=1)) * .5
    target[target > .25] = .9
    curve = baselines.fit_histogram(source.half().numpy(), target)
    assert (curve[0].diff() > 0).all() and (curve[1].diff() >= 0).all()
    matched = baselines.histogram(source, curve)
    q = torch.linspace(.05, .6, 12)
    assert_close(torch.quantile(matched.flatten(), q), torch.quantile(target.flatten(), q), atol=.01, rtol=0)
    same = baselines.fit_histogram(source, source)
    assert_close(baselines.histogram(source, same), source, atol=.01, rtol=0)


def test_histogram_matching_looks_at_every_image_of_a_large_stack():
    source = torch.cat([torch.full((50, 1, 64, 64), -.5), torch.full((50, 1, 64, 64), .5)]).numpy()
    few = baselines.thin(source, 4096)
    assert 3000 < len(few) <= 4096 and abs(few.mean()) < .01


# ---------------------------------------------------------------- with a network

class Gaussian(nn.Module):
    """The exact velocity for pixels N(mean_y, std_y^2): E[x1 - x0 | xt]; the null label has label 0's."""

    def __init__(self, mean, std):
        super().__init__()
        self.shape = SimpleNamespace(num_domains=len(mean), score=0.0)
        self.mean, self.std = torch.tensor(mean + mean[:1]), torch.tensor(std + std[:1])

    def forward(self, xt, t, y):
        t, m, s = (a[:, None, None, None] for a in (t, self.mean[y], self.std[y]))
        return m + (t * s ** 2 - (1 - t)) / ((1 - t) ** 2 + t ** 2 * s ** 2) * (xt - t * m)


@pytest.mark.parametrize("tau", [0.0, .3, .7])
def test_sdedit_has_the_mean_and_variance_of_the_exact_flow(tau):
    mean, std, grey = [.6, -.4], [.5, .3], .2
    x1 = torch.full((4, 1, 64, 64), grey)
    x = baselines.sdedit(Gaussian(mean, std), x1, 1, tau, steps=50, seed=3)
    spread = ((1 - tau) ** 2 + (tau * std[1]) ** 2) ** .5       # of xt where the target's own images are
    assert x.mean() == pytest.approx(mean[1] + std[1] / spread * tau * (grey - mean[1]), abs=.01)
    assert x.std() == pytest.approx(std[1] / spread * (1 - tau), rel=.02)


def test_sdedit_draws_fresh_noise_from_its_seed_and_takes_a_label_each():
    model, x1 = Gaussian([.6, -.4], [.5, .3]), torch.zeros(2, 1, 64, 64)
    first, again, other = (baselines.sdedit(model, x1, torch.tensor([0, 1]), .2, 2.0, 10, seed=s) for s in (0, 0, 1))
    assert_close(first, again, atol=0, rtol=0)
    assert (first - other).abs().mean() > .05
    assert first[0].mean() > .3 and first[1].mean() < -.3


class Affine(nn.Module):
    """The smallest network: a gain and an offset for each label; it complains about any time but t = 1."""

    def __init__(self):
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.zeros(3, 1, 1, 1)) for _ in range(2))

    def forward(self, xt, t, y):
        assert (t == 1).all()
        return self.gain[y] * xt + self.offset[y]


def test_supervised_learns_a_linear_map_under_its_label():
    source, lines = uniform(64, 1, 16, 16).half().numpy(), []
    model = baselines.supervised(Affine(), source, source * np.float16(.5) - np.float16(.2), 2, steps=300, batch_size=16, lr=.03,
                                 progress=lines.append)
    x = uniform(3, 1, 16, 16, seed=5)
    assert_close(baselines.regress(model, x, 2), .5 * x - .2, atol=5e-3, rtol=0)
    assert_close(baselines.regress(model, x, 0), x)             # another label was never touched
    assert len(lines) == 10 and "300/300" in lines[-1] and not model.training


# ---------------------------------------------------------------- the references of one pair

def a_data_set(n=16, size=32):
    """Two domains of blobs: the second is a grey-value curve of the first, plus structure of its own, plus noise."""
    def pairs(seed):
        base, own = (metrics.low_pass(noise(n, 1, size, size, seed=seed + i), 3.0) * 5 for i in (0, 1))
        first, second = torch.tanh(base), (torch.tanh(base) * .5 + .3 + .1 * torch.tanh(own))
        truth = torch.stack([first, second], 1)                 # (N, D, C, H, W)
        noisy = lambda i: (truth + .03 * noise(*truth.shape, seed=seed + i)).half().numpy()
        return SimpleNamespace(images=noisy(2), truth=truth.half().numpy(), second=noisy(3))

    valid, test, train = pairs(0), pairs(100), pairs(200)
    return SimpleNamespace(domains=("a", "b"), train=[train.images[:, 0], train.images[:, 1]], valid=valid, test=test)


def test_references_stand_in_their_order():
    data = a_data_set()
    scores = baselines.reference_scores(data, 0, 1, heads=8)
    assert list(scores) == ["untouched", "histogram", "curve", "second_exposure"]
    assert scores["curve"]["gap_closed"] == 0 and scores["second_exposure"]["gap_closed"] == 1
    assert scores["untouched"]["gap_closed"] < scores["histogram"]["gap_closed"] < 1
    assert scores["untouched"]["structure"] < scores["curve"]["structure"] < scores["second_exposure"]["structure"]
    assert scores["second_exposure"]["noise"] == pytest.approx(1, abs=.15)


def test_a_pair_without_a_gap_has_none():
    data = a_data_set()
    data.test.images[:, 0] = data.test.truth[:, 1]              # a source that is the truth: cleaner than any exposure
    data.valid.images[:, 0] = data.valid.truth[:, 1]
    scores = baselines.reference_scores(data, 0, 1)
    assert all(numbers["gap_closed"] is None for numbers in scores.values())
