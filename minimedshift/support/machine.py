"""What this machine is and does best: device, number format, memory format, compiler, and its memory."""

import ctypes
import math
import mmap
import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from minimedshift.support.command import UserError, refuse

triton = None
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:  # elsewhere it would only take 70 MB
    with suppress(ImportError):  # on macOS and Windows
        import triton


def pick_device(name):
    """The torch.device asked for, or with "auto" the best one here. Raises UserError where there is none."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    refuse(name.partition(":")[0] not in ("auto", *here),
           f"--device {name} is not available on this machine, which has: {', '.join(here)}")
    device = here[0] if name == "auto" else name
    if name == "auto" and device == "cpu" and shutil.which("nvidia-smi"):
        print(f"no GPU is seen by torch {torch.__version__} (its CUDA: {torch.version.cuda}; is the driver "
              "too old?): computing on the CPU", file=sys.stderr)
    try:
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:  # a card without kernels is "available", and cuda:9 may be none
        why = str(error).partition("\n")[0]
        raise UserError(f"{device}: {why}; torch {torch.__version__} is made for "
                        f"{torch.cuda.get_arch_list()}: take another build, or --device cpu") from None
    return torch.device(device)


@cache
def pick_formats(dtype, device):
    """The number format of arithmetic and the memory format of weights with which a convolution is fastest.
    On a CPU they are measured, in about a second. dtype: "auto", or the name of the one to take."""
    wanted = [torch.float32, torch.bfloat16] if dtype == "auto" else [getattr(torch, dtype)]
    if device.type == "cuda":
        refuse(dtype == "bfloat16" and not has_bfloat16(), "--dtype bfloat16: this GPU only emulates it")
        return wanted[-1] if has_bfloat16() else torch.float32, torch.channels_last
    if device.type == "mps":
        return wanted[0], torch.contiguous_format
    seconds = dict.fromkeys(product(wanted, (torch.contiguous_format, torch.channels_last)), math.inf)
    end = time.perf_counter() + 1.2
    for turn in range(10):  # taking turns, so that other programs disturb all formats alike
        for pair in seconds:
            if turn < 2 or time.perf_counter() < end:
                seconds[pair] = min(seconds[pair], time_convolution(*pair))
    margin = {torch.bfloat16: .7}  # it is less exact, so it must be clearly faster
    return min(seconds, key=lambda pair: seconds[pair] / margin.get(pair[0], 1))


def time_convolution(number, memory):
    """Seconds of one convolution with its gradients."""
    x = torch.randn(4, 64, 32, 32).to(number, memory_format=memory).requires_grad_()
    w = torch.randn(64, 64, 3, 3).to(number, memory_format=memory).requires_grad_()
    start = time.perf_counter()
    y = F.conv2d(x, w, padding=1)
    y.backward(y.detach())
    return time.perf_counter() - start


def has_bfloat16():
    """Whether this CUDA GPU computes in bfloat16 (compute capability 8.0 and newer). Others emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def scorer(device):
    """Where scores and finishes are computed: they take float64, which mps lacks."""
    return "cpu" if torch.device(device).type == "mps" else device


def to_device(x, device):
    """A host tensor on the device, copied while the host goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def can_compile(device):
    """Whether torch.compile can make kernels here: CUDA, Triton, compute capability 7.0 or newer."""
    return device.type == "cuda" and triton is not None and torch.cuda.get_device_capability() >= (7, 0)


def try_compile(model, shape, dtype):
    """Compile the network's blocks and try them on images of a shape (B, C, H, W): where the compiler fails,
    one line says so and the network stays as it is."""
    device = next(model.parameters()).device
    x, t = torch.zeros(shape, device=device), torch.zeros(shape[0], device=device)
    print("compiling the network, once: a minute or two")
    model.compile_blocks(dynamic=False)
    try:
        with autocast(device, dtype):
            model(x, t, t.long()).square().mean().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler can raise anything
        why = str(error).partition("\n")[0] or type(error).__name__
        print(f"not compiling the network: {why}")
        for module in model.modules():
            module._compiled_call_impl = None
        vars(model).pop("head", None)
    model.zero_grad()


def try_capture(step, inputs, state):
    """`step`, a function of GPU tensors like `inputs` that changes `state`, as one CUDA graph: one launch
    instead of hundreds. Where that does not do what `step` does, one line says so and `step` is returned."""
    inputs, before = [x.clone() for x in inputs], [x.detach().clone() for x in state]
    other = [x / 2 if x.is_floating_point() else x for x in inputs]  # not what the graph is captured with

    def replay(*values):
        torch._foreach_copy_(inputs, values)  # the graph reads them here
        graph.replay()
        return [x.clone() for x in results]

    @torch.no_grad()
    def tried(function):  # what one step makes of the state, which is as before then
        with torch.enable_grad():
            function(*other)
        after = [x.clone() for x in state]
        torch._foreach_copy_(state, before)
        return after

    try:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose and compile what they need
                wanted = tried(step)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results = step(*inputs)
        change = [(x - y).norm().clamp_min(1e-12) for x, y in zip(wanted, before)]
        off = [((x - y).norm() / z).clamp_max(1) for x, y, z in zip(tried(replay), wanted, change)]
        why = f"its changes are off by {(off := torch.stack(off).mean().item()):.0%}"
        if off < 0.1:
            return replay
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
    with torch.no_grad():
        torch._foreach_copy_(state, before)  # a step that failed may have left a part of itself
    for x in state:
        x.grad = None
    print(f"no CUDA graph: {why}")
    return step


def keep_memory(arrays=(), size=64):
    """Let glibc keep what a step frees for the next, in blocks below 256 images of `size` pixels: a step
    takes a fifth less time. What is free now is given back, and what was read of mapped arrays."""
    for array in arrays:
        while isinstance(array, np.ndarray):
            array = array.base
        if isinstance(array, mmap.mmap) and sys.platform == "linux":
            array.madvise(mmap.MADV_DONTNEED)
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with suppress(OSError, AttributeError):  # another system has no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, min(1024 * max(64, size) ** 2, 2**25))  # glibc's most
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.malloc_trim(0)


def autocast(device, dtype):
    """In this block arithmetic has the number format `dtype`."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def to_float(array, device):
    """A stored float16 array (or a slice of one) as float32 on the device."""
    return torch.from_numpy(np.array(array, np.float32)).to(device)


def in_batches(function, x, batch=64):
    """function applied to slices of x (N, ...), joined again. A batch that a GPU has no memory for is halved.
    Raises torch.OutOfMemoryError where a single image does not fit."""
    while True:
        try:
            return torch.cat([function(part) for part in x.split(batch)])
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2


def machine_name(device):
    """The GPU with its memory and software, or the processor and how many threads it runs, for a report."""
    if device.type == "cuda":
        free, total = (round(n / 1e9, 1) for n in torch.cuda.mem_get_info(device))
        triton_version = getattr(triton, "__version__", "none")
        software = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton_version}"
        card = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
        return f"{card}, {free} of {total} GB free, {software}"
    found = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has none
    return f"{torch.get_num_threads()} x {found.get('cpu_name', platform.machine())}"
