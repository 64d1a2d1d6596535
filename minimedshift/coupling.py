"""Which noise goes with which image: couplings of noise x0 and images x1.

The fewer lines from noise to image cross, the less the network has to average: the flow is straighter and
needs fewer solver steps. The Schrodinger bridge of a Brownian motion of width sigma pairs noises and images
by entropic optimal transport (arXiv:2302.00482, Prop. 3.4):

    pi = argmin <C, pi> + eps sum pi log pi,    C_ij = ||x1_i - x0_j||^2,    eps = 2 sigma^2

pi_ij is the share of image i that goes to noise j. (For C = 1/2 ||.||^2 it would be eps = sigma^2.)

    independent   eps to infinity: any noise with any image
    sinkhorn      eps between: pi from a batch, then a noise for each image drawn from pi(. | image)
    exact         eps to 0: the one-to-one assignment of least total cost
    semidiscrete  eps to 0 and all training images at once: every fresh noise has its image

All are called alike: x0, x1, plan = couple(x0, y, generator) takes noises and their labels, and gives pairs.
A new coupling that pairs the noises and images of a batch is a function and its entry in PAIRINGS. Pairs are
made inside each label: a label-blind plan would train a p(x0 | y) that is not N(0, I), while sampling starts
from N(0, I) (arXiv:2503.10636). With coloured noise (flow.draw_noise) its own Gaussian stands for N(0, I)."""

from typing import NamedTuple

import numpy as np
import torch

from minimedshift.assignment import assign
from minimedshift.support.machine import to_device

ITERATIONS = 100  # of Sinkhorn, the first half of them while eps shrinks
CLOSEST = 4       # images that are compared again in float32 after a look in bfloat16


class Plan(NamedTuple):
    """Three numbers about the pairs of a batch, as scalar tensors or floats."""
    entropy: torch.Tensor  # mean entropy of pi(. | image), 0: one noise an image, 1: any of its label alike
    cost: torch.Tensor     # mean ||x1 - x0||^2 of the pairs over that of all pairs of one label
    error: torch.Tensor    # mean relative error of the plan's column sums; its row sums are exact


# function(x0, x1, y, eps, generator) -> index, entropy, error: x0[index] goes with x1, whose labels are y.
# x0, x1 (n, ...) are on any device. y (n,), on the host, has the label of noise i and of image i.

def independent(x0, x1, y, eps=0.0, generator=None):
    """Noise i with image i."""
    return torch.arange(len(x1), device=x1.device), 1.0, 0.0


def exact(x0, x1, y, eps=0.0, generator=None):
    """Optimal transport: in each label the permutation j of least sum ||x1_i - x0_j(i)||^2."""
    index = torch.empty(len(y), dtype=torch.int64)
    for label in y.unique().tolist():
        mine = (y == label).nonzero()[:, 0]
        rows = mine.to(x1.device)
        index[mine] = mine[assign(-centred(x1[rows]) @ centred(x0[rows]).T)]
    return index.to(x1.device), 0.0, 0.0


def sinkhorn(x0, x1, y, eps, generator=None, iterations=ITERATIONS):
    """Entropic optimal transport: for each image a noise drawn from pi(. | image). Stores n^2 numbers.
    Raises ValueError unless eps > 0."""
    if not eps > 0:
        raise ValueError(f"sinkhorn needs eps > 0, got {eps}")
    matrix = minus_cost(x0, x1, y)
    logits = potentials(matrix, eps, iterations) + matrix / eps  # log pi(j | i) + constant_i
    e = torch.empty(logits.shape).exponential_(generator=generator).to(logits.device)
    index = (logits - e.log()).argmax(1)  # a draw, by the Gumbel-max trick: -log e is Gumbel noise
    pi = logits.softmax(1)
    most = torch.isfinite(matrix).sum(1).log().sum()  # the entropy of independent pairs
    entropy = torch.special.entr(pi).sum() / most.clamp_min(1e-9)
    return index, entropy, (pi.sum(0) - 1).abs().mean()


