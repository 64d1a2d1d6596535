"""Solvers against ODEs whose solution is known, and translation between Gaussians, where it is a formula."""

import math
from types import SimpleNamespace

import pytest
import torch
from gaussians import covariance, gaussian_bridge

from minimedshift.flow import EDGE
from minimedshift.model import Shape, UNet
from minimedshift.sampler import (SOLVERS, Velocity, adaptive, decode, encode, grid, last, reversible,
    trajectory, translate)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("fireflow", 2)])
@pytest.mark.parametrize("reverse", [False, True])
def test_order_of_convergence_in_both_directions(solver, order, reverse):
    """dx/dt = x cos t, so x(t) = x(0) exp(sin t)."""
    ends = (1.0, 0.0) if reverse else (0.0, 1.0)
    errors = []
    for n in (16, 32):
        times = torch.linspace(*ends, n + 1, dtype=torch.float64).tolist()
        x = last(SOLVERS[solver](lambda x, t: x * math.cos(t), torch.ones(1, dtype=torch.float64), times))
        errors.append(abs(x.item() - math.exp(math.sin(ends[1]) - math.sin(ends[0]))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("fireflow", 2)])
def test_order_of_convergence_of_a_translation_between_gaussians(solver, order):
    """Two legs, two labels, a grid that is denser near the image; the reference is the formula."""
    draw = torch.Generator().manual_seed(0)
    x1 = torch.randn(64, 1, 2, 2, generator=draw, dtype=torch.float64) * SPREADS[0] + MEANS[0]
    _, expected = gaussian_translation(x1, 0.3, 0.97)
    errors = []
    for n in (20, 40):
        out = translate(gaussian, x1, 0, 1, 0.3, steps=n, solver=solver, end=0.97)
        errors.append((out - expected).square().mean().sqrt())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("fireflow", 2)])
def test_a_reversible_solver_keeps_the_order_and_comes_back_exactly(solver, order):
    """dx/dt = x cos t again: the error falls as fast as the solver's own at least; undo finds the start."""
    errors, start = [], torch.tensor([1.0, -0.3, 2.0], dtype=torch.float64)
    v = lambda x, t: x * math.cos(t)
    for n in (16, 32):
        times = [i / n for i in range(n + 1)]
        *_, (t, pair) = reversible(v, (start, start), times, SOLVERS[solver])
        back = list(reversible(v, pair, times, SOLVERS[solver], undo=True))
        errors.append((pair[0] - start * math.exp(math.sin(1))).abs().max())
        assert t == 1 and [t for t, _ in back] == times[::-1]
        for x in back[-1][1]:
            torch.testing.assert_close(x, start, rtol=1e-13, atol=1e-13)
    assert math.log2(errors[0] / errors[1]) > order - 0.2


def test_a_network_takes_an_image_to_another_label_and_back_exactly_if_the_pair_is_kept():
    """Few and long steps through a network with random weights: no ordinary solver finds the way back."""
    torch.manual_seed(0)
    model = UNet(Shape(num_domains=2, widths=(32,), blocks=(1,))).eval()
    for weights in model.parameters():
        if not weights.any():  # those that start at zero, so that an untrained network does nothing
            torch.nn.init.normal_(weights, std=0.05)
    x1, times = torch.randn(2, 1, 16, 16), grid(0.1, 3, 0.97)
    source, target = Velocity(model, 0), Velocity(model, 1)
    with torch.inference_mode():
        pair = last(reversible(source, (x1, x1), times))
        there = last(reversible(target, pair, times[::-1]))
        error = lambda pair: undone(source, target, pair, times).sub(x1).norm() / x1.norm()
        assert there[0].sub(x1).norm() > 0.1 * x1.norm()
        assert error(there) < 1e-5 < 1e-4 < error((there[0], there[0]))


def undone(source, target, pair, times):
    """The image from which a reversible leg of the source and one of the target have led to a pair."""
    pair = last(reversible(target, pair, times[::-1], undo=True))
    return last(reversible(source, pair, times, undo=True))[0]


