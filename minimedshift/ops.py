"""A fused op, in a few lines of PyTorch and as Triton kernels: two passes over memory instead of five.

    norm_film_silu   silu(GroupNorm(x) (1 + scale) + shift), what stands before a convolution of the network

The reference says what is computed. A kernel is one program run many times at once, each time on its own
tile of numbers: it loads them (a mask drops what lies beyond the edge), computes in float32, and stores.
torch.compile cannot look into a custom_op: register_fake tells the shapes, register_autograd the gradient."""

from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # e.g. on macOS: the kernels stay plain functions, and nobody calls them
    triton = None
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
    function = fused_norm_film_silu if fused else norm_film_silu_reference
    return function(x, weight, bias, groups, scale, shift, eps)


def norm_film_silu_reference(x, weight, bias, groups, scale=None, shift=None, eps=1e-5):
    u = F.group_norm(wide(x), groups, wide(weight), wide(bias), eps)
    if scale is not None:
        u = u * (1 + wide(scale)[:, :, None, None]) + wide(shift)[:, :, None, None]
    return F.silu(u).to(x.dtype)


def fused_norm_film_silu(x, weight, bias, groups, scale=None, shift=None, eps=1e-5):
    """The same by kernels; y is channels-last.

    In each channel of an image u = gain xhat + offset, xhat = (x - mean) rstd, gain and offset (B, C). With
    du = dy silu'(u), sums over an image's pixels and means over a group's n elements:

        doffset = S0 = sum du,    dgain = S1 = sum du xhat
        dx = rstd (gain du - A0 - A1 xhat)
        A0 = mean gain du = sum_channels gain S0 / n,    A1 = mean gain du xhat = sum_channels gain S1 / n

    Two kernels forward (moments of chunks of pixels, then y), two backward (S of chunks, then dx)."""
    gain, offset = weight.float().expand(x.shape[:2]), bias.float().expand(x.shape[:2])
    if scale is not None:
        factor = 1 + scale.float()
        gain, offset = gain * factor, offset * factor + shift.float()
    return norm_silu(x, gain, offset, groups, eps)[0]


