"""The bridge against autodiff, counted moments and closed-form Gaussian flows."""

import pytest
import torch

from minimedshift.flow import EDGE, bridge, draw_noise, loss, tint, weight


@pytest.mark.parametrize("sigma", [0.0, 0.3, 2.0])
def test_velocity_is_the_derivative_of_the_path(sigma):
    g = torch.Generator().manual_seed(0)
    x0, x1, e = (torch.randn(16, 1, 3, 3, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
    derivative = torch.func.jvp(lambda t: bridge(x0, x1, t, sigma, e)[0], (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(bridge(x0, x1, t, sigma, e)[1], derivative)


def test_ends_are_noise_and_image_and_stay_finite():
    x0, x1, e = torch.randn(3, 2, 1, 4, 4).unbind()
    for sigma in (0.0, 1.0):
        start, slope = bridge(x0, x1, torch.zeros(2), sigma, e)
        end, slope_end = bridge(x0, x1, torch.ones(2), sigma, e)
        assert torch.isfinite(slope).all() and torch.isfinite(slope_end).all()
        torch.testing.assert_close(start, x0, atol=sigma * 5 * EDGE**0.5, rtol=0)
        torch.testing.assert_close(end, x1, atol=sigma * 5 * EDGE**0.5, rtol=0)


def test_the_bridge_has_the_brownian_variance():
    n, t, sigma = 200_000, 0.3, 0.7
    zeros, e = torch.zeros(n, 1), torch.randn(n, 1, generator=torch.Generator().manual_seed(1))
    xt, _ = bridge(zeros, zeros, torch.full((n,), t), sigma, e)
    assert xt.var().item() == pytest.approx(sigma**2 * t * (1 - t), rel=0.02)


def test_bridge_refuses_a_negative_sigma_and_missing_noise():
    x = torch.zeros(1, 1)
    for sigma, noise in ((-1.0, x), (1.0, None)):
        with pytest.raises(ValueError, match="sigma"):
            bridge(x, x, torch.zeros(1), sigma, noise)


@pytest.mark.parametrize("colour", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(32, 32), (20, 33)])
def test_noise_has_unit_variance_and_the_asked_spectrum(colour, shape):
    x = draw_noise((2000, 1, *shape), torch.Generator().manual_seed(0), colour)
    assert x.var().item() == pytest.approx(1, rel=0.05)
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    at = lambda k: (power[0, k] + power[k, 0]).item()
    assert at(3) / at(9) == pytest.approx(3 ** (2 * colour), rel=0.1)
    assert at(1) / at(3) == pytest.approx(1, rel=0.1)


def test_loss_of_the_true_velocity_of_a_gaussian_is_its_conditional_variance():
    """x0 ~ N(0, 1), x1 ~ N(0, s^2): E[x1 - x0 | xt] is linear, and what is left of the loss is known."""
    n, s, t = 200_000, 0.5, 0.6
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(n, 1, generator=g), s * torch.randn(n, 1, generator=g)
    total = (1 - t) ** 2 + t**2 * s**2
    slope = (t * s**2 - (1 - t)) / total
    labels, times = torch.zeros(n, dtype=torch.long), torch.full((n,), t)
    value = loss(lambda x, t, y: slope * x, x0, x1, labels, times).mean()
    assert value.item() == pytest.approx(1 + s**2 - slope**2 * total, rel=0.01)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 3.0])
def test_weight_keeps_the_variance_that_the_bridge_adds_to_the_target_below_one(sigma):
    t = torch.linspace(0, 1, 101)
    x, e = torch.zeros(101, 1), torch.ones(101, 1)
    added = weight(t, sigma) * bridge(x, x, t, sigma, e)[1][:, 0] ** 2
    assert added.max() <= 1 and torch.all(weight(t, 0.0) == 1) and weight(torch.tensor(0.5), sigma) == 1


def test_the_loss_is_weighted_by_time(sigma=0.8):
    """A network that says nothing, an image and a noise that are both 0: left is the bridge's own noise."""
    t = torch.tensor([0.1, 0.5, 0.8])
    x, e = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    found = loss(lambda x, t, y: 0 * x, x, x, torch.zeros(3, dtype=torch.long), t, sigma, e)
    slopes = [sigma * (1 - 2 * s) / (2 * (s * (1 - s)) ** 0.5) for s in t.tolist()]
    assert found.tolist() == pytest.approx([slope**2 / (1 + slope**2) for slope in slopes], abs=1e-6)


def test_tint_is_symmetric_and_is_what_draw_noise_does():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 1, 12, 10, generator=g, dtype=torch.float64)
    torch.testing.assert_close((tint(a, 1.0) * b).sum(), (a * tint(b, 1.0)).sum())
    seeded = lambda: torch.Generator().manual_seed(3)
    white = torch.randn(2, 1, 8, 8, generator=seeded())
    torch.testing.assert_close(draw_noise((2, 1, 8, 8), seeded(), 1.0), tint(white, 1.0))
