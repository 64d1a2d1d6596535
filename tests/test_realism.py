"""Distances between sets: closed forms, brute force, and the properties they were published with."""

import numpy as np
import pytest
import torch
from test_bands import noise

from minimedshift import realism


def test_the_kernel_distance_is_the_double_loop_and_unbiased():
    a, b = noise(5, 3).double(), noise(4, 3, seed=1).double() + .5
    k = lambda x, y: (sum(float(u * v) for u, v in zip(x, y)) / 3 + 1) ** 3
    same = lambda s: np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
    expected = same(a) + same(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert realism.kernel_distance(a, b) == pytest.approx(expected)
    pairs = [(noise(10, 4, seed=2 * i), noise(10, 4, seed=2 * i + 1)) for i in range(600)]
    repeats = torch.tensor([realism.kernel_distance(*pair) for pair in pairs])
    assert abs(repeats.mean()) < 3 * repeats.std() / len(repeats) ** .5


def test_learned_features_tell_sets_and_corruptions_apart():
    def ramps(seed, slope):
        ramp = torch.linspace(-slope, slope, 32).expand(1, 32, 32)
        return (ramp + .1 * noise(200, 1, 32, 32, seed=seed)).half().numpy()

    sets = [ramps(0, .3), ramps(1, .8)]
    features, again = (realism.train_features(sets, steps=60) for _ in range(2))
    x = torch.from_numpy(ramps(2, .3)).float()
    assert features(x).shape == (200, 64) and not features(x).requires_grad
    assert torch.equal(features(x), again(x))
    known = features(torch.from_numpy(sets[0]).float())
    target = lambda x: realism.kernel_distance(features(x), known)
    floor, other = target(x), target(torch.from_numpy(sets[1]).float())
    assert floor < other / 5 and floor < target(realism.corrupt(x, 1, None)) / 5
    assert all(floor < target(realism.corrupt(x, i, torch.Generator().manual_seed(0))) for i in range(2, 6))


@pytest.mark.parametrize("kind", range(realism.KINDS))
def test_each_corruption_changes_the_picture_and_keeps_its_shape(kind):
    x = noise(3, 2, 32, 32).clamp(-1, 1)
    spoilt = realism.corrupt(x, kind, torch.Generator().manual_seed(0))
    assert spoilt.shape == x.shape and torch.equal(spoilt, x) == (kind == 0) and spoilt.isfinite().all()
