"""The ODE dx/dt = v(x, t, y), solved in both directions; translation is one leg back and one leg forward.

    encode     dx = -v(x, t, y_source) dt     from the image down to z at t = tau
    decode     dx =  v(x, t, y_target) dt     from z up to the translated image        arXiv:2508.21435, eq. 4-5

In the paper an image is xt at t = 1. Here it may count as xt a little earlier, at t = end: both legs lie in [tau, end]. What happens
beyond is a stiff layer in which detail fainter than (1 - end) x0 is blown up into full-sized noise, and the network's errors with it.
With end < 1 such detail passes as it is; what that is worth is measured in the README.

Solvers are generators that yield every (t, xt), so that any caller can draw the trajectory; the same code runs both ways.
"""

import torch


class Velocity:
    """v(x, t) for one label, guided if asked, with its network evaluations counted in `.evaluations`.

        v = v(x, t, null) + w (v(x, t, y) - v(x, t, null))       classifier-free guidance, arXiv:2207.12598, eq. 6

    y int or (B,) int64; w = 1 is no guidance and costs one evaluation instead of two.
    """

    def __init__(self, model, y, guidance=1.0):
        self.model, self.y, self.guidance, self.evaluations = model, y, guidance, 0

    def __call__(self, x, t):
        t = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        y = torch.as_tensor(self.y, device=x.device).expand(len(x))
        vt = self.evaluate(x, t, y)
        if self.guidance != 1:
            null = self.evaluate(x, t, torch.full_like(y, self.model.shape.num_domains))
            vt = null + self.guidance * (vt - null)
        return vt

    def evaluate(self, x, t, y):
        self.evaluations += 1
        return self.model(x, t, y).float()


def grid(tau, steps, end=1.0, rho=1.5):
    """steps + 1 times from end down to tau, denser near the image, where the velocity is stiff: t = end - (end - tau) s^rho,
    s = 0..1. Turn it around for the way up. Raises ValueError unless 0 <= tau < end <= 1 and steps >= 1."""
    if not 0 <= tau < end <= 1 or steps < 1:
        raise ValueError(f"the grid needs 0 <= tau < end <= 1 and steps >= 1, got tau = {tau}, end = {end} and steps = {steps}")
    return [end - (end - tau) * (i / steps) ** rho for i in range(steps + 1)]


def euler(v, x, times):
    """x <- x + h v(x, t): first order, one evaluation a step. times: any monotone list. Yields (t, xt), the start too."""
    yield times[0], x
    for t, s in zip(times[:-1], times[1:]):
        x = x + (s - t) * v(x, t)
        yield s, x


def heun(v, x, times):
    """x <- x + h/2 (v(x, t) + v(x + h v(x, t), t + h)): second order, two evaluations a step. Yields (t, xt)."""
    yield times[0], x
    for t, s in zip(times[:-1], times[1:]):
        slope = v(x, t)
        x = x + (s - t) / 2 * (slope + v(x + (s - t) * slope, s))
        yield s, x


SOLVERS = {"euler": euler, "heun": heun}


def last(trajectory):
    """The xt a solver ends with."""
    for _, xt in trajectory:
        pass
    return xt


@torch.inference_mode()
def encode(model, x1, y, tau=0.0, steps=5, solver="heun", end=0.97):
    """From the image x1 (B, C, H, W) at t = end back to z at t = tau under label y: (B, C, H, W). Never guided.
    Raises ValueError as `grid` does, KeyError for an unknown solver."""
    return last(SOLVERS[solver](Velocity(model, y), x1, grid(tau, steps, end)))


@torch.inference_mode()
def decode(model, z, y, tau=0.0, guidance=1.0, steps=5, solver="heun", end=0.97):
    """From z (B, C, H, W) at t = tau forward to the image at t = end under label y, guided: (B, C, H, W)."""
    return last(SOLVERS[solver](Velocity(model, y, guidance), z, grid(tau, steps, end)[::-1]))


def translate(model, x1, y_source, y_target, tau=0.4, guidance=1.0, steps=5, solver="heun", end=0.97):
    """Carry images x1 (B, C, H, W) in [-1, 1] from domain y_source to y_target (ints or (B,)). tau near 1 keeps structure,
    tau near 0 favours realism. `steps` are for each leg. Returns (B, C, H, W), not clipped. Raises what `encode` raises."""
    return decode(model, encode(model, x1, y_source, tau, steps, solver, end), y_target, tau, guidance, steps, solver, end)
