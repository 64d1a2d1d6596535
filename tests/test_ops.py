"""The fused op: its reference against its definition, what is called where, kernels (kernels.py)
interpreted or on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch

from minimedshift import ops

ROOT = Path(ops.__file__).parents[1]
no_triton = ops.triton is None and sys.platform != "linux"
needs_triton = pytest.mark.skipif(no_triton, reason="there is no Triton for this system")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def python(*command, **more):
    """Run Python from the repository's root; a failure shows what it printed."""
    env = dict(os.environ, **more)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def by_definition(x, weight, bias, groups, scale, shift, eps):
    """Every group's own mean and variance, one after the other."""
    B, C = x.shape[:2]
    out = []
    for b in range(B):
        for c in range(C):
            first = c // (C // groups) * (C // groups)
            group = x[b, first:first + C // groups]
            u = (x[b, c] - group.mean()) / (group.var(correction=0) + eps).sqrt() * weight[c] + bias[c]
            u = u if scale is None else u * (1 + scale[b, c]) + shift[b, c]
            out.append(u / (1 + (-u).exp()))
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("film", [True, False])
def test_the_norm_and_its_gradients_equal_their_definition(groups, film):
    shapes = ((2, 6, 5, 3), (6,), (6,), (2, 6), (2, 6))[:5 if film else 3]
    inputs = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    args = (*inputs[:3], groups, *(inputs[3:] or (None, None)), 1e-3)
    results = [ops.norm_film_silu(*args), by_definition(*args)]
    torch.testing.assert_close(*[(y, *torch.autograd.grad(y.square().sum(), inputs)) for y in results])


def test_the_norm_sums_in_float32_and_returns_what_it_got():
    norm = lambda z: ops.norm_film_silu(*z[:3], 1, *z[3:])
    shapes = ((2, 16, 64, 64), (16,), (16,), (2, 16), (2, 16))
    args = [randn(*shape, seed=i).bfloat16() + 4 * (not i) for i, shape in enumerate(shapes)]
    expected = norm([z.float() for z in args]).bfloat16()  # a sum in bfloat16 is far off
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            torch.testing.assert_close(norm(args), expected, atol=.05, rtol=.02)


def compare_compiled(device, backend, tolerance):
    """The public function is one graph; compiled it gives the same value and gradients.
    Returns whether the graph calls a fused op."""
    function = lambda *z: ops.norm_film_silu(*z[:3], 2, *z[3:])
    shapes = ((2, 4, 3, 3), (4,), (4,), (2, 4), (2, 4))
    inputs = [randn(*shape, seed=i, dtype=torch.float32).to(device) for i, shape in enumerate(shapes)]
    inputs, called = [z.requires_grad_() for z in inputs], []

    def look(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = [torch.compile(function, fullgraph=True, backend=b) for b in (look, backend)]
    results = [z(*inputs) for z in (function, *compiled)]
    results = [(y, *torch.autograd.grad(y.square().sum(), inputs)) for y in results]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=tolerance, atol=tolerance)
    assert called
    return any("minimedshift" in target for target in called)


def test_a_cpu_compiles_the_reference_in_one_graph(monkeypatch):
    monkeypatch.setattr(ops, "FUSED", True)
    assert not compare_compiled("cpu", "aot_eager", 1e-6)


def test_without_triton_there_are_the_references():
    python("-c", "import sys; sys.modules['triton'] = None\n"
                 "import torch; from minimedshift import ops\n"
                 "assert ops.triton is None\n"
                 "y = ops.norm_film_silu(torch.randn(1, 4, 2, 2), torch.ones(4), torch.ones(4), 2)\n"
                 "assert y.shape == (1, 4, 2, 2)")


@needs_triton
def test_every_check_passes_in_the_interpreter():
    python("-W", "ignore", "tests/kernels.py", TRITON_INTERPRET="1")


@needs_triton
def test_the_kernels_compile_for_a_gpu():
    python("-W", "ignore", "tests/kernels.py", "compile")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", kernels.CHECKS)
def test_every_check_passes_on_a_gpu(name):
    kernels.CHECKS[name]("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [True, False])
def test_a_gpu_compiles_what_the_switch_says(fused, monkeypatch):
    monkeypatch.setattr(ops, "FUSED", fused)
    assert compare_compiled("cuda", "inductor", 1e-4) == fused
