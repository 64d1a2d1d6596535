"""What a machine is given: formats by measurement on a CPU, by what the hardware can do on a GPU."""

from types import SimpleNamespace

import pytest
import torch

from minimedshift.model import Shape, UNet
from minimedshift.support import machine
from minimedshift.support.command import UserError

pick = machine.pick_formats.__wrapped__  # without the memory of an earlier answer
CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.mark.parametrize("bfloat16, last, best", [
    (1.2, .9, (torch.float32, torch.channels_last)),
    (.8, 1.1, (torch.float32, torch.contiguous_format)),
    (.4, .9, (torch.bfloat16, torch.channels_last)),
])
def test_a_cpu_takes_what_is_fastest_and_bfloat16_only_by_a_clear_margin(monkeypatch, bfloat16, last, best):
    """By a clock that convolutions alone move: `bfloat16` and `last` scale contiguous float32's .1 s."""
    now = [0.]

    def convolution(x, w, padding):
        seconds = .1 * (bfloat16 if x.dtype == torch.bfloat16 else 1)
        now[0] += seconds * (last if x.is_contiguous(memory_format=torch.channels_last) else 1)
        return x * 1

    monkeypatch.setattr(machine.F, "conv2d", convolution)
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert pick("auto", CPU) == best and now[0] < 2
    assert pick("bfloat16", CPU)[0] == torch.bfloat16


def test_a_gpu_takes_what_it_has_a_unit_for(monkeypatch):
    for has, auto in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(machine, "has_bfloat16", lambda: has)
        assert pick("auto", CUDA) == (auto, torch.channels_last)
        assert pick("float32", CUDA) == (torch.float32, torch.channels_last)
    with pytest.raises(UserError, match="only emulates"):
        pick("bfloat16", CUDA)
    assert pick("auto", MPS) == (torch.float32, torch.contiguous_format)


def test_a_gpu_that_cannot_run_this_torch_is_refused_and_one_that_it_misses_is_told(monkeypatch, capsys):
    def ones(*_, **__):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert machine.pick_device("auto").type == "cpu" and "no GPU is seen by torch" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(UserError, match="cuda: no kernel image; torch .* --device cpu"):
        machine.pick_device("auto")


def test_scores_are_computed_where_there_is_float64():
    assert [machine.scorer(device) for device in (MPS, CUDA, "cpu")] == ["cpu", CUDA, "cpu"]


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def function(x):
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError
        return 2 * x

    x = torch.arange(10)
    assert torch.equal(machine.in_batches(function, x, 8), 2 * x) and sizes == [8, 4, 2, 2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        machine.in_batches(lambda x: function(torch.cat([x] * 4)), x, 8)


@pytest.mark.parametrize("works", [True, False])
def test_where_the_compiler_fails_the_network_runs_as_it_is(monkeypatch, capsys, works):
    def compiled(function, **options):
        def call(*inputs):
            calls.append(1)
            if not works:
                raise RuntimeError("no code for this GPU\nand much more")
            return function(*inputs)
        return call

    calls = []
    monkeypatch.setattr(torch, "compile", compiled)
    net = UNet(Shape(stem=2, widths=(16,), blocks=(1,), head_width=16))
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    expected = net(x, t, y)
    machine.try_compile(net, x.shape, torch.float32)
    tried = len(calls)
    assert tried and torch.equal(net(x, t, y), expected) and (len(calls) > tried) == works
    assert all(p.grad is None for p in net.parameters())
    said = "" if works else "not compiling the network: no code for this GPU\n"
    said = "compiling the network, once: a minute or two\n" + said
    assert capsys.readouterr().out == said
