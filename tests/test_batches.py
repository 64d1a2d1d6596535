"""What a step is given: a function of seed and step, whatever the plan's window."""

from types import SimpleNamespace

import pytest
import torch

from minimedshift.batches import batches, draw_step, make_coupling, randomness
from minimedshift.coupling import Minibatch, Semidiscrete
from minimedshift.data import Dataset
from minimedshift.flow import draw_noise
from minimedshift.sizes import resize

CPU = torch.device("cpu")


def settings(**more):
    usual = dict(seed=0, steps=5, batch_size=12, ot_batch=2, coupling="exact", sigma=0., colour=0.,
                 drop_label=0.)
    return SimpleNamespace(**usual | more)


def three_domains():
    """Images whose mean tells their domain: about -.6, 0 and .6."""
    noise = .1 * torch.randn(3, 20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = list((noise + torch.tensor([-.6, 0, .6]).view(3, 1, 1, 1, 1)).half().numpy())
    return Dataset(("a", "b", "c"), 4, 1, images, images)


def domain_of(x):
    return (x.mean((1, 2, 3)) / .6).round().long() + 1


def test_labels_hidden_and_noise_come_from_two_streams():
    """On a CPU both generators are of one kind: seeded alike, noise would tell which labels are hidden."""
    dataset = SimpleNamespace(domains=range(5), channels=1, size=16)
    config = SimpleNamespace(seed=0, batch_size=8, drop_label=.5, colour=0.)
    drawn = [draw_step(dataset, config, step, torch.device("cpu")) for step in range(300)]
    hidden = torch.stack([each[2] for each in drawn]).double()  # (300, 8)
    noise = torch.stack([each[0][0].flatten() for each in drawn]).double()  # (300, 256)
    table = torch.corrcoef(torch.cat([hidden, noise.abs(), noise], 1).T)[:8, 8:]
    assert table.abs().max() < .32  # 4096 coefficients of chance, each with a standard deviation of .058


def test_the_random_draws_of_a_step_depend_on_seed_and_step_alone():
    draw = lambda seed, step: torch.randn(3, generator=randomness(seed, step)).tolist()
    assert draw(0, 5) == draw(0, 5) and len({tuple(draw(s, k)) for s in range(3) for k in range(5)}) == 15


@pytest.mark.parametrize("coupling", ["independent", "exact", "sinkhorn", "semidiscrete"])
def test_labels_are_those_of_the_images_but_for_the_hidden(coupling, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path))
    dataset, hidden = three_domains(), []
    for step in batches(dataset, settings(coupling=coupling, sigma=.5, steps=20, drop_label=.3), CPU):
        seen = step.y != 3
        hidden.append((~seen).float().mean())
        assert torch.equal(step.y[seen], domain_of(step.x1)[seen])
    assert torch.stack(hidden).mean() == pytest.approx(.3, abs=.1)


def test_the_flow_sees_small_copies_of_larger_images():
    images = torch.rand(2, 20, 1, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    small = resize(images.flatten(0, 1).float(), (16, 16)).flatten(1)
    dataset = Dataset(("a", "b"), 32, 1, list(images.numpy()), [])
    for step in batches(dataset.shrunk(16), settings(coupling="independent"), CPU):
        away, which = torch.cdist(step.x1.flatten(1), small).min(1)
        assert step.x0.shape == step.x1.shape == (12, 1, 16, 16) and away.max() < .01
        assert torch.equal(which // 20, step.y)
    assert dataset.shrunk(32) is dataset.shrunk(64) is dataset


def test_noise_comes_with_the_image_of_its_plan():
    """In a window no two images of one label gain by an exchange of their noises."""
    first, second, *_ = batches(three_domains(), settings(), CPU)
    x0, x1, y = (torch.cat(parts) for parts in zip(first[:3], second[:3]))
    cost = torch.cdist(x1.flatten(1), x0.flatten(1)) ** 2
    pairs = cost.diagonal()[:, None] + cost.diagonal()
    gain = (pairs - cost - cost.T)[y[:, None] == y]
    assert gain.max() < 1e-4 and gain.min() < -1


def test_the_bridge_of_width_sigma_is_paired_with_eps_of_2_sigma_squared():
    dataset, config = three_domains(), settings(coupling="sinkhorn", sigma=.5, ot_batch=1)
    x0, y = draw_step(dataset, config, 0, CPU)[:2]
    entropy = lambda eps: Minibatch("sinkhorn", dataset.batch, eps)(x0, y, randomness(0, -1))[2].entropy
    found = next(batches(dataset, config, CPU)).plan.entropy
    assert found == entropy(2 * .5**2) and entropy(.5**2) < .9 * found


def test_every_process_has_its_part_of_the_batch():
    whole = list(batches(three_domains(), settings(), CPU))
    parts = [list(batches(three_domains(), settings(), CPU, rank=rank, processes=3)) for rank in range(3)]
    for step, shares in zip(whole, zip(*parts)):
        for i, x in enumerate(step[:5]):
            assert torch.equal(x, torch.cat([share[i] for share in shares]))


def test_too_many_images_for_semidiscrete_are_paired_by_exact(monkeypatch, capsys):
    monkeypatch.setattr("minimedshift.batches.MOST", 1000)
    couple = make_coupling(three_domains(), settings(coupling="semidiscrete"), CPU, torch.float32)
    assert isinstance(couple, Minibatch) and "taking --coupling exact" in capsys.readouterr().out


def test_a_resumed_run_makes_the_plan_of_its_window_again():
    whole = list(batches(three_domains(), settings(), CPU))
    rest = list(batches(three_domains(), settings(), CPU, first=3))
    assert len(whole) == 5 and len(rest) == 2
    for one, other in zip(whole[3:], rest):
        assert all(torch.equal(a, b) for a, b in zip(one[:5], other[:5]))


def test_coloured_noise_picks_each_image_by_its_weight(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path))
    g = torch.Generator().manual_seed(0)
    images = .3 * draw_noise((60, 1, 16, 16), g, 1.) * torch.linspace(.5, 1.5, 60).view(-1, 1, 1, 1)
    weight = torch.linspace(1.8, .2, 60)
    dataset = Dataset(("a",), 16, 1, [images.numpy()], [images.numpy()], weights=[weight.numpy()])
    semidiscrete = make_coupling(dataset, settings(colour=1., coupling="semidiscrete"), CPU, torch.float32)
    assert isinstance(semidiscrete, Semidiscrete)
    picked = semidiscrete.best(draw_noise((30000, 1, 16, 16), g, 1.).flatten(1), 0)
    counted = torch.bincount(picked, minlength=60) / 500
    assert ((counted - weight).abs() / weight).mean() < .15
