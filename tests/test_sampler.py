"""Solvers against ODEs whose solution is known, and translation between Gaussians, where it is a formula."""

import math
from types import SimpleNamespace

import pytest
import torch

from minimedshift.sampler import (SOLVERS, Velocity, decode, encode, evaluations, grid, last, trajectory,
                                  translate)


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
        out = translate(gaussian, x1, 0, 1, 0.3, steps=n, solver=solver, t_image=0.97)
        errors.append((out - expected).square().mean().sqrt())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_solvers_yield_the_whole_trajectory():
    for solver in SOLVERS.values():
        steps = list(solver(lambda x, t: torch.ones_like(x), torch.zeros(2), [0.0, 0.25, 1.0]))
        assert steps[0][0] == 0.0 and steps[-1][0] == 1.0
        assert all(x[0].item() == pytest.approx(t) for t, x in steps)


@pytest.mark.parametrize("t_image", [1.0, 0.97])
def test_grid_ends_where_it_should_and_is_denser_near_the_image(t_image):
    times = grid(0.3, 10, t_image)
    assert times[0] == t_image and times[-1] == pytest.approx(0.3) and times == sorted(times, reverse=True)
    assert times[0] - times[1] < (times[-2] - times[-1]) / 4


def test_grid_refuses_what_cannot_be_solved():
    for tau, steps, end in ((1.0, 5, 1.0), (-0.1, 5, 1.0), (0.5, 0, 1.0), (0.5, 5, 0.5), (0.5, 5, 1.1)):
        with pytest.raises(ValueError, match="tau"):
            grid(tau, steps, end)


MEANS, SPREADS = (0.5, -1.0), (0.4, 1.5)


def gaussian(x, t, y):
    """The velocity from N(0, 1) to N(m_y, s_y^2), coupled independently; the null label has their mean."""
    m = torch.tensor([*MEANS, sum(MEANS) / 2], dtype=x.dtype)[y].view(-1, 1, 1, 1)
    s = torch.tensor([*SPREADS, 1.0], dtype=x.dtype)[y].view(-1, 1, 1, 1)
    t = t.view(-1, 1, 1, 1).to(x.dtype)
    return m + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (x - t * m)


gaussian.shape = SimpleNamespace(num_domains=2)


def gaussian_translation(x1, tau, end):
    """z at tau and the translation 0 -> 1: each leg keeps (xt - t m) / S(t), S^2 = t^2 s^2 + (1 - t)^2."""
    S = lambda t, y: math.sqrt(t**2 * SPREADS[y] ** 2 + (1 - t) ** 2)
    z = tau * MEANS[0] + S(tau, 0) / S(end, 0) * (x1 - end * MEANS[0])
    return z, end * MEANS[1] + S(end, 1) / S(tau, 1) * (z - tau * MEANS[1])


@pytest.mark.parametrize("tau, end", [(0.0, 1.0), (0.45, 1.0), (0.8, 1.0), (0.1, 0.97)])
def test_translation_between_gaussians_is_the_known_map(tau, end):
    x1 = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * SPREADS[0] + MEANS[0]
    z, expected = gaussian_translation(x1, tau, end)
    torch.testing.assert_close(encode(gaussian, x1, 0, tau, steps=100, t_image=end), z, atol=2e-3, rtol=0)
    found = translate(gaussian, x1, 0, 1, tau, steps=100, t_image=end)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


def test_there_and_back_is_the_identity_up_to_the_solver():
    x1 = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.5
    errors = [(translate(gaussian, x1, 0, 0, 0.2, steps=n) - x1).abs().max().item() for n in (20, 40)]
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 3


def test_a_trajectory_goes_down_to_z_and_up_to_the_translation():
    x1 = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    how = dict(tau=0.3, steps=4, solver="fireflow", t_image=0.97)
    states, down = list(trajectory(gaussian, x1, 0, 1, **how)), grid(0.3, 4, 0.97)
    assert [t for t, _ in states] == down + down[-2::-1]
    assert torch.equal(states[0][1], x1) and torch.equal(states[4][1], encode(gaussian, x1, 0, **how))
    assert torch.equal(states[-1][1], translate(gaussian, x1, 0, 1, **how))
    assert torch.equal(states[-1][1], decode(gaussian, states[4][1], 1, **how))


def test_a_large_image_is_solved_small_and_the_change_is_carried():
    """The flow of Gaussians multiplies and adds: a line in the source, which can be carried."""
    x1 = torch.nn.functional.interpolate(torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)),
                                         (64, 64), mode="bicubic")
    how = dict(tau=0.3, steps=4, size=16)
    gaussian.stride = 8
    found, whole = translate(gaussian, x1, 0, 1, **how), translate(gaussian, x1, 0, 1, **how | dict(size=64))
    assert (found - whole).square().mean() < 1e-4 * (whole - x1).square().mean()
    assert not torch.equal(found, whole) and torch.equal(whole, translate(gaussian, x1, 0, 1, .3, steps=4))


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


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_evaluations_are_counted_as_the_network_is_asked(solver, guidance):
    asked = []

    def counted(x, t, y):
        asked.extend(y.tolist())
        return gaussian(x, t, y)

    counted.shape = gaussian.shape
    translate(counted, torch.zeros(1, 1, 2, 2), 0, 1, 0.3, guidance, steps=3, solver=solver)
    assert len(asked) == evaluations(solver, 3, guidance)
