"""Whole runs on a pretended GPU (pretend.py): nothing mixes devices, no step waits, mps gets no float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pretend import pretended

import train
import translate
from minimedshift.model import PRESETS, Shape
from minimedshift.phantom import sets
from minimedshift.support import machine
from minimedshift.support.log import Log

TINY = ("--size 16 --train-images 20 --valid-heads 2 --test-heads 8 --batch-size 4 --solver-steps 1 "
        "--student-images 2 --student-steps 2 --preset cpu").split()
RUNS = {"semidiscrete": "", "exact": "--no-evaluate", "sinkhorn": "--sigma .5 --no-evaluate",
        "independent": "--no-evaluate"}
SHAPE = Shape(stem=4, widths=(32, 32), blocks=(1, 1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    sets.phantom_set(16, 20, 2, 8, cache=folder)
    return str(folder)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, cache):
    """A small network. Nothing that was found out about the machine is kept from one test to the next."""
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", cache)
    monkeypatch.setitem(PRESETS, "cpu", replace(PRESETS["cpu"], shape=SHAPE))
    machine.pick_formats.cache_clear()
    yield
    machine.pick_formats.cache_clear()


def waits_of_steps(monkeypatch, gpu):
    """{step: what made the host wait since the step before, but for the log itself}."""
    waits = {}

    class Spy(Log):
        def __call__(self, step, *rest, **more):
            waits[step] = list(gpu.waits)
            super().__call__(step, *rest, **more)
            gpu.waits.clear()

    monkeypatch.setattr(train, "Log", Spy)
    return waits


def test_it_refuses_to_mix_and_sees_what_waits():
    with pretended("cuda") as gpu:
        x, y = torch.ones(3, device="cuda"), torch.ones(3)
        assert x.device.type == "cuda" and x.is_cuda and not y.is_cuda and x[1:].view(2, 1).is_cuda
        for mix in (lambda: x + y, lambda: torch.cat([x, y]), lambda: x.masked_fill(y > 0, 1), lambda: x @ y,
                    lambda: x.add_(y), lambda: torch.randn(3, generator=torch.Generator(), device="cuda")):
            with pytest.raises(RuntimeError):
                mix()
        with pytest.raises(TypeError):
            x.numpy()
        assert (x + 1).is_cuda and (x + torch.tensor(1.)).is_cuda and not gpu.waits
        quiet = (lambda: y.pin_memory().to("cuda", non_blocking=True), lambda: x.argmax(), lambda: x[:2] * 2)
        loud = (lambda: x.sum().item(), lambda: x.tolist(), lambda: x.cpu(), lambda: y.to("cuda"),
                lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x.any()), lambda: float(x[0]))
        for does, waits in ((quiet, False), (loud, True)):
            for f in does:
                gpu.waits.clear()
                f()
                assert bool(gpu.waits) == waits, gpu.waits
        layer = torch.nn.Linear(3, 1).to("cuda")
        layer(x).backward()
        assert layer.weight.is_cuda and layer.weight.grad.is_cuda
    with pretended("mps"):
        with pytest.raises(TypeError):
            torch.ones(3, device="mps").double()


def test_after_twenty_steps_the_log_says_what_a_step_takes(tmp_path, capsys):
    with pretended("cuda"):
        log, loss = Log(tmp_path, 13, 60, 4), torch.ones((), device="cuda")
        for step in range(14, 61):
            log(step, loss, loss, .1, (0.0, 1.0, 0.0), 0.0)
            assert ("ms a step" in capsys.readouterr().out) == (step == 40)


@pytest.mark.parametrize("fault", ["none", "it counts", "it waits"])
def test_a_step_becomes_one_graph_unless_that_does_something_else(fault, capsys):
    with pretended("cuda"):
        w, x, lr = (torch.randn(shape, device="cuda") for shape in ((3, 2), (4, 3), ()))
        w.requires_grad_()
        steps = []

        def step(lr, x):
            steps.append(1)
            loss = (x @ w).square().mean()
            loss.backward()
            with torch.no_grad():
                w.sub_(lr * (len(steps) if fault == "it counts" else 1) * w.grad)
            if fault == "it waits":
                loss.item()
            w.grad = None
            return loss.detach(), w.detach().norm()

        first = w.detach().clone()
        take = machine.try_capture(step, [lr, x], [w])
        assert torch.equal(w, first) and w.grad is None  # nothing is left of what was tried
        says = capsys.readouterr().out
        assert (take is step) == (fault != "none") == ("no CUDA graph" in says), says
        for rate in (0.1, 0.2):
            new, before = torch.randn(4, 3, device="cuda"), w.detach().clone()
            gradient = 2 / 8 * new.T @ (new @ before)
            loss, norm = take(torch.full((), rate, device="cuda"), new)
            if fault != "it counts":
                torch.testing.assert_close(loss, (new @ before).square().mean())
                torch.testing.assert_close(w.detach(), before - rate * gradient)
                torch.testing.assert_close(norm, w.detach().norm())


@pytest.mark.slow
@pytest.mark.parametrize("coupling", RUNS)
def test_a_whole_run_on_a_gpu(tmp_path, monkeypatch, coupling, capsys):
    with pretended("cuda") as gpu:
        waits = waits_of_steps(monkeypatch, gpu)
        flags = ["--steps", "4", "--out", str(tmp_path), "--coupling", coupling, *RUNS[coupling].split()]
        assert train.main([*TINY, *flags]) == 0
        checkpoint = ["--checkpoint", str(tmp_path / "checkpoint.pt")]
        for method in (["--method", "student"], ["--method", "flow"]):
            assert translate.main([*checkpoint, *method]) == 0
    says = capsys.readouterr().out
    assert "cuda: pretended (6, 0), 8.0 of 8.0 GB free" in says
    assert ", bfloat16, channels_last, cpu preset" in says and "no CUDA graph" not in says
    if coupling != "exact":  # an assignment is found on the host
        assert not waits[3] + waits[4], "these lines wait for the GPU in every step"


@pytest.mark.slow
def test_a_whole_run_on_a_mac(tmp_path, capsys):
    with pretended("mps"):
        assert train.main([*TINY, "--steps", "2", "--out", str(tmp_path)]) == 0
        assert translate.main(["--checkpoint", str(tmp_path / "checkpoint.pt"), "--method", "flow"]) == 0
    assert ", float32, contiguous_format, cpu preset" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_of_the_gpu_preset_at_its_own_size(tmp_path, monkeypatch, capsys):
    draw = np.random.default_rng(0)
    for domain in "ab":
        (tmp_path / "images" / domain).mkdir(parents=True)
        for i in range(3):
            pixels = draw.integers(0, 255, (256, 256), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / domain / f"{i}.png")
    flags = ("--steps 1 --batch-size 1 --ot-batch 1 --solver-steps 1 "
             "--student-images 1 --student-steps 1").split()
    with pretended("cuda"):
        assert train.main(["--data", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *flags]) == 0
    assert ", bfloat16, channels_last, gpu preset: 24" in capsys.readouterr().out
