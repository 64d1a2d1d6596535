from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from minimedshift import metrics, rivals
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from minimedshift.model import Shape, UNet


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n, size=16, seed=0):
    """Smooth random pictures."""
    return torch.tanh(metrics.low_pass(noise(n, 1, size, size, seed=seed), 1.5) * 4)


# ---------------------------------------------------------------- SDEdit

class Gaussian(nn.Module):
    """The exact velocity for pixels N(mean_y, std_y^2): E[x1 - x0 | xt]; the null label has label 0's."""

    def __init__(self, mean, std):
        super().__init__()
        self.shape = SimpleNamespace(num_domains=len(mean), score=0.0)
        self.mean, self.std = torch.tensor(mean + mean[:1]), torch.tensor(std + std[:1])

    def forward(self, xt, t, y):
        t, m, s = (a[:, None, None, None] for a in (t, self.mean[y], self.std[y]))
        return m + (t * s ** 2 - (1 - t)) / ((1 - t) ** 2 + t ** 2 * s ** 2) * (xt - t * m)


@pytest.mark.parametrize("tau", [0.0, .3, .7])
def test_sdedit_has_the_mean_and_variance_of_the_exact_flow(tau):
    mean, std, grey = [.6, -.4], [.5, .3], .2
    x1 = torch.full((4, 1, 64, 64), grey)
    x = rivals.sdedit(Gaussian(mean, std), x1, 1, tau, steps=50, seed=3)
    spread = ((1 - tau) ** 2 + (tau * std[1]) ** 2) ** .5       # of xt where the target's own images are
    assert x.mean() == pytest.approx(mean[1] + std[1] / spread * tau * (grey - mean[1]), abs=.01)
    assert x.std() == pytest.approx(std[1] / spread * (1 - tau), rel=.02)


@pytest.mark.parametrize("tau", [.2, .6, .85])
@pytest.mark.parametrize("end", [.9, 1.0])
def test_sdedit_leaves_a_domain_of_its_own_as_it_is(tau, end):
    mean, std = .3, .4
    spread = ((1 - end) ** 2 + (end * std) ** 2) ** .5  # xt at t = end: N(end mean, spread^2)
    x1 = end * mean + spread * noise(4, 1, 64, 64, seed=1)
    x = rivals.sdedit(Gaussian([mean], [std]), x1, 0, tau, steps=50, end=end)
    assert x.mean() == pytest.approx(end * mean, abs=.01)
    assert x.std() == pytest.approx(spread, rel=.02)


def test_sdedit_draws_fresh_noise_from_its_seed_and_takes_a_label_each():
    model, x1 = Gaussian([.6, -.4], [.5, .3]), torch.zeros(2, 1, 64, 64)
    first, again, other = (rivals.sdedit(model, x1, torch.tensor([0, 1]), .2, 2.0, 10, seed=s) for s in (0, 0, 1))
    assert_close(first, again, atol=0, rtol=0)
    assert (first - other).abs().mean() > .05
    assert first[0].mean() > .3 and first[1].mean() < -.3


# ---------------------------------------------------------------- the adversarial rival

def test_a_generator_starts_as_the_identity_and_looks_no_farther_than_it_says():
    torch.manual_seed(0)
    generator = rivals.Generator(width=8, blocks=1)
    x = uniform(2, 1, 48, 40)
    assert_close(generator(x), x, atol=0, rtol=0)
    for p in generator.parameters():
        nn.init.normal_(p, std=.3)
    x = x[:1].requires_grad_()
    generator(x)[0, 0, 24, 20].backward()
    rows, columns = torch.nonzero(x.grad[0, 0], as_tuple=True)
    reach = max((rows - 24).abs().max(), (columns - 20).abs().max())
    assert 8 <= reach <= 4 * 1 + 5


def test_a_judge_marks_patches():
    torch.manual_seed(0)
    judge, x = rivals.judge(1, 8), uniform(1, 1, 64, 64).requires_grad_()
    marks = judge(x)
    marks[0, 0, 7, 7].backward()
    rows, columns = torch.nonzero(x.grad[0, 0], as_tuple=True)
    assert marks.shape == (1, 1, 14, 14) and np.ptp(rows) + 1 == 34 and np.ptp(columns) + 1 == 34