def test_solvers_yield_the_whole_trajectory():
    for solver in (SOLVERS["euler"], SOLVERS["heun"], SOLVERS["fireflow"], adaptive):
        steps = list(solver(lambda x, t: torch.ones_like(x), torch.zeros(2), [0.0, 0.25, 1.0]))
        assert steps[0][0] == 0.0 and steps[-1][0] == 1.0
        assert all(x[0].item() == pytest.approx(t) for t, x in steps)


@pytest.mark.parametrize("end", [1.0, 0.97])
def test_grid_ends_where_it_should_and_is_denser_near_the_image(end):
    times = grid(0.3, 10, end)
    assert times[0] == end and times[-1] == pytest.approx(0.3) and times == sorted(times, reverse=True)
    assert times[0] - times[1] < (times[-2] - times[-1]) / 4


def test_grid_refuses_what_cannot_be_solved():
    for tau, steps, end in ((1.0, 5, 1.0), (-0.1, 5, 1.0), (0.5, 0, 1.0), (0.5, 5, 0.5), (0.5, 5, 1.1)):
        with pytest.raises(ValueError, match="tau"):
            grid(tau, steps, end)


MEANS, SPREADS = (0.5, -1.0), (0.4, 1.5)


def gaussian(x, t, y):
    """The velocity from N(0, 1) to N(m_y, s_y^2), coupled independently; the null label has the mean of both."""
    m = torch.tensor([*MEANS, sum(MEANS) / 2], dtype=x.dtype)[y].view(-1, 1, 1, 1)
    s = torch.tensor([*SPREADS, 1.0], dtype=x.dtype)[y].view(-1, 1, 1, 1)
    t = t.view(-1, 1, 1, 1).to(x.dtype)
    return m + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (x - t * m)


gaussian.shape = SimpleNamespace(num_domains=2, score=0.0)


def gaussian_translation(x1, tau, end):
    """z at tau and the translation 0 -> 1: each leg keeps (xt - t m) / S(t), S^2 = t^2 s^2 + (1 - t)^2."""
    S = lambda t, y: math.sqrt(t**2 * SPREADS[y] ** 2 + (1 - t) ** 2)
    z = tau * MEANS[0] + S(tau, 0) / S(end, 0) * (x1 - end * MEANS[0])
    return z, end * MEANS[1] + S(end, 1) / S(tau, 1) * (z - tau * MEANS[1])


@pytest.mark.parametrize("tau, end", [(0.0, 1.0), (0.45, 1.0), (0.8, 1.0), (0.1, 0.97)])
def test_translation_between_gaussians_is_the_known_map(tau, end):
    x1 = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * SPREADS[0] + MEANS[0]
    z, expected = gaussian_translation(x1, tau, end)
    torch.testing.assert_close(encode(gaussian, x1, 0, tau, steps=100, end=end), z, atol=2e-3, rtol=0)
    torch.testing.assert_close(translate(gaussian, x1, 0, 1, tau, steps=100, end=end), expected, atol=5e-3, rtol=0)


def test_there_and_back_is_the_identity_up_to_the_solver():
    x1 = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.5
    errors = [(translate(gaussian, x1, 0, 0, 0.2, steps=n) - x1).abs().max().item() for n in (20, 40)]
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 3


def test_a_trajectory_goes_down_to_z_and_up_to_the_translation():
    x1 = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    how = dict(tau=0.3, steps=4, solver="fireflow", end=0.97)
    states, down = list(trajectory(gaussian, x1, 0, 1, **how)), grid(0.3, 4, 0.97)
    assert [t for t, _ in states] == down + down[-2::-1]
    assert torch.equal(states[0][1], x1) and torch.equal(states[4][1], encode(gaussian, x1, 0, **how))
    assert torch.equal(states[-1][1], translate(gaussian, x1, 0, 1, **how))
    assert torch.equal(states[-1][1], decode(gaussian, states[4][1], 1, **how))


