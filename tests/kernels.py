"""The kernels of minimedshift/ops.py against their references in float64, each a function of the device.

On a CPU Triton's interpreter runs them.

    python tests/kernels.py                     every check
    python tests/kernels.py check_half          one of them
    python tests/kernels.py compile             compile them for GPUs that need not be here, and run nothing
"""

import itertools
import os
import sys
import time
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if "compile" in sys.argv:
        torch.cuda.is_available = lambda: True  # else there is no Triton
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
    device = "cpu" if "TRITON_INTERPRET" in os.environ else "cuda"

from minimedshift import ops

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(found, expected, dtype, what):
    """The greatest error may be TOLERANCE of the greatest expected value. What is infinite must be so in
    both, and nothing may be NaN."""
    found, finite = found.double(), expected.isfinite()
    assert found.shape == expected.shape, f"{what}: {found.shape} instead of {expected.shape}"
    assert torch.equal(found[~finite], expected[~finite]), f"{what}: {found} instead of {expected}"
    if finite.any():
        error, scale = (found - expected)[finite].abs().max(), expected[finite].abs().max()
        assert error <= TOLERANCE[dtype] * scale.clamp_min(1e-3), f"{what}: off by {error:.2e} of {scale:.2e}"


def normals(device, seed=0):
    """randn(*shape) from one seeded stream, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=g).to(device)


def leaves(*tensors):
    """Copies in float64 that need a gradient, None where there is none."""
    return [None if z is None else z.detach().double().requires_grad_() for z in tensors]


def norm_film_silu(device, B, C, groups, H, W, film=True, dtype=torch.float32, mean=0.0, kept=torch.float32):
    """Value and gradients of one shape. x and dy in either memory format, scale and shift strided as a
    network makes them, or turned."""
    draw = normals(device)
    x, dy = (2 * draw(B, C, H, W) + mean).to(dtype), draw(B, C, H, W).to(dtype)
    weight, bias = draw(C).to(kept), draw(C).to(kept)
    scale, shift = draw(B, 2 * C).to(dtype).chunk(2, 1) if film else (None, None)
    inputs = leaves(x, weight, bias, scale, shift)
    wanted = ops.norm_film_silu_reference(*inputs[:3], groups, *inputs[3:])
    used = [z for z in inputs if z is not None]
    wanted = [wanted, *torch.autograd.grad(wanted, used, dy.double())]
    for turn in range(2):
        if turn:
            x, dy = x.to(memory_format=torch.channels_last), dy.to(memory_format=torch.channels_last)
            scale, shift = (z if z is None else z.T.contiguous().T for z in (scale, shift))
        args = [z if z is None else z.detach().requires_grad_() for z in (x, weight, bias, scale, shift)]
        y = ops.fused_norm_film_silu(*args[:3], groups, *args[3:])
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        args = [z for z in args if z is not None]
        found = [y, *torch.autograd.grad(y, args, dy)]
        names = ("y", "dx", "dweight", "dbias", "dscale", "dshift")
        for name, a, b, like in zip(names, found, wanted, (x, *args)):
            assert a.dtype == like.dtype
            close(a, b, dtype, f"{name} of {B, C, groups, H, W}")


def check_norm_film_silu(device):
    shapes = ((2, 16, 1, 7, 5), (1, 48, 3, 33, 1), (3, 48, 3, 1, 1), (1, 16, 1, 6, 8), (2, 6, 3, 4, 4),
              (1, 1, 1, 5, 5), (1, 136, 17, 4, 3))
    for shape in shapes:
        norm_film_silu(device, *shape)


def check_norm_silu(device):
    for shape in ((3, 16, 1, 7, 5), (1, 48, 3, 33, 1)):
        norm_film_silu(device, *shape, film=False)


def check_a_large_mean(device):
    for mean in (100, -100):
        norm_film_silu(device, 1, 32, 2, 9, 7, mean=mean)


def check_half(device):
    norm_film_silu(device, 1, 48, 3, 7, 5, dtype=torch.bfloat16)
    norm_film_silu(device, 1, 16, 1, 7, 5, dtype=torch.bfloat16, kept=torch.bfloat16, film=False)
    norm_film_silu(device, 1, 48, 3, 7, 5, dtype=torch.float16)


def check_what_is_kept(device):
    """Between forward and backward: inputs, mean and rstd. Everything but x is a few numbers a channel."""
    B, C, H, W = 2, 16, 16, 16
    draw, kept = normals(device), []
    x = draw(B, C, H, W).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = draw(C).requires_grad_(), draw(C).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        ops.fused_norm_film_silu(x, weight, bias, 1, *draw(B, 2 * C).requires_grad_().chunk(2, 1))
    storages = {z.untyped_storage().data_ptr(): z.numel() for z in kept}
    assert storages.pop(x.untyped_storage().data_ptr()) == x.numel(), storages
    assert 0 < max(storages.values()) <= B * C, storages
    assert sum(z.shape == (B, 1) for z in kept) == 2


def check_registration(device):
    """torch.library.opcheck: schema, no aliasing, fake tensors, autograd; all traced with dynamic shapes."""
    draw = normals(device)
    grad = lambda *shape: draw(*shape).requires_grad_()
    x, gain, offset, mean, rstd = draw(2, 6, 5, 3), draw(2, 6), draw(2, 6), draw(2, 3), draw(2, 3).abs()
    for op, args in ((ops.norm_silu, (grad(2, 6, 5, 3), grad(2, 6), grad(2, 6), 3, 1e-5)),
                     (ops.norm_silu_backward, (draw(2, 6, 5, 3), x, gain, offset, mean, rstd))):
        torch.library.opcheck(op, args)


def check_compile(device):
    """Functions that use the kernels compile without a graph break, and give what they give uncompiled."""
    draw = normals(device)
    shapes = ((2, 16, 4, 3), (16,), (16,), (2, 32))
    x, weight, bias, film = (draw(*shape).requires_grad_() for shape in shapes)

    def function(x, weight, bias, film):
        out = 2 * ops.fused_norm_film_silu(x + 1, weight, bias, 2, *film.chunk(2, 1))
        return out.square().sum()

    inputs = (x, weight, bias, film)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = [(out, *torch.autograd.grad(out, inputs)) for out in (function(*inputs), compiled(*inputs))]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


class CompileOnly:
    """In the place of a kernel: kernel[grid](*args) compiles it for these arguments, for a GPU that need not
    be here, and runs nothing."""
    TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", int: "i32", float: "fp32"}

    def __init__(self, kernel, compiled, capability):
        self.kernel, self.compiled, self.capability = kernel, compiled, capability

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        signature, constants = {}, {}
        for i, (parameter, arg) in enumerate(zip(self.kernel.params, args, strict=True)):
            if parameter.is_constexpr:
                constants[(i,)] = arg
                signature[parameter.name] = "constexpr"
            else:
                signature[parameter.name] = self.TYPES[arg.dtype if torch.is_tensor(arg) else type(arg)]
        source, target = ASTSource(self.kernel, signature, constants), GPUTarget("cuda", self.capability, 32)
        done = ops.triton.compile(source, target=target, options=dict(num_warps=num_warps))
        self.compiled[self.kernel.__name__] = done.asm["ptx"]


def compile_for_gpus():
    """At a network's sizes, on tensors without memory."""
    kernels = {name: getattr(ops, name) for name in ("forward_kernel", "backward_kernel")}
    like = dict(device="meta")
    for dtype, capability in itertools.product((torch.float32, torch.bfloat16), (75, 80, 90, 120)):
        compiled = {}  # for T4, A100, H100, the Blackwell of a desktop
        for name, kernel in kernels.items():
            setattr(ops, name, CompileOnly(kernel, compiled, capability))
        x = torch.empty(256, 128, 64, 64, dtype=dtype, **like)
        gain, mean = torch.empty(256, 128, **like), torch.empty(256, 8, **like)
        ops.norm_silu._init_fn(x, gain, gain, 8, 1e-5)
        ops.norm_silu_backward._init_fn(x, x, gain, gain, mean, mean)
        assert len(compiled) == 2 and all(f".target sm_{capability}" in ptx for ptx in compiled.values())


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    if "compile" in sys.argv:
        sys.exit(compile_for_gpus())
    for name in sys.argv[1:] or CHECKS:
        start = time.perf_counter()
        CHECKS[name](device)
        print(f"{name}  {time.perf_counter() - start:.1f} s", flush=True)
