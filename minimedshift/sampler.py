"""The ODE dx/dt = v(x, t, y), solved in both directions; translation is one leg back and one leg forward.

    encode     dx = v(x, t, y_source) dt     t from the image down to z at tau: dt < 0
    decode     dx = v(x, t, y_target) dt     t from z up to the translated image        arXiv:2508.21435, eq. 4-5

In the paper an image is xt at t = 1. Here it may count as xt a little earlier, at t = end: both legs lie in [tau, end]. What happens
beyond is a stiff layer in which detail fainter than (1 - end) x0 is blown up into full-sized noise, and the network's errors with it.
With end < 1 such detail passes as it is; what that is worth is measured in the README.

A diffusion has the same images at every t (`sde`): it forgets on the way what the ODE carries along.
Solvers are generators that yield every (t, xt), so that any caller can draw the trajectory; the same code runs both ways.
"""

import math

import torch

from minimedshift.flow import direct_label, draw_noise, velocity_and_score
from minimedshift.support.machine import has_bfloat16


class Velocity:
    """v(x, t) for one label, guided if asked, with its network evaluations counted in `.evaluations`.

        v = v(x, t, null) + w (v(x, t, y) - v(x, t, null))       classifier-free guidance, arXiv:2207.12598, eq. 6

    y int or (B,) int64; w = 1 is no guidance and costs one evaluation instead of two, which are made in one call. colour and generator are for `sde`.
    """

    def __init__(self, model, y, guidance=1.0, colour=0.0, generator=None):
        self.model, self.y, self.guidance, self.evaluations = model, y, guidance, 0
        self.colour, self.generator, self.sigma = colour, generator, model.shape.score

    def __call__(self, x, t):
        return self.parts(x, t)[0]

    def parts(self, x, t):
        """The velocity v and s = width(t)^2 / 2 times the score grad log p_t, like x.

        A score head gives s (flow.py). Without one it follows from v, under independent coupling and sigma = 0 alone: the score is
        -E[x0 | xt] / (1 - t), and E[x0 | xt] = x - t v (for coloured noise, score and width are those in which it is white).
        """
        time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        y = self.y if torch.is_tensor(self.y) else torch.full((len(x),), self.y, device=x.device)
        out = self.evaluate(x, time, y)
        return velocity_and_score(out, t, self.sigma) if self.sigma else (out, t * out - x)

    def width(self, t):
        """The sigma(t) of the diffusion: the bridge's own with a score head, else sqrt(2 (1 - t)), which vanishes at the image."""
        return self.sigma or math.sqrt(2 * (1 - t))

    def noise(self, x):
        """Fresh noise like x (B, C, H, W): white with a score head, else coloured as in training."""
        return draw_noise(x.shape, self.generator, 0.0 if self.sigma else self.colour, x.device)

    def evaluate(self, x, t, y):
        """What the network says of x at t (B,) under y (B,), guided: in bfloat16 on CUDA, as in training, or inside the caller's
        torch.autocast; the solver computes in float32."""
        asked = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=asked or x.is_cuda and has_bfloat16()):
            if self.guidance == 1:
                self.evaluations += 1
                return self.model(x, t, y).float()
            self.evaluations += 2
            null = torch.full_like(y, self.model.shape.num_domains)
            out, null = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).float().chunk(2)
        return null + self.guidance * (out - null)


def grid(tau, steps, end=1.0, solver="heun"):
    """steps + 1 times from end down to tau: t = end - (end - tau) s^rho, s = 0..1. Turn it around for the way up. For an ODE they are denser
    near the image, where the velocity is stiff (rho = 1.5); a diffusion takes its noise off in its last step, which must not be too short (1).
    Raises ValueError unless 0 <= tau < end <= 1 and steps >= 1."""
    rho = 1.0 if solver == "sde" else 1.5
    if not 0 <= tau < end <= 1 or steps < 1:
        raise ValueError(f"the grid needs 0 <= tau < end <= 1 and steps >= 1, got tau = {tau}, end = {end} and steps = {steps}")
    return [end - (end - tau) * (i / steps) ** rho for i in range(steps + 1)]


def euler(v, x, times):
    """x <- x + h v(x, t): first order, one evaluation a step. times: any monotone list. Yields (t, xt), the start too."""
    yield times[0], x
    for t, after in zip(times[:-1], times[1:]):
        x = x + (after - t) * v(x, t)
        yield after, x


def heun(v, x, times):
    """x <- x + h/2 (v(x, t) + v(x + h v(x, t), t + h)): second order, two evaluations a step. Yields (t, xt)."""
    yield times[0], x
    for t, after in zip(times[:-1], times[1:]):
        h, slope = after - t, v(x, t)
        x = x + h / 2 * (slope + v(x + h * slope, after))
        yield after, x


def fireflow(v, x, times):
    """x <- x + h v(x + h/2 v_before, t + h/2): second order, one evaluation a step, one more at the start.

    v_before is the midpoint velocity of the step before, in the first step v(x, t) (arXiv:2412.07517). It is
    dropped after a leg: under another label or the other way it is no good guess. Yields (t, xt)."""
    yield times[0], x
    midpoint = v(x, times[0])
    for t, after in zip(times[:-1], times[1:]):
        h = after - t
        midpoint = v(x + h / 2 * midpoint, t + h / 2)
        x = x + h * midpoint
        yield after, x


