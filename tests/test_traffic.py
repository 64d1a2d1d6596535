"""How much memory the fused op's gradient moves on a GPU, as Inductor plans it: no GPU has to be here.

Forward and backward are traced on the CPU, moved to a pretended H100 by name, lowered, and what the kernels
read and write is counted. All that is private to torch: the test is for the version it was written with."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from minimedshift import ops
from minimedshift.model import Shape, UNet

H100 = SimpleNamespace(multi_processor_count=132, major=9, minor=0, regs_per_multiprocessor=65536,
                       max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32)
IMAGE = 32 * 128 * 64 * 64 * 2 / 1e6  # MB of 32 images in bfloat16, 128 channels, 64 x 64


def of_groups(x, weight, bias, groups, scale, shift):  # the reference for CPUs
    u = F.group_norm(x.float(), groups, weight, bias)
    u = u * (1 + scale.float()[:, :, None, None]) + shift.float()[:, :, None, None]
    return F.silu(u).to(x.dtype)


@pytest.fixture
def inductor(monkeypatch):
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, scheduler
    for place in (CudaInterface, CudaInterface.Worker):
        monkeypatch.setattr(place, "get_device_properties", staticmethod(lambda *_: H100))
    monkeypatch.setattr(CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90))
    monkeypatch.setattr(scheduler, "has_triton", lambda *_: True)
    with config.patch(realize_reads_threshold=4, realize_opcount_threshold=None):  # as they come
        yield config


def traffic(function):
    """MB that the kernels of forward and of backward read and write."""
    from torch._inductor.compile_fx import shape_env_from_inputs
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    counted = []

    def on_a_gpu(x):
        like = dict(dtype=x.dtype, device="cuda") if torch.is_tensor(x) else {}
        return torch.empty_strided(x.shape, x.stride(), **like) if like else x

    def count(module, inputs):
        with mode:
            for node in module.graph.nodes:
                node.meta["val"] = tree_map(on_a_gpu, node.meta.get("val"))
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
            inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        graph = GraphLowering(module, shape_env=shape_env_from_inputs(inputs))
        with V.set_graph_handler(graph), V.set_real_inputs(inputs), DebugContext():
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            counted.append(sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes) / 1e6)
        return make_boxed_func(module)

    with FakeTensorMode() as mode:
        x = torch.empty(32, 128, 64, 64, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        inputs = [x, torch.empty(128), torch.empty(128), torch.empty(32, 256, dtype=torch.bfloat16)]
        inputs = [z.requires_grad_() for z in inputs]
        part = lambda *args, **how: min_cut_rematerialization_partition(*args, compiler="inductor", **how)
        traced = aot_function(lambda x, w, b, film: function(x, w, b, 8, *film.chunk(2, 1)), count, count,
                              part, select_decomp_table())
        y = traced(*inputs)
        y.backward(torch.empty_like(y))
    return counted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="reads what is private to torch 2.13")
def test_compiled_for_a_gpu_the_gradient_reads_its_inputs_twice_and_writes_once(inductor):
    before = traffic(of_groups)
    UNet(Shape(widths=(16,), blocks=(1,), head_width=16)).compile_blocks()  # it sets Inductor
    forward, backward = traffic(ops.by_channels)
    assert forward < 3.1 * IMAGE            # x twice, y
    assert backward < 5.2 * IMAGE < before[1] / 3  # x and dy twice, dx; before: three times as much


def test_both_references_are_one_function():
    draw = torch.Generator().manual_seed(0)
    x, weight, bias, scale, shift = (torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
                                     for shape in ((2, 32, 5, 7), (32,), (32,), (2, 32), (2, 32)))
    for inputs, film in (((x, weight, bias), ()), ((x, weight, bias, scale, shift), (scale, shift))):
        results = [f(x, weight, bias, 2, *film) for f in (ops.norm_film_silu_reference, ops.by_channels)]
        a, b = ((y, *torch.autograd.grad(y.square().sum(), inputs)) for y in results)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
