"""Checkpoints: whole or not at all, and refused in one sentence."""

from dataclasses import asdict

import pytest
import torch
from networks import save_network

from minimedshift import model
from minimedshift.model import Shape, UNet
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError

NET = UNet(Shape(num_domains=5, stem=2, widths=(16,), blocks=(1,), head_width=16))


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


@pytest.mark.parametrize("weights, says", [
    ({}, "weight is nothing"),
    (None, "weight is nothing"),
    ({"weight": torch.zeros(3, 3)}, r"weight is \(3, 3\), this one needs \(2, 2\)"),
    ({"weight": torch.zeros(2, 2), "more": 1}, "more is nothing"),
    ({"weight": torch.tensor([[0, 0], [0, torch.nan]])}, "a number in weight is not finite"),
])
def test_weights_that_do_not_fit_are_refused_by_the_first_name(weights, says):
    net = torch.nn.Linear(2, 2, bias=False)
    before = net.weight.clone()
    with pytest.raises(UserError, match=f"c.pt .*{says}"):
        checkpoint.fill(net, weights, "c.pt")
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("part, says", [
    (dict(shape=asdict(NET.shape) | dict(widths=(2**40,))), "shape"),
    (dict(domains=["a"]), "domains"),
    (dict(translate=dict(tau=1.0, t_image=.97)), "translate"),
])
def test_what_describes_no_network_is_refused_before_one_is_made(tmp_path, monkeypatch, part, says):
    save_network(tmp_path / "c.pt", NET)
    checkpoint.save(tmp_path / "c.pt", checkpoint.load(tmp_path / "c.pt") | part)
    monkeypatch.setattr(model, "UNet", lambda shape: pytest.fail("too late"))
    with pytest.raises(UserError, match=says):
        model.load_model(tmp_path / "c.pt")


def test_a_network_is_loaded_with_its_mean_weights(tmp_path):
    shape = Shape(widths=(32,), blocks=(1,))
    raw, mean = UNet(shape).state_dict(), UNet(shape).state_dict()
    save_network(tmp_path / "c.pt", UNet(shape), model=raw, ema=mean)
    net, state = model.load_model(tmp_path / "c.pt")
    assert all(torch.equal(value, mean[name]) for name, value in net.state_dict().items())
    assert not torch.equal(raw["stem.weight"], mean["stem.weight"]) and not net.training
    assert torch.equal(state["model"]["stem.weight"], raw["stem.weight"])
