"""Couplings against brute force, and the promise that labels, images and noises all survive."""

from itertools import permutations

import pytest
import torch

from minimedshift.coupling import assign, couple, exact


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
    assert torch.equal(x0[exact(x0, x1, torch.zeros(40, dtype=torch.long))][x1[:, 0].argsort()], x0.sort(0).values)


def test_assign_refuses_what_is_not_square():
    with pytest.raises(ValueError, match="square"):
        assign(torch.zeros(2, 3))


