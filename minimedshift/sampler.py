"""The ODE dx/dt = v(x, t, y), solved in both directions. A translation is one leg back and one leg forward:

    encode     from the image at t = end down to z at t = tau      dx = v(x, t, y_source) dt,  dt < 0
    decode     from z at t = tau up to the image at t = end        dx = v(x, t, y_target) dt,  dt > 0

(arXiv:2508.21435, eq. 4-5). tau near 1 keeps structure, as little has turned into noise; tau near 0 favours
realism. In the paper end is 1. But near t = 1 the noise that is left, (1 - t) x0, is invisible, while the
velocity x1 - x0 holds x0 in full: the network must guess it. So an image counts as xt at t = end < 1.

A solver is a generator: from a velocity v, a start x and any monotone list of times, it yields every (t, xt),
the start too. The same code runs both ways.
"""

import math

import torch

from minimedshift.flow import direct_label, draw_noise, velocity_and_score
from minimedshift.support.machine import has_bfloat16


class Velocity:
    """v(x, t) for one label y, an int or (B,) int64, with classifier-free guidance of strength w:

        v = v(x, t, null) + w (v(x, t, y) - v(x, t, null))                        arXiv:2207.12598, eq. 6

    w = 1 is no guidance; any other w costs two evaluations, made in one call. colour, generator: for `sde`.
    """

    def __init__(self, model, y, guidance=1.0, colour=0.0, generator=None):
        self.model, self.y, self.guidance = model, y, guidance
        self.colour, self.generator, self.sigma = colour, generator, model.shape.score

    def __call__(self, x, t):
        return self.parts(x, t)[0]

    def parts(self, x, t):
        """The velocity v and s = width(t)^2 / 2 grad log p_t, each like x (B, C, H, W).

        A score head gives s (flow.py). Without one it follows from v, if coupling is independent and sigma 0:
        grad log p_t = -E[x0 | xt] / (1 - t), and E[x0 | xt] = x - t v, for noise counted as white."""
        times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        out = self.evaluate(x, times, torch.as_tensor(self.y, device=x.device).expand(len(x)))
        return velocity_and_score(out, t, self.sigma) if self.sigma else (out, t * out - x)

    def evaluate(self, x, t, y):
        """The network's output for x at t (B,) under y (B,), guided. Float32, made in bfloat16 on CUDA."""
        asked = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=asked or x.is_cuda and has_bfloat16()):
            if self.guidance == 1:
                return self.model(x, t, y).float()
            null = torch.full_like(y, self.model.shape.num_domains)
            both = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        out, null = both.float().chunk(2)
        return null + self.guidance * (out - null)

    def width(self, t):  # sigma(t) of the diffusion: without a score head 0 at the image
        return self.sigma or math.sqrt(2 * (1 - t))

    def noise(self, x):  # like x: white with a score head, else coloured as in training
        return draw_noise(x.shape, self.generator, 0.0 if self.sigma else self.colour, x.device)


# ---------------------------------------------------------------- solvers

def grid(tau, steps, end=1.0, solver="heun"):
    """steps + 1 times from end down to tau: t = end - (end - tau) s^rho, s = 0..1. Reversed: the way up.

    rho = 1.5: denser near the image, where the ODE is stiff. rho = 1 for `sde`: it takes its noise off in the
    last step, which must not be too short. Raises ValueError unless 0 <= tau < end <= 1 and steps >= 1."""
    if not 0 <= tau < end <= 1 or steps < 1:
        raise ValueError(f"grid needs 0 <= tau < end <= 1 and steps >= 1, got {tau = }, {end = }, {steps = }")
    rho = 1.0 if solver == "sde" else 1.5
    return [end - (end - tau) * (i / steps) ** rho for i in range(steps + 1)]


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


def sde(v, x, times):
    """dX = (v + s) dt + sigma dW forward and (v - s) dt + sigma dW backward in time (arXiv:2307.03672):

        x <- x +- h v + h s + sigma sqrt(h r) e        h > 0 the step's length; v a Velocity

    r is the variance that a bridge's noise has left at the far end t' of the step, (1 - t') / (1 - t) forward
    and t' / t backward: 1 up to order h (Euler-Maruyama), but 0 in a step that ends in an image."""
    yield times[0], x
    for t, after in zip(times[:-1], times[1:]):
        h, r = abs(after - t), (1 - after) / (1 - t) if after > t else after / t
        vt, st = v.parts(x, t)
        x = x + (after - t) * vt + h * st + v.width(t) * math.sqrt(h * r) * v.noise(x)
        yield after, x


