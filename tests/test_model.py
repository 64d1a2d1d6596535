"""The network: shapes, what it must refuse, what its documentation claims."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minimedshift import model
from minimedshift.model import PRESETS, Attention, Block, Shape, UNet, time_features

SMALL = Shape(stem=2, widths=(32, 48), blocks=(1, 1), head_width=16)


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


def test_only_the_way_up_hears_the_label():
    net, x, t = awake(), torch.randn(1, 1, 16, 16), torch.tensor([0.5])
    seen = []
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    for block in blocks:
        block.register_forward_hook(lambda block, inputs, out: seen.append((block, out)))
    net(x, t, torch.tensor([0]))
    net(x, t, torch.tensor([1]))
    down = [block for module in net.down for block in module if isinstance(block, Block)]
    for (block, one), (_, other) in zip(seen[:len(blocks)], seen[len(blocks):], strict=True):
        assert torch.equal(one, other) == any(block is each for each in down)


def test_the_sinusoids_of_time():
    t = torch.tensor([0.0, 0.3, 1.0])
    angles = [[1000 * s * 1e-4 ** (i / 64) for i in range(64)] for s in t.tolist()]
    wanted = [[f(a) for f in (math.cos, math.sin) for a in row] for row in angles]
    torch.testing.assert_close(time_features(t), torch.tensor(wanted), atol=1e-3, rtol=0)


def test_attention_is_its_definition_head_by_head():
    torch.manual_seed(0)
    layer, x = Attention(32, 16), torch.randn(2, 32, 3, 2)
    torch.nn.init.normal_(layer.out.weight, std=0.1)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, 1)  # (2, 32, 6) each
    heads = []
    for own in (slice(0, 16), slice(16, 32)):
        share = (q[:, own].mT @ k[:, own] / 16**0.5).softmax(2)  # of each position in what each looks at
        heads.append(torch.einsum("bij,bcj->bci", share, v[:, own]))
    wanted = x + layer.out(torch.cat(heads, 1).view(2, 32, 3, 2))
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


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
    assert told in open(model.__file__).read()


def test_blocks_of_one_width_are_compiled_once_for_training_and_once_for_every_batch_to_translate():
    """Three widths, the attention and the head."""
    torch.compiler.reset()
    found = []

    def inputs(batch, size=16):
        return torch.randn(batch, 1, size, size), torch.rand(batch), torch.zeros(batch, dtype=torch.long)

    backend = lambda graph, examples: found.append(graph) or graph.forward
    shape = Shape(stem=2, widths=(32, 48, 64), blocks=(2, 1, 2), head_width=16)
    net, same = awake(shape), awake(shape)
    names = list(net.state_dict())
    net.compile_blocks(dynamic=False, backend=backend)
    for batch in (4, 4, 2, 8, 3):
        args = inputs(batch)
        torch.testing.assert_close(net(*args), same(*args))
    assert len(found) == 5 * 4 and list(net.state_dict()) == names
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        net(*inputs(5))
    assert len(found) == 5 * 4
    torch.compiler.reset()
    found.clear()
    net.compile_blocks(dynamic=True, backend=backend)
    with torch.inference_mode():
        for batch, size in ((4, 16), (8, 16), (3, 16), (6, 24)):
            net(*inputs(batch, size))
    assert len(found) == 5
    torch.compiler.reset()
    found.clear()
    net.compile_blocks(dynamic=False, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):  # the way up has the same kinds of numbers as the way down
        net(*inputs(4))
    assert len(found) == 5
