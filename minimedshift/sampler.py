"""The ODE dx/dt = v(x, t, y), solved in both directions. A translation is one leg back and one leg forward:

    encode     from the image at t = t_image down to z at t = tau      dx = v(x, t, y_source) dt,  dt < 0
    decode     from z at t = tau up to the image at t = t_image        dx = v(x, t, y_target) dt,  dt > 0

(arXiv:2508.21435, eq. 4-5). tau near 1 keeps structure, as little has turned into noise; tau near 0 favours
realism. In the paper t_image is 1. But near t = 1 the noise that is left, (1 - t) x0, is invisible, while the
velocity x1 - x0 holds x0 in full: the network must guess it. So an image counts as xt at t = t_image < 1.

A solver is a generator: from a velocity v, a start x and any monotone list of times, it yields every (t, xt),
the start too. The same code runs both ways."""

import torch

from minimedshift.sizes import carry_to_full_size, shrunk
from minimedshift.support.machine import has_bfloat16


class Velocity:
    """v(x, t) for one label y, an int or (B,) int64, with classifier-free guidance of strength w:

        v = v(x, t, null) + w (v(x, t, y) - v(x, t, null))                        arXiv:2207.12598, eq. 6

    w = 1 is no guidance; any other w costs two evaluations, made in one call. x (B, C, H, W), t a float.
    Returns float32 like x, made in bfloat16 on CUDA."""

    def __init__(self, model, y, guidance=1.0):
        self.model, self.y, self.guidance = model, y, guidance

    def __call__(self, x, t):
        t = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        y = self.y if torch.is_tensor(self.y) else torch.full_like(t, self.y, dtype=torch.int64)
        asked = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=asked or x.is_cuda and has_bfloat16()):
            if self.guidance == 1:
                return self.model(x, t, y).float()
            null = torch.full_like(y, self.model.shape.num_domains)
            both = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        out, null = both.float().chunk(2)
        return null + self.guidance * (out - null)


def grid(tau, steps, t_image=1.0):
    """steps + 1 times from t_image down to tau; reversed they are the way up.

        t = t_image - (t_image - tau) s^1.5,  s = 0..1          denser near the image, where the ODE is stiff

    Raises ValueError unless 0 <= tau < t_image <= 1 and steps >= 1."""
    if not 0 <= tau < t_image <= 1 or steps < 1:
        raise ValueError("grid needs 0 <= tau < t_image <= 1 and steps >= 1, "
                         f"got {tau = }, {t_image = }, {steps = }")
    return [t_image - (t_image - tau) * (i / steps) ** 1.5 for i in range(steps + 1)]


def euler(v, x, times):
    """x <- x + h v(x, t): first order, one evaluation a step."""
    yield times[0], x
    for t, after in zip(times[:-1], times[1:]):
        x = x + (after - t) * v(x, t)
        yield after, x


def heun(v, x, times):
    """x <- x + h/2 (v(x, t) + v(x + h v(x, t), t + h)): second order, two evaluations a step."""
    yield times[0], x
    for t, after in zip(times[:-1], times[1:]):
        h, slope = after - t, v(x, t)
        x = x + h / 2 * (slope + v(x + h * slope, after))
        yield after, x


def fireflow(v, x, times):
    """x <- x + h v(x + h/2 v_before, t + h/2): second order, one evaluation a step, one more at the start.
    v_before is the midpoint velocity of the step before, at first v(x, t) (arXiv:2412.07517)."""
    yield times[0], x
    midpoint = v(x, times[0])
    for t, after in zip(times[:-1], times[1:]):
        h = after - t
        midpoint = v(x + h / 2 * midpoint, t + h / 2)
        x = x + h * midpoint
        yield after, x


SOLVERS = {"euler": euler, "heun": heun, "fireflow": fireflow}


def last(states):
    """The xt that a solver ends with."""
    for _, xt in states:
        pass
    return xt


@torch.inference_mode()
def encode(model, x1, y, tau, steps=3, solver="fireflow", t_image=0.97):
    """From images x1 (B, C, H, W) at t = t_image back to z at t = tau, under label y, never guided.
    Raises ValueError as `grid` does."""
    return last(SOLVERS[solver](Velocity(model, y), x1, grid(tau, steps, t_image)))


@torch.inference_mode()
def decode(model, z, y, tau, guidance=1.0, steps=3, solver="fireflow", t_image=0.97):
    """From z (B, C, H, W) at t = tau forward to images at t = t_image, under label y, guided."""
    return last(SOLVERS[solver](Velocity(model, y, guidance), z, grid(tau, steps, t_image)[::-1]))


@torch.inference_mode()
def trajectory(model, x1, y_source, y_target, tau=0.3, guidance=1.0, steps=3, solver="fireflow",
               t_image=0.97):
    """Every (t, xt) of images x1 (B, C, H, W) on their way down to z at tau and up to the translation.
    y_source, y_target: ints or (B,) int64. steps: of each leg. The last xt is the translation."""
    times = grid(tau, steps, t_image)
    *down, (_, z) = SOLVERS[solver](Velocity(model, y_source), x1, times)
    yield from down
    yield from SOLVERS[solver](Velocity(model, y_target, guidance), z, times[::-1])


def translate(model, x1, y_source, y_target, *settings, size=None, **how):
    """The translations (B, C, H, W), not clipped: the end of a `trajectory` with the same arguments.
    size: copies with this shorter side are translated, and the change is carried to x1 (sizes.py)."""
    small = shrunk(x1, size, model.stride) if size else x1
    return carry_to_full_size(x1, small, last(trajectory(model, small, y_source, y_target, *settings, **how)))


def evaluations(solver, steps, guidance=1.0):
    """Network evaluations of one translation: a leg back, never guided, and a leg forward."""
    leg = {"euler": steps, "heun": 2 * steps, "fireflow": steps + 1}[solver]
    return leg + leg * (1 if guidance == 1 else 2)
