"""Which noise goes with which image: the coupling.

Flow matching pairs every image x1 with a noise x0 and learns the line between them. Any pairing will do in
which the noises of each label are N(0, I). If the lines are short, they cross less. The Schrodinger bridge of
a Brownian motion of width sigma pairs them by entropic optimal transport (arXiv:2302.00482, Prop. 3.4):

    pi = argmin <C, pi> + eps sum pi log pi,    C_ij = ||x1_i - x0_j||^2,    eps = 2 sigma^2

All rows and columns of pi weigh alike. (For C = 1/2 ||.||^2 it would be eps = sigma^2.) The couplings:

    independent   eps to infinity: any noise with any image
    sinkhorn      eps between: pi from a batch, then a noise for each image drawn from pi(. | image)
    exact         eps to 0: the one-to-one assignment of least total cost
    semidiscrete  eps to 0 and all training images at once: every fresh noise has its image (Semidiscrete)

Plans are made inside each label's block. A label-blind plan would train a p(x0 | y) that is not N(0, I),
while sampling starts from N(0, I) (arXiv:2503.10636). For coloured noise (flow.draw_noise) read its own
Gaussian instead of N(0, I): nothing else changes.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from minimedshift.ops import row_lse, row_lse_dot, scores

COUPLINGS = ("independent", "sinkhorn", "exact", "semidiscrete")
DENSE = 4096  # the costs of up to so many images are stored; of more, they are computed whenever needed
CLOSEST = 4  # images that are compared again in float32 after a look in bfloat16
TRIALS = 40  # fresh noises for each image, to see how evenly the images are picked
ITERATIONS = 100  # of Sinkhorn, the first half of them while eps shrinks


class Plan(NamedTuple):
    """What `couple` returns; the scalars are tensors on the device, so that nothing waits for them."""
    index: torch.Tensor    # (n,) int64: the noise of each image
    entropy: torch.Tensor  # mean entropy of pi(. | image) over log n: 0 is one noise an image, 1 independent
    cost: torch.Tensor     # mean ||x1 - x0||^2 of the pairs over that of all pairs of one label
    error: torch.Tensor    # mean relative error of the plan's column sums; its row sums are exact


def couple(name, x0, x1, y, eps=0.0, generator=None):
    """Pair noises with images inside each label's block.

    x0, x1 (n, ...) on any device, y (n,) int64 on the host (so that block sizes cost no device sync).
    "sinkhorn" needs eps > 0 and a generator on the device. Returns a Plan: x0[plan.index] goes with x1 and y,
    which stay where they are; every image is used once. Raises ValueError for a coupling that makes no plan
    of a batch, or eps <= 0.
    """
    one, zero = torch.ones((), device=x1.device), torch.zeros((), device=x1.device)
    if name == "independent":
        return Plan(torch.arange(len(x1), device=x1.device), one, one, zero)
    if name == "exact":
        index, entropy, error = exact(x0, x1, y), zero, zero
    elif name == "sinkhorn":
        index, entropy, error = sinkhorn(x0, x1, y, eps, generator)
    else:
        raise ValueError(f"couple knows independent, sinkhorn and exact, not {name}")
    a, b = x1.flatten(1).float(), x0.flatten(1).float()
    labels = int(y.max()) + 1
    y = y.to(x1.device, non_blocking=True)
    # mean ||a_i - b_j||^2 of all pairs of one label: mean ||a||^2 + mean ||b||^2 - 2 mean <a_i, mean b_j>
    squares = a.square().sum(1).mean() + b.square().sum(1).mean()
    all_pairs = squares - 2 * (a * label_mean(b, y, labels)[y]).sum(1).mean()
    pairs = (a - b[index]).square().sum(1).mean()
    return Plan(index, entropy, pairs / all_pairs, error)


def label_mean(x, y, labels):
    """The mean of x (n, d) over each label: (labels, d), zero where there is none."""
    count = torch.zeros(labels, device=x.device).index_add_(0, y, torch.ones_like(x[:, 0]))
    total = torch.zeros(labels, x.shape[1], device=x.device).index_add_(0, y, x)
    return total / count.clamp_min(1)[:, None]


def centred(x):
    """x (n, ...) as (n, d) float32 less its mean.
    Of ||x1 - x0||^2 only -2 <x1, x0> matters to a plan, and only up to row and column constants. Of centred
    vectors it is a small number, exact enough in float32."""
    x = x.flatten(1).float()
    return x - x.mean(0)


# ---------------------------------------------------------------- entropic: Sinkhorn

def half_step(lse, g, eps, count):
    """f_i = -log mean_j exp(g_j - C_ij / eps), over the count_i entries of i's label: g (n,) -> f (n,).
    After it, every row of the plan has its weight (arXiv:1803.00567, eq. 4.43; potentials in units of eps).
    lse(g, eps) is log sum_j exp(g_j - C_ij / eps)."""
    return count.log() - lse(g, eps)


def solve(x0, x1, y, eps, iterations=ITERATIONS):
    """The dual of the entropic plan. y (n,) on the device.
    Returns g (n,), one potential a noise in units of eps, and a function that gives -C + constants in blocks
    of rows: the matrix 2 <x1_i, x0_j>, -inf across labels. eps shrinks to its value during the first half of
    a fixed number of iterations, so that none waits for the device."""
    a, b = centred(x1), centred(x0)
    of_label = torch.zeros(len(y), device=y.device).index_add_(0, y, torch.ones(len(y), device=y.device))
    count = of_label[y]  # (n,): how many have i's label
    if len(a) <= DENSE:
        matrix = scores(a, b, y, y)
        rows = partial(row_lse, matrix)
        columns = partial(row_lse, matrix.T.contiguous())

        def blocks():
            yield matrix
    else:
        rows = partial(row_lse_dot, a, b, y, y)
        columns = partial(row_lse_dot, b, a, y, y)
        height = DENSE**2 // len(a)

        def blocks():
            for part, label in zip(a.split(height), y.split(height)):
                yield scores(part, b, label, y)

    g, now = torch.zeros(len(b), device=b.device), eps
    for i in range(iterations):
        before, now = now, eps * 1000 ** max(0, 1 - 2 * i / iterations)
        f = half_step(rows, g * (before / now), now, count)
        g = half_step(columns, f, now, count)
    return g * (now / eps), blocks


def sinkhorn(x0, x1, y, eps, generator=None, iterations=ITERATIONS):
    """Entropic optimal transport: for each image a noise drawn from pi(. | image), by the Gumbel trick.

    Returns index (n,) int64, and as scalars the normalised entropy and the marginal error (see Plan).
    """
    if not eps > 0:
        raise ValueError(f"sinkhorn needs eps > 0, got {eps}")
    y = y.to(x1.device, non_blocking=True)
    g, blocks = solve(x0, x1, y, eps, iterations)
    index, entropy, most, columns = [], 0, 0, 0
    for block in blocks():
        logits = torch.add(g, block, alpha=1 / eps)  # (rows, n): log pi(j | i) up to a constant
        e = torch.empty_like(logits).exponential_(generator=generator)
        index.append((logits - e.log()).argmax(1))  # -log e is Gumbel noise
        p = logits.softmax(1)
        entropy = entropy + torch.special.entr(p).sum()
        most = most + torch.isfinite(block).sum(1).log().sum()  # entropy of independent pairs
        columns = columns + p.sum(0)
    return torch.cat(index), entropy / most.clamp_min(1e-9), (columns - 1).abs().mean()


def find_eps(x0, x1, y, entropy, steps=20):
    """The eps whose plan of these noises and images has this normalised entropy in (0, 1): a float.
    By bisection of log eps. Not for the hot loop."""
    variance = x1.flatten(1).float().var(0).sum().item()
    low, high = np.log(variance) + np.log((1e-5, 1e2))
    for _ in range(steps):
        middle = (low + high) / 2
        found = sinkhorn(x0, x1, y, float(np.exp(middle)))[1].item()
        low, high = (low, middle) if found > entropy else (middle, high)
    return float(np.exp((low + high) / 2))


# ---------------------------------------------------------------- exact: assignment

def exact(x0, x1, y):
    """Optimal transport: in each label the permutation j of least sum ||x1_i - x0_j(i)||^2, (n,) int64.
    y is on the host."""
    index = torch.empty(len(y), dtype=torch.int64)
    for label in y.unique().tolist():
        mine = (y == label).nonzero()[:, 0]
        rows = mine.to(x1.device)
        index[mine] = mine[assign(-centred(x1[rows]) @ centred(x0[rows]).T)]
    return index.to(x1.device)


def assign(cost):
    """The cheapest one-to-one assignment of rows to columns: by auction, then by shortest paths. Optimal.

    Auction (Bertsekas 1988): a row without a column takes its best one from whoever has it, and raises that
    column's price by its margin over the second best plus eps. The total is then within n eps of the optimum.
    Each row then gives up a column that is not quite its best, and gets one along the cheapest chain of
    exchanges (Jonker & Volgenant 1987).

    cost (n, n) finite, any device. Returns the column of each row, (n,) int64 on the host. Raises ValueError
    on any other shape.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"assign needs a square cost matrix, got {tuple(cost.shape)}")
    cost = cost.detach().cpu().double().numpy()
    n = len(cost)
    spread = cost.std() if n else 0
    if n < 2 or spread == 0:  # nothing to choose
        return torch.arange(n)
    price, value, rows = np.zeros(n), np.empty(n), list(cost)
    for eps in (spread / 5, spread / 20, spread / 100, spread / 500):
        owner, column, free = [-1] * n, [-1] * n, list(range(n))
        while free:
            i = free.pop()
            np.add(rows[i], price, out=value)
            j = int(value.argmin())
            best, value[j] = value[j], np.inf
            second = value[value.argmin()]
            price[j] += second - best + eps
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