@cache
def tiling(B, C, H, W):
    """The grid (chunks, B, blocks of channels), and the sizes that kernels take: pixels, rows, C, ROWS, COLS.
    An image is (pixels, C) in channels-last memory. A tile has at most 8192 elements, fewer where a GPU would
    be idle. The chunks of an image are equally long, so that its moments are plain means of theirs."""
    cols = min(triton.next_power_of_2(C), 128)
    blocks = triton.cdiv(C, cols)
    most = 512
    while most > 16 and (most * cols > 8192 or B * triton.cdiv(H * W, most) * blocks < 512):
        most //= 2
    rows = max(r for r in range(1, most + 1) if H * W % r == 0)
    grid = (H * W // rows, B, blocks)
    return grid, (H * W, rows, C, triton.next_power_of_2(rows), cols)


@jit
def place(pixels, rows, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's tile: where it is in x and what of it exists (ROWS, COLS), its channels (1, COLS)."""
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)[None, :]
    at = (image * pixels + chunk * rows + row) * C + col
    return at, (row < rows) & (col < C), col


@jit
def of_channels(table, k, col, C):
    """Row k of a table (rows, B, C) for this program's channels: (1, COLS)."""
    return tl.load(table + (k * tl.num_programs(1) + tl.program_id(1)) * C + col, col < C, 0.)


@jit
def store_two(parts, first, second, col, C):
    """Two numbers for each of this program's channels, into parts (B, chunks, 2, C)."""
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * C + col
    tl.store(parts + at, first, col < C)
    tl.store(parts + at + C, second, col < C)


@jit
def normalised(x, table, at, there, col, C):
    """xhat and u of a tile. The first rows of the table are mean, rstd, gain, offset."""
    v = tl.load(x + at, there, 0.).to(tl.float32)
    xhat = (v - of_channels(table, 0, col, C)) * of_channels(table, 1, col, C)
    return xhat, of_channels(table, 2, col, C) * xhat + of_channels(table, 3, col, C)


@jit
def gradient(x, dy, table, at, there, col, C):
    """xhat and du = dy silu'(u) of a tile, where silu(u) = u s. du is 0 where nothing exists."""
    xhat, u = normalised(x, table, at, there, col, C)
    s = tl.sigmoid(u)
    return xhat, tl.load(dy + at, there, 0.).to(tl.float32) * s * (1 + u * (1 - s))


@jit
def moments_kernel(x, parts, pixels, rows, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mean and variance of each chunk and channel. Of a large mean, E x^2 - mean^2 would be all rounding."""
    at, there, col = place(pixels, rows, C, ROWS, COLS)
    v = tl.load(x + at, there, 0.).to(tl.float32)
    mean = tl.sum(v, 0, keep_dims=True) / rows
    v = tl.where(there, v - mean, 0.)
    store_two(parts, mean, tl.sum(v * v, 0, keep_dims=True) / rows, col, C)


@jit
def silu_kernel(x, y, table, pixels, rows, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    at, there, col = place(pixels, rows, C, ROWS, COLS)
    _, u = normalised(x, table, at, there, col, C)
    tl.store(y + at, (u * tl.sigmoid(u)).to(y.dtype.element_ty), there)


@jit
def sums_kernel(x, dy, parts, table, pixels, rows, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """S0 and S1 of each chunk and channel."""
    at, there, col = place(pixels, rows, C, ROWS, COLS)
    xhat, du = gradient(x, dy, table, at, there, col, C)
    store_two(parts, tl.sum(du, 0, keep_dims=True), tl.sum(du * xhat, 0, keep_dims=True), col, C)


@jit
def dx_kernel(x, dy, dx, table, pixels, rows, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows 4 and 5 of the table are A0 and A1."""
    at, there, col = place(pixels, rows, C, ROWS, COLS)
    xhat, du = gradient(x, dy, table, at, there, col, C)
    v = of_channels(table, 2, col, C) * du
    v -= of_channels(table, 4, col, C) + of_channels(table, 5, col, C) * xhat
    tl.store(dx + at, (of_channels(table, 1, col, C) * v).to(dx.dtype.element_ty), there)


def table_of(mean, rstd, gain, offset):
    """The table (4, B, C), from mean, rstd (B, groups) and gain, offset (B, C)."""
    each = gain.shape[1] // mean.shape[1]
    return torch.stack([mean.repeat_interleave(each, 1), rstd.repeat_interleave(each, 1), gain, offset])


@custom_op("minimedshift::norm_silu", mutates_args=())
def norm_silu(x: Tensor, gain: Tensor, offset: Tensor, groups: int,
              eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, channels-last, mean and rstd (B, groups). gain, offset (B, C) float32."""
    grid, sizes = tiling(*x.shape)
    x = x.contiguous(**LAST)
    parts = gain.new_empty(len(x), grid[0], 2, x.shape[1])
    moments_kernel[grid](x, parts, *sizes, num_warps=8)
    means, variances = parts.unflatten(3, (groups, -1)).unbind(2)
    var, mean = torch.var_mean(means, (1, 3), correction=0)
    rstd = (var + variances.mean((1, 3)) + eps).rsqrt()  # all variance: of the means, plus within the chunks
    y = torch.empty_like(x, **LAST)
    silu_kernel[grid](x, y, table_of(mean, rstd, gain, offset), *sizes, num_warps=8)
    return y, mean, rstd


@custom_op("minimedshift::norm_silu_backward", mutates_args=())
def norm_silu_backward(dy: Tensor, x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor,
                       rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx, channels-last, and S (B, 2, C)."""
    grid, sizes = tiling(*x.shape)
    dy, x = dy.contiguous(**LAST), x.contiguous(**LAST)
    table = table_of(mean, rstd, gain, offset)
    parts = gain.new_empty(len(x), grid[0], 2, x.shape[1])
    sums_kernel[grid](x, dy, parts, table, *sizes, num_warps=8)
    S, groups = parts.sum(1), mean.shape[1]
    A = (gain[:, None] * S).unflatten(2, (groups, -1)).sum(3) / (x[0].numel() // groups)  # (B, 2, groups)
    A = A.repeat_interleave(x.shape[1] // groups, 2)  # (B, 2, C)
    dx = torch.empty_like(x, **LAST)
    dx_kernel[grid](x, dy, dx, torch.cat([table, A.transpose(0, 1)]), *sizes, num_warps=8)
    return dx, S


@norm_silu.register_fake
def norm_silu_shapes(x, gain, offset, groups, eps):
    return torch.empty_like(x, **LAST), gain.new_empty(len(x), groups), gain.new_empty(len(x), groups)


@norm_silu_backward.register_fake
def norm_silu_backward_shapes(dy, x, gain, *rest):
    return torch.empty_like(x, **LAST), gain.new_empty(len(x), 2, x.shape[1])


def keep_moments(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])


def norm_silu_gradients(ctx, dy, *_):
    dx, S = norm_silu_backward(dy, *ctx.saved_tensors)
    return dx, S[:, 1], S[:, 0], None, None


norm_silu.register_autograd(norm_silu_gradients, setup_context=keep_moments)
