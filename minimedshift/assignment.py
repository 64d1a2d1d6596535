"""The assignment problem, for coupling.py: which column goes with which row, so that the cost is least."""

import numpy as np
import torch


def assign(cost):
    """The cheapest one-to-one assignment of rows to columns: by auction, then by shortest paths. Optimal.

    Auction (Bertsekas 1988): a row without a column takes its best one from whoever has it, and raises that
    column's price by how much it beats the second best, plus `step`. The total is then within n steps of
    the optimum. Each row then gives up a column that is not quite its best, and gets one along the cheapest
    chain of exchanges (Jonker & Volgenant 1987). cost (n, n) finite -> the column of each row, (n,) int64 on
    the host.
    """
    cost = cost.detach().cpu().double().numpy()
    n, spread = len(cost), cost.std() or 1.0
    if n == 1:  # there is no second best
        return torch.arange(n)
    price, value, rows = np.zeros(n), np.empty(n), list(cost)
    for step in (spread / 5, spread / 20, spread / 100, spread / 500):
        owner, column, free = [-1] * n, [-1] * n, list(range(n))
        while free:
            i = free.pop()
            np.add(rows[i], price, out=value)
            j = int(value.argmin())
            best, value[j] = value[j], np.inf
            price[j] += value.min() - best + step
            if owner[j] >= 0:
                free.append(owner[j])
            owner[j], column[i] = i, j

    u = (cost + price).min(1)  # cost_ij + price_j - u_i >= 0, and 0 on every pair that is kept
    owner, column = np.full(n, -1), np.array(column)
    column[cost[np.arange(n), column] + price[column] > u] = -1
    owner[column[column >= 0]] = np.flatnonzero(column >= 0)
    for start in np.flatnonzero(column < 0):
        distance = cost[start] + price - u[start]  # of each column from `start`
        before = np.full(n, start)                 # the row from which it is reached
        shut = np.zeros(n)                         # infinite where the distance is final
        reached = []
        j = int(distance.argmin())
        while owner[j] >= 0:  # Dijkstra, until a column nobody owns
            i = owner[j]
            shut[j] = np.inf
            reached.append(j)
            through = cost[i] + price + (distance[j] - u[i]) + shut
            nearer = through < distance
            distance[nearer], before[nearer] = through[nearer], i
            j = int((distance + shut).argmin())
        # prices rise so that no cost_ij + price_j - u_i turns negative, and along the chain each is 0
        gain = distance[j] - distance[reached]
        price[reached] += gain
        u[owner[reached]] += gain
        u[start] += distance[j]
        i = -1
        while i != start:  # everyone on the chain moves on by one
            i = before[j]
            owner[j], column[i], j = i, j, column[i]
    return torch.from_numpy(column)
