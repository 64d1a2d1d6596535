"""The network: shapes, what it must refuse, what its documentation claims."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minimedshift.model import Shape, UNet
from minimedshift.support import presets
from minimedshift.support.presets import PRESETS

SMALL = Shape(stem=2, widths=(32, 48), blocks=(1, 1), head=16)


def awake(shape=SMALL):
    """A network whose zero-initialised layers are not zero, so that everything is heard at the output."""
    torch.manual_seed(0)
    net = UNet(shape)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


def test_starts_at_zero():
    assert not UNet(SMALL)(torch.randn(2, 1, 16, 16), torch.rand(2), torch.tensor([0, 5])).any()


@pytest.mark.parametrize("size", [(16, 16), (8, 28)])
def test_any_size_divisible_by_the_stride(size):
    net = awake()
    assert net(torch.randn(2, 1, *size), torch.rand(2), torch.tensor([0, 5])).shape == (2, 1, *size)
    with pytest.raises(ValueError, match="divisible by 4"):
        net(torch.randn(1, 1, 16, 18), torch.rand(1), torch.tensor([0]))


def test_hears_time_label_and_every_pixel():
    net, x = awake(), torch.randn(1, 1, 16, 16)
    at = lambda t, y: net(x, torch.tensor([t]), torch.tensor([y]))
    assert not torch.allclose(at(0.5, 0), at(0.501, 0)) and not torch.allclose(at(0.5, 0), at(0.5, 5))
    x.requires_grad_()
    at(0.5, 0)[0, 0, 0, 0].backward()
    assert x.grad.abs().min() > 0  # attention: one output pixel depends on the whole image


def test_images_of_a_batch_do_not_mix():
    net, x = awake(), torch.randn(3, 1, 16, 16)
    t, y = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 5])
    torch.testing.assert_close(net(x, t, y)[1:2], net(x[1:2], t[1:2], y[1:2]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_the_file_tells_the_truth_about_each_preset(name):
    size, shape = PRESETS[name].size, PRESETS[name].shape
    with torch.device("meta"):
        net = UNet(shape)
        with FlopCounterMode(display=False) as count:
            net(torch.empty(1, 1, size, size), torch.empty(1), torch.empty(1, dtype=torch.long))
    parameters = sum(p.numel() for p in net.parameters())
    told = f"{parameters / 1e6:.2f}M parameters, {count.get_total_flops() / 1e9:.2f} GFLOPs"
    assert told in open(presets.__file__).read()


def test_blocks_of_one_width_are_compiled_once_for_training_and_once_for_every_batch_to_translate():
    torch.compiler.reset()
    found = []

    def inputs(batch, size=16):
        return torch.randn(batch, 1, size, size), torch.rand(batch), torch.zeros(batch, dtype=torch.long)

    backend = lambda graph, examples: found.append(graph) or graph.forward
    shape = Shape(stem=2, widths=(32, 48, 64), blocks=(2, 1, 2), head=16)
    net, same = awake(shape), awake(shape)
    names = list(net.state_dict())
    net.compile_blocks(dynamic=False, backend=backend)
    for batch in (4, 4, 2, 8, 3):
        args = inputs(batch)
        torch.testing.assert_close(net(*args), same(*args))
    assert len(found) == 3 * 4 and list(net.state_dict()) == names
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        net(*inputs(5))
    assert len(found) == 3 * 4
    torch.compiler.reset()
    found.clear()
    net.compile_blocks(dynamic=True, backend=backend)
    with torch.inference_mode():
        for batch, size in ((4, 16), (8, 16), (3, 16), (6, 24)):
            net(*inputs(batch, size))
    assert len(found) == 3
