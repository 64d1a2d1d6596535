"""Which noise goes with which image: the coupling.

Flow matching pairs every image x1 with a noise x0 and learns the straight line between them. Any pairing whose noises
are N(0, I) is allowed; a pairing with short lines makes lines that cross less. Pairs are made inside each label's block:
a label-blind plan would train p(x0 | y) that is not N(0, I), while sampling starts from N(0, I) (arXiv:2503.10636).
For coloured noise (flow.draw_noise) read its own Gaussian instead of N(0, I): nothing else changes.
"""

import torch


def squared_distance(x0, x1):
    """Cost matrix C_ij = ||x1_i - x0_j||^2 of images (n, ...) and noises (m, ...): (n, m) float32, >= 0."""
    a, b = x1.flatten(1).float(), x0.flatten(1).float()
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp_min(0)


def independent(x0, x1):
    """Image i keeps noise i: p(x0, x1) = p(x0) p(x1). Returns (n,) int64, the noise of each image."""
    return torch.arange(len(x1), device=x1.device)


def exact(x0, x1):
    """Optimal transport between n noises and n images (n, ...): the permutation of least sum ||x1_i - x0_j(i)||^2.

    Equal to the Schrodinger bridge's static plan as its sigma goes to 0. Returns (n,) int64, the noise of each image.
    """
    return assign(squared_distance(x0, x1))


def assign(cost, tolerance=1e-6):
    """The cheapest one-to-one assignment of rows to columns, by auction (Bertsekas 1988, eps-scaling as in his eq. 5).

    Every row without a column bids for its best one, raising that column's price by its margin over the second best plus
    eps; the highest bid wins and the former owner is free again. When all own one, the total is within n eps of the
    optimum. eps shrinks from a quarter of the cost range to tolerance * range / n; prices carry over between rounds.

    cost (n, n) finite, any device. Returns (n,) int64, the column of each row; raises ValueError on any other shape.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"assign needs a square cost matrix, got {tuple(cost.shape)}")
    n, span = len(cost), (cost.max() - cost.min()).item() if cost.numel() else 0.0
    if n < 2 or span == 0:  # nothing to choose
        return torch.arange(n, device=cost.device)
    value = (cost.min() - cost).double() / span  # -1..0, and prices stay under n: no bid is too small to be felt
    price = value.new_zeros(n)
    eps, last = 1 / 4, tolerance / n
    while True:
        owner = value.new_full((n,), -1, dtype=torch.int64)  # of each column
        column = owner.clone()  # of each row
        while (free := (column < 0).nonzero()[:, 0]).numel():
            (best, second), index = (value[free] - price).topk(2).values.T, (value[free] - price).argmax(1)
            bid = price[index] + (best - second) + eps  # (rows without a column)
            top = torch.full_like(price, -torch.inf).scatter_reduce(0, index, bid, "amax")
            won = bid == top[index]
            winner = torch.full_like(owner, -1).scatter_reduce(0, index[won], free[won], "amax")  # ties: the last row
            sold = (winner >= 0).nonzero()[:, 0]
            evicted = owner[sold]
            column[evicted[evicted >= 0]] = -1
            owner[sold], price[sold] = winner[sold], top[sold]
            column[winner[sold]] = sold
        if eps <= last:
            return column
        eps = max(eps / 5, last)


COUPLINGS = {"independent": independent, "exact": exact}


def couple(name, x0, x1, y):
    """Pair noises with images inside each label's block. x0, x1 (B, ...), y (B,) int64 on the host (so that block sizes
    cost no device sync). Returns x0 reordered: every noise is used once, images and labels stay where they are."""
    index = torch.arange(len(x1), device=x1.device)
    if name != "independent":
        for label in y.unique().tolist():
            rows = (y == label).nonzero()[:, 0].to(x1.device)
            index[rows] = rows[COUPLINGS[name](x0[rows], x1[rows])]
    return x0[index]