def sde(v, x, times):
    """dX = (v + s) dt + sigma dW forward and dX = (v - s) dt + sigma dW backward in time (arXiv:2307.03672): with h the step's length,
    both are  x <- x +- h v + h s + sigma sqrt(h r) e.  r is what a bridge's noise has left of its variance at the step's far end, (1 - t') / (1 - t)
    forward, t' / t backward: 1 up to order h (Euler-Maruyama), but none in a step that ends in an image. v: a Velocity. Yields (t, xt)."""
    yield times[0], x
    for t, after in zip(times[:-1], times[1:]):
        h, r = abs(after - t), (1 - after) / (1 - t) if after > t else after / t
        vt, st = v.parts(x, t)
        x = x + (after - t) * vt + h * st + v.width(t) * math.sqrt(h * r) * v.noise(x)
        yield after, x


def adaptive(v, x, times, tolerance=1e-3):
    """Third order, with steps as long as the root mean square of each step's error stays under `tolerance` (Bogacki & Shampine 1989).
    Of `times` only the first and the last count. Waits for the device at every step: for measuring (study.py). Yields (t, xt)."""
    t, end, k1 = times[0], times[-1], v(x, times[0])
    h = (end - t) / 10
    yield t, x
    while t != end:
        h = h if abs(h) < abs(end - t) else end - t
        k2 = v(x + h / 2 * k1, t + h / 2)
        k3 = v(x + 3 * h / 4 * k2, t + 3 * h / 4)
        after = x + h / 9 * (2 * k1 + 3 * k2 + 4 * k3)
        k4 = v(after, t + h)
        error = (h * (-5 / 72 * k1 + k2 / 12 + k3 / 9 - k4 / 8)).square().mean().sqrt().item() / tolerance
        if error <= 1:
            t, x, k1 = (end if h == end - t else t + h), after, k4
            yield t, x
        h *= min(5, max(0.2, 0.9 * max(error, 1e-9) ** (-1 / 3)))


SOLVERS = {"euler": euler, "heun": heun, "fireflow": fireflow, "sde": sde}
# network evaluations of a leg of n steps, without guidance
EVALUATIONS = {"euler": lambda n: n, "heun": lambda n: 2 * n, "fireflow": lambda n: n + 1,
               "sde": lambda n: n}


def last(trajectory):
    """The xt a solver ends with."""
    for _, xt in trajectory:
        pass
    return xt


def reversible(v, pair, times, solver=heun, undo=False, keep=0.999):
    """Any explicit solver made exactly reversible: it carries a pair (y, z), both the image at the start.

        y' = keep y + (1 - keep) z + step(z, t, t')        z' = z - step(y', t', t)        arXiv:2410.11648

    step(x, t, t') is what `solver` adds to x from t to t'. It keeps the order and doubles the evaluations.
    undo=True goes the same `times` from their last to their first and ends, up to rounding, where they began.
    From one image alone it does not: how y and z differ is lost. Yields (t, (y, z)).
    """
    step = lambda x, t, after: last(solver(v, x, [t, after])) - x
    y, z = pair
    yield (times[-1] if undo else times[0]), pair
    if undo:
        times = times[::-1]
    for t, after in zip(times[:-1], times[1:]):
        if undo:
            z = z + step(y, t, after)
            y = (y - (1 - keep) * z - step(z, after, t)) / keep
        else:
            y = keep * y + (1 - keep) * z + step(z, t, after)
            z = z - step(y, after, t)
        yield after, (y, z)


@torch.inference_mode()
def encode(model, x1, y, tau=0.0, steps=3, solver="fireflow", end=0.97, colour=0.0, generator=None):
    """From the image x1 (B, C, H, W) at t = end back to z at t = tau under label y: (B, C, H, W). Never guided. colour (as in
    training) and generator (on x1's device) are for the solver "sde". Raises ValueError as `grid` does, KeyError for an unknown solver."""
    return last(SOLVERS[solver](Velocity(model, y, 1.0, colour, generator), x1, grid(tau, steps, end, solver)))


@torch.inference_mode()
def decode(model, z, y, tau=0.0, guidance=1.0, steps=3, solver="fireflow", end=0.97, colour=0.0, generator=None):
    """From z (B, C, H, W) at t = tau forward to the image at t = end under label y, guided: (B, C, H, W)."""
    return last(SOLVERS[solver](Velocity(model, y, guidance, colour, generator), z, grid(tau, steps, end, solver)[::-1]))


@torch.inference_mode()
def trajectory(model, x1, y_source, y_target, tau=0.3, guidance=1.0, steps=3, solver="fireflow", end=0.97,
               colour=0.0, x0="noise", generator=None):
    """Carry images x1 (B, C, H, W) in [-1, 1] from domain y_source to y_target (ints or (B,)): yields every
    (t, xt) from x1 at t = end down to z at tau and up to the translation at t = end, not clipped. tau near 1
    keeps structure, tau near 0 favours realism. `steps` are for each leg. Raises what `encode` raises.

    A network trained with --x0 image goes from domain to domain directly: one leg, t = 0 to 1, whatever tau.
    """
    solve, xt = SOLVERS[solver], x1
    if x0 == "image":
        y_target = direct_label(y_source, y_target, math.isqrt(model.shape.num_domains))
        times = grid(0.0, steps, 1.0, solver)
    else:
        times = grid(tau, steps, end, solver)
        for t, xt in solve(Velocity(model, y_source, 1.0, colour, generator), x1, times):
            if t != times[-1]:  # z is where the next leg starts
                yield t, xt
    yield from solve(Velocity(model, y_target, guidance, colour, generator), xt, times[::-1])


def translate(model, x1, y_source, y_target, *settings, **how):
    """The translations (B, C, H, W), not clipped: the end of a `trajectory` with the same arguments."""
    return last(trajectory(model, x1, y_source, y_target, *settings, **how))
