"""Couplings against brute force, closed forms and quantiles; labels and images survive every one of them."""

import pytest
import torch
from gaussians import covariance, gaussian_bridge, power

from minimedshift import coupling
from minimedshift.coupling import (PAIRINGS, Minibatch, Semidiscrete, exact, learn_potentials, minus_cost,
    potentials, sinkhorn)
from minimedshift.flow import bridge, draw_noise, tint


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- exact
def test_in_one_dimension_the_optimal_plan_is_sorted():
    g = seeded()
    x0, x1 = torch.randn(40, 1, generator=g), torch.randn(40, 1, generator=g)
    index, _, _ = exact(x0, x1, torch.zeros(40, dtype=torch.long))
    assert torch.equal(x0[index][x1[:, 0].argsort()], x0.sort(0).values)


# ---------------------------------------------------------------- entropic
@pytest.mark.parametrize("d, sigma", [(1, .5), (2, 2.), (8, 1.5)])
def test_sinkhorn_between_gaussians_is_the_schrodinger_bridge(d, sigma, n=1200):
    """Cross covariance of the pairs, then mean and covariance of xt: closed forms, which eps = sigma^2 or
    4 sigma^2 would miss. The samples have their means and covariances exactly; a covariance of n drawn pairs
    is uncertain by sqrt(2 / n)."""
    g, A, B = seeded(), covariance(d, 1), covariance(d, 2)
    m0, m1 = torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64)
    white = lambda z: (z - z.mean(0)) @ power(z.T.cov().reshape(d, d), -.5)
    randn = lambda: torch.randn(n, d, generator=g, dtype=torch.float64)
    x0, x1 = (white(randn()) @ power(S, .5) + m for S, m in ((A, m0), (B, m1)))
    y, C = torch.zeros(n, dtype=torch.long), gaussian_bridge(A, B, sigma)

    def cross(eps):
        a = x0[sinkhorn(x0, x1, y, eps, g)[0]]
        return (a - a.mean(0)).T @ (x1 - x1.mean(0)) / n, a

    scale = (A.trace() * B.trace()).sqrt()
    error = lambda found: ((found - C).norm() / scale).item()
    found, a = cross(2 * sigma**2)
    assert error(found) < .06
    assert min(error(cross(eps)[0]) for eps in (sigma**2, 4 * sigma**2)) > error(found)
    for t in (.2, .5, .9):
        xt = bridge(a, x1, torch.full((n,), t, dtype=torch.float64), sigma, randn())[0]
        own = sigma**2 * torch.eye(d, dtype=torch.float64)  # the bridge's own noise
        S = (1 - t) ** 2 * A + t**2 * B + t * (1 - t) * (C + C.T + own)
        allowed = 5 * (S.diagonal().max() / n).sqrt().item()
        torch.testing.assert_close(xt.mean(0), (1 - t) * m0 + t * m1, atol=allowed, rtol=0)
        assert (xt.T.cov() - S).norm() < 3 * (2 / n) ** .5 * S.trace()


@pytest.mark.parametrize("eps", [2., 20.])
def test_the_plan_has_its_marginals_and_sinkhorn_says_so(eps):
    g = seeded()
    x0, x1, y = torch.randn(90, 20, generator=g), torch.randn(90, 20, generator=g), torch.arange(90) % 3
    matrix = minus_cost(x0, x1, y)
    logits = potentials(matrix, eps, iterations=400) + matrix / eps
    plan = logits.double().softmax(1) / 90
    assert ((plan.sum(0) * 90 - 1).abs() < 1e-4).all() and ((plan.sum(1) * 90 - 1).abs() < 1e-6).all()
    assert plan[y[:, None] != y].sum() == 0
    assert sinkhorn(x0, x1, y, eps, g, iterations=400)[2] < 1e-4
    assert sinkhorn(x0, x1, y, .01, g, iterations=2)[2] > .05  # an unfinished plan is not called one


def test_noises_are_drawn_from_the_plan():
    """Three noises and images, the plan by plain alternate scaling in float64, and the shares of 4,000 draws:
    40 of each of 100 labels that have the same three."""
    x0, x1, eps = torch.tensor([[0.], [1.], [3.]]), torch.tensor([[.5], [2.], [2.5]]), 2.
    plan = torch.exp(-(x1 - x0.T).double() ** 2 / eps)
    for _ in range(500):
        plan = plan / plan.sum(0)
        plan = plan / plan.sum(1, keepdim=True)
    labels, draws, g = 100, 40, seeded()
    counts, y = torch.zeros(3, 3), torch.arange(labels).repeat_interleave(3)
    for _ in range(draws):
        index, _, _ = sinkhorn(x0.repeat(labels, 1), x1.repeat(labels, 1), y, eps, g)
        counts.index_put_((torch.arange(3 * labels) % 3, index % 3), torch.ones(3 * labels), accumulate=True)
    torch.testing.assert_close(counts / (labels * draws), plan.float(), atol=.03, rtol=0)


# ---------------------------------------------------------------- semidiscrete
def test_semidiscrete_in_one_dimension_cuts_the_noise_into_quantiles():
    """N images on a line: the k-th gets the noises between the quantiles k/N and (k+1)/N of N(0, 1)."""
    N, images = 12, torch.randn(12, 1, generator=seeded())
    g = learn_potentials(images)
    x0 = torch.randn(5000, 1, generator=seeded(1))
    same, x1, plan = Semidiscrete([images], [g])(x0, torch.zeros(5000, dtype=torch.long))
    cell = (torch.special.ndtr(x0[:, 0]) * N).long()
    assert (x1 == images.sort(0).values[cell]).float().mean() > .95
    assert torch.equal(same, x0) and plan.entropy == 0
    all_pairs = (x0[:, None] - images).square().mean()
    assert plan.cost == pytest.approx(((x1 - x0).square().mean() / all_pairs).item(), rel=1e-4)


