"""What this machine is and does best: device, number format, memory format, and how memory is kept."""

import ctypes
import math
import platform
import time
from functools import cache

import torch
import torch.nn.functional as F

from minimedshift.support.command import UserError
from minimedshift.ops import triton


def pick_device(name):
    """The torch.device asked for, or with "auto" the best one here. Raises UserError where there is none."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name != "auto" and name not in here:
        raise UserError(f"--device {name} is not available on this machine, which has: {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


@cache
def pick_formats(dtype, device):
    """The number format of arithmetic and the memory format of weights with which a convolution is fastest.
    On CUDA channels-last and bfloat16, where the GPU has a unit for it; on mps plain; on a CPU measured, with
    gradients, in under two seconds. dtype: "auto", or the name of the one to use."""
    wanted = [torch.float32, torch.bfloat16] if dtype == "auto" else [getattr(torch, dtype)]
    if device.type == "cuda":
        can = dtype != "auto" or has_bfloat16()
        return wanted[-1] if can else torch.float32, torch.channels_last
    if device.type == "mps":
        return wanted[0], torch.contiguous_format
    tensors = {}
    for number in wanted:
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(4, 64, 32, 32).to(number, memory_format=memory).requires_grad_()
            w = torch.randn(64, 64, 3, 3).to(number, memory_format=memory).requires_grad_()
            tensors[number, memory] = x, w
    seconds = dict.fromkeys(tensors, math.inf)
    end = time.perf_counter() + 1.2
    for turn in range(10):  # in turns, so that what else runs here disturbs all alike
        for formats, (x, w) in tensors.items():
            if turn < 2 or time.perf_counter() < end:
                start = time.perf_counter()
                y = F.conv2d(x, w, padding=1)
                y.backward(y.detach())
                spent = time.perf_counter() - start
                if formats[0] == torch.bfloat16:
                    spent = spent / .7  # less exact: it must be clearly faster
                seconds[formats] = min(seconds[formats], spent)
    return min(seconds, key=seconds.get)


def has_bfloat16():
    """Whether this CUDA GPU computes in bfloat16 (compute capability 8.0 and newer). Others emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def can_compile(device):
    """Whether torch.compile can make kernels for this device: CUDA, Triton, compute capability 7.0 or newer.
    Says once what is missing where Triton cannot build its launcher (a C compiler, or Python's headers)."""
    if device.type != "cuda" or triton is None or torch.cuda.get_device_capability() < (7, 0):
        return False
    try:
        triton.runtime.driver.active.utils
    except Exception as error:
        print(f"not compiling the network: {error}")
        return False
    return True


def keep_memory():
    """Let the C library keep memory that a step frees, for the next step. Does nothing without glibc.
    By default glibc gives large blocks back to the system, which hands them out again page by page, each
    filled with zeros: a fifth of a CPU training step."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass


def machine(device):
    """The name of the processor or GPU, for the report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        names = [line.split(":")[1].strip() for line in lines]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
