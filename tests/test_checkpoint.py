"""Checkpoints: whole or not at all, refused in a sentence, and an EMA with a closed form."""

import pytest
import torch
from networks import save_network

from minimedshift.model import Shape, UNet
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from minimedshift.support.checkpoint import EMA
from minimedshift.optim import Muon, orthogonalise, split


def test_round_trip_of_plain_types(tmp_path):
    state = dict(step=3, config=dict(sigma=0.0, data=None), model={"w": torch.randn(3)})
    checkpoint.save(tmp_path / "a" / "c.pt", state)
    back = checkpoint.load(tmp_path / "a" / "c.pt")
    assert back["step"] == 3 and back["config"] == state["config"]
    assert torch.equal(back["model"]["w"], state["model"]["w"])
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["c.pt"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "c.pt", dict(step=1))
    with pytest.raises(Exception):
        checkpoint.save(tmp_path / "c.pt", dict(step=lambda: 0))
    assert checkpoint.load(tmp_path / "c.pt")["step"] == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "text", dict(step=1), dict(format=99), [1, 2]])
def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match="c.pt") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none.pt")
    checkpoint.save(tmp_path / "c.pt", dict(w=torch.randn(1000)))
    (tmp_path / "c.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:2000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "c.pt")
    with pytest.raises(UserError, match="weight is nothing"):
        checkpoint.load_weights(torch.nn.Linear(2, 2, bias=False), {}, "c.pt")
    with pytest.raises(UserError, match=r"weight is \(3, 3\), this one needs \(2, 2\)"):
        checkpoint.load_weights(torch.nn.Linear(2, 2, bias=False), {"weight": torch.zeros(3, 3)}, "c.pt")


def test_a_network_is_loaded_with_its_mean_weights(tmp_path):
    shape = Shape(widths=(32,), blocks=(1,))
    raw, mean = UNet(shape).state_dict(), UNet(shape).state_dict()
    save_network(tmp_path / "c.pt", UNet(shape), model=raw, ema=mean)
    net, state = checkpoint.load_model(tmp_path / "c.pt")
    assert all(torch.equal(value, mean[name]) for name, value in net.state_dict().items())
    assert not torch.equal(raw["stem.weight"], mean["stem.weight"]) and not net.training
    assert torch.equal(state["model"]["stem.weight"], raw["stem.weight"])


def test_ema_of_a_ramp():
    """theta = k at step k: the power-function profile's mean is close to n (gamma + 1) / (gamma + 2) for long runs."""
    net, gamma, n = torch.nn.Linear(1, 1, bias=False), 6.94, 2000
    ema = EMA(net, gamma)
    for step in range(1, n + 1):
        with torch.no_grad():
            net.weight.fill_(step)
        ema.update(step)
        if step == 1:
            assert ema.mean["weight"].item() == 1  # nothing of the initial weights is left
    assert ema.mean["weight"].item() == pytest.approx(n * (gamma + 1) / (gamma + 2), rel=2e-3)


def test_ema_leaves_buffers_and_the_live_network_alone():
    net = torch.nn.BatchNorm1d(2)
    before = net.weight.clone()
    EMA(net).update(5)
    assert torch.equal(net.weight, before) and set(EMA(net).mean) == {"weight", "bias"}


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_muon_makes_singular_values_alike(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    m = u * torch.logspace(0, -1.5, s.shape[1]) @ vt  # singular values from 1 to .03
    o = torch.stack(orthogonalise([*m, torch.randn(16, 16)])[:3])  # others of the same or another side change nothing
    assert 0.6 < torch.linalg.svdvals(o).min() and torch.linalg.svdvals(o).max() < 1.25
    assert ((o * (u @ vt)).sum((1, 2)) / o.norm(dim=(1, 2)) / (u @ vt).norm(dim=(1, 2)) > 0.95).all()


def test_newton_schulz_on_the_gram_matrix_is_newton_schulz():
    """The textbook form, on the matrix itself and in float64."""
    m = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -3, 40))
    x = m.double() / m.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    torch.testing.assert_close(torch.stack(orthogonalise(list(m))), x.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_step_of_muon_is_the_textbook_step_in_either_memory_format(memory):
    """From zero momentum: U V^T of the gradient as (out, in h w), times sqrt(out / in h w) where that is above 1."""
    for shape in ((4, 3, 3, 3), (24, 2, 3, 3)):
        w = torch.nn.Parameter(torch.randn(shape).to(memory_format=memory))
        before, w.grad = w.detach().clone(), torch.randn(shape).to(memory_format=memory)
        Muon([w], lr=0.1, weight_decay=0.5).step()
        u = torch.stack(orthogonalise([w.grad.flatten(1)]))[0].view(shape)
        wanted = 0.95 * before - 0.1 * max(1, shape[0] / (9 * shape[1])) ** 0.5 * u
        torch.testing.assert_close(w.detach(), wanted, atol=1e-5, rtol=1e-5)


def test_the_momentum_of_muon_is_nesterovs(lr=0.1, keep=0.8):
    """Three steps with other gradients: M <- keep M + (1 - keep) G, and the update is of keep M + (1 - keep) G."""
    w = torch.nn.Parameter(torch.randn(6, 4, 1, 1))
    optimizer = Muon([w], lr, keep, weight_decay=0.0)
    mean, wanted = torch.zeros(6, 4), w.detach()[..., 0, 0].clone()
    for _ in range(3):
        gradient = torch.randn(6, 4)
        w.grad = gradient[..., None, None].clone()
        optimizer.step()
        mean = keep * mean + (1 - keep) * gradient
        wanted = wanted - lr * (6 / 4) ** 0.5 * orthogonalise([keep * mean + (1 - keep) * gradient])[0]
    torch.testing.assert_close(w.detach()[..., 0, 0], wanted, atol=1e-4, rtol=1e-4)


def test_muon_gets_the_convolutions_within_and_adamw_the_rest():
    net = UNet(Shape(widths=(32, 32), blocks=(1, 1)))
    names = {id(p): name for name, p in net.named_parameters()}
    inside, rest = ([names[id(p)] for p in group] for group in split(net))
    assert sorted(inside + rest) == sorted(names.values())
    assert {"stem.weight", "out.weight", "label.weight", "time.0.weight", "norm.weight"} <= set(rest)
    assert {"attention.out.weight", "down.0.1.conv1.weight", "up.1.0.weight"} <= set(inside)
    assert all(net.get_parameter(name).ndim == 4 for name in inside)


def test_muon_solves_a_badly_scaled_least_squares():
    torch.manual_seed(0)
    x = torch.randn(256, 8) * torch.logspace(0, -2, 8)
    target = torch.randn(4, 8)
    w = torch.nn.Parameter(torch.zeros(4, 8, 1, 1))
    optimizer = Muon([w], weight_decay=0.0)
    for step in range(400):
        loss = (x @ (w[..., 0, 0] - target).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.step()
    assert (w[..., 0, 0] - target).abs().max() < 0.1