def test_a_quick_look_in_bfloat16_picks_the_same_images():
    images = .5 * draw_noise((500, 1, 32, 32), seeded(), 1.)
    x0 = draw_noise((2000, 1, 32, 32), seeded(1), 1.)
    g = torch.randn(500, generator=seeded(2))
    both = [Semidiscrete([images], [g], dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    slow, quick = (semidiscrete.best(x0.flatten(1), 0) for semidiscrete in both)
    alone = (x0.flatten(1).bfloat16() @ images.flatten(1).bfloat16().T + g).argmax(1)
    assert torch.equal(slow, quick) and not torch.equal(slow, alone)  # a look alone would err


@pytest.mark.parametrize("colour", [0., 1.])
def test_semidiscrete_picks_every_image_about_equally_often(colour):
    """On real noise of the training's colour, though what learns the potentials sees only Gaussian scores."""
    images = .3 * draw_noise((100, 1, 16, 16), seeded(), 1.) * torch.linspace(.5, 1.5, 100).view(-1, 1, 1, 1)
    x0 = draw_noise((20000, 1, 16, 16), seeded(1), colour).flatten(1)
    picked = lambda g: Semidiscrete([images], [g]).best(x0, 0)
    spread = lambda g: (torch.bincount(picked(g), minlength=100) / 200).std().item()
    learned = learn_potentials(tint(images, colour))
    chance = (1 / 200) ** .5
    assert chance / 2 < spread(learned) < .15 < .5 < spread(-images.square().flatten(1).sum(1) / 2)


# ---------------------------------------------------------------- all of them
def of_batch(name, x1, eps=1.):
    """The coupling `name` of one batch of images."""
    return Minibatch(name, lambda y, generator: x1, eps)


@pytest.mark.parametrize("name", coupling.COUPLINGS)
def test_noises_images_and_labels_stay_together(name):
    """The mean of every image and of every noise tells its label, whatever is paired."""
    g = seeded()
    y = torch.randint(5, (64,), generator=g)
    x0, x1 = torch.randn(64, 1, 4, 4, generator=g), torch.randn(64, 1, 4, 4, generator=g)
    x0, x1 = (x - x.mean((1, 2, 3), keepdim=True) + y.view(-1, 1, 1, 1) for x in (x0, x1))
    label_of = lambda x: x.mean((1, 2, 3)).round().long()
    if name == "semidiscrete":
        groups = [x1[y == label] for label in range(5)]
        couple = Semidiscrete(groups, [torch.zeros(len(z)) for z in groups])
    else:
        couple = of_batch(name, x1)
    noises, images, plan = couple(x0, y, g)
    assert torch.equal(label_of(noises), y) and torch.equal(label_of(images), y)
    if name != "sinkhorn":  # every noise is used once
        assert torch.equal(noises.flatten().sort().values, x0.flatten().sort().values)
    if name != "semidiscrete":
        assert torch.equal(images, x1)
    assert 0 <= plan.entropy <= 1 and plan.cost > 0


def test_entropy_and_cost_go_from_the_assignment_to_independence():
    g = seeded()
    x0, x1, y = torch.randn(128, 3, generator=g), torch.randn(128, 3, generator=g), torch.arange(128) % 2
    low, middle, high = (of_batch("sinkhorn", x1, eps)(x0, y, g)[2] for eps in (1e-3, 1., 1e4))
    best, any_ = (of_batch(name, x1)(x0, y)[2] for name in ("exact", "independent"))
    assert low.entropy < .03 and .2 < middle.entropy < .9 and high.entropy > .999
    assert low.cost == pytest.approx(best.cost.item(), rel=.02) and best.cost < middle.cost < 1.2
    assert high.cost == pytest.approx(1, abs=.15) and any_.entropy == 1


def test_the_cost_is_that_of_the_pairs_over_that_of_all_pairs_of_a_label():
    g = seeded()
    x0, x1 = torch.randn(30, 6, generator=g), torch.randn(30, 6, generator=g) + 1
    y = torch.randint(3, (30,), generator=g)
    all_costs = torch.cdist(x1, x0) ** 2
    same = (y[:, None] == y).float()
    expected = (all_costs * same).sum(1) / same.sum(1)
    index, _, _ = exact(x0, x1, y)
    found = all_costs[torch.arange(30), index].mean()
    cost = of_batch("exact", x1)(x0, y)[2].cost
    assert cost.item() == pytest.approx((found / expected.mean()).item(), rel=1e-4)


def test_sinkhorn_refuses_an_eps_of_zero():
    x, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="eps"):
        PAIRINGS["sinkhorn"](x, x, y, 0.)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sinkhorn_and_semidiscrete_never_wait_for_the_gpu():
    g = torch.Generator("cuda").manual_seed(0)
    x0, x1 = (torch.randn(256, 1, 16, 16, generator=g, device="cuda") for _ in range(2))
    y = torch.arange(256) % 5
    groups = [x1[y == label].cpu() for label in range(5)]
    couples = (of_batch("sinkhorn", x1), Semidiscrete(groups, [torch.zeros(len(z)) for z in groups], "cuda"))
    for armed in (False, True):  # once to warm up
        torch.cuda.set_sync_debug_mode("error" if armed else "default")
        try:
            pairs = [couple(x0, y, seeded()) for couple in couples]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(x0.is_cuda and x1.is_cuda for x0, x1, _ in pairs)
