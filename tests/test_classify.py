"""Which domain an image is from, where that is known: domains of one image each, or of noise alone."""

from functools import partial

import pytest
import torch

from minimedshift import classify, phantom
from minimedshift.flow import draw_noise, tint


unexplained = partial(classify.unexplained, colour=1.0)


@pytest.mark.parametrize("H, W, count", [(64, 64, 5), (64, 80, 5), (16, 16, 3), (20, 48, 3)])
def test_octaves_hold_every_frequency_up_to_nyquist_once(H, W, count):
    masks = classify.octaves(H, W)
    ky, kx = torch.meshgrid(torch.fft.fftfreq(H, 1 / H), torch.fft.fftfreq(W, 1 / W), indexing="ij")
    k = torch.hypot(ky, kx)
    assert len(masks) == count and torch.equal(masks.sum(0), (k <= min(H, W) / 2).long())
    assert all(k[mask].max() < 2 * k[mask].clamp(min=1).min() + 1e-3 for mask in masks[:-1])


def test_domains_that_differ_in_the_power_of_their_noise_alone():
    """Images are coloured noise, so that E[x1 - x0 | xt] is a formula. Four times the power is told apart,
    nearly the same power is close."""
    power = torch.tensor([0.01, 0.04, 0.0401])

    def model(x, t, y):
        t, a = t.view(-1, 1, 1, 1), power[y].view(-1, 1, 1, 1)
        return (t * a - (1 - t)) / (t**2 * a + (1 - t) ** 2) * x

    noise = draw_noise((12, 1, 32, 32), torch.Generator().manual_seed(0), 1.0)
    quiet, loud, strange = (unexplained(model, s * noise, range(3)) for s in (0.1, 0.2, 5))
    label, _, close = classify.label_of(quiet, 32, 32)
    assert (label == 0).all() and not close.any()
    label, second, close = classify.label_of(loud, 32, 32)
    assert (label > 0).all() and (second > 0).all() and close.all()
    assert not classify.far(torch.cat([quiet, loud])).any() and classify.far(strange).all()


def test_a_simulated_head_is_known_and_its_negative_and_a_texture_are_far():
    """Domains of one head's noise-free pictures with white noise on them: E[x1 - x0 | xt] is a formula."""
    head, noise = phantom.Head(3), torch.tensor([0.08, 0.03, 0.06, 0.03, 0.02])
    c = torch.stack([phantom.render(head, name, 32, noise=False) for name in phantom.DOMAINS])
    delta = torch.zeros(1, 1, 32, 32)
    delta[..., 0, 0] = 1
    power = torch.fft.fft2(tint(delta, 1.0)).abs().square()  # of x0

    def model(x, t, y):
        t, a = t.view(-1, 1, 1, 1), noise[y].view(-1, 1, 1, 1) ** 2
        known = (t * a - (1 - t) * power) / (t**2 * a + (1 - t) ** 2 * power)
        return c[y] + torch.fft.ifft2(known * torch.fft.fft2(x - t * c[y])).real

    draw = torch.Generator().manual_seed(0)
    x1 = c + noise.view(-1, 1, 1, 1) * torch.randn(c.shape, generator=draw)
    shares = unexplained(model, x1, range(5))
    assert classify.label_of(shares, 32, 32)[0].tolist() == [0, 1, 2, 3, 4] and not classify.far(shares).any()
    for strange in (-x1, torch.rand(5, 1, 32, 32, generator=draw) * 2 - 1):
        assert classify.far(unexplained(model, strange, range(5))).all()


def test_what_is_left_is_the_noise_itself_where_the_network_knows_nothing():
    """v = x1, the mean of x1 - x0 where xt says nothing of x0: all noise is left, in every octave."""
    x1 = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    shares = unexplained(lambda x, t, y: x1, x1, [0], draws=40)
    torch.testing.assert_close(shares, torch.ones(3, 1, 4), atol=0.25, rtol=0)
