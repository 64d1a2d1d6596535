"""Training that fails: it goes back to good weights, says so, and stops with advice when nothing helps."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from pretend import pretended
from test_train import TINY, same_tensors

import train
from minimedshift import flow
from minimedshift.support import checkpoint, guard
from minimedshift.support.command import UserError
from minimedshift.support.log import LOOK


def trained():
    """A network that has taken a step, its optimizer and its mean."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    optimizer, ema = torch.optim.AdamW(net.parameters(), .1), checkpoint.EMA(net)
    take_step(net, optimizer, ema, 1)
    return net, optimizer, ema


def take_step(net, optimizer, ema, step):
    net(torch.ones(3)).square().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(step)


def state(net, optimizer, ema):
    return net.state_dict(), ema.mean, optimizer.state_dict()


@pytest.mark.parametrize("loss, norm, fault", [
    (math.nan, 1., True), (math.inf, 1., True), (1., math.nan, True), (1., math.inf, True), (11., 1., True),
    (9., 1., False)])
def test_a_fault_gives_back_the_kept_state(capsys, monkeypatch, loss, norm, fault):
    monkeypatch.setattr(guard, "EVERY", 2)
    net, optimizer, ema = trained()
    watch = guard.Guard(net, [optimizer], ema).watch
    watch(1, [(1, .5, 1.)])
    watch(2, [(2, 1., 1.)])  # here it keeps the state, and the largest loss
    kept = copy.deepcopy(state(net, optimizer, ema))
    for step in (3, 4, 5):
        take_step(net, optimizer, ema, step)
    moved = copy.deepcopy(state(net, optimizer, ema))
    assert not same_tensors(moved, kept)
    watch(5, [(3, 1., 1.), (4, loss, norm), (5, 1., 1.)])
    assert same_tensors(state(net, optimizer, ema), kept if fault else moved)
    assert ("step 4 has loss" in capsys.readouterr().out) == fault
    if fault:  # and again: going back has not given away what was kept
        take_step(net, optimizer, ema, 6)
        watch(6, [(6, loss, norm)])
        assert same_tensors(state(net, optimizer, ema), kept)


def broken_at(monkeypatch, steps):
    """train.py's loss is nan in some of its steps, counted from 1."""
    calls = []

    def loss(*args):
        calls.append(1)
        return flow.loss(*args) * (math.nan if len(calls) in steps else 1)

    monkeypatch.setattr(train, "flow_loss", loss)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_training_goes_on_after_a_fault(tmp_path, monkeypatch, capsys, device):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    broken_at(monkeypatch, {3})
    steps = 2 * LOOK + 5
    flags = [*TINY, "--preset", "cpu", "--no-student", "--no-evaluate", "--steps", str(steps), "--out", str(tmp_path)]
    with pretended("cuda") if device == "cuda" else nullcontext():
        assert train.main(flags) == 0
    assert "step 3 has loss nan and gradient norm nan: back to the weights after step 0" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == steps and all(p.isfinite().all() for p in saved["model"].values())
    losses = [float(row.split(",")[1]) for row in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    bad = [i + 1 for i, loss in enumerate(losses) if math.isnan(loss)]
    assert bad == ([3] if device == "cpu" else list(range(3, LOOK + 1)))  # a GPU's losses are read late


def test_training_that_only_fails_stops_with_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    broken_at(monkeypatch, set(range(4, 1000)))
    with pytest.raises(UserError, match="fault 6 of this run: start anew with a smaller --lr"):
        train.main([*TINY, "--steps", "50", "--no-evaluate", "--device", "cpu", "--out", str(tmp_path)])
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 9 and all(p.isfinite().all() for p in (saved["model"] | saved["ema"]).values())
