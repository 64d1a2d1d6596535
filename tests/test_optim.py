"""How weights are trained: Muon against its textbook form, and an EMA with a closed form."""

import pytest
import torch

from minimedshift.model import Shape, UNet
from minimedshift.optim import EMA, Muon, orthogonalise


def test_ema_of_a_ramp():
    """theta = k at step k: the power-function mean is close to n (gamma + 1) / (gamma + 2) for long runs."""
    net, gamma, n = torch.nn.Linear(1, 1, bias=False), 6.94, 2000
    ema = EMA(net, gamma)
    for step in range(1, n + 1):
        with torch.no_grad():
            net.weight.fill_(step)
        ema.update(step)
        if step == 1:
            assert ema.model.weight.item() == 1  # nothing of the initial weights is left
    assert ema.model.weight.item() == pytest.approx(n * (gamma + 1) / (gamma + 2), rel=2e-3)


def test_ema_leaves_buffers_and_the_live_network_alone():
    net = torch.nn.BatchNorm1d(2)
    before, ema = net.weight.clone(), EMA(net)
    with torch.no_grad():
        net.weight.add_(1)
    net.running_mean.add_(1)
    ema.update(1)
    assert torch.equal(net.weight, before + 1) and net.training and not ema.model.training
    assert torch.equal(ema.model.weight, net.weight) and not ema.model.running_mean.any()


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_muon_makes_singular_values_alike(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    m = u * torch.logspace(0, -1.5, s.shape[1]) @ vt  # singular values from 1 to .03
    # others of the same or another side change nothing
    o = torch.stack(orthogonalise([*m, torch.randn(16, 16)])[:3])
    assert 0.6 < torch.linalg.svdvals(o).min() and torch.linalg.svdvals(o).max() < 1.25
    assert ((o * (u @ vt)).sum((1, 2)) / o.norm(dim=(1, 2)) / (u @ vt).norm(dim=(1, 2)) > 0.95).all()


def test_newton_schulz_on_the_gram_matrix_is_newton_schulz():
    """The textbook form, on the matrix itself and in float64."""
    normal = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    m = normal @ torch.diag(torch.logspace(0, -3, 40))
    x = m.double() / m.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    torch.testing.assert_close(torch.stack(orthogonalise(list(m))), x.float(), atol=1e-4, rtol=0)


def test_newton_schulz_bears_tf32(monkeypatch):
    """Factors with 10 bits of mantissa, as a GPU takes them, and singular values from 1 to .01."""
    short = lambda x: ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32)

    class Short(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
                args = [short(x.as_subclass(torch.Tensor)).as_subclass(Short) for x in args]
            if function is torch.baddbmm:
                args = [args[0], *(short(x.as_subclass(torch.Tensor)).as_subclass(Short) for x in args[1:])]
            return super().__torch_function__(function, types, args, kwargs or {})

    normal = torch.randn(96, 400, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(normal, full_matrices=False)
    m = u * torch.logspace(0, -2, 96) @ vt
    exact, found = orthogonalise([m])[0], orthogonalise([m.as_subclass(Short)])[0].as_subclass(torch.Tensor)
    assert 0 < (found - exact).abs().max() / exact.abs().max() < 0.1
    assert 0.6 < torch.linalg.svdvals(found).min() and torch.linalg.svdvals(found).max() < 1.35


def kernel(w):
    """A model of one convolution, whose weights are w."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(w)
    return model


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_step_of_muon_is_the_textbook_step_in_either_memory_format(memory):
    """From zero momentum: U V^T of the gradient as (out, in h w), times sqrt(out / in h w) if above 1."""
    for shape in ((4, 3, 3, 3), (24, 2, 3, 3)):
        model = kernel(torch.randn(shape).to(memory_format=memory))
        before, gradient = model.weight.detach().clone(), torch.randn(shape).to(memory_format=memory)
        model.weight.grad = gradient
        Muon(model, weight_decay=0.5).step(0.1)
        u = torch.stack(orthogonalise([gradient.flatten(1)]))[0].view(shape)
        wanted = 0.95 * before - 0.1 * max(1, shape[0] / (9 * shape[1])) ** 0.5 * u
        torch.testing.assert_close(model.weight.detach(), wanted, atol=1e-5, rtol=1e-5)


def test_the_momentum_of_muon_is_nesterovs(lr=0.1, keep=0.8):
    """Three steps with new gradients: M <- keep M + (1 - keep) G; the update is of keep M + (1 - keep) G."""
    model = kernel(torch.randn(6, 4, 1, 1))
    optimizer = Muon(model, keep, weight_decay=0.0)
    mean, wanted = torch.zeros(6, 4), model.weight.detach()[..., 0, 0].clone()
    for _ in range(3):
        gradient = torch.randn(6, 4)
        model.weight.grad = gradient[..., None, None].clone()
        optimizer.step(lr)
        mean = keep * mean + (1 - keep) * gradient
        wanted = wanted - lr * (6 / 4) ** 0.5 * orthogonalise([keep * mean + (1 - keep) * gradient])[0]
    torch.testing.assert_close(model.weight.detach()[..., 0, 0], wanted, atol=1e-4, rtol=1e-4)


def test_muon_gets_the_convolutions_within_and_adamw_the_rest():
    net = UNet(Shape(widths=(32, 32), blocks=(1, 1)))
    names, optimizer = {id(p): name for name, p in net.named_parameters()}, Muon(net)
    inside, rest = ([names[id(p)] for p in group] for group in (optimizer.inside, optimizer.rest))
    assert sorted(inside + rest) == sorted(names.values())
    assert {"stem.weight", "out.weight", "label.weight", "time.0.weight", "norm.weight"} <= set(rest)
    assert {"attention.out.weight", "down.0.1.conv1.weight", "up.1.0.weight"} <= set(inside)
    assert all(net.get_parameter(name).ndim == 4 for name in inside)


def test_the_rest_moves_as_with_torchs_adamw_and_a_restored_optimizer_goes_on(lr=0.1):
    parts = lambda: dict(line=torch.nn.Linear(3, 4), conv=torch.nn.Conv2d(3, 2, 1))
    nets = [torch.nn.ModuleDict(parts()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours, torchs = Muon(nets[0]), torch.optim.AdamW(nets[1]["line"].parameters(), lr / 20, (0.9, 0.99))
    for step in range(6):
        if step == 3:  # another process goes on
            state = ours.state()
            ours = Muon(nets[0])
            ours.restore(state)
        x = torch.randn(5, 3)
        for net in nets:
            (net["line"](x).square().sum() + net["conv"](x[..., None, None]).square().sum()).backward()
        ours.step(lr)
        torchs.step()
        torchs.zero_grad()
    for p, q in zip(*(net["line"].parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises((ValueError, RuntimeError)):
        Muon(torch.nn.Conv2d(3, 3, 1)).restore(ours.state())


def test_muon_solves_a_badly_scaled_least_squares():
    torch.manual_seed(0)
    x = torch.randn(256, 8) * torch.logspace(0, -2, 8)
    target = torch.randn(4, 8)
    model = kernel(torch.zeros(4, 8, 1, 1))
    optimizer = Muon(model, weight_decay=0.0)
    for step in range(400):
        (x @ (model.weight[..., 0, 0] - target).T).square().mean().backward()
        optimizer.step(0.05 * (1 - step / 400))
    assert (model.weight[..., 0, 0] - target).abs().max() < 0.1