def centred(x):
    """x (n, ...) as (n, d) float32 less its mean.
    Only -2 <x1, x0> of ||x1 - x0||^2 matters to a plan, up to row and column constants. Between centred
    vectors it is a small number, exact enough in float32."""
    x = x.flatten(1).float()
    return x - x.mean(0)


def minus_cost(x0, x1, y):
    """-C_ij up to row and column constants: 2 <x1_i, x0_j>, and -inf across labels. (n, n)"""
    y = to_device(y, x1.device)
    return (2 * centred(x1) @ centred(x0).T).masked_fill(y[:, None] != y, -torch.inf)


def potentials(matrix, eps, iterations=ITERATIONS):
    """Sinkhorn's algorithm: the potential g (n,) of each noise, in units of eps (arXiv:1803.00567, eq. 4.43).

        f_i = -log mean_j exp(g_j - C_ij / eps),    g_j = -log mean_i exp(f_i - C_ij / eps)

    matrix (n, n) is -C. The means are over i's label. After the first every row of the plan has its weight,
    after the second every column. eps shrinks to its value during the first half of the iterations; g is in
    units of the eps of the moment, so it is rescaled by before / now."""
    log_count = torch.isfinite(matrix).sum(1).log()  # (n,): how many have i's label
    g, now = torch.zeros_like(log_count), eps
    for i in range(iterations):
        before, now = now, eps * 1000 ** max(0, 1 - 2 * i / iterations)
        f = log_count - (g * (before / now) + matrix / now).logsumexp(1)
        g = log_count - (f[:, None] + matrix / now).logsumexp(0)
    return g * (now / eps)


def relative_cost(index, x0, x1, y):
    """The cost of a Plan. Over all pairs of one label, with m_i the mean of x0 over the label of image i,

        mean ||x1_i - x0_j||^2 = mean ||x1_i||^2 + mean ||x0_j||^2 - 2 mean <x1_i, m_i>"""
    a, b = x1.flatten(1).float(), x0.flatten(1).float()
    labels = int(y.max()) + 1
    y = to_device(y, a.device)
    total = torch.zeros(labels, b.shape[1], device=b.device).index_add_(0, y, b)
    count = torch.zeros(labels, device=b.device).index_add_(0, y, torch.ones_like(b[:, 0]))
    mean = total / count.clamp_min(1)[:, None]
    squares = a.square().sum(1).mean() + b.square().sum(1).mean()
    all_pairs = squares - 2 * (a * mean[y]).sum(1).mean()
    return (a - b[index]).square().sum(1).mean() / all_pairs


PAIRINGS = {"independent": independent, "sinkhorn": sinkhorn, "exact": exact}


class Minibatch:
    """Draws an image for each noise, draw_images(y, generator), and pairs them by one of PAIRINGS."""

    def __init__(self, name, draw_images, eps=0.0):
        self.pair, self.draw_images, self.eps = PAIRINGS[name], draw_images, eps

    def __call__(self, x0, y, generator=None):
        """x0 (n, ...) in another order, its images x1 and the Plan. y (n,), generator: on the host."""
        x1 = to_device(self.draw_images(y, generator), x0.device)
        index, entropy, error = self.pair(x0, x1, y, self.eps, generator)
        return x0[index], x1, Plan(entropy, relative_cost(index, x0, x1, y), error)


