"""The first ten minutes on a GPU: `python -m pytest -m gpu -s`, then `python studies/bench.py`.

The checks print figures, and say what to expect. They run on a CPU too, in small, so that a card finds them
in order. H100: 12 to 17 ms a step of the gpu preset, 18 % of what its matrix products reach; A100: 27 ms; RTX
3060: 190 ms. Less by a half: look at the clock and power limit, then at the share of the host."""

import signal
import time
from dataclasses import replace

import pytest
import torch

import train
from minimedshift.coupling import Semidiscrete
from minimedshift.flow import draw_noise
from minimedshift.model import PRESETS, Block, Shape
from minimedshift.support.log import Log
from minimedshift.support.machine import can_compile

ON_A_CARD = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
FLOPS = 27.11e9  # of an image of the gpu preset; a step is three times as much
SMALL = replace(PRESETS["cpu"], size=16, batch_size=4, shape=Shape(stem=4, widths=(32, 32), blocks=(1, 1)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_A_CARD)])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setitem(PRESETS, "cpu", SMALL)
    torch.compiler.reset()
    return torch.device(request.param)


def trainer(device, dtype=torch.bfloat16, compile="no"):
    """step(i) -> the loss of step i, as training makes it, on noise; the batch; the network."""
    preset = "gpu" if device.type == "cuda" else "cpu"
    config = train.resolve(train.Config(preset=preset, device=device.type, compile="no"))[0]
    model, optimizer, _ = train.build(config, 5, 1, device, dtype, torch.channels_last)
    if compile == "yes":
        model.compile_blocks(dynamic=False, backend="inductor" if can_compile(device) else "aot_eager")
    B, size = config.batch_size, config.size
    generator = torch.Generator(device).manual_seed(0)
    x0, x1 = (draw_noise((B, 1, size, size), generator, 1.0, device) for _ in range(2))
    y, t = torch.arange(B, device=device) % 5, torch.linspace(0, .99, B, device=device)
    lr = torch.tensor(.02, device=device)
    return lambda: train.take_step(model, optimizer, config, dtype, lr, x0, x1, y, t, None)[0], x1


def test_a_compiled_block_equals_float64_in_every_gradient(device):
    torch.manual_seed(0)
    block = Block(64, 32).to(device)
    torch.nn.init.normal_(block.conv2.weight, std=.05)
    exact = Block(64, 32).to(device).double()
    exact.load_state_dict(block.state_dict())
    block.compile(dynamic=False, backend="inductor" if can_compile(device) else "aot_eager")
    x, emb = torch.randn(2, 64, 8, 8, device=device), torch.randn(2, 32, device=device)
    results = []
    for net, dtype in ((block, torch.float32), (exact, torch.float64)):
        out = net(x.to(dtype), emb.to(dtype))
        results.append([out, *torch.autograd.grad(out.square().mean(), list(net.parameters()))])
    for found, wanted in zip(*results, strict=True):
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < (5e-3 if device.type == "cuda" else 1e-5)  # a GPU's convolutions are TF32


def test_plain_compiled_and_float32_steps_lose_alike_and_are_compiled_once(device):
    losses = {}
    for name, dtype, compile in (("plain", torch.bfloat16, "no"), ("compiled", torch.bfloat16, "yes"),
                                 ("float32", torch.float32, "no")):
        step, _ = trainer(device, dtype, compile)
        first = step()
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses[name] = torch.stack([first, *(step() for _ in range(19))])
    assert losses["float32"][-1] < .9 * losses["float32"][0]
    for name in ("plain", "compiled"):
        torch.testing.assert_close(losses[name], losses["float32"], rtol=.01, atol=0)


def test_a_step_takes_what_its_work_takes(device):
    """Milliseconds a step, the host's share of them, memory, and the share of a matrix product's speed."""
    count, n = (100, 8192) if device.type == "cuda" else (3, 512)
    step, x1 = trainer(device, compile="yes")
    wait = lambda: None
    if device.type == "cuda":
        wait = torch.cuda.synchronize
        torch.cuda.reset_peak_memory_stats()
    matrix = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for work in (step, lambda: matrix @ matrix):
        for _ in range(3):
            work()
        wait()
        start = time.perf_counter()
        for _ in range(count):
            work()
        host = (time.perf_counter() - start) / count
        wait()
        seconds = (time.perf_counter() - start) / count
        if work is step:
            step_seconds, share = seconds, host / seconds
    if device.type == "cuda":
        speed, ceiling = 3 * FLOPS * len(x1) / step_seconds, 2 * n**3 / seconds
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"\n{torch.cuda.get_device_name()}: {1e3 * step_seconds:.1f} ms a step, host {share:.0%}, "
              f"{peak:.1f} GB, {speed / 1e12:.0f} of {ceiling / 1e12:.0f} TFLOP/s")
        assert speed > .08 * ceiling and share < .9 and peak < 24
    assert 0 < share <= 1


def test_bfloat16_picks_the_images_that_float32_picks(device):
    draw = torch.Generator().manual_seed(0)
    images, x0 = .5 * draw_noise((2000, 1, 32, 32), draw, 1.0), draw_noise((256, 1, 32, 32), draw, 1.0)
    y = torch.zeros(256, dtype=torch.int64)
    picks = [Semidiscrete([images], [torch.zeros(2000)], device, dtype)(x0.to(device), y)[1]
             for dtype in (torch.float32, torch.bfloat16)]
    assert (picks[0] == picks[1]).flatten(1).all(1).float().mean() > .99


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(device, tmp_path, monkeypatch):
    class Stopping(Log):
        def __call__(self, step, *rest, **more):
            super().__call__(step, *rest, **more)
            if step == 20 and not self.first:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    flags = ("--size 16 --preset cpu --train-images 20 --valid-heads 2 --test-heads 8 --batch-size 4 "
             f"--steps 40 --no-student --no-evaluate --device {device.type} --out").split()
    assert train.main([*flags, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(train, "Log", Stopping)
    assert train.main([*flags, str(tmp_path / "parts")]) == 130
    assert train.main([*flags, str(tmp_path / "parts"), "--resume"]) == 0
    rows = [(tmp_path / name / "log.csv").read_text().splitlines()[1:] for name in ("whole", "parts")]
    whole, parts = (torch.tensor([float(row.split(",")[1]) for row in some]) for some in rows)
    torch.testing.assert_close(parts, whole, rtol=.01 if device.type == "cuda" else 1e-6, atol=0)
