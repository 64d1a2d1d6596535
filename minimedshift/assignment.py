"""The assignment problem, for coupling.py: which column goes with which row, so that the cost is least."""

import numpy as np
import torch


def assign(cost):
    """The one-to-one assignment of rows to columns of least total cost, by shortest augmenting paths.
    cost (n, n) finite -> the column of each row, (n,) int64 on the host. Prices u of rows and v of columns
    keep all cost_ij - u_i - v_j >= 0, and 0 on every pair that is made: such pairs are optimal (Jonker &
    Volgenant 1987). The prices start as those of Sinkhorn's algorithm, so that most paths are short."""
    cost = cost.detach().cpu().double().numpy()
    n, spread = len(cost), cost.std() or 1.0
    v = np.zeros(n)
    for eps in spread * np.geomspace(1, .01, 10):
        u = soft_min(cost - v, 1, eps)
        v = soft_min(cost - u[:, None], 0, eps)
    u, favourite = (cost - v).min(1), (cost - v).argmin(1)
    column, owner = np.full(n, -1), np.full(n, -1)
    owner[favourite[::-1]] = np.arange(n)[::-1]  # the first row that wants a column has it
    column[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    for start in np.flatnonzero(column < 0):
        distance = cost[start] - v - u[start]  # of each column from `start`
        before = np.full(n, start)             # the row from which it is reached
        shut, reached = np.zeros(n), []        # shut: infinite where the distance is final
        while owner[j := int((distance + shut).argmin())] >= 0:  # Dijkstra, until a column nobody owns
            shut[j] = np.inf
            reached.append(j)
            through = cost[owner[j]] - v + (distance[j] - u[owner[j]]) + shut
            nearer = np.flatnonzero(through < distance)
            distance[nearer], before[nearer] = through[nearer], owner[j]
        gain = distance[j] - distance[reached]
        v[reached] -= gain
        u[owner[reached]] += gain
        u[start] += distance[j]
        while j >= 0:  # every row on the path moves on by one column
            owner[j] = before[j]
            column[before[j]], j = j, column[before[j]]
    return torch.from_numpy(column)


def soft_min(x, axis, eps):
    """-eps log mean exp(-x / eps) over an axis of x."""
    least = x.min(axis, keepdims=True)
    return least.squeeze(axis) - eps * np.log(np.exp((least - x) / eps).mean(axis))
