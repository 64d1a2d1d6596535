"""Pictures of translations, and samples between Gaussians, where their mean and spread are formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_sampler import MEANS, SPREADS, gaussian

from minimedshift import sampler
from minimedshift.support import film


@pytest.mark.parametrize("target, tau", [(0, 0.4), (1, 0.4), (1, 0.0)])
def test_samples_keep_the_distribution_and_differ_by_what_fresh_noise_says(target, tau, end=0.97, n=4000):
    """Images of the source's distribution become images of the target's; samples differ by a known width."""
    S = lambda t, y: math.sqrt(t**2 * SPREADS[y] ** 2 + (1 - t) ** 2)
    draw = torch.Generator().manual_seed(0)
    x1 = end * MEANS[0] + S(end, 0) * torch.randn(n, 1, 1, 1, generator=draw)
    out = film.samples(gaussian, x1, 0, target, 8, tau, steps=20, end=end, generator=draw)
    assert out.shape == (8, n, 1, 1, 1)
    s = film.FRESH * tau
    z = tau * MEANS[0] + S(tau, 0) / S(end, 0) * (x1 - end * MEANS[0])
    fresh = math.sqrt((1 - s) ** 2 - film.FRESH**2 * (1 - tau) ** 2)
    expected = end * MEANS[target] + S(end, target) / S(s, target) * (film.FRESH * z - s * MEANS[target])
    width = S(end, target) / S(s, target) * fresh
    assert (out - expected).square().mean().sqrt().item() == pytest.approx(width, rel=0.02)
    assert out.var(0).mean().sqrt().item() == pytest.approx(width, rel=0.02)
    if target == 0:
        assert out.std().item() == pytest.approx(S(end, 0), rel=0.03)


def test_spread_is_the_deviation_of_what_is_coarse():
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    several = torch.stack([x, x + 0.1, x - 0.1])
    torch.testing.assert_close(film.spread(several), torch.full_like(x, 0.1))
    checks = torch.ones(32, 32) - 2 * (torch.arange(32)[:, None] + torch.arange(32)).remainder(2)
    assert film.spread(torch.stack([x, x + checks, x - checks])).max() < 1e-3  # finest detail is not shown


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg"])
@pytest.mark.parametrize("x0, columns", [("noise", 9), ("image", 5)])
def test_a_film_has_a_column_for_each_state_it_shows(tmp_path, suffix, x0, columns):
    model = lambda x, t, y: torch.ones_like(x)
    model.shape = SimpleNamespace(num_domains=4, score=0.0)
    x1, path = torch.zeros(1, 1, 8, 8), tmp_path / f"film{suffix}"
    states = list(sampler.trajectory(model, x1, 0, 1, 0.4, steps=6, solver="euler", x0=x0))
    film.strip(path, [t for t, _ in states], [("a", [xt[0] for _, xt in states])])
    assert (Image.open(path).width - 17) / 164 == columns  # cells of 164 pixels, beside a label of one letter