# ---------------------------------------------------------------- semidiscrete: all training images at once

class Semidiscrete:
    """Optimal transport from all noise to all training images of a label: to argmax_j <x0, x_j> + g_j.

    images: one (N, ...) array or tensor a label; g: one (N,) potential each, from `learn_potentials`. All are
    held on the device, in float32. To ignore labels, give one group of all images, and their `labels` (N,),
    on the host. dtype: number format of a first, quick look at all images; with bfloat16 the best CLOSEST are
    compared again in float32. (arXiv:2509.25519; there the potential is g_j + ||x_j||^2 / 2.)
    """

    def __init__(self, images, g, device="cpu", labels=None, dtype=torch.float32):
        self.labels = labels
        self.images = [torch.tensor(np.asarray(x), device=device).float() for x in images]
        self.rows = [x.flatten(1).to(dtype) for x in self.images]
        self.g = [torch.as_tensor(z, device=device) for z in g]
        self.centre = [x.mean(0) for x in self.images]
        self.square = [x.square().flatten(1).sum(1).mean() for x in self.images]

    def pick(self, x0, y):
        """The image of each noise x0 (n, ...), among those of its label y (n,), which is on the host.
        Where labels are ignored: among all images. Returns x1 (n, ...), the label y (n,) of each, and a Plan,
        whose index is that of the image in its group."""
        y = y if self.labels is None else 0 * y
        j = torch.empty(len(y), dtype=torch.int64, device=x0.device)
        x1 = torch.empty_like(x0)
        independent = 0  # the cost of pairing every noise with all images of its label
        for label in y.unique().tolist():
            rows = (y == label).nonzero()[:, 0].to(x0.device, non_blocking=True)
            mine = x0[rows]
            j[rows] = self.best(mine.flatten(1), label)
            x1[rows] = self.images[label][j[rows]]
            squares = mine.square().sum() + len(rows) * self.square[label]
            independent = independent + (squares - 2 * (mine * self.centre[label]).sum())
        y = y if self.labels is None else self.labels[j.cpu()]
        zero = torch.zeros((), device=x0.device)
        return x1, y, Plan(j, zero, (x1 - x0).square().sum() / independent, zero)

    def best(self, x0, label):
        """argmax_j <x0, x_j> + g_j among the images of one label: x0 (n, d) -> (n,)."""
        rows, g = self.rows[label], self.g[label]
        scores = (x0.to(rows.dtype) @ rows.T).float() + g
        if rows.dtype == torch.float32:
            return scores.argmax(1)
        closest = scores.topk(min(CLOSEST, len(rows)), 1).indices  # (n, k)
        candidates = self.images[label].flatten(1)[closest]  # (n, k, d)
        exact = torch.einsum("nd,nkd->nk", x0, candidates) + g[closest]
        return closest.gather(1, exact.argmax(1, keepdim=True))[:, 0]