def test_the_marks_that_least_squares_wants():
    marks = torch.tensor([1.0, 0, 3, 1])
    assert rivals.off(marks, 1) == 5 / 4 and rivals.off(marks, 0) == 11 / 4


def look(x):
    """The target domain: darker, with less contrast."""
    return .5 * x - .4


def test_adversarial_learns_the_look_of_another_domain_from_other_pictures():
    source, target, test = blobs(200).half().numpy(), look(blobs(200, seed=1)), blobs(16, seed=2)
    forth, back = rivals.adversarial(source, target, steps=300, lr=3e-3, width=16, blocks=1)
    assert metrics.mse(forth(test), look(test)).mean() < .1 * metrics.mse(test, look(test)).mean()
    assert metrics.mse(back(look(test)), test).mean() < .1 * metrics.mse(test, look(test)).mean()
    assert not forth.training


def test_adversarial_is_a_function_of_its_seed():
    source, target = blobs(20), look(blobs(20, seed=1))
    how = dict(steps=3, width=8, blocks=1)
    train = lambda seed: rivals.adversarial(source, target, seed=seed, **how)
    before = torch.random.get_rng_state()
    first, again, other = train(0), train(0), train(1)
    assert torch.equal(before, torch.random.get_rng_state())    # nobody else's dice are touched
    for one, two in zip(first, again):
        for a, b in zip(one.parameters(), two.parameters()):
            assert_close(a, b, atol=0, rtol=0)
    assert not torch.equal(first[0].enter.weight, other[0].enter.weight)
    assert not torch.equal(first[0].enter.weight, first[1].enter.weight)


# ---------------------------------------------------------------- the supervised ceiling

class Affine(nn.Module):
    """The smallest network: a gain and an offset for each label; it complains about any time but t = 1."""

    def __init__(self):
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.zeros(3, 1, 1, 1)) for _ in range(2))

    def forward(self, xt, t, y):
        assert (t == 1).all()
        return self.gain[y] * xt + self.offset[y]


def test_supervised_learns_a_linear_map_under_its_label():
    source = uniform(64, 1, 16, 16).half().numpy()
    target = source * np.float16(.5) - np.float16(.2)
    model = rivals.supervised(Affine(), source, target, 2, steps=300, batch_size=16, lr=.03)
    x = uniform(3, 1, 16, 16, seed=5)
    assert_close(rivals.regress(model, x, 2), .5 * x - .2, atol=5e-3, rtol=0)
    assert_close(rivals.regress(model, x, 0), x)                # another label was never touched
    assert not model.training


def test_as_many_steps_as_fit_into_the_time(monkeypatch):
    clock = [0.0]

    def train(steps):
        """Three seconds to start, then half a second a step; what starts once does not start again."""
        clock[0] += (3.0 if clock[0] == 0 else 0) + .5 * steps

    monkeypatch.setattr(rivals.time, "time", lambda: clock[0])
    assert rivals.steps_within(60, train) == 120
    assert rivals.steps_within(.01, train) == 1


# ---------------------------------------------------------------- files

def scattered(network, seed=0):
    """The network with random weights: those that are zero at the start too."""
    draw = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=draw) * .1
    return network.eval()


@torch.no_grad()
def test_translators_come_back_from_their_files(tmp_path):
    x = uniform(2, 1, 16, 16)
    generator = scattered(rivals.Generator(width=8, blocks=2)).to(memory_format=torch.channels_last)
    rivals.save(tmp_path / "a.pt", generator, ("here", "there"))
    translate, pair = rivals.load(tmp_path / "a.pt")
    assert pair == ("here", "there")
    assert_close(translate(x), generator(x))
    model = scattered(UNet(Shape(num_domains=3, stem=2, widths=(16, 32), blocks=(1, 1), head=16)))
    rivals.save(tmp_path / "b.pt", model, ("here", "there"), y_target=2)
    translate, pair = rivals.load(tmp_path / "b.pt")
    assert_close(translate(x), rivals.regress(model, x, 2))
    assert not torch.equal(translate(x), rivals.regress(model, x, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_other_files_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="none.pt"):
        rivals.load(tmp_path / "none.pt")
    checkpoint.save(tmp_path / "run.pt", dict(shape=vars(Shape()), model={}))
    with pytest.raises(UserError, match="run.pt holds no rival"):
        rivals.load(tmp_path / "run.pt")
