"""How many centimetres of bone, soft tissue and brain each ray crosses: exact chords, cone beam.

A ray is x(t) = (u, v, 0) + t d, d = (u, v, D): it starts at the source, (0, 0, -D), and passes pixel (u, v).
In a part's own space it is y0 + t w, with w = M d and the part's matrix M. Where the ray is level with the
part's centre, y0 = k (M_u du + M_v dv) is linear in the distance (du, dv) from the projected centre."""

import contextlib
import itertools
import math

import numpy as np
import torch

from minimedshift.phantom.anatomy import CUTS, FILLS, FINE, PARTS

SOURCE_DISTANCE = 75.       # D: cm from the X-ray source to the isocentre plane, in which pixels are measured


def geometry(heads):
    """All that is known of the parts before a pixel is chosen, float64: a dict of arrays (..., B, K).
    mu, mv are columns of each part's matrix. The part's centre is projected to (uc, vc) and has the level k;
    wc is w there. A and Q are the coefficients of two polynomials in (du, dv):
    A = |w|^2 = A0 + A1 du + A2 dv + A3 du^2 + A4 du dv + A5 dv^2 and
    Q = |y0 x w|^2 = Q0 du^2 + Q1 du dv + Q2 dv^2.
    The cross product is linear and vanishes at the centre, so Q has no lower terms: float32 loses nothing."""
    last = lambda x: np.moveaxis(x, (0, 1), (-2, -1))
    dot = lambda x, y: (x * y).sum(0)
    mu, mv, mw = last([head.matrix.swapaxes(1, 2) for head in heads])
    u, v, depth = last([head.centre for head in heads])
    k = 1 + depth / SOURCE_DISTANCE
    uc, vc = u / k, v / k
    wc = mu * uc + mv * vc + mw * SOURCE_DISTANCE
    a, b = np.cross(mu, wc, axis=0) * k, np.cross(mv, wc, axis=0) * k
    A = np.stack([dot(wc, wc), 2 * dot(mu, wc), 2 * dot(mv, wc), dot(mu, mu), 2 * dot(mu, mv), dot(mv, mv)])
    Q = np.stack([dot(a, a), 2 * dot(a, b), dot(b, b)])
    return dict(mu=mu, mv=mv, wc=wc, k=k, uc=uc, vc=vc, depth=depth, A=A, Q=Q,
                cuts=last([head.cuts for head in heads]), length=np.tile(PARTS["length"], (len(heads), 1)))


def boxes(heads, field, size):
    """The box of pixels round each part: first (row, column) and last, exclusive, each (2, B, K).
    Lines u = s D and v = s D on the picture touch an ellipsoid's silhouette where s solves
    s^2 T_ww - 2 s T_uw + T_uu = 0, T = c c^T - (M^T M)^-1, with c from the source to its centre."""
    inverse = np.linalg.inv([head.matrix for head in heads])
    centre = [head.centre for head in heads] + np.array([0., 0., SOURCE_DISTANCE])
    axis = inverse[..., 2] * PARTS["length"][:, None]  # half a capsule's segment
    c = np.stack([centre - axis, centre + axis])  # the balls at both ends of the segment
    T = c[..., None] * c[..., None, :] - inverse @ inverse.swapaxes(2, 3)
    u, v, w = np.moveaxis(T, (3, 4), (0, 1))
    middle = np.stack([-v[2], u[2]]) / w[2]  # rows go down, v goes up
    reach = np.sqrt(middle ** 2 - np.stack([v[1], u[0]]) / w[2])
    pixel = lambda s: (s * SOURCE_DISTANCE / field + 1) / 2 * size
    first, last = pixel((middle - reach).min(1)) - 1, pixel((middle + reach).max(1)) + 1
    return np.clip(np.round([first, last]), 0, size).astype(int)


def polynomial(c, du, dv):
    """c0 + c1 du + c2 dv + c3 du^2 + c4 du dv + c5 dv^2."""
    return dv * (du * c[4]) + (du * (du * c[3] + c[1]) + c[0]) + dv * (dv * c[5] + c[2])


def ellipsoid_spans(part, u, v, du, dv, cuts):
    """The length of each ray inside ellipsoids, in units of t, between (-y0.w +- sqrt(A - Q)) / A.
    part: tensors (..., n, 1, 1) of n parts; u, du (n, 1, columns); v, dv (n, rows, 1)."""
    a0, a1, a2, a3, a4, a5 = part["A"]
    q0, q1, q2 = part["Q"]
    area = polynomial(part["A"], du, dv)
    inside = polynomial((a0, a1, a2, a3 - q0, a4 - q1, a5 - q2), du, dv)
    half = inside.clamp(min=0).sqrt() / area
    if not cuts:
        return 2 * half
    middle = polynomial((0, a1 / 2, a2 / 2, a3, a4, a5), du, dv) * -part["k"] / area
    return cut_spans(part, middle - half, middle + half, u, v, cuts)


