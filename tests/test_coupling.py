"""Couplings against brute force, and the promise that labels, images and noises all survive."""

from itertools import permutations

import pytest
import torch

from minimedshift.coupling import COUPLINGS, assign, couple, exact, squared_distance


@pytest.mark.parametrize("n", range(1, 8))
def test_assign_equals_brute_force(n):
    for seed in range(5):
        cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = min(sum(cost[i, p[i]].item() for i in range(n)) for p in permutations(range(n)))
        column = assign(cost)
        assert sorted(column.tolist()) == list(range(n))
        assert cost[torch.arange(n), column].sum().item() == pytest.approx(best, rel=1e-5)


def test_assign_survives_ties_scale_and_hidden_structure():
    assert sorted(assign(torch.ones(6, 6)).tolist()) == list(range(6))
    hidden = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    cost = 1e3 + torch.rand(100, 100, generator=torch.Generator().manual_seed(1))
    cost[torch.arange(100), hidden] -= 2
    assert torch.equal(assign(cost), hidden)


def test_in_one_dimension_the_optimal_plan_is_sorted():
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(40, 1, generator=g), torch.randn(40, 1, generator=g)
    assert torch.equal(x0[exact(x0, x1)][x1[:, 0].argsort()], x0.sort(0).values)


def test_assign_refuses_what_is_not_square():
    with pytest.raises(ValueError, match="square"):
        assign(torch.zeros(2, 3))


def test_squared_distance_is_squared_distance():
    x0, x1 = torch.randn(5, 1, 3, 3), torch.randn(4, 1, 3, 3)
    torch.testing.assert_close(squared_distance(x0, x1), torch.cdist(x1.flatten(1), x0.flatten(1)) ** 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", COUPLINGS)
def test_pairs_stay_inside_their_label_and_every_noise_is_used_once(name):
    g = torch.Generator().manual_seed(0)
    x0, x1, y = torch.randn(64, 1, 4, 4, generator=g), torch.randn(64, 1, 4, 4, generator=g), torch.randint(5, (64,), generator=g)
    mine = couple(name, x0, x1, y)
    for label in range(5):
        before, after = (x[y == label].flatten(1) for x in (x0, mine))
        assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    if name == "exact":
        assert (mine - x1).square().sum() < (x0 - x1).square().sum()