def adaptive(v, x, times, tolerance=1e-3):
    """Third order; a step is as long as its root mean square error allows (Bogacki & Shampine 1989).

    Of `times` only the ends count. Waits for the device at every step: for measuring (study.py)."""
    t, end = times[0], times[-1]
    h, k1 = (end - t) / 10, v(x, t)
    yield t, x
    while t != end:
        h = min(h, end - t, key=abs)
        k2 = v(x + h / 2 * k1, t + h / 2)
        k3 = v(x + 3 * h / 4 * k2, t + 3 * h / 4)
        after = x + h / 9 * (2 * k1 + 3 * k2 + 4 * k3)
        k4 = v(after, t + h)
        error = (h * (-5 / 72 * k1 + k2 / 12 + k3 / 9 - k4 / 8)).square().mean().sqrt().item() / tolerance
        if error <= 1:
            t, x, k1 = (end if h == end - t else t + h), after, k4
            yield t, x
        h *= min(5, max(0.2, 0.9 * max(error, 1e-9) ** (-1 / 3)))


def reversible(v, pair, times, solver=heun, undo=False, keep=0.999):
    """Any of the solvers made exactly reversible: it carries a pair (y, z), both the image at the start.

        y' = keep y + (1 - keep) z + step(z, t, t')        z' = z - step(y', t', t)        arXiv:2410.11648

    step(x, t, t') is what `solver` adds to x from t to t'. undo=True goes the same `times` from their last to
    their first, back to the start up to rounding, which takes the pair. Yields (t, (y, z))."""
    step = lambda x, t, after: last(solver(v, x, [t, after])) - x
    (y, z), times = pair, times[::-1] if undo else times
    yield times[0], pair
    for t, after in zip(times[:-1], times[1:]):
        if undo:
            z = z + step(y, t, after)
            y = (y - (1 - keep) * z - step(z, after, t)) / keep
        else:
            y = keep * y + (1 - keep) * z + step(z, t, after)
            z = z - step(y, after, t)
        yield after, (y, z)


SOLVERS = {"euler": euler, "heun": heun, "fireflow": fireflow, "sde": sde}


def last(states):
    """The xt a solver ends with."""
    for _, xt in states:
        pass
    return xt


# ---------------------------------------------------------------- from image to image

@torch.inference_mode()
def encode(model, x1, y, tau, steps=3, solver="fireflow", end=0.97, colour=0.0, generator=None):
    """From images x1 (B, C, H, W) at t = end back to z at t = tau, under label y, never guided.

    generator: on x1's device. Raises ValueError as `grid` does."""
    v = Velocity(model, y, 1.0, colour, generator)
    return last(SOLVERS[solver](v, x1, grid(tau, steps, end, solver)))


@torch.inference_mode()
def decode(model, z, y, tau, guidance=1.0, steps=3, solver="fireflow", end=0.97, colour=0.0,
           generator=None):
    """From z (B, C, H, W) at t = tau forward to images at t = end, under label y, guided."""
    v = Velocity(model, y, guidance, colour, generator)
    return last(SOLVERS[solver](v, z, grid(tau, steps, end, solver)[::-1]))


@torch.inference_mode()
def trajectory(model, x1, y_source, y_target, tau=0.3, guidance=1.0, steps=3, solver="fireflow", end=0.97,
               colour=0.0, x0="noise", generator=None):
    """Every (t, xt) of images x1 (B, C, H, W) on their way from y_source to y_target, ints or (B,) int64:
    down to z at tau and up to the translation, not clipped. `steps` are for each leg.
    A network trained with --x0 image goes directly: one leg, t = 0 to 1, whatever tau and end are."""
    solve, z, times = SOLVERS[solver], x1, grid(tau, steps, end, solver)
    if x0 == "image":
        times = grid(0.0, steps, 1.0, solver)
        y_target = direct_label(y_source, y_target, math.isqrt(model.shape.num_domains))
    else:
        *down, (_, z) = solve(Velocity(model, y_source, 1.0, colour, generator), x1, times)
        yield from down
    yield from solve(Velocity(model, y_target, guidance, colour, generator), z, times[::-1])


def translate(model, x1, y_source, y_target, *settings, **how):
    """The translations (B, C, H, W), not clipped: the end of a `trajectory` with the same arguments."""
    return last(trajectory(model, x1, y_source, y_target, *settings, **how))


def evaluations(solver, steps, guidance=1.0, x0="noise"):
    """Network evaluations of one translation: a leg back, never guided, and a leg forward."""
    leg = {"heun": 2 * steps, "fireflow": steps + 1}.get(solver, steps)
    return leg * (x0 == "noise") + leg * (1 if guidance == 1 else 2)
