"""How weights are trained: Muon, an optimizer, and EMA, their running mean, with which images are translated.

Muon is momentum whose update has all its singular values made equal, for the weights of convolutions.

    M <- momentum M + (1 - momentum) G          the usual running mean of the gradient G
    W <- W - lr sqrt(max(1, rows / columns)) U V^T          U S V^T the SVD of M as a matrix (out, in x 3 x 3)

A gradient's few large singular values would drown the many small ones. Here each direction moves alike.
U V^T comes from five Newton-Schulz steps, which are matrix products only. (github.com/KellerJordan/Muon)"""

import copy

import torch


def orthogonalise(matrices, rounds=5):
    """About U V^T of each matrix (R, C) of a list: singular values between .7 and 1.2.
    Newton-Schulz is x <- p(s) x with s = x x^T, p(s) = a + b s + c s^2. All factors are polynomials in the
    small s and commute, so s <- p^2 s, q <- p q, and only the last product q x is as large as x."""
    turned = [m.mT if m.shape[0] > m.shape[1] else m for m in matrices]  # at least as wide as high
    done = list(turned)
    for side in {len(x) for x in turned}:
        which = [i for i, x in enumerate(turned) if len(x) == side]
        s = torch.stack([turned[i] @ turned[i].mT for i in which])  # (N, R, R)
        square = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-14  # of the norm of x
        s = s / square
        a = 3.4445 * torch.eye(side, device=s.device)
        for i in range(rounds):
            if i:
                s = p @ p @ s
            p = torch.baddbmm(torch.add(a, s, alpha=-4.7750), s, s, alpha=2.0315)
            q = p @ q if i else p
        for i, factor in zip(which, q * square.rsqrt()):
            done[i] = factor @ turned[i]
    return [u.mT if m.shape[0] > m.shape[1] else u for u, m in zip(done, matrices)]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for weights of convolutions (out, in, h, w)."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            some = [p for p in group["params"] if p.grad is not None]
            for p in some:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
            grads = [p.grad for p in some]
            means = [self.state[p]["mean"] for p in some]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov
            m = [z.permute(0, 2, 3, 1).flatten(1) for z in ahead]  # no copy of channels-last memory
            torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
            for p, u in zip(some, orthogonalise(m)):
                u = u.unflatten(1, (*p.shape[2:], p.shape[1])).permute(0, 3, 1, 2)  # (out, in, h, w) again
                scale = max(1, p.shape[0] / p[0].numel()) ** 0.5
                p.add_(u, alpha=-group["lr"] * scale)


def split(model):
    """The weights Muon is for (convolutions, without a network's first and last layer), and the rest."""
    ends = ("stem.", "out.", "enter.", "leave.")
    inside = [p for name, p in model.named_parameters() if p.ndim == 4 and not name.startswith(ends)]
    chosen = set(map(id, inside))
    return inside, [p for p in model.parameters() if id(p) not in chosen]


class EMA:
    """Running mean of a model's parameters (no buffers), over a constant share of the run so far:

        ema <- beta ema + (1 - beta) theta,    beta = (1 - 1 / step)^(gamma + 1)     arXiv:2312.02696, eq. 127

    At step 1 beta is 0. gamma 6.94 averages over about the last tenth of the steps, 16.97 over a twentieth.
    `model` is a copy of the model in eval mode, which holds the mean; make it before compiling."""

    def __init__(self, model, gamma=6.94):
        self.gamma, self.live = gamma, list(model.parameters())
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, step):
        """Call after optimizer step number `step` = 1, 2, ..."""
        keep = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(list(self.model.parameters()), self.live, 1 - keep)