class Semidiscrete:
    """Optimal transport from all noise to all training images of a label: to argmax_j <x0, x_j> + g_j, whose
    g_j lets each image be picked by its share of noises (arXiv:2509.25519; there g_j + ||x_j||^2 / 2).
    images: one (N, ...) array or tensor a label, kept as it is, float16 too; g: the potentials (N,) of each,
    from `learn_potentials`. dtype: of a first look at all; then CLOSEST are compared in float32."""

    def __init__(self, images, g, device="cpu", dtype=torch.float32):
        self.images, self.dtype = [torch.as_tensor(np.asarray(x), device=device) for x in images], dtype
        self.g = [torch.as_tensor(z, device=device) for z in g]
        self.mean = [x.mean(0, dtype=torch.float32) for x in self.images]
        self.square = [x.float().square().flatten(1).sum(1).mean() for x in self.images]

    def __call__(self, x0, y, generator=None):
        """x0 (n, ...) as it is, the image x1 (n, ...) of each noise, and the Plan. y (n,): on the host."""
        x1 = torch.empty_like(x0)
        all_pairs = 0  # the cost of all pairs of a noise and an image of its label, as in `relative_cost`
        for label in y.unique().tolist():
            rows = to_device((y == label).nonzero()[:, 0], x0.device)
            noise = x0[rows]
            x1[rows] = self.images[label][self.best(noise.flatten(1), label)].float()
            squares = noise.square().sum() + len(rows) * self.square[label]
            all_pairs = all_pairs + (squares - 2 * (noise * self.mean[label]).sum())
        return x0, x1, Plan(0.0, (x1 - x0).square().sum() / all_pairs, 0.0)

    def best(self, x0, label):
        """argmax_j <x0, x_j> + g_j among the images of one label: x0 (n, d) -> (n,)."""
        rows, g = self.images[label].flatten(1), self.g[label]
        value = (x0.to(self.dtype) @ rows.to(self.dtype).T).float() + g
        if self.dtype == torch.float32:
            return value.argmax(1)
        closest = value.topk(min(CLOSEST, len(rows)), 1).indices  # (n, k)
        candidates = rows[closest].float()  # (n, k, d)
        again = torch.einsum("nd,nkd->nk", x0, candidates) + g[closest]
        return closest.gather(1, again.argmax(1, keepdim=True))[:, 0]


def learn_potentials(x, weight=None, noises=200, batch=512, rank=256, seed=0, device="cpu",
                     dtype=torch.float32):
    """Potentials g (N,) float32 of images x (N, ...) such that each is picked by its share of white noises.

    The shares are equal, or in proportion to `weight` (N,). For coloured noise x are the tinted images:
    <tint(e), x> = <e, tint(x)> (flow.py). Stochastic ascent on the semidual (arXiv:2509.25519, Alg. 1),

        sum_j w_j g_j - E max_j (<x0, x_j> + g_j),    sum_j w_j = 1,

    whose gradient in g_j is w_j less the share of noises that pick j. Scores <x0, x_j> of white noise are
    Gaussian with covariance x x^T; they are drawn from its leading `rank` directions. The sums over odd and
    even ones are added with all signs: four noises for the work of one. About `noises` an image are seen.
    Returns the mean of g over the second half of the batches. dtype: of the products."""
    x = centred(torch.as_tensor(np.asarray(x), device=device))
    N = len(x)
    draw = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # svd_lowrank has no generator of its own
    left, scale, _ = torch.svd_lowrank(x, q=min(rank, *x.shape), niter=2)
    factor = (left * scale).T.to(dtype).contiguous()  # (rank, N)
    weight = torch.as_tensor(np.ones(N) if weight is None else weight, dtype=torch.float32, device=device)
    weight = weight / weight.mean()
    size = x.square().sum(1).mean().sqrt() / 4
    g, mean = torch.zeros(N, device=device), torch.zeros(N, device=device)
    steps = max(800, noises * N // batch)
    best = lambda z: z.argmax(1) if z.is_cuda else torch.from_numpy(z.numpy().argmax(1))  # ten times as fast
    for step in range(steps):
        e = torch.randn(batch // 4, len(factor), generator=draw, device=device).to(dtype)
        a, b = ((e[:, i::2] @ factor[i::2]).float() for i in (0, 1))
        picked = torch.cat([best(g + p + q) for p in (a, -a) for q in (b, -b)])
        share = torch.bincount(picked, minlength=N) * (N / batch)  # 1 on average
        rate = size * 0.3 * min(1, 20 / (step + 1))
        g = g + rate * (weight - share)
        mean = mean + g * (2 * step >= steps) / (steps - (steps + 1) // 2)
    return mean


COUPLINGS = (*PAIRINGS, "semidiscrete")