def learn_potentials(x, weight=None, noises=200, batch=512, rank=256, seed=0, device="cpu"):
    """Potentials g (N,) float32 of images x (N, ...) such that each is picked by its share of white noises.

    The shares are equal, or in proportion to `weight` (N,). For coloured noise x are the tinted images:
    <tint(e), x> = <e, tint(x)> (flow.py). Stochastic ascent on the semidual (arXiv:2509.25519, Alg. 1),

        sum_j w_j g_j - E max_j (<x0, x_j> + g_j),    sum_j w_j = 1,

    whose gradient in g_j is w_j less the share of noises that pick j. The scores <x0, x_j> of white noise are
    Gaussian with covariance x x^T. They are drawn from its leading `rank` directions, which is 16 times
    cheaper than from noise at 64x64. About `noises` an image are seen, in at least 800 batches. Returns the
    mean of g over the second half, and the shares of TRIALS N fresh noises over w (1 is right).
    """
    x = centred(torch.as_tensor(np.asarray(x), device=device))
    draw = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # svd_lowrank has no generator of its own
    left, scale, _ = torch.svd_lowrank(x, q=min(rank, *x.shape), niter=2)
    factor = left * scale  # (N, rank)
    N = len(x)
    if weight is None:
        weight = torch.ones(N, device=device)
    weight = torch.as_tensor(weight, dtype=torch.float32, device=device)
    weight = weight / weight.mean()

    def share(g):
        """How often each image is picked by a batch of fresh noises: (N,), 1 on average."""
        e = torch.randn(batch, factor.shape[1], generator=draw, device=device)
        picked = (e @ factor.T + g).argmax(1)
        return torch.bincount(picked, minlength=N) * (N / batch)

    size = x.square().sum(1).mean().sqrt() / 4
    g, mean = torch.zeros(N, device=device), torch.zeros(N, device=device)
    steps = max(800, noises * N // batch)
    for step in range(steps):
        rate = size * 0.3 * min(1, 20 / (step + 1))
        g = g + rate * (weight - share(g))
        mean = mean + g * (2 * step >= steps) / (steps - (steps + 1) // 2)
    rounds = math.ceil(TRIALS * N / batch)
    return mean, sum(share(mean) for _ in range(rounds)) / rounds / weight
