"""Distances between sets: closed forms, brute force, and the properties they were published with."""

import numpy as np
import pytest
import torch

from minimedshift import realism


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- features

def test_frechet_of_gaussians_is_its_closed_form():
    """Of exactly whitened samples: their means are apart by d, their covariances diag(a) and diag(b)."""
    z = normal(500, 3).double()
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    a, b, d = torch.tensor([[1.0, 4.0, 9.0], [4.0, 4.0, 1.0], [1.0, 0.0, -2.0]]).double()
    expected = d.square().sum() + (a.sqrt() - b.sqrt()).square().sum()  # of commuting covariances
    assert realism.frechet(z * a.sqrt(), z * b.sqrt() + d) == pytest.approx(expected.item(), rel=1e-9)
    turn = torch.linalg.qr(normal(3, 3, seed=1).double())[0]
    turned = realism.frechet(z * a.sqrt() @ turn, (z * b.sqrt() + d) @ turn)
    assert turned == pytest.approx(expected.item(), rel=1e-9)
    assert realism.frechet(z, z) == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_is_the_double_loop_and_unbiased():
    a, b = normal(5, 3).double(), normal(4, 3, seed=1).double() + .5
    k = lambda x, y: (sum(float(u * v) for u, v in zip(x, y)) / 3 + 1) ** 3
    same = lambda s: np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
    expected = same(a) + same(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert realism.kernel_distance(a, b) == pytest.approx(expected)
    pairs = [(normal(10, 4, seed=2 * i), normal(10, 4, seed=2 * i + 1)) for i in range(600)]
    repeats = torch.tensor([realism.kernel_distance(*pair) for pair in pairs])
    assert abs(repeats.mean()) < 3 * repeats.std() / len(repeats) ** .5


# ---------------------------------------------------------------- the networks of features

def test_learned_features_tell_sets_and_corruptions_apart():
    def ramps(seed, slope):
        draw = torch.Generator().manual_seed(seed)
        noise = .1 * torch.randn(200, 1, 32, 32, generator=draw)
        return (torch.linspace(-slope, slope, 32).expand(1, 32, 32) + noise).half().numpy()

    sets = [ramps(0, .3), ramps(1, .8)]
    features, again = (realism.train_features(sets, steps=60) for _ in range(2))
    x = torch.from_numpy(ramps(2, .3)).float()
    assert features(x).shape == (200, 64) and not features(x).requires_grad
    assert torch.equal(features(x), again(x))
    target = realism.Reference(torch.from_numpy(sets[0]).float(), features)
    floor, other = realism.score(x, target), realism.score(torch.from_numpy(sets[1]).float(), target)
    blurred = realism.score(realism.corrupt(x, 1, None), target)
    for key in ("frechet", "kernel"):
        assert floor[key] < other[key] / 5 and floor[key] < blurred[key] / 5
    assert all(isinstance(floor[key], float) for key in ("frechet", "kernel"))


@pytest.mark.parametrize("kind", range(realism.KINDS))
def test_each_corruption_changes_the_picture_and_keeps_its_shape(kind):
    x = normal(3, 2, 32, 32).clamp(-1, 1)
    spoilt = realism.corrupt(x, kind, torch.Generator().manual_seed(0))
    assert spoilt.shape == x.shape and torch.equal(spoilt, x) == (kind == 0) and spoilt.isfinite().all()