def capsule_spans(part, u, v, du, dv, cuts):
    """The length of each ray inside capsules, in units of t: two balls and the cylinder between them."""
    move = part["mu"] * du + part["mv"] * dv
    y1, y2, y3 = part["k"] * move  # the ray in own space: y + t w
    w1, w2, w3 = move + part["wc"]
    flat = y1 * w1 + y2 * w2
    flat_area = w1 * w1 + w2 * w2
    across = y1 * y1 + y2 * y2 - 1
    area = flat_area + w3 * w3
    spans = []  # hit or missed, from where to where
    for z in (y3 - part["length"], y3 + part["length"]):  # the balls
        b = flat + z * w3
        half = (b * b - area * (across + z * z)).clamp(min=0).sqrt()
        spans.append((half > 0, (-b - half) / area, (half - b) / area))
    cross = y1 * w2 - y2 * w1  # the cylinder: a round wall and a slab
    half = (flat_area - cross * cross).clamp(min=0).sqrt()
    slab, reach = -y3 / w3, part["length"] / w3.abs()
    first = torch.maximum((-flat - half) / flat_area, slab - reach)
    last = torch.minimum((half - flat) / flat_area, slab + reach)
    spans.append((last > first, first, last))
    enter = torch.stack([torch.where(hit, first, math.inf) for hit, first, _ in spans]).amin(0)
    leave = torch.stack([torch.where(hit, last, -math.inf) for hit, _, last in spans]).amax(0)
    return cut_spans(part, enter, leave, u, v, cuts)


def cut_spans(part, enter, leave, u, v, cuts):
    """The length, in units of t, of the spans [enter, leave] within the first `cuts` half-spaces n.x <= h."""
    k, depth = part["k"], part["depth"]
    for nu, nv, nw, h in part["cuts"][:cuts]:
        speed = nu * u + (nv * v + nw * SOURCE_DISTANCE)  # n.d
        reach = ((nu * u) * -k + (h - nw * depth - k * (nv * v))) / speed
        leave = torch.minimum(leave, torch.where(speed > 0, reach, math.inf))
        enter = torch.maximum(enter, torch.where(speed > 0, -math.inf, reach))
    return (leave - enter).clamp(min=0)


@contextlib.contextmanager
def one_thread():
    """Run a block on one CPU thread. More threads make many small operations slower, and change the bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def project(heads, size, fine=False):
    """Line integrals through bone, soft tissue and brain, (B, 3, size, size), in cm of full density.
    fine: with sutures and grooves. Parts of a kind and of similar size in the picture are computed together
    as small patches, which are added in an order that depends on the head alone. So the bytes of a head do
    not depend on which other heads are drawn with it."""
    single = lambda x: torch.from_numpy(x.astype(np.float32))
    g = geometry(heads)
    field = np.array([[head.field] for head in heads])
    grid = (np.arange(size) + .5) / size * 2 - 1  # pixel centres
    first, last = boxes(heads, field, size)
    extent = np.where((last > first).all(0) & (fine | ~FINE), (last - first).max(0), 0)  # 0 if unseen

    sums = np.zeros((len(heads), len(FILLS), size, size), np.float32)
    ladder = sorted({min(size, side) for side in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, size)})
    for below, side in zip([0] + ladder, ladder):
        for spans_of, cuts in itertools.product((ellipsoid_spans, capsule_spans), range(3)):
            kind = ((PARTS["length"] > 0) == (spans_of is capsule_spans)) & (CUTS == cuts)
            chosen = np.argwhere((extent > below) & (extent <= side) & kind)  # (n, 2): head and part
            together = max(1, 2 ** 17 // side ** 2)  # what a processor's cache likes
            for start in range(0, len(chosen), together):
                b, k = chosen[start:start + together].T
                row, col = np.minimum(first[:, b, k], size - side)
                u = (field[b] * grid[col[:, None] + np.arange(side)])[:, None, :]
                v = (-field[b] * grid[row[:, None] + np.arange(side)])[:, :, None]
                part = {name: values[..., b, k][..., None, None] for name, values in g.items()}
                rays = [single(x) for x in (u, v, u - part["uc"], v - part["vc"])]
                part = {name: single(values) for name, values in part.items()}
                spans = spans_of(part, *rays, cuts).numpy()
                for span, head, fill, r, c in zip(spans, b, PARTS["fill"][k], row, col):
                    sums[head, fill, r:r + side, c:c + side] += span

    u, v = single(field * grid)[:, None, :], single(-field * grid)[:, :, None]
    slant = (u * u + v * v + SOURCE_DISTANCE ** 2).sqrt()  # |d|: from t to cm
    materials = torch.zeros(len(heads), 3, size, size)
    for fill, weights in enumerate(torch.tensor(list(FILLS.values()))):
        materials += torch.from_numpy(sums[:, fill, None]) * weights.view(3, 1, 1)
    return (materials * slant[:, None]).clamp(min=0)
