"""The assignment against brute force, against what is known of an optimal one, and in time."""

from itertools import permutations

import pytest
import torch
from test_coupling import seeded

from minimedshift.assignment import assign


def total(cost, column):
    return cost[torch.arange(len(cost)), column].sum().item()


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("kind", ["any", "ties", "equal", "large"])
def test_no_permutation_is_cheaper(n, kind):
    for seed in range(10):
        cost = torch.randn(n, n, generator=seeded(seed))
        cost = {"any": cost, "ties": cost.round(), "equal": torch.ones(n, n), "large": cost * 1e8 - 1e9}[kind]
        column = assign(cost)
        assert column.sort().values.tolist() == list(range(n))
        least = min(total(cost.double(), torch.tensor(order)) for order in permutations(range(n)))
        assert total(cost.double(), column) == pytest.approx(least, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [30, 300])
def test_no_exchange_along_a_ring_of_pairs_is_cheaper(n):
    """Optimal, for any n: if row i takes the column of row k it pays cost_i,column(k) - cost_i,column(i)
    more; no ring of such exchanges has a negative sum. (All shortest ways, after Floyd and Warshall.)"""
    for seed in range(3):
        cost = torch.randn(n, n, generator=seeded(seed)).double()
        column = assign(cost)
        assert column.sort().values.tolist() == list(range(n))
        pays = cost[:, column]
        pays = pays - pays.diagonal()[:, None]
        for k in range(n):
            pays = torch.minimum(pays, pays[:, k, None] + pays[k])
        assert pays.diagonal().min() > -1e-9


def test_rows_in_another_order_find_the_same_columns():
    cost = torch.rand(200, 200, generator=seeded())
    order = torch.randperm(200, generator=seeded(1))
    assert torch.equal(assign(cost[order]), assign(cost)[order])
