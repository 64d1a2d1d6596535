"""A fused op, in a few lines of PyTorch and as Triton kernels: two passes over memory instead of five.

    norm_film_silu   silu(GroupNorm(x) (1 + scale) + shift), what stands before a convolution of the network

The reference says what is computed. A kernel is one program run many times at once, here for each group of
each image. It loads a tile of numbers (a mask drops what lies beyond the edge), computes in float32, stores.
torch.compile cannot look into a custom_op: register_fake tells the shapes, register_autograd the gradient."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from minimedshift.support.machine import triton

if triton:
    import triton.language as tl
    jit = triton.jit
else:  # the kernels stay plain functions, and nobody calls them
    tl = SimpleNamespace(constexpr=None)
    jit = lambda kernel: kernel

FUSED = False  # on a GPU: the kernels, or the compiled reference; `python studies/bench.py` times both
LAST = dict(memory_format=torch.channels_last)


def wide(x):  # at least float32
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_film_silu(x, weight, bias, groups, scale=None, shift=None, eps=1e-5):
    """silu(GroupNorm(x; weight, bias) (1 + scale) + shift): y like x.
    x (B, C, H, W), weight, bias (C,), scale, shift (B, C) or both None."""
    fused = FUSED and x.is_cuda and triton is not None
    low = x.device.type == "cpu" and x.dtype == torch.bfloat16
    function = fused_norm_film_silu if fused else on_cpu if low else norm_film_silu_reference
    return function(x, weight, bias, groups, scale, shift, eps)


def on_cpu(x, weight, bias, groups, scale, shift, eps):
    """The same for x in bfloat16. Sums are in float32 anyway; the rest in bfloat16 takes half of the time."""
    for_all = lambda z: z.to(x.dtype)[:, :, None, None]
    with torch.autocast("cpu", enabled=False):
        u = F.group_norm(x, groups, weight.float(), bias.float(), eps)
        u = u if scale is None else torch.addcmul(for_all(shift), u, for_all(1 + scale.float()))
        return F.silu(u)


def norm_film_silu_reference(x, weight, bias, groups, scale=None, shift=None, eps=1e-5):
    if x.is_cuda:
        return by_channels(x, weight, bias, groups, scale, shift, eps)
    u = F.group_norm(wide(x), groups, wide(weight), wide(bias), eps)
    if scale is not None:
        u = u * (1 + wide(scale)[:, :, None, None]) + wide(shift)[:, :, None, None]
    return F.silu(u).to(x.dtype)


def by_channels(x, weight, bias, groups, scale=None, shift=None, eps=1e-5):
    """The same: moments of each channel, then of its group, then silu(a x + b). Its gradient, compiled with
    model.compile_blocks, moves 171 MB where that of the above moves 541 (32 images, 128 channels, 64x64)."""
    in_groups = lambda z: z.unflatten(1, (groups, -1))
    for_each = lambda z: z.expand(-1, -1, x.shape[1] // groups).flatten(1)  # (B, groups, 1) -> (B, C)
    var, mean = torch.var_mean(wide(x), (2, 3), correction=0)  # (B, C)
    between, m = torch.var_mean(in_groups(mean), 2, correction=0, keepdim=True)
    a = wide(weight) * for_each((in_groups(var).mean(2, keepdim=True) + between + eps).rsqrt())
    b = wide(bias) - a * for_each(m)
    if scale is not None:
        a, b = a * (1 + wide(scale)), b * (1 + wide(scale)) + wide(shift)
    return F.silu(wide(x) * a[:, :, None, None] + b[:, :, None, None]).to(x.dtype)


def fused_norm_film_silu(x, weight, bias, groups, scale=None, shift=None, eps=1e-5):
    """The same by kernels; y is channels-last.

    In each channel of an image u = gain xhat + offset, xhat = (x - mean) rstd, gain and offset (B, C). With
    du = dy silu'(u), sums over an image's pixels and means over a group's n elements:

        doffset = S0 = sum du,    dgain = S1 = sum du xhat
        dx = rstd (gain du - A0 - A1 xhat)
        A0 = mean gain du = sum_channels gain S0 / n,    A1 = mean gain du xhat = sum_channels gain S1 / n

    A program has one group of one image, and goes over it twice: for sums, then for y or dx."""
    gain, offset = weight.float().expand(x.shape[:2]), bias.float().expand(x.shape[:2])
    if scale is not None:
        factor = 1 + scale.float()
        gain, offset = gain * factor, offset * factor + shift.float()
    return norm_silu(x, gain, offset, groups, eps)[0]


def launch(kernel, x, mean, *args):
    """Run a kernel, one program for each image of x and each group of mean (B, groups). An image is
    (pixels, C) in channels-last memory. A program's tile has at most 4096 elements: pixels, by channels."""
    (B, C, H, W), groups = x.shape, mean.shape[1]
    cols = triton.next_power_of_2(C // groups)
    rows = min(triton.next_power_of_2(H * W), max(1, 4096 // cols))
    kernel[B, groups](x, mean, *args, H * W, C, C // groups, rows, cols, num_warps=8)


@jit
def place(pixels, C, each, COLS: tl.constexpr):
    """Where this program's group is: its number, its first pixel in x (1, COLS), its channels in a table
    (B, C), and which of them exist. each: channels of a group."""
    image, group, col = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, COLS)[None, :]
    channel = group * each + col
    return image * tl.num_programs(1) + group, image * pixels * C + channel, image * C + channel, col < each


@jit
def tile(first, start, exists, pixels, C, ROWS: tl.constexpr):
    """The pixels from number `first` on: where they are in x and which exist, (ROWS, COLS)."""
    row = first + tl.arange(0, ROWS)[:, None]
    return start + row * C, (row < pixels) & exists


@jit
def gradient(x, dy, at, there, mean, rstd, gain, offset):
    """xhat and du = dy silu'(u) of a tile, where silu(u) = u s. du is 0 where nothing exists."""
    xhat = (tl.load(x + at, there, 0.).to(tl.float32) - mean) * rstd
    u = gain * xhat + offset
    s = tl.sigmoid(u)
    return xhat, tl.load(dy + at, there, 0.).to(tl.float32) * s * (1 + u * (1 - s))


@jit
def forward_kernel(x, mean, rstd, gain, offset, y, eps, pixels, C, each, ROWS: tl.constexpr,
                   COLS: tl.constexpr):
    """Sums are of x less a channel's first pixel: of a large mean, E x^2 - mean^2 would be all rounding."""
    number, start, channel, exists = place(pixels, C, each, COLS)
    pixel = tl.load(x + start, exists, 0.).to(tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, pixels, ROWS):
        at, there = tile(first, start, exists, pixels, C, ROWS)
        v = tl.where(there, tl.load(x + at, there, 0.).to(tl.float32) - pixel, 0.)
        total += v
        squares += v * v
    own = tl.sum(total, 0, keep_dims=True) / pixels
    within = tl.sum(squares, 0, keep_dims=True) / pixels - own * own
    m = tl.sum(own + pixel) / each
    between = tl.where(exists, own + pixel - m, 0.)  # all variance: of the channels' means, plus within them
    r = 1 / tl.sqrt(tl.sum(within + between * between) / each + eps)
    tl.store(mean + number, m)
    tl.store(rstd + number, r)
    slope, bias = tl.load(gain + channel, exists, 0.) * r, tl.load(offset + channel, exists, 0.)
    for first in range(0, pixels, ROWS):
        at, there = tile(first, start, exists, pixels, C, ROWS)
        u = (tl.load(x + at, there, 0.).to(tl.float32) - m) * slope + bias
        tl.store(y + at, (u * tl.sigmoid(u)).to(y.dtype.element_ty), there)


@jit
def backward_kernel(x, mean, rstd, gain, offset, dy, dx, dgain, doffset, pixels, C, each,
                    ROWS: tl.constexpr, COLS: tl.constexpr):
    number, start, channel, exists = place(pixels, C, each, COLS)
    m, r = tl.load(mean + number), tl.load(rstd + number)
    slope, bias = tl.load(gain + channel, exists, 0.), tl.load(offset + channel, exists, 0.)
    S0 = tl.zeros((ROWS, COLS), tl.float32)
    S1 = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, pixels, ROWS):
        at, there = tile(first, start, exists, pixels, C, ROWS)
        xhat, du = gradient(x, dy, at, there, m, r, slope, bias)
        S0 += du
        S1 += du * xhat
    sum0, sum1 = tl.sum(S0, 0, keep_dims=True), tl.sum(S1, 0, keep_dims=True)
    tl.store(doffset + channel, sum0, exists)
    tl.store(dgain + channel, sum1, exists)
    A0, A1 = tl.sum(slope * sum0) / (pixels * each), tl.sum(slope * sum1) / (pixels * each)
    for first in range(0, pixels, ROWS):
        at, there = tile(first, start, exists, pixels, C, ROWS)
        xhat, du = gradient(x, dy, at, there, m, r, slope, bias)
        tl.store(dx + at, ((slope * du - A0 - A1 * xhat) * r).to(dx.dtype.element_ty), there)


@custom_op("minimedshift::norm_silu", mutates_args=())
def norm_silu(x: Tensor, gain: Tensor, offset: Tensor, groups: int,
              eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, channels-last, mean and rstd (B, groups). gain, offset (B, C) float32."""
    x, gain, offset = x.contiguous(**LAST), gain.contiguous(), offset.contiguous()
    y, mean = torch.empty_like(x, **LAST), gain.new_empty(len(x), groups)
    rstd = torch.empty_like(mean)
    launch(forward_kernel, x, mean, rstd, gain, offset, y, eps)
    return y, mean, rstd


@custom_op("minimedshift::norm_silu_backward", mutates_args=())
def norm_silu_backward(dy: Tensor, x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor,
                       rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, channels-last, dgain and doffset (B, C)."""
    dy, x = dy.contiguous(**LAST), x.contiguous(**LAST)
    gain, offset = gain.contiguous(), offset.contiguous()
    dx, dgain, doffset = torch.empty_like(x, **LAST), torch.empty_like(gain), torch.empty_like(gain)
    launch(backward_kernel, x, mean, rstd, gain, offset, dy, dx, dgain, doffset)
    return dx, dgain, doffset


@norm_silu.register_fake
def norm_silu_shapes(x, gain, offset, groups, eps):
    return torch.empty_like(x, **LAST), gain.new_empty(len(x), groups), gain.new_empty(len(x), groups)


@norm_silu_backward.register_fake
def norm_silu_backward_shapes(dy, x, gain, *rest):
    return torch.empty_like(x, **LAST), gain.new_empty(gain.shape), gain.new_empty(gain.shape)


def keep_moments(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])


def norm_silu_gradients(ctx, dy, *_):
    return *norm_silu_backward(dy, *ctx.saved_tensors), None, None


norm_silu.register_autograd(norm_silu_gradients, setup_context=keep_moments)