def test_guidance_extrapolates_from_the_null_label():
    x, t = torch.randn(4, 1, 2, 2), 0.5
    at = torch.full((4,), t)
    plain, null = gaussian(x, at, torch.ones(4, dtype=torch.long)), gaussian(x, at, torch.full((4,), 2))
    v = Velocity(gaussian, 1, guidance=3.0)
    torch.testing.assert_close(v(x, t), null + 3 * (plain - null))
    one = Velocity(gaussian, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(one(x, t), gaussian(x, at, torch.tensor([0, 1, 0, 1])))


def test_only_the_forward_leg_is_guided():
    x1, seen = torch.randn(2, 1, 2, 2), []

    def spy(x, t, y):
        seen.extend(y.tolist())
        return gaussian(x, t, y)

    spy.shape = gaussian.shape
    encode(spy, x1, 0, 0.5, steps=2)
    assert set(seen) == {0}
    seen.clear()
    decode(spy, x1, 1, 0.5, guidance=2.0, steps=2)
    assert set(seen) == {1, 2}
    seen.clear()
    translate(spy, x1, 0, 1, 0.5, guidance=2.0, steps=2, solver="euler")
    assert seen == 2 * [0, 0] + 2 * [1, 1, 2, 2]


def test_the_adaptive_solver_is_as_exact_as_asked_and_ends_at_the_end():
    errors, counts = [], []
    for tolerance in (1e-3, 1e-6):
        counts.append(0)

        def v(x, t):
            counts[-1] += 1
            return x * math.cos(20 * t)

        for ends in ([0.0, 1.0], [1.0, 0.0]):
            *_, (t, x) = adaptive(v, torch.ones(3, dtype=torch.float64), ends, tolerance)
            assert t == ends[1]
            errors.append(abs(x[0].item() - math.exp((math.sin(20 * ends[1]) - math.sin(20 * ends[0])) / 20)))
    assert max(errors[:2]) < 0.02 and max(errors[2:]) < 5e-5 and counts[0] < 200 < counts[1] < 2000


# ---------------------------------------------------------------- the diffusion

def bridge_parts(A, B, C, sigma):
    """A network that knows the Gaussian bridge of covariances A, B and Cov(x0, x1) = C: E[x1 - x0 | xt] and
    E[e | xt], means 0, x (n, 1, 1, d)."""
    eye = torch.eye(len(A))
    S = lambda t: (1 - t) ** 2 * A + t**2 * B + t * (1 - t) * (C + C.T) + sigma**2 * t * (1 - t) * eye

    def model(x, t, y):
        t = min(max(t[0].item(), EDGE), 1 - EDGE)
        cross = t * B - (1 - t) * A + (1 - t) * C.T - t * C  # Cov(x1 - x0, xt)
        d = x @ torch.linalg.solve(S(t), cross.T)
        e = sigma * math.sqrt(t * (1 - t)) * x @ torch.linalg.inv(S(t))  # Cov(e, xt) = sigma sqrt(t (1 - t))
        return torch.cat([d, e], 1)

    model.shape = SimpleNamespace(num_domains=1, score=sigma)
    return model, S


@pytest.mark.parametrize("d, sigma", [(1, 0.5), (2, 1.5), (8, 1.0)])
@pytest.mark.parametrize("backward", [False, True])
def test_ode_and_sde_keep_the_marginals_of_the_schrodinger_bridge(d, sigma, backward, n=10_000):
    """From the exact distribution at one end to .5 and to the other end: covariances in closed form.
    A wrong sign of s does not keep them."""
    A, B = covariance(d, 1), covariance(d, 2)
    model, S = bridge_parts(*(z.float() for z in (A, B, gaussian_bridge(A, B, sigma))), sigma)
    start, end = (1.0, 0.0) if backward else (0.0, 1.0)
    white = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    x = (white @ torch.linalg.cholesky(S(start)).T).view(n, 1, 1, d)
    times = [start + (end - start) * i / 400 for i in range(401)]

    def errors(solver, flip=1.0):
        flipped = lambda *a: torch.cat([p * k for p, k in zip(model(*a).chunk(2, 1), (1, flip))], 1)
        flipped.shape = model.shape
        v = Velocity(flipped, 0, generator=torch.Generator().manual_seed(1))
        if flip < 0:  # the velocity stays right, the diffusion's drift does not
            v.parts = lambda x, t, right=Velocity(model, 0): (right(x, t), -right.parts(x, t)[1])
        path = dict((round(t, 6), xt) for t, xt in solver(v, x, times))
        return [((path[t].flatten(1).T.cov() - S(t)).norm() / S(t).norm()).item() for t in (0.5, end)]

    assert max(errors(SOLVERS["heun"])) < 0.05 and max(errors(SOLVERS["sde"])) < 0.06
    assert max(errors(SOLVERS["sde"], flip=-1.0)) > 0.2


@pytest.mark.parametrize("backward", [False, True])
def test_a_bridge_between_two_known_images_is_exact_with_any_number_of_steps(backward, sigma=0.7):
    """One x0 and one x1: mean (1 - t) x0 + t x1, variance sigma^2 t (1 - t), no noise left at the end."""
    x0, x1 = (torch.full((20_000, 1, 1, 1), value) for value in (-2.0, 1.0))

    def model(x, t, y):
        t = t[0].clamp(EDGE, 1 - EDGE)
        return torch.cat([x1 - x0, (x - (1 - t) * x0 - t * x1) / (sigma * (t * (1 - t)).sqrt())], 1)

    model.shape = SimpleNamespace(num_domains=1, score=sigma)
    times = [0.0, 0.2, 0.6, 1.0][::-1 if backward else 1]
    v = Velocity(model, 0, generator=torch.Generator().manual_seed(0))
    path = list(SOLVERS["sde"](v, x1 if backward else x0, times))
    for t, x in path[1:-1]:
        assert x.mean().item() == pytest.approx(-2 + 3 * t, abs=0.02)
        assert x.var().item() == pytest.approx(sigma**2 * t * (1 - t), rel=0.04)
    torch.testing.assert_close(path[-1][1], x0 if backward else x1, atol=2e-3, rtol=0)


def test_without_a_score_head_the_diffusion_follows_from_the_velocity():
    """Independent coupling, sigma = 0: backward to tau and forward again under another label; mean and
    variance are those of the flow."""
    n, tau, end = 20_000, 0.3, 0.97
    x1 = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    S = lambda t, y: math.sqrt(t**2 * SPREADS[y] ** 2 + (1 - t) ** 2)
    how = dict(steps=200, solver="sde", end=end, generator=torch.Generator().manual_seed(1))
    z = encode(gaussian, end * MEANS[0] + S(end, 0) * x1, 0, tau, **how)
    assert z.mean().item() == pytest.approx(tau * MEANS[0], abs=0.03)
    assert z.std().item() == pytest.approx(S(tau, 0), rel=0.03)
    assert (z * x1).mean().abs() < 0.9 * z.std()  # it has forgotten some of the image, as the ODE does not
    x = decode(gaussian, tau * MEANS[1] + S(tau, 1) * x1, 1, tau, **how)
    assert x.mean().item() == pytest.approx(end * MEANS[1], abs=0.05)
    assert x.std().item() == pytest.approx(S(end, 1), rel=0.03)


def test_the_noise_of_the_diffusion_has_the_colour_of_the_training():
    x = torch.zeros(500, 1, 16, 16)
    power = lambda v: torch.fft.fft2(v.noise(x)).abs().square().mean((0, 1))
    coloured = power(Velocity(gaussian, 0, colour=1.0, generator=torch.Generator().manual_seed(0)))
    assert (coloured[0, 3] / coloured[0, 6]).item() == pytest.approx(4, rel=0.15)
    model, _ = bridge_parts(torch.eye(1), torch.eye(1), torch.zeros(1, 1), 1.0)
    white = power(Velocity(model, 0, colour=1.0, generator=torch.Generator().manual_seed(0)))
    assert (white[0, 3] / white[0, 6]).item() == pytest.approx(1, rel=0.15)


def test_from_image_to_image_there_is_one_leg_and_a_label_for_every_pair():
    seen = []

    def spy(x, t, y):
        seen.append((t[0].item(), y.tolist()))
        return torch.ones_like(x)

    spy.shape = SimpleNamespace(num_domains=9, score=0.0)
    x1 = torch.zeros(2, 1, 2, 2)
    out = translate(spy, x1, torch.tensor([0, 2]), 1, tau=0.7, steps=2, solver="euler", x0="image")
    torch.testing.assert_close(out, x1 + 1)
    assert [y for _, y in seen] == [[1, 7], [1, 7]] and seen[0][0] == 0
